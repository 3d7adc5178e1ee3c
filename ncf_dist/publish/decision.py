"""What the gates decide together: the refusal with all that speaks against a night, or the blessing that lets it pass.

`runs/<ds>/gates/<run>.json` is the blessing, or the refusal: which run, which gate, its value, its bound, what came of
it, and who may have overridden it and why.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ncf_dist.config import UNDONE
from ncf_dist.config.gates import OVERRIDABLE
from ncf_dist.config.publish import Gate
from ncf_dist.errors import GateRefused
from ncf_dist.files import make_dirs, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.publish import leftovers
from ncf_dist.publish.gates import Verdict
from ncf_dist.publish.measures import Check

REQUIRABLE = get_args(Gate)
OFF = {"beats": "[]", "slices": "{}", "scores": "false"}
"""Of the gates that are not off with null."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """run: the key of the run that was judged. checks: of measures; verdicts: of the gates of publish.require (require:
    those that were judged), of which one that passes has none. overrides: gates that may not refuse, and why.
    train_run: the model's; None where only the data was judged."""

    ds: str
    run: str
    checks: Sequence[Check]
    verdicts: Sequence[Verdict]
    overrides: Mapping[str, str]
    require: Collection[str] = ()
    train_run: str | None = None

    @property
    def against(self) -> dict[str, str]:
        """What refuses the night by itself, overridden or not: gate to message."""
        said = {verdict.check: verdict.message for verdict in self.verdicts if verdict.refuses}
        return said | {check.gate: check.message for check in self.checks if check.outcome == "refused"}

    @property
    def refused(self) -> dict[str, str]:
        return {gate: said for gate, said in self.against.items() if gate not in self.overrides}

    @property
    def overridden(self) -> dict[str, str]:
        """Gates that would refuse and may not, and why: what the commit says."""
        return {gate: why for gate, why in self.overrides.items() if gate in self.against}

    @property
    def warnings(self) -> list[str]:
        said = [f"{verdict.check}: {verdict.message}" for verdict in self.verdicts if not verdict.refuses]
        said += [f"{gate}: {self.against[gate]}; overridden: {why}" for gate, why in self.overridden.items()]
        unneeded = [gate for gate in self.overrides if gate not in self.against and gate != UNDONE]
        return [*said, *(f"--override {gate} was not needed: nothing refuses the night there" for gate in unneeded)]

    def gates(self) -> dict[str, dict[str, Any]]:
        """Value, bound and outcome by gate: passed, warned, refused, overridden, unknown or off."""
        found: dict[str, dict[str, Any]] = {gate: {"outcome": "passed"} for gate in self.require}
        for verdict in self.verdicts:
            if not verdict.refuses:
                found[verdict.check] = {"outcome": "warned"}
        for check in self.checks:
            found[check.gate] = {"value": check.value, "bound": list(check.bound), "outcome": check.outcome}
        for gate in self.against:
            found[gate] = {**found.get(gate, {}), "outcome": "overridden" if gate in self.overrides else "refused"}
        return found

    def record(self, lake: Lake) -> str:
        """Where it is kept what the gates said of this run."""
        return lake.path("runs", self.ds, "gates", f"{self.run}.json")

    def enforce(self, lake: Lake) -> list[str]:
        """Keep what was decided; returns the warnings. Raises GateRefused."""
        warnings = self.warnings
        for warning in warnings:
            log.warning("%s", warning)
        folder = posixpath.dirname(self.record(lake))
        body = {
            "ds": self.ds,
            "run_key": self.run,
            "train_run": self.train_run,
            "blessed": not self.refused,
            "gates": self.gates(),
            "refused": self.refused,
            "overridden": self.overridden,
            "warnings": warnings,
        }
        make_dirs(folder)
        leftovers.sweep(folder)
        write_atomic(self.record(lake), json.dumps(body, indent=1).encode())
        if self.refused:
            raise GateRefused(
                f"ds {self.ds} is not published and what is published stays: "
                + "; ".join(f"{gate}: {message}" for gate, message in self.refused.items())
                + self._remedy(),
                refused=list(self.refused),
                warnings=warnings,
                gates=self.gates(),
            )
        return warnings

    def _remedy(self) -> str:
        """How to publish it all the same; nothing where a gate refuses that cannot be overridden."""
        names = list(self.refused)
        if not set(names) <= set(OVERRIDABLE):
            return ""
        switched = [
            f"leave {gate} out of publish.require"
            if gate in REQUIRABLE
            else f"set gates.{gate}={OFF.get(gate, 'null')}"
            for gate in names
        ]
        given = " ".join(f"--override {gate} --why TEXT" for gate in names)
        return f". To publish it all the same, {' and '.join(switched)}, or, for this night only, add {given}"
