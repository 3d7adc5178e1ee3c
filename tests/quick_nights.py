"""Whole nights in a second: the job nightly with stages that write what tests.published has, and no model; and the jobs
that may run beside it, each holding what its command holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ncf_dist.clean.pipeline import clean
from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.nightly import pipeline as line
from ncf_dist.publish.pipeline import publish
from ncf_dist.rollback import pipeline as back
from ncf_dist.stage import Outcome
from tests.published import Night, good

__all__ = ["clean", "nightly", "publish", "rollback"]


def of(config: Config, ds: str) -> Night:
    """The night of this config: its seed says which model it trains."""
    night = Night(Path(config.paths.lake).parent, ds)
    night.sections = {"seed": config.seed, "retention": config.retention}
    night.config = config
    return night


def model_of(config: Config) -> str:
    return f"m{config.seed}"


def _prepare(night: Night) -> Manifest:
    return night.prepare()


def _train(night: Night) -> Manifest:
    return night._run("train", _key("train", night.config), {}, {}, {"prepare": "p1"})


def _evaluate(night: Night) -> Manifest:
    return night.evaluate(key=_key("evaluate", night.config), train=_key("train", night.config))


def _score(night: Night) -> Manifest:
    model, train = model_of(night.config), _key("train", night.config)
    return night.score(good(model), key=_key("score", night.config), model_version=model, train=train)


MADE = {"prepare": _prepare, "train": _train, "evaluate": _evaluate, "score": _score}


def _key(stage: str, config: Config) -> str:
    return "p1" if stage == "prepare" else f"{stage[0]}{config.seed}x"


def _stage(name: str) -> Any:
    def run(config: Config, ds: str, given: Any = None) -> Outcome:
        if done := Lake(config.paths.lake).stage(ds, name).find(_key(name, config)):
            return Outcome("already-done", done.run_key, manifest=done)
        made = MADE[name](of(config, ds))
        return Outcome("done", made.run_key, manifest=made)

    return run


def nightly(config: Config, ds: str) -> Outcome:
    line.STAGES.update({name: _stage(name) for name in MADE})
    with Lake(config.paths.lake).hold(ds):
        return line.nightly(config, ds)


def rollback(config: Config, ds: str) -> Outcome:
    with Lake(config.paths.lake).hold(ds):
        return back.rollback(config, ds)
