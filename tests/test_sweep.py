"""The job sweep: it finds the best of what it is given to search, trains nothing twice, and says its mistakes before
the first training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ncf_dist import cli
from ncf_dist.config import Config, Range, changed
from ncf_dist.errors import ConfigError, TrainingFailed
from ncf_dist.stage import Outcome
from ncf_dist.sweep import pipeline
from ncf_dist.sweep.pipeline import sweep

LR = {"low": 0.0001, "high": 0.1, "log": True}


def configured(tmp_path: Path, **sections: Any) -> Config:
    paths = {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")}
    return Config.model_validate({"paths": paths, "input": {"path": "x"}, **sections})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What was trained. The best is a rate of .01 with 32 factors; no training with 48 factors ends."""
    seen: list[Config] = []

    def train(config: Config, ds: str) -> Outcome:
        seen.append(config)
        if config.model.factors == 48:
            raise TrainingFailed("loss is not finite")
        value = 0.3 - abs(config.train.lr - 0.01) - abs(config.model.factors - 32) / 100
        manifest: Any = SimpleNamespace(seconds=1.5)
        return Outcome("done", metrics={"validation.ndcg@10": value, "validation.mse": -value}, manifest=manifest)

    monkeypatch.setattr(pipeline, "train", train)
    return seen


def test_the_best_settings_are_found_and_printed_as_options(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    space = {"train.lr": LR, "model.factors": [8, 32, 48]}
    config = configured(tmp_path, sweep={"space": space, "trials": 40})
    outcome = sweep(config, "2026-01-31")
    best = outcome.extra["trials"][0]
    assert best["settings"]["model.factors"] == 32
    assert abs(best["settings"]["train.lr"] - 0.01) < 0.005
    assert outcome.extra["best"] == f"--set train.lr={best['settings']['train.lr']} --set model.factors=32"
    assert outcome.metrics["validation.ndcg@10"] == best["value"] > 0.29
    assert outcome.metrics["sweep.trials"] == 40
    assert outcome.metrics["sweep.failed"] == sum(each.model.factors == 48 for each in trained) > 0
    assert f"best: {outcome.extra['best']}" in capsys.readouterr().err
    names = {each.run for each in trained}
    assert None not in names
    assert all(name.startswith("sweep-") for name in names if name)
    assert len({(each.train.lr, each.model.factors) for each in trained}) == len(names)
    again = len(trained)
    sweep(config, "2026-01-31")
    assert [each.run for each in trained[again:]] == [each.run for each in trained[:again]], "runs are found again"


def test_errors_are_minimised(trained: list[Config], tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    space = {"model.factors": {"low": 8, "high": 47}}
    config = configured(tmp_path, sweep={"space": space, "metric": "validation.mse", "trials": 15}, train={"lr": 0.01})
    outcome = sweep(config, "2026-01-31")
    values = [trial["value"] for trial in outcome.extra["trials"]]
    assert values == sorted(values)
    assert all(isinstance(trial["settings"]["model.factors"], int) for trial in outcome.extra["trials"])


def test_a_metric_that_train_does_not_give_and_trials_that_all_fail_are_said(
    trained: list[Config], tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    space = {"model.factors": [48]}
    with pytest.raises(TrainingFailed, match="all 3 trials failed; needed one that ends: narrow sweep.space"):
        sweep(configured(tmp_path, sweep={"space": space, "trials": 3}), "2026-01-31")
    other = {"space": {"model.factors": [8]}, "metric": "full.ndcg@10"}
    with pytest.raises(ConfigError, match="sweep.metric is full.ndcg@10; needed one that train gives, such as valid"):
        sweep(configured(tmp_path, sweep=other), "2026-01-31")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space is empty; needed settings of model, train, loader, parts"),
        ({"input.k_core": [1, 5]}, "sweep.space has input.k_core; needed settings of"),
        ({"negatives.alpha": [0.0, 0.5]}, "sweep.space has negatives.alpha; needed settings of"),
        ({"train": [1]}, "sweep.space has train; needed settings of"),
        ({"train.rate": [1]}, r"unknown key train.rate \(did you mean"),
        ({"train.lr": ["fast"]}, "train.lr is 'fast'"),
    ],
)
def test_a_space_that_cannot_be_searched_is_said_before_the_first_training(
    trained: list[Config], tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(configured(tmp_path, sweep={"space": space}), "2026-01-31")
    assert trained == []


@pytest.mark.parametrize("wrong", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}])
def test_a_range_has_a_lower_and_a_higher_end(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needed low below high"):
        Range.model_validate(wrong)


def test_without_optuna_the_job_says_how_to_get_it(
    trained: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    config = tmp_path / "c.yaml"
    tree = configured(tmp_path, sweep={"space": {"train.lr": LR}}).model_dump(mode="json")
    config.write_text(yaml.safe_dump({name: tree[name] for name in ("paths", "input", "sweep")}))
    assert cli.main(["sweep", "--config", str(config), "--trials", "2"]) == 2
    assert "pip install 'ncf-dist[sweep]'" in json.loads(capsys.readouterr().out)["error"]
    assert trained == []


def test_settings_are_changed_by_their_whole_names(tmp_path: Path) -> None:
    config = configured(tmp_path, sequences={"length": 50, "next_items": 10})
    assert changed(config, {}) == config
    other = changed(config, {"train.lr": 0.5, "parts.counts.last": 3, "run": "a"})
    assert (other.train.lr, other.run) == (0.5, "a")
    assert other.parts.counts is not None
    assert other.parts.counts.last == 3
