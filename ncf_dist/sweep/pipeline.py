"""The job sweep: train a model for each trial's settings on the night's tables, and say which was best on the
validation rows. Test rows are not looked at: `runs` and `evaluate` are for that, once.

Settings are suggested by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), seeded by `seed`. A trial
that was trained before is found done, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncf_dist.charts.text import aligned, compact, seconds_text
from ncf_dist.config import Config, Range, changed
from ncf_dist.errors import ConfigError, TrainingFailed
from ncf_dist.stage import LINE, Outcome
from ncf_dist.train.pipeline import train

log = logging.getLogger(__name__)
SEARCHED = tuple(name for name in LINE["train"].sections if name not in LINE["prepare"].sections)
"""Sections whose settings make another model of the same tables."""
MINIMISED = ("mse", "rmse", "mae", "loss")


@dataclass(frozen=True)
class Trial:
    """value: of the metric; None where the training failed. run: the experiment's name."""

    settings: Mapping[str, Any]
    run: str
    value: float | None
    seconds: float


def sweep(config: Config, ds: str) -> Outcome:
    """Raises ConfigError: nothing or something else to search, no such metric, no Optuna; ContractError where the job
    prepare has not finished for `ds` with this config."""
    _check(config)
    optuna, trials = _optuna(), list[Trial]()
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    study = optuna.create_study(direction="minimize" if _lower(config) else "maximize", sampler=sampler)
    for number in range(1, config.sweep.trials + 1):
        asked = study.ask()
        settings = {name: _suggest(asked, name, of) for name, of in config.sweep.space.items()}
        trial = _tried(config, ds, settings)
        trials.append(trial)
        log.info("── %d/%d %s %s: %s ──", number, config.sweep.trials, trial.run, _as_set(settings), trial.value)
        # A training that failed says nothing about its neighbours that a number would.
        study.tell(asked, trial.value, optuna.trial.TrialState.FAIL if trial.value is None else None)
    ranked = sorted(
        (t for t in trials if t.value is not None), key=lambda t: t.value or 0.0, reverse=not _lower(config)
    )
    print(_table(config, ranked or trials), file=sys.stderr, flush=True)
    if not ranked:
        raise TrainingFailed(f"all {len(trials)} trials failed; needed one that ends: narrow sweep.space; see the log")
    best = ranked[0]
    print(f"best: {_as_set(best.settings)}", file=sys.stderr, flush=True)
    figures = {config.sweep.metric: best.value, "sweep.trials": len(trials), "sweep.failed": len(trials) - len(ranked)}
    said = {"best": _as_set(best.settings), "best_run": best.run}
    return Outcome("done", None, {}, figures, {**said, "trials": [vars(trial) for trial in ranked]})


def _check(config: Config) -> None:
    space = config.sweep.space
    wrong = [name for name in space if name.split(".")[0] not in SEARCHED or "." not in name]
    if wrong or not space:
        found = f"has {wrong[0]}" if wrong else "is empty"
        raise ConfigError(
            f"sweep.space {found}; needed settings of {', '.join(SEARCHED)}, such as train.lr: {{low: 0.0003, "
            "high: 0.03, log: true}"
        )
    # A name that does not exist is said before the first training.
    changed(config, {name: of.low if isinstance(of, Range) else of[0] for name, of in space.items()})


def _tried(config: Config, ds: str, settings: Mapping[str, Any]) -> Trial:
    """Train with these settings, or find it done. What two settings cannot be together counts as failed."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    run = f"{config.sweep.name}-{digest}"
    try:
        outcome = train(changed(config, {**settings, "run": run}), ds)
    except (ConfigError, TrainingFailed) as error:
        log.warning("%s (%s) failed: %s", run, _as_set(settings), error)
        return Trial(settings, run, None, 0.0)
    if (value := outcome.metrics.get(config.sweep.metric)) is None:
        raise ConfigError(
            f"sweep.metric is {config.sweep.metric}; needed one that train gives, such as "
            f"{', '.join(name for name in outcome.metrics if name.startswith('validation.')) or 'validation.ndcg@10'}"
        )
    return Trial(settings, run, float(value), outcome.manifest.seconds if outcome.manifest else 0.0)


def _lower(config: Config) -> bool:
    """Whether less of the metric is better."""
    return config.sweep.metric.rpartition(".")[2] in MINIMISED


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "the job sweep needs Optuna, which is not installed: pip install 'ncf-dist[sweep]' or pip install optuna"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: Any, name: str, of: Range | list[Any]) -> Any:
    if not isinstance(of, Range):
        return trial.suggest_categorical(name, of)
    if isinstance(of.low, int) and isinstance(of.high, int):
        return trial.suggest_int(name, of.low, of.high, log=of.log)
    # Four figures tell settings apart, and are what a person writes.
    return float(f"{trial.suggest_float(name, of.low, of.high, log=of.log):.4g}")


def _as_set(settings: Mapping[str, Any]) -> str:
    """--set train.lr=0.003 --set model.factors=32"""
    return " ".join(f"--set {name}={_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(config: Config, trials: list[Trial]) -> str:
    head = ["run", config.sweep.metric, "time", *config.sweep.space]
    rows = [
        [
            trial.run,
            "failed" if trial.value is None else compact(trial.value),
            seconds_text(trial.seconds),
            *(_text(trial.settings[name]) for name in config.sweep.space),
        ]
        for trial in trials
    ]
    return aligned(head, rows, {"run"})
