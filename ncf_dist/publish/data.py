"""The gates of the data: what prepare says of a night, against the good nights before it.

`nightly` asks right after prepare, so that a bad log costs no training; `publish` asks again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncf_dist.config import Config, Gates
from ncf_dist.config.gates import DATA_GATES
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish import measures
from ncf_dist.publish.decision import Decision
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.measures import Check, psi
from ncf_dist.publish.past import Measured, Night, before, good_nights
from ncf_dist.publish.runs import interactions_of
from ncf_dist.stored import typed


@dataclass(frozen=True)
class Profile:
    """prepare's fact of this name; nothing is known of what is None or empty."""

    new_users_a_day: float | None = None
    quarantine: float | None = None
    age_days: float | None = None
    vanished: float | None = None
    ratings: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, prepare: Manifest) -> Profile:
        """Empty where an earlier version of ours prepared the night. Raises ContractError."""
        try:
            return typed(cls, prepare.facts.get("profile") or {}, more_keys=True)
        except ValueError as error:
            raise ContractError(
                f"the facts of prepare run {prepare.run_key} cannot be used (profile: {error}); rerun the job prepare"
            ) from None


def check(config: Config, ds: str, prepare: Manifest) -> None:
    """Raise GateRefused where the data of this night may not be published. A night that is published from this very run
    passes: nothing is left to stop."""
    lake = Lake(config.paths.lake)
    log = DeltaLog(lake.path(config.publish.table))
    if _published(lake, log, ds) == prepare.run_key:
        return
    checks, _ = judge(config.gates, prepare, good_nights(log, ds, config.gates.nights))
    Decision(ds, prepare.run_key, checks, [], config.gates.overrides).enforce(lake)


def judge(gates: Gates, prepare: Manifest, nights: list[Night]) -> tuple[list[Check], Measured]:
    """(the verdict of each gate of the data, what was measured). nights: good ones, the newest first."""
    profile = Profile.of(prepare)
    volume = interactions_of(prepare)
    last = nights[0].measured if nights else Measured()
    found = {
        "volume": None if volume is None else float(volume),
        "new_users": profile.new_users_a_day,
        "quarantine": profile.quarantine,
        "age": profile.age_days,
        "rating_drift": psi(profile.ratings, last.ratings),
        "item_drift": psi(profile.items, last.items),
        "vanished": profile.vanished,
    }
    run = f"prepare run {prepare.run_key}"
    checks = [
        measures.judge(gate, getattr(gates, gate), found[gate], before(nights, gate), gates.spread, run)
        for gate in DATA_GATES
    ]
    numbers = {gate: value for gate, value in found.items() if value is not None}
    return checks, Measured(numbers, profile.ratings, profile.items)


def _published(lake: Lake, log: DeltaLog, ds: str) -> str | None:
    """The prepare run that the published night `ds` was made from; None where nobody knows."""
    table = log.open()
    found = log.explain(table, ds) if table is not None else None
    try:
        score = lake.stage(ds, "score").find(found[1].run_key) if found and found[1].run_key else None
    except ContractError:
        return None
    return str(score.inputs.get("prepare")) if score else None
