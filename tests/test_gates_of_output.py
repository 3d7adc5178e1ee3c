"""The gates of the output, and the canary: what they measure by hand, and what each refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist import contracts, spark_io
from ncf_dist.config import Gates
from ncf_dist.config.gates import OUTPUT_GATES
from ncf_dist.errors import GateRefused
from ncf_dist.publish import canary as readers
from ncf_dist.publish import pipeline
from ncf_dist.publish.audit import Audit
from ncf_dist.publish.canary import READERS, canary
from ncf_dist.publish.measures import MEASURES, judge
from ncf_dist.publish.output import churn, measured, sampled
from tests.published import Night, good

CONTRACT = contracts.recommendations(pa.string(), pa.string())
Lists = dict[int, list[int]]
lists = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 20), min_size=1, max_size=5, unique=True))


def pairs(of: Lists) -> pa.Table:
    rows = [(user, item) for user, items in of.items() for item in items]
    users, items = ([row[at] for row in rows] for at in (0, 1))
    return pa.table({"user_id": pa.array(users, pa.int64()), "item_id": pa.array(items, pa.int64())})


# ---- what is measured --------------------------------------------------------------------------------------


@given(lists, lists)
def test_churn_is_what_has_gone_of_the_lists_that_there_were(now: Lists, then: Lists) -> None:
    gone = [len(set(items) - set(now[user])) / len(items) for user, items in then.items() if user in now]
    found = churn(pairs(now), pairs(then))
    assert found == (pytest.approx(np.mean(gone)) if gone else None)


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    """ann, bob and cat have two items each, dan one; four of the six items are offered; dan gets the fallback."""
    path = tmp_path / "0.parquet"
    rows = [("ann", "a"), ("ann", "b"), ("bob", "a"), ("bob", "c"), ("cat", "a"), ("cat", "d"), ("dan", "a")]
    table = pa.table({"user_id": [user for user, _ in rows], "item_id": [item for _, item in rows]})
    pq.write_table(table, path)
    then = tmp_path / "1.parquet"
    earlier = {"user_id": ["ann", "ann", "bob", "bob"], "item_id": ["a", "x", "a", "c"]}
    pq.write_table(pa.table(earlier), then)
    audited = Audit([], model_users=3, users=4, rows=7, coverage=4 / 6)
    found = measured(audited, 2, [str(path)], [str(then)])
    assert found == {"coverage": 4 / 6, "filled": 7 / 8, "fallback": 1 / 4, "churn": pytest.approx((1 / 2 + 0) / 2)}
    assert "churn" not in measured(audited, 2, [str(path)], [])
    assert measured(Audit([], 0), 2, [], []) == {}


def test_a_sample_is_whole_users_and_the_same_ones_in_every_file(tmp_path: Path) -> None:
    users = [f"u{user}" for user in range(4_000)]
    for night, items in (("a", ["x", "y"]), ("b", ["y", "z"])):
        columns = {"user_id": [user for user in users for _ in items], "item_id": items * len(users)}
        pq.write_table(pa.table(columns), tmp_path / night)
    one, two = (sampled([str(tmp_path / night)], 8) for night in "ab")
    assert set(one["user_id"].to_pylist()) == set(two["user_id"].to_pylist())
    assert 400 < len(one) / 2 < 600
    assert churn(one, two) == 0.5
    assert len(sampled([str(tmp_path / "a")], 1)) == 8_000


@pytest.mark.parametrize("form", ["long", "lists"])
def test_a_night_is_measured_in_either_form(tmp_path: Path, form: str) -> None:
    before, night = Night(tmp_path, "2026-01-30"), Night(tmp_path)
    for each in (before, night):
        each.prepare()
        each.score(good(), form=form, config={"score": {"form": form}})
    before.publish()
    gates = pipeline.publish(night.config, night.ds).extra["gates"]
    assert {name: gates[name]["value"] for name in OUTPUT_GATES} == {
        "coverage": 1.0, "filled": 1.0, "fallback": 0.0, "churn": 0.0,
    }  # fmt: skip


# ---- planted defects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "good_nights", "bad"),
    [
        ("coverage", [0.61, 0.60, 0.62, 0.60], 0.02),  # everybody gets the same items
        ("filled", [1.0, 1.0, 0.999, 1.0], 0.8),  # a list of denied items that denies too much
        ("fallback", [0.02, 0.03, 0.02, 0.02], 0.4),  # a log that was cut: users quietly become `popular`
        ("churn", [0.3, 0.35, 0.28, 0.31], 0.98),  # another model altogether
        ("churn", [0.3, 0.35, 0.28, 0.31], 0.0),  # last night's lists once more
    ],
)
def test_a_planted_defect_of_the_output_is_refused(gate: str, good_nights: list[float], bad: float) -> None:
    assert judge(gate, "learned", bad, good_nights, 6.0, "score run s9").outcome == "refused"
    for value in good_nights:
        assert judge(gate, "learned", value, good_nights, 6.0, "score run s9").outcome == "passed"


@given(st.integers(0, 2**32 - 1))
def test_thirty_clean_nights_of_output_are_never_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = {"coverage": rng.uniform(0.1, 0.9), "filled": 1.0, "fallback": 0.05, "churn": rng.uniform(0.2, 0.6)}
    for gate, mean in means.items():
        noise = 0.002 if gate == "filled" else 0.03
        nights = np.clip(mean * (1 + noise * rng.standard_normal(40)), 0, 1).tolist()
        for at in range(10, 40):
            check = judge(gate, getattr(Gates(), gate), nights[at], nights[at - 7 : at], 6.0, "run")
            assert check.outcome == "passed", (gate, check.message, MEASURES[gate])


# ---- the canary --------------------------------------------------------------------------------------------


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """The night before is published, and tonight is ready to be."""
    before, night = Night(tmp_path, "2026-01-30"), Night(tmp_path)
    for each in (before, night):
        each.prepare()
        each.score()
    before.publish()
    return night


def test_candidates_are_read_by_stock_readers(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spark_io, "open_session", lambda: None)  # An earlier test may have left Spark open.
    gates = pipeline.publish(night.config, night.ds).extra["gates"]
    assert (gates["canary"]["outcome"], gates["canary"]["value"]) == ("passed", 2)


@pytest.mark.usefixtures("spark")
def test_spark_reads_them_where_it_is_open(night: Night) -> None:
    gates = pipeline.publish(night.config, night.ds).extra["gates"]
    assert (gates["canary"]["outcome"], gates["canary"]["value"]) == ("passed", 3)


@pytest.mark.parametrize("name", ["pandas", "duckdb"])
@pytest.mark.parametrize("damage", ["torn", "short", "renamed"])
def test_files_that_a_consumer_cannot_read_are_not_published(
    night: Night, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    """The file system gives back something else than what was written and audited."""
    real = pipeline.PublishedTable.copy

    def copied(self: Any, *args: Any) -> None:
        real(self, *args)
        path = sorted(Path(self.root, f"ds={night.ds}").glob("*.parquet"))[0]
        if damage == "torn":
            path.write_bytes(path.read_bytes()[:-9])
            return
        rows = pq.ParquetFile(path).read()
        pq.write_table(rows.slice(1) if damage == "short" else rows.rename_columns(["u", *rows.column_names[1:]]), path)

    monkeypatch.setattr(pipeline.PublishedTable, "copy", copied)
    night.sections["gates"] = {"canary": [name]}
    night.config = night.configured()
    seen = night.read("2026-01-30"), night.latest()
    with pytest.raises(GateRefused, match=f"canary: the 2 files .*ds={night.ds}: {name} ") as caught:
        night.publish()
    assert "--override" not in str(caught.value)
    assert (night.read("2026-01-30"), night.latest(), night.read()) == (*seen, [])
    kept = json.loads(Path(night.lake.root, "runs", night.ds, "gates", "s1.json").read_text())
    assert (kept["blessed"], list(kept["refused"])) == (False, ["canary"])
    monkeypatch.undo()
    assert night.publish() == ("done", 1)


def test_a_reader_that_is_not_installed_is_passed_over(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(readers.importlib, "import_module", gone)
    monkeypatch.delitem(sys.modules, "ncf_dist.spark_io", raising=False)
    assert READERS["duckdb"]([]) is None
    assert canary(Gates(canary=("duckdb", "spark")), CONTRACT, {"x": 1}).outcome == "unknown"
    assert canary(Gates(canary=None), CONTRACT, {"x": 1}).outcome == "off"
