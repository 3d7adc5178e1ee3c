"""What is known of each night, from the records of its attempts (`ncf_dist/attempts.py`) and the published table's
log."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ncf_dist import attempts, metrics
from ncf_dist.attempts import Record
from ncf_dist.champion import CHAMPION
from ncf_dist.lake import Lake
from ncf_dist.publish.log import DeltaLog


@dataclass(frozen=True)
class Published:
    """What readers see of a night. version: of the commit that published it."""

    version: int | None
    rows: int
    run_key: str | None


@dataclass(frozen=True)
class Refusal:
    """gates: those that refused; job: of the attempt; error: what it said of that, None where it went on (the champion
    ranked)."""

    attempt: str
    job: str
    gates: list[str]
    error: str | None


@dataclass
class Night:
    """A night, all attempts at it together. outcome: of the last attempt, None where no record is left; failed: the
    stage that ended it, unless all went well; metric: the headline metric's name; champion: the model minus the one
    that was published before it, on the same rows where `paired`; refused: gates, by the last attempt; refusals: every
    attempt that a gate refused something of; seconds: of all attempts; bytes: of the tables that the stages made;
    published: None where readers do not see it; undone: by a rollback."""

    ds: str
    attempts: int = 0
    outcome: str | None = None
    failed: str | None = None
    error: str | None = None
    model_version: str | None = None
    published: Published | None = None
    undone: bool = False
    metric: str | None = None
    value: float | None = None
    popularity: float | None = None
    champion: float | None = None
    paired: bool = False
    refused: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    warnings: int = 0
    interactions: int | None = None
    rows: int | None = None
    quarantined: float | None = None
    churn: float | None = None
    seconds: float | None = None
    bytes: int | None = None


def last_nights(lake: Lake, table: str, most: int) -> list[Night]:
    """The latest `most` nights that were tried or are published, the oldest first. Raises ContractError where the log
    of the published table is damaged."""
    shown, undone = _published(DeltaLog(lake.path(table)))
    found = list[Night]()
    for ds in sorted({*lake.nights(), *shown}, reverse=True):
        night = _night(ds, attempts.read(lake, ds), shown.get(ds), undone.get(ds, set()))
        if night.attempts or night.published is not None:
            found.insert(0, night)
        if len(found) > most:  # One more, for what the first of them is compared with.
            break
    before: Night | None = None
    for night in found:
        if night.champion is None and before is not None and night.metric == before.metric:
            night.champion = _difference(night.value, before.value)
        before = night if night.published is not None and night.value is not None else before
    return found[-most:]


def _published(delta: DeltaLog) -> tuple[dict[str, Published], dict[str, set[str]]]:
    """(what readers see by ds, keys of runs that were undone by ds)"""
    table, shown, undone = delta.open(), dict[str, Published](), dict[str, set[str]]()
    for ds, files in delta.nights(table).items() if table is not None else ():
        found = delta.explain(table, ds) if table is not None else None
        version, key = (found[0], found[1].run_key) if found is not None else (None, None)
        shown[ds] = Published(version, sum(rows for _, rows in files), key)
    for ds, key in delta.undone(int(table.version())) if table is not None else ():
        undone.setdefault(ds, set()).add(key)
    return shown, undone


def _night(ds: str, records: Sequence[Record], shown: Published | None, undone: set[str]) -> Night:
    night = Night(ds, published=shown, rows=shown.rows if shown is not None else None)
    records = [record for record in records if record.run is None and record.job != "sweep"]
    gates: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for record in records:
        night.attempts += 1
        if record.seconds is not None:
            night.seconds = (night.seconds or 0.0) + record.seconds
        if night.model_version is None or "score" in record.stages:  # Who ranks, whatever was trained or judged after.
            night.model_version = record.model_version or night.model_version
        night.undone |= record.run_key in undone
        if refused := _refused(record):
            night.refusals.append(Refusal(record.attempt, record.job, refused, record.error))
        gates |= record.gates
        measured |= record.metrics
    if records:
        _judge(night, records[-1])
        _tables(night, records)
    night.undone &= shown is None
    _measures(night, measured, gates)
    return night


def _judge(night: Night, last: Record) -> None:
    """How the last attempt ended."""
    night.outcome, night.error, night.warnings = last.outcome, last.error, len(last.warnings)
    ended = [name for name, stage in last.stages.items() if stage.status in ("failed", "refused", "running")]
    night.failed = ended[-1] if ended and last.outcome not in ("done", "already-done") else None
    night.refused = _refused(last)


def _refused(record: Record) -> list[str]:
    """The gates that refused something of this attempt."""
    outcomes = {name: gate.get("outcome") for name, gate in record.gates.items() if isinstance(gate, Mapping)}
    return sorted(name for name, outcome in outcomes.items() if outcome == "refused")


def _tables(night: Night, records: Sequence[Record]) -> None:
    """What the stages made, each as the last attempt that finished it says."""
    stages = {name: stage for record in records for name, stage in record.stages.items() if stage.bytes}
    night.bytes = sum(sum(stage.bytes.values()) for stage in stages.values()) if stages else None
    prepared = stages["prepare"].rows if "prepare" in stages else {}
    night.interactions = prepared.get("interactions")
    if night.interactions is not None and "quarantine" in prepared:
        kept = night.interactions + prepared["quarantine"]
        night.quarantined = prepared["quarantine"] / kept if kept else None


def _measures(night: Night, measured: Mapping[str, Any], gates: Mapping[str, Any]) -> None:
    """The headline metric beside what it is compared with, and what the gates measured."""
    ks = [int(found[1]) for name in measured if (found := re.fullmatch(r"full\.ndcg@(\d+)", name))]
    if ks:
        night.metric = ".".join(metrics.headline(ks))
        night.value = _number(measured.get(night.metric))
        night.popularity = _number(measured.get(f"popularity.{night.metric}"))
        night.champion = _difference(night.value, _number(measured.get(f"{CHAMPION}.{night.metric}")))
        night.paired = night.champion is not None
    values = {name: _number(gate.get("value")) for name, gate in gates.items() if isinstance(gate, Mapping)}
    night.churn = values.get("churn")
    night.quarantined = values.get("quarantine", night.quarantined)


def _number(value: Any) -> float | None:
    ours = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ours else None


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
