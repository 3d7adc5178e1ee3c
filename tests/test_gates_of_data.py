"""The gates of the data over many nights: a clean log with growth and noise is never refused, and each way to spoil it
is refused by the gate that is meant for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist import cli
from ncf_dist.config import Config, Gates, load_config
from ncf_dist.config.gates import DATA_GATES
from ncf_dist.errors import ConfigError, GateRefused
from ncf_dist.nightly import pipeline as line
from ncf_dist.publish import data, measures
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.measures import MEASURES, Check, judge, learned, psi
from ncf_dist.publish.past import Measured, before, good_nights
from ncf_dist.publish.past import Night as Good
from ncf_dist.publish.pipeline import publish
from ncf_dist.stage import Outcome
from tests.published import Night
from tests.simulated import WINDOW, Rows, a_log, joined, manifest, night

values = st.floats(-1e6, 1e6)

# ---- one measure -------------------------------------------------------------------------------------------


@given(st.lists(values, min_size=3, max_size=9), st.floats(0.1, 10), st.sampled_from(sorted(MEASURES)))
def test_a_night_like_the_good_ones_passes(good: list[float], spread: float, gate: str) -> None:
    measure = MEASURES[gate]
    low, high = learned(measure, good, spread)
    median = float(np.median(good))
    assert low <= median <= high
    assert judge(gate, "learned", median, good, spread, "run").outcome == "passed"
    assert high - median >= measure.slack + measure.share * abs(median) - 1e-6 * (1 + abs(median))
    wider = learned(measure, good, spread * 2)
    assert wider[0] <= low
    assert high <= wider[1]


@given(st.lists(st.floats(90, 110), min_size=5, max_size=9), st.floats(-1e9, 1e9))
def test_one_odd_night_moves_no_learned_bound_far(good: list[float], odd: float) -> None:
    """The median and the MAD of five or more values stay within the others' range."""
    low, high = learned(MEASURES["volume"], [*good, odd], 6.0)
    widest = 6 * measures.NORMAL * 20 + 0.25 * 110
    assert 90 - widest <= low
    assert high <= 110 + widest


@pytest.mark.parametrize(
    ("gate", "setting", "value", "good", "outcome"),
    [
        ("volume", "learned", 10.0, [100.0, 100.0], "unknown"),
        ("volume", "learned", 10.0, [100.0, 100.0, 100.0], "refused"),
        ("volume", (0.8, 1.5), 79.0, [100.0], "refused"),
        ("volume", (0.8, 1.5), 80.0, [100.0], "passed"),
        ("volume", (0.8, 1.5), 151.0, [100.0], "refused"),
        ("volume", (0.8, 1.5), 80.0, [], "unknown"),
        ("volume", None, 1.0, [100.0] * 7, "off"),
        ("quarantine", 0.1, 0.11, [], "refused"),
        ("quarantine", 0.1, 0.1, [], "passed"),
        ("quarantine", 0.1, None, [], "unknown"),
    ],
)
def test_bounds(gate: str, setting: Any, value: float | None, good: list[float], outcome: str) -> None:
    check = judge(gate, setting, value, good, 6.0, "prepare run p1")
    assert check.outcome == outcome
    assert bool(check.message) == (outcome == "refused")


def test_a_refusal_says_value_bound_run_and_where_to_look() -> None:
    said = judge("volume", "learned", 2499.0, [29040.0, 29000.0, 29100.0], 6.0, "prepare run p9").message
    assert said == (
        "2,499 interactions that prepare kept (prepare run p9); needed at least 21,780 (gates.volume = learned, from 3 "
        "good nights with a median of 29,040): look at whether the log is complete, or is there twice"
    )


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 500), min_size=2), st.integers(2, 9))
def test_what_grows_alike_does_not_drift(then: dict[str, int], times: int) -> None:
    assert psi({name: count * times for name, count in then.items()}, then) == pytest.approx(0, abs=0.02)


def test_drift_by_hand_and_by_chance() -> None:
    """(0.9 − 0.5) ln(0.9 / 0.5) + (0.1 − 0.5) ln(0.1 / 0.5); samples of one distribution drift by about nothing."""
    wanted = 0.4 * np.log(0.9 / 0.5) - 0.4 * np.log(0.1 / 0.5)
    assert psi({"a": 900_000, "b": 100_000}, {"a": 500_000, "b": 500_000}) == pytest.approx(wanted, rel=1e-3)
    assert psi({}, {"a": 1}) is None
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.ones(64))
    drifts = []
    for _ in range(200):
        now, then = ({str(i): int(n) for i, n in enumerate(rng.multinomial(400, shares))} for _ in range(2))
        drifts.append(psi(now, then))
    assert max(found for found in drifts if found is not None) < 0.25


# ---- many nights -------------------------------------------------------------------------------------------


def as_it_is(rows: Rows) -> Rows:
    return rows


class Nights:
    """Nights of one log, each judged against those before it that passed."""

    def __init__(self, seed: int, days: int) -> None:
        self.log, self.good = a_log(seed, days), list[Good]()
        self.last: Rows | None = None
        self.known: set[int] = set()

    def judge(self, day: int, change: Callable[[Rows], Rows] = as_it_is) -> list[Check]:
        """The checks that refuse the night; where none does, it is the next one's measure."""
        rows = night(self.log, day, change)
        prepared = manifest(rows, day, self.last, self.known)
        checks, measured = data.judge(Gates(), prepared, self.good[:7])
        refused = [check for check in checks if check.outcome == "refused"]
        if not refused:
            self.good.insert(0, Good(str(day), measured))
            self.last = rows
            self.known |= set(rows.user.tolist())
        return refused


@pytest.mark.parametrize("seed", range(3))
def test_thirty_clean_nights_with_growth_and_noise_are_never_refused(seed: int) -> None:
    nights = Nights(seed, WINDOW + 30)
    assert [nights.judge(day) for day in range(WINDOW, WINDOW + 30)] == [[]] * 30


def cut(rows: Rows) -> Rows:
    return rows.where(np.arange(len(rows)) < len(rows) // 3)


def stopped(rows: Rows) -> Rows:
    return rows.where(rows.day < rows.day.max() - 4)


def one_source_missing(rows: Rows) -> Rows:
    return rows.where(rows.item % 5 > 1)


def other_users(rows: Rows) -> Rows:
    return replace(rows, user=rows.user + 10**7)


def some_other_users(rows: Rows) -> Rows:
    return replace(rows, user=np.where(rows.user % 4 == 0, rows.user + 10**7, rows.user))


def twice_under_other_names(rows: Rows) -> Rows:
    return joined([rows, replace(other_users(rows), bad=0)])


DEFECTS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "the log is cut": (cut, "volume"),
    "the log is there twice": (twice_under_other_names, "volume"),
    "users' ids changed their form": (other_users, "new_users"),
    "a quarter of the users changed their form": (some_other_users, "new_users"),
    "a column moved, and rows go to the quarantine": (lambda rows: replace(rows, bad=len(rows) // 20), "quarantine"),
    "the log stopped": (stopped, "age"),
    "ratings are out of ten": (lambda rows: replace(rows, rating=rows.rating * 2), "rating_drift"),
    "ratings are all 5": (lambda rows: replace(rows, rating=np.full(len(rows), 5.0)), "rating_drift"),
    "ratings are turned around": (lambda rows: replace(rows, rating=6 - rows.rating), "rating_drift"),
    "the item map is off by one": (lambda rows: replace(rows, item=rows.item + 1), "item_drift"),
    "two of five sources are missing": (one_source_missing, "vanished"),
    "users were deleted": (lambda rows: rows.where(rows.user % 3 > 0), "vanished"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_refused_by_the_gate_that_is_meant_for_it(name: str) -> None:
    change, gate = DEFECTS[name]
    nights = Nights(7, WINDOW + 12)
    for day in range(WINDOW, WINDOW + 10):
        assert nights.judge(day) == []
    refused = nights.judge(WINDOW + 10, change)
    assert gate in [check.gate for check in refused]
    assert all("; needed " in check.message and f"(gates.{check.gate} = " in check.message for check in refused)
    assert nights.judge(WINDOW + 10) == [], "the night is good once the log is"


# ---- a night of the line -----------------------------------------------------------------------------------


PROFILE: dict[str, Any] = {
    "new_users_a_day": 0.0,
    "quarantine": 0.0,
    "age_days": 1.0,
    "vanished": 0.0,
    "ratings": {"15": 9_000},
    "items": {"0": 4_500, "1": 4_500},
}


def published(root: Path, days: int, last: dict[str, Any] | None = None, **config: Any) -> Night:
    """`days` nights are published; the last one is only ready to be, and has other facts (`last`)."""
    for day in range(1, days + 2):
        night = Night(root, f"2026-01-{day:02}")
        night.sections = {"gates": config}
        night.prepare(profile={**PROFILE, **((last or {}) if day == days + 1 else {})})
        night.score()
        if day <= days:
            night.publish()
    return night


def test_numbers_of_many_digits_come_back_from_a_commit(tmp_path: Path) -> None:
    """delta-rs reads some floats back with another last digit, and then the commit would look damaged."""
    rng = np.random.default_rng(3)
    numbers = {f"n{at}": float(value) for at, value in enumerate(rng.random(500))}
    night = Night(tmp_path)
    night.prepare()
    night.score()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measured, "stored", lambda self: real(Measured(numbers, {"1": 2}, {"3": 4})))
        assert night.publish() == ("done", 0)
    (found,) = good_nights(DeltaLog(str(night.table)), "2027-01-01", 7)
    assert found.measured == Measured(numbers, {"1": 2}, {"3": 4})


real = Measured.stored


def test_what_was_measured_is_in_the_commits_and_outlives_the_runs(tmp_path: Path) -> None:
    night = published(tmp_path, 4)
    log = DeltaLog(str(night.table))
    found = good_nights(log, night.ds, 3)
    assert [each.ds for each in found] == ["2026-01-04", "2026-01-03", "2026-01-02"]
    assert found[0].measured.numbers == {
        "volume": 9.0, "new_users": 0.0, "quarantine": 0.0, "age": 1.0, "vanished": 0.0, "rating_drift": 0.0,
        "item_drift": 0.0, "coverage": 1.0, "filled": 1.0, "fallback": 0.0, "churn": 0.0,
    }  # fmt: skip
    assert found[0].measured.items == PROFILE["items"]
    assert good_nights(log, "2026-01-01", 3) == []


@pytest.mark.parametrize(
    ("fact", "value", "gate"),
    [
        ("age_days", 9.0, "age"),
        ("quarantine", 0.5, "quarantine"),
        ("vanished", 0.4, "vanished"),
        ("new_users_a_day", 400.0, "new_users"),
        ("ratings", {"22": 9_000}, "rating_drift"),
        ("items", {"0": 8_900, "1": 100}, "item_drift"),
    ],
)
def test_bad_data_is_refused_by_publish_and_right_after_prepare(
    tmp_path: Path, fact: str, value: Any, gate: str
) -> None:
    night = published(tmp_path, 4, {fact: value})
    prepared = night.lake.stage(night.ds, "prepare").newest()
    for judged, run in ((lambda: publish(night.config, night.ds), "s1"), (lambda: check(night, prepared), "p1")):
        with pytest.raises(GateRefused, match=f"what is published stays: {gate}: .*gates.{gate} = ") as caught:
            judged()
        assert caught.value.extra["refused"] == [gate]
        assert f"set gates.{gate}=null, or, for this night only, add --override {gate} --why TEXT" in str(caught.value)
        kept = json.loads(Path(night.lake.root, "runs", night.ds, "gates", f"{run}.json").read_text())
        assert (kept["run_key"], kept["blessed"], list(kept["refused"])) == (run, False, [gate])
        assert kept["gates"][gate]["outcome"] == "refused"


def check(night: Night, prepared: Any) -> None:
    data.check(night.config, night.ds, prepared)


def test_a_night_that_is_published_is_not_held_to_later_bounds(tmp_path: Path) -> None:
    night = published(tmp_path, 4, {"age_days": 9.0}, age=None)
    assert night.publish() == ("done", 4)
    night.sections["gates"] = {}
    config = night.configured()
    prepared = night.lake.stage(night.ds, "prepare").newest()
    data.check(config, night.ds, prepared)
    with pytest.raises(GateRefused, match="age: "):
        data.check(config, night.ds, replace(prepared, run_key="another"))


def test_nightly_trains_nothing_on_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = published(tmp_path, 4, {"age_days": 9.0})
    begun: list[str] = []

    def stage(name: str) -> Any:
        def run(config: Config, ds: str, given: Any = None) -> Outcome:
            begun.append(name)
            made = night.lake.stage(ds, name)
            return Outcome("done", name, manifest=made.newest() if name == "prepare" else None)

        return run

    monkeypatch.setattr(line, "STAGES", {name: stage(name) for name in line.STAGES})
    with pytest.raises(GateRefused, match="age: ") as caught:
        line.nightly(night.config, night.ds)
    assert begun == ["prepare"]
    assert caught.value.extra["stages"] == {"prepare": "done", "publish": "refused"}
    named = night.config.model_copy(update={"run": "trial"})
    assert line.nightly(named, night.ds).status == "done", "an experiment is not published, so nothing judges its data"


# ---- in spite of a gate ------------------------------------------------------------------------------------


def test_an_override_is_in_the_commit_and_makes_the_night_the_measure(tmp_path: Path) -> None:
    night = published(tmp_path, 4, {"age_days": 9.0}, overrides={"age": "the shop was closed", "vanished": "no"})
    outcome = publish(night.config, night.ds)
    assert outcome.extra["gates"]["age"]["outcome"] == "overridden"
    said = [text for text in outcome.extra["warnings"] if not text.startswith("beats_popularity")]
    assert [text.partition(":")[0] for text in said] == ["age", "--override vanished was not needed"]
    assert said[0].endswith("overridden: the shop was closed")
    after = good_nights(DeltaLog(str(night.table)), "2026-02-01", 7)
    assert after[0].overrides == {"age": "the shop was closed"}
    assert before(after, "age") == [9.0]
    assert before(after, "volume") == [9.0] * 5
    blessing = json.loads(Path(night.lake.root, "runs", night.ds, "gates", "s1.json").read_text())
    assert blessing["blessed"]
    assert blessing["overridden"] == {"age": "the shop was closed"}


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans()), max_size=7))
def test_nights_before_an_override_are_no_measure(nights: list[tuple[float, bool]]) -> None:
    good = [Good("", Measured({"age": value}), {"age": "why"} if why else {}) for value, why in nights]
    stop = next((at + 1 for at, (_, why) in enumerate(nights) if why), len(nights))
    assert before(good, "age") == [value for value, _ in nights[:stop]]


def test_a_night_without_rows_is_published_by_no_override(tmp_path: Path) -> None:
    night = published(tmp_path, 1)
    night.score([], key="s2", cuts=(), active_since="2026-02-01", users=0)
    with pytest.raises(GateRefused, match="rows: ") as caught:
        night.publish()
    assert "--override" not in str(caught.value)


def test_the_command_says_why(tmp_path: Path) -> None:
    parse = cli.parser("publish").parse_args
    given = ["--config", "x", "--override", "age", "--why", "it's: fine", "--override", "undone", "--why", "b"]
    (made,) = cli.overrides(parse(given))
    path = tmp_path / "conf.yaml"
    path.write_text("paths: {lake: l, work: w}\ninput: {path: x}\n")
    assert load_config(path, [made]).gates.overrides == {"age": "it's: fine", "undone": "b"}
    with pytest.raises(ConfigError, match="1 --override and 0 --why; needed one --why TEXT for each"):
        cli.overrides(parse(["--config", "x", "--override", "age"]))
    for bad, match in (('{"rows": "x"}', "--override is rows; needed one of users"), ('{"age": " "}', "is empty")):
        with pytest.raises(ConfigError, match=match):
            load_config(path, [f"gates.overrides={bad}"])


@pytest.mark.parametrize("gate", DATA_GATES)
def test_each_gate_can_be_off(gate: str) -> None:
    for off in (None, False):
        gates = Gates.model_validate({gate: off})
        checks, _ = data.judge(gates, manifest(Nights(1, 3).log[0], 1, None, set()), [])
        assert [check.outcome == "off" for check in checks] == [name == gate for name in DATA_GATES]
