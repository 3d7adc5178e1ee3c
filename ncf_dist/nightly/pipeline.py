"""The job nightly: the whole line in order. A stage whose manifest and inputs have not changed is found done and
skipped, so a night that died goes on where it stopped."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ncf_dist import attempts
from ncf_dist.config import Config
from ncf_dist.errors import GateRefused, NcfError
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.manifests import Manifest
from ncf_dist.nightly.stand_in import stand_in
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.ahead import check_ahead
from ncf_dist.publish.data import check as check_data
from ncf_dist.publish.model import check as check_model
from ncf_dist.publish.pipeline import publish
from ncf_dist.refit.pipeline import refit
from ncf_dist.score.pipeline import score
from ncf_dist.spark_io import kept_session, lent_to_ranks
from ncf_dist.stage import Outcome, Upstream
from ncf_dist.train.pipeline import of_earlier_night, train

log = logging.getLogger(__name__)


class Stage(Protocol):
    def __call__(self, config: Config, ds: str, given: Upstream | None = None) -> Outcome: ...


STAGES: dict[str, Stage] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "refit": refit,
    "score": score,
    "publish": publish,
}


def nightly(config: Config, ds: str) -> Outcome:
    """Run every stage for `ds`, each on the runs that those before it have made or found. An experiment (`--run NAME`)
    is scored, not published. Raises what the first failing stage raises, and nothing published is touched. A night that
    could not be published in the end is refused before the first stage."""
    wanted = {"refit": config.train.refit, "publish": config.run is None}
    names = [name for name in STAGES if wanted.get(name, True)]
    if "publish" in names:
        check_ahead(config, ds)
    night = _Night()
    with kept_session(config.spark):
        for number, name in enumerate(names, 1):
            log.info("── %d/%d %s ──", number, len(names), name)
            with night.standing_in(name, config, ds):
                night.take(name, config, ds)
                if "publish" in names:
                    night.judge(name, config, ds)
    if config.run is not None:
        log.info("an experiment is not published: %s", config.run)
    return night.outcome()


@dataclass
class _Night:
    """What the stages so far have said."""

    made: dict[str, Manifest] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    run_key: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def take(self, name: str, config: Config, ds: str) -> None:
        """Run a stage and gather what it says."""
        shared = lent_to_ranks(config) if name == "train" else contextlib.nullcontext()
        with self._told(name), attempts.stage(name) as took, shared:
            took(outcome := STAGES[name](config, ds, self.made))
        if outcome.manifest:
            self.made[name] = outcome.manifest
        self.stages[name], self.run_key = outcome.status, outcome.run_key
        self.outputs |= outcome.outputs
        self.metrics |= outcome.metrics
        self.warnings += outcome.extra.get("warnings", ())
        self.extra |= {**outcome.extra, **self._gates(outcome.extra)}

    def judge(self, name: str, config: Config, ds: str) -> None:
        """Refuse a night whose data publish would refuse before a model is trained on it, and one whose model it would
        refuse before anybody is ranked by it."""
        made = self.made.get(name)
        with self._told("publish"):
            if made is not None and name == "prepare":
                check_data(config, ds, made)
            if made is not None and name == "evaluate":
                check_model(config, ds, self.made["prepare"], made)

    @contextlib.contextmanager
    def standing_in(self, name: str, config: Config, ds: str) -> Iterator[None]:
        """Where a gate refuses the model, the champion ranks, if gates.on_refusal says so and there is one that may."""
        try:
            yield
        except GateRefused as error:
            if name != "evaluate" or config.run is not None:
                raise
            found, error = stand_in(config, ds, self.made, error)
            warning = f"the model of this night is refused, and the champion of {found.ds} ranks in its place: {error}"
            log.warning("%s", warning)
            self.warnings.append(warning)
            self.outputs |= (ranks := of_earlier_night(found)).outputs
            self.extra |= {**ranks.extra, **self._gates(error.extra)}
            self.stages.setdefault(name, "refused")
            self.made["train"] = found

    def _gates(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """What was said of each gate; a refusal stays one when the champion's lists pass in place of the model's."""
        before, now = self.extra.get("gates", {}), extra.get("gates", {})
        refused = {name: said for name, said in before.items() if said["outcome"] == "refused"}
        gates = {**before, **now, **refused}
        return {"gates": gates} if gates else {}

    @contextlib.contextmanager
    def _told(self, stage: str) -> Iterator[None]:
        """An error of ours leaves with what the stages before it have said."""
        try:
            yield
        except NcfError as error:
            said = {"outputs": self.outputs, "metrics": self.metrics, "runs": self.runs, **self.extra}
            last: Any = error.extra.get("warnings", ())
            error.extra = {
                **said,
                **error.extra,
                **self._gates(error.extra),
                "warnings": [*self.warnings, *last],
                "stages": {**self.stages, stage: error.status},
            }
            raise

    @property
    def runs(self) -> dict[str, str]:
        return {name: manifest.root for name, manifest in self.made.items()}

    def outcome(self) -> Outcome:
        status = "already-done" if set(self.stages.values()) == {"already-done"} else "done"
        extra = {**self.extra, "warnings": self.warnings, "stages": self.stages}
        return Outcome(status, self.run_key, self.outputs, self.metrics, extra, others=self.runs)
