"""A model that a gate refused, or whose night was rolled back, is what no later night builds on: not a warm start, not
train.every, not a champion; nor does the job clean keep it for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ncf_dist.clean.keep import what_stays
from ncf_dist.earlier import GATES, objection, rejected
from ncf_dist.errors import GateRefused
from ncf_dist.manifests import Manifest
from ncf_dist.published import Shown, shown
from tests.published import Night, good
from tests.test_every import Nights, day

TABLE = "recommendations"


@pytest.fixture
def night(tmp_path: Path) -> Night:
    made = Night(tmp_path)
    made.prepare()
    return made


def trained(night: Night, model: str) -> Manifest:
    """A model of the night, and a run of score by it."""
    run = night._run("train", f"t-{model}", {}, {}, {"prepare": "p1"})
    night.score(good(model), key=f"s-{model}", model_version=model, train=run.run_key)
    return run


def against(night: Night, *runs: Manifest) -> list[bool]:
    return [rejected(night.lake, TABLE, run) is not None for run in runs]


def test_what_was_rolled_back_is_rejected_until_readers_see_it_again(night: Night) -> None:
    assert shown(night.lake, TABLE).nights == {}
    first = trained(night, "m1")
    assert against(night, first) == [False], "nothing is published"
    night.publish()
    second = trained(night, "m2")
    night.publish()
    assert against(night, first, second) == [False, False]
    night.rollback()
    assert against(night, first, second) == [False, True]
    assert "took the run s-m2 of 2026-01-31 back" in str(rejected(night.lake, TABLE, second))
    later = Night(night.root, "2026-02-01")
    later.prepare()
    trained(later, "m3")
    later.publish()
    assert against(night, first, second) == [False, True], "each commit carries it on"
    night.rollback(0)
    night.score(good("m2"), key="s-again", model_version="m2", train=second.run_key)
    night.publish()
    assert against(night, second) == [False], "by another run of score readers see it"
    night.rollback()
    assert against(night, first, second) == [False, True]


def test_a_run_that_was_cleaned_away_is_taken_for_one_of_the_model(night: Night) -> None:
    run = trained(night, "m1")
    night.publish()
    night.rollback()
    Path(night.lake.root, "runs", night.ds, "score", "s-m1", "manifest.json").unlink()
    assert against(night, run) == [True]


def test_a_log_that_cannot_be_read_rejects_nothing(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    run = trained(night, "m1")
    night.publish()
    night.rollback()
    for entry in (night.table / "_delta_log").iterdir():
        entry.write_text("{")
    assert against(night, run) == [False]
    assert "whether the night 2026-01-31 was rolled back cannot be told (the Delta log of" in caplog.text


def test_a_refusal_that_was_overridden_rejects_nothing(night: Night) -> None:
    run = trained(night, "m1")
    night.sections["publish"] = {"require": ["evaluated"]}
    night.config = night.configured()
    with pytest.raises(GateRefused):
        night.publish()
    assert against(night, run) == [True]
    night.sections["gates"] = {"overrides": {"evaluated": "it was seen to be good"}}
    night.config = night.configured()
    night.publish()
    assert against(night, run) == [False]


def refuse(night: Night, run: Manifest) -> None:
    folder = Path(night.lake.root, "runs", run.ds, GATES)
    folder.mkdir(exist_ok=True)
    (folder / "x.json").write_text(json.dumps({"train_run": run.run_key, "refused": ["churn"]}))


@pytest.mark.parametrize("how", ["refused", "rolled back"])
def test_clean_keeps_the_newest_good_model_for_a_warm_start(night: Night, how: str) -> None:
    good_one = trained(night, "m1")
    night.publish()
    bad = Night(night.root, "2026-02-01")
    bad.prepare()
    worse = trained(bad, "m2")
    if how == "refused":
        refuse(bad, worse)
    else:
        bad.publish()
        bad.rollback()
    for ds in ("2026-02-02", "2026-02-03"):
        last = Night(night.root, ds)
        last.prepare()
        Path(last.lake.stage(ds, "train").run_path("t1"), "manifest.json").unlink()
    for ds in (night.ds, bad.ds):
        Path(night.lake.stage(ds, "train").run_path("t1"), "manifest.json").unlink()
    config = night.config.model_copy(update={"retention": night.config.retention.model_copy(update={"nights": 1})})
    stays = what_stays(night.lake, config, []).runs
    assert (good_one.root in stays, worse.root in stays) == (True, False)


def test_train_every_passes_over_a_night_that_was_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nights = Nights("7d")
    older = nights.train(nights.prepare(day(0)))
    newer = nights.train(nights.prepare(day(1)))
    tonight = nights.prepare(day(2))
    assert objection(nights.lake, TABLE, tonight, newer) is None
    monkeypatch.setattr("ncf_dist.earlier.shown", lambda *_: Shown(undone=frozenset({(day(1), "s")})))
    assert nights.upstream(day(2), "score")["train"] == older
