"""The job nightly: the whole line in order. A stage whose manifest and inputs have not changed is found done and
skipped, so a night that died goes on where it stopped."""

from __future__ import annotations

import logging
from typing import Any

from ncf_dist.artifacts import Outcome
from ncf_dist.cli import JobFunction
from ncf_dist.config import Config
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import check_ahead, publish
from ncf_dist.score.pipeline import score
from ncf_dist.train.pipeline import train

log = logging.getLogger(__name__)

STAGES: dict[str, JobFunction] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "publish": publish,
}


def nightly(config: Config, ds: str) -> Outcome:
    """Run every stage for `ds`; raises what the first failing stage raises, and nothing published is touched. A night
    that could not be published in the end is refused before the first stage."""
    check_ahead(config, ds)
    stages: dict[str, str] = {}
    outputs: dict[str, str] = {}
    metrics: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    warnings: list[str] = []
    outcome = Outcome("done")
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        log.info("── %d/%d %s ──", number, len(STAGES), name)
        outcome = stage(config, ds)
        stages[name] = outcome.status
        outputs |= outcome.outputs
        metrics |= outcome.metrics
        warnings += outcome.extra.get("warnings", ())
        extra |= outcome.extra
    status = "already-done" if set(stages.values()) == {"already-done"} else "done"
    return Outcome(status, outcome.run_key, outputs, metrics, {**extra, "warnings": warnings, "stages": stages})
