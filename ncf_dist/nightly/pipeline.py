"""The job nightly: the whole line in order. A stage whose manifest and inputs have not changed is found done and
skipped, so a night that died goes on where it stopped."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from ncf_dist.config import Config
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.manifests import Manifest
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import check_ahead, publish
from ncf_dist.score.pipeline import score
from ncf_dist.stage import Outcome, Upstream
from ncf_dist.train.pipeline import train

log = logging.getLogger(__name__)


class Stage(Protocol):
    def __call__(self, config: Config, ds: str, given: Upstream | None = None) -> Outcome: ...


STAGES: dict[str, Stage] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "publish": publish,
}


def nightly(config: Config, ds: str) -> Outcome:
    """Run every stage for `ds`, each on the runs that the ones before it have made or found. An experiment (`--run
    NAME`) is scored, and not published. Raises what the first failing stage raises, and nothing published is touched. A
    night that could not be published in the end is refused before the first stage."""
    names = [name for name in STAGES if name != "publish" or config.run is None]
    if "publish" in names:
        check_ahead(config, ds)
    made: dict[str, Manifest] = {}
    stages: dict[str, str] = {}
    outputs: dict[str, str] = {}
    metrics: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    warnings: list[str] = []
    outcome = Outcome("done")
    for number, name in enumerate(names, 1):
        log.info("── %d/%d %s ──", number, len(names), name)
        outcome = STAGES[name](config, ds, made)
        if outcome.manifest:
            made[name] = outcome.manifest
        stages[name] = outcome.status
        outputs |= outcome.outputs
        metrics |= outcome.metrics
        warnings += outcome.extra.get("warnings", ())
        extra |= outcome.extra
    if config.run is not None:
        log.info("an experiment is not published: %s", config.run)
    status = "already-done" if set(stages.values()) == {"already-done"} else "done"
    return Outcome(status, outcome.run_key, outputs, metrics, {**extra, "warnings": warnings, "stages": stages})
