"""train.refit: what ranks is the judged model trained once more on every row; only score and publish find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist.bundle import read_bundle
from ncf_dist.champion import champion
from ncf_dist.clean.keep import what_stays
from ncf_dist.config import Config
from ncf_dist.contracts import INTERACTIONS
from ncf_dist.errors import ConfigError, ContractError, GateRefused
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.publish import model
from ncf_dist.publish.gates import Verdict
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.pipeline import publish
from ncf_dist.refit import pipeline
from ncf_dist.refit.pipeline import refit, settings_of
from ncf_dist.refits import in_place_of, name_of, refit_of
from ncf_dist.score.pipeline import score
from ncf_dist.stage import Outcome, Upstream, decisive, find_upstream, model_of_earlier_night, production_runs, stored
from tests.shop import shop
from tests.test_every import Nights, day

FIRST, SECOND = "2024-05-20", "2024-05-21"


def with_refit(config: Config, wanted: bool) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"refit": wanted})})


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_score_and_publish_find_the_refit_and_nothing_else_does(wanted: bool, steps: list[tuple[bool, bool]]) -> None:
    """steps: whether a night trains a model of its own, and whether that has a refit."""
    nights = Nights("9d")
    nights.config = with_refit(nights.config, wanted)
    other = with_refit(nights.config, not wanted)
    judged: Manifest | None = None
    again: Manifest | None = None
    for number, (own, has_refit) in enumerate(steps):
        prepared = nights.prepare(day(number))
        if own or judged is None:
            judged = nights.train(prepared)
            again = nights.train(prepared, name_of(judged)) if has_refit else None
        for stage in ("evaluate", "score"):
            assert nights.upstream(day(number), stage) == {"prepare": prepared, "train": judged}
        assert next(production_runs(nights.lake, "train")) == judged
        if judged.ds != day(number):
            assert model_of_earlier_night(nights.lake, nights.config, prepared) == judged
        if wanted and again is None and judged.ds == day(number):
            with pytest.raises(ContractError, match=r"has no refit; needed one, .*: run the job refit after evaluate"):
                in_place_of(nights.lake, nights.config, day(number), judged)
            continue
        ranked_by = in_place_of(nights.lake, nights.config, day(number), judged)
        assert ranked_by == (again if wanted else None)
        scored = nights.score(prepared, judged, ranked_by)
        assert nights.upstream(day(number), "publish") == {"score": scored, "train": judged, "prepare": prepared}
        if ranked_by or judged.ds == day(number):
            with pytest.raises(ContractError, match="rerun the job score"):
                find_upstream(nights.lake, other, day(number), "publish")


def test_clean_keeps_the_refit_of_a_model_that_stays() -> None:
    nights = Nights("9d", retention={"nights": 1, "days": 1})
    first = nights.prepare(day(0))
    judged = nights.train(first)
    again, other = nights.train(first, name_of(judged)), nights.train(first, "trial")
    for number in (1, 2):
        nights.prepare(day(number))
    kept = what_stays(nights.lake, nights.config, [])
    assert {judged.root, again.root} <= kept.runs
    assert other.root not in kept.runs


# ---- the job ---------------------------------------------------------------------------------------------------------


class Made(Nights):
    """Whose refits are made of manifests, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
        super().__init__("9d", publish={"require": []}, **sections)
        self.config = with_refit(self.config, True)
        self.log, self.ran = 0, list[Config]()
        monkeypatch.setattr(pipeline, "prepare", self._prepare)
        monkeypatch.setattr(pipeline, "train", self._train)

    def _prepare(self, config: Config, ds: str, given: Upstream | None = None) -> Outcome:
        self.ran.append(config)
        base, usual, self.config = self.base, self.config, config
        self.base = None
        made = self.prepare(ds, version=self.log)
        self.base, self.config = base, usual
        return Outcome.of(made)

    def _train(self, config: Config, ds: str, given: Upstream | None = None) -> Outcome:
        self.ran.append(config)
        assert given is not None
        return Outcome.of(self.train(given["prepare"], config.run))


def test_a_judged_model_is_refitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nights = Made(monkeypatch)
    prepared = nights.prepare(day(0))
    judged = nights.train(prepared)
    with pytest.raises(ContractError, match="was not judged, .*: run the job evaluate first"):
        refit(nights.config, day(0))
    nights.evaluate(prepared, judged)
    done = refit(nights.config, day(0))
    found = refit_of(nights.lake, judged)
    assert found is not None
    assert (done.status, done.run_key) == ("done", found.run_key)
    of, itself = (read_bundle(f"{run.root}/bundle").model_version for run in (judged, found))
    assert (done.extra["model_version"], done.extra["refit_of"]) == (itself, of)
    every, training = nights.ran
    assert (every.run, every.split.strategy) == (name_of(prepared), "none")
    assert training == settings_of(nights.config, judged)
    assert refit(nights.config, day(0)).status == "already-done"
    nights.prepare(day(1))
    assert refit(nights.config, day(1)).run_key == found.run_key, "the model of the night before ranks, by its refit"
    assert len(nights.ran) == 2


def test_a_model_that_a_gate_refuses_is_not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    nights = Made(monkeypatch)
    monkeypatch.setattr(model, "judge", lambda *_: [Verdict("beats", "it is worse", True)])
    prepared = nights.prepare(day(0))
    nights.evaluate(prepared, nights.train(prepared))
    with pytest.raises(GateRefused, match="beats: it is worse"):
        refit(nights.config, day(0))
    assert nights.ran == []


def test_a_log_that_grew_since_it_was_judged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nights = Made(monkeypatch)
    prepared = nights.prepare(day(0))
    nights.evaluate(prepared, nights.train(prepared))
    nights.log = 1
    with pytest.raises(
        ContractError, match=r"the log has changed since .* was prepared \(log\), .* from the job prepare"
    ):
        refit(nights.config, day(0))


def test_a_config_without_the_setting_or_without_held_out_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.refit is false; needed true"):
        refit(Nights(None).config, day(0))
    for split in ({"strategy": "none"}, {"strategy": "files", "test": "test.csv"}):
        tree = {"paths": {"lake": "l"}, "input": {"path": "l"}, "train": {"refit": True}, "split": split}
        with pytest.raises(ValueError, match=r"train.refit is true with split.strategy=\w+; needed one that holds"):
            Config.model_validate(tree)


@settings(deadline=None)
@given(st.integers(0, 30), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from(["hash", "file"]))
def test_only_what_validation_chose_differs(best: int, weight: float, ties: str) -> None:
    tree = {"paths": {"lake": "l"}, "input": {"path": "l", "columns": {"timestamp": "t"}}, "split": {"ties": ties}}
    more = {"sequences": {"length": 5, "next_items": 5}, "parts": {"counts": {}}}
    config = Config.model_validate({**tree, **more, "train": {"refit": True, "every": "7d", "patience": 3}})
    facts, metrics = {"parts": {"weights": {"counts": weight}}}, {"train.best_epoch": best}
    judged = Manifest(
        stage="train", ds=day(0), run_key="t", root="r", config={}, inputs={}, facts=facts, metrics=metrics
    )
    made = settings_of(config, judged)
    assert Config.model_validate_json(made.model_dump_json(by_alias=True)) == made, "as its ranks read it"
    assert (made.split.strategy, made.split.ties, made.run) == ("none", ties, "refit-t")
    before, after = (decisive("train", stored("train", one)) for one in (config, made))
    parts = before.pop("parts")
    assert after.pop("parts") == {"counts": {**parts["counts"], "weights": [weight]}}
    assert after["train"].pop("stop_after") == best + 1
    assert after == before


# ---- a whole night ---------------------------------------------------------------------------------------------------


def test_a_night_is_ranked_by_the_refit_of_the_model_that_was_judged(spark: SparkSession, tmp_path: Path) -> None:
    config = shop(tmp_path, train={"refit": True, "epochs": 3})
    lake, ds = Lake(config.paths.lake), FIRST
    said = nightly(config, ds).extra
    prepared, judged, judgement, scored = (
        lake.stage(ds, stage).newest() for stage in ("prepare", "train", "evaluate", "score")
    )
    again = refit_of(lake, judged)
    assert again is not None
    of, itself = (read_bundle(f"{run.root}/bundle").model_version for run in (judged, again))
    assert of != itself
    # On every row, for as many epochs as were kept.
    every = lake.stage(ds, "prepare").load(again.made_from("prepare"))
    rows = [run.tables["train"].rows for run in (prepared, every)]
    assert rows == [prepared.tables[INTERACTIONS.name].rows - 2 * 20, prepared.tables[INTERACTIONS.name].rows]
    epochs = json.loads(Path(again.root, "history.json").read_text())["epochs"]
    assert len(epochs) == judged.metrics["train.best_epoch"] + 1
    # What was judged is the model, what ranks is the refit, and each says which.
    assert (judgement.inputs["train"], judgement.facts["model_version"]) == (judged.run_key, of)
    assert (scored.inputs["train"], scored.inputs["refit"]) == (judged.run_key, again.run_key)
    told = {"of": of, "train": judged.run_key, "run": again.run_key}
    assert (scored.facts["refit"], scored.facts["model_version"]) == (told, itself)
    assert "earlier_model" not in scored.facts
    [(_, commit)] = DeltaLog(lake.path("recommendations")).history(ds)
    assert (commit.facts["ncf.refit"], commit.facts["ncf.model_version"]) == (told, itself)
    assert (said["stages"]["refit"], said["model_version"], said["refit_of"]) == ("done", itself, of)
    # The jobs find one by one what nightly made, and the next night's champion is the model that was judged.
    for job in (evaluate, refit, score, publish):
        assert job(config, ds).status == "already-done"
    found = champion(lake, config.publish.table, SECOND)
    assert found is not None
    assert found.run_key == judged.run_key
