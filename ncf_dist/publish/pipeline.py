"""Publish one night: fence → audit → gates → copy → one atomic commit → latest.json.

Readers see the old night or the new one. A run that is stopped anywhere leaves the old night in place, or the
new one whole; the same command then finishes the job, and says `already-done` where nothing was left to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ncf_dist import metrics
from ncf_dist.config import Config
from ncf_dist.contracts import recommendations
from ncf_dist.errors import ContractError, GateRefused, InputError
from ncf_dist.files import is_local, make_dirs, read_json, resolve
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo
from ncf_dist.publish import gates, leftovers
from ncf_dist.publish.audit import Audit, Promise, audit, contract_of
from ncf_dist.publish.repair import restore
from ncf_dist.publish.table import Publication, PublishedTable
from ncf_dist.stage import Outcome, Upstream, find_upstream

log = logging.getLogger(__name__)

STAGE = "publish"

ID_TYPES = {"int": (pa.int64(),), "string": (pa.string(),), None: (pa.int64(), pa.string())}
"""By input.user_type and input.item_type; left out, the log decides."""


@dataclass(frozen=True)
class Runs:
    """What the night was made by. evaluate: of the model that score used, where it was evaluated."""

    prepare: Manifest
    score: Manifest
    evaluate: Manifest | None


def find_runs(lake: Lake, config: Config, ds: str, given: Upstream | None) -> Runs:
    """Raises ContractError where no finished run of score fits this config."""
    upstream = find_upstream(lake, config, ds, STAGE, given)
    if given is not None and "evaluate" in given:
        judged = [given["evaluate"]]
    else:
        judged = lake.stage(ds, "evaluate").production()
    mine = [run for run in judged if run.inputs.get("train") == upstream["train"].run_key]
    # The newest; but one that compares says more than one that does not.
    return Runs(upstream["prepare"], upstream["score"], max(mine, key=lambda run: bool(run.tables), default=None))


def publish(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Make the score run of `ds` that fits this config what readers see.

    Raises ContractError: a rule of the audit is broken, or the table is damaged. GateRefused: the night is not good
    enough. StaleRun: a later ds is published. BusyRun: another publication came first. InputError: the lake or the work
    folder cannot be written. What readers see changes in none of these, but for InputError, which says so.
    """
    lake = Lake(config.paths.lake)
    runs = find_runs(lake, config, ds, given)
    score, promise = runs.score, Promise.of(runs.score)
    contract = contract_of(runs.prepare, promise.form)
    night = Publication(ds, score.run_key, promise.model_version, promise.k)
    table = PublishedTable(lake.path(config.publish.table), contract)
    infos = {table.path_of(night, info.path, info.sha256): info for info in score.table(contract).files}
    warnings: list[str] = []
    repaired: list[str] = []
    with _stops_named(config, table, night, infos):
        done = table.holds(night, infos)
        if done:
            repaired = _restore(config, table, score, infos)
        else:
            audited = audit(score, runs.prepare, resolve(config.paths.work))
            warnings = _pass_gates(config, table, runs, audited)
            night = replace(night, model_users=audited.model_users)
            table.copy(night, audited.files)
            table.commit(night, audited.files)
        version = table.settle(night)
        leftovers.sweep_table(table.log)
    said = "repaired" if repaired else "already published" if done else "published"
    log.info("%s: %s, ds %s, version %d, %s rows", said, table.root, ds, version, f"{table.rows(ds):,}")
    status = "already-done" if done and not repaired else "done"
    extra = {"version": version, "warnings": warnings, **({"repaired": repaired} if repaired else {})}
    return Outcome(status, score.run_key, {contract.name: table.root}, {}, extra)


def check_ahead(config: Config, ds: str) -> None:
    """Raise what `publish` would raise tonight whatever the stages before it make: the lake, the table or the work
    folder cannot be written, the table is damaged or has other columns, or a later ds is published.

    A night that is published already passes also where a later one is: it may be found done.
    """
    lake = Lake(config.paths.lake)
    lake.check_writable()
    root, work = lake.path(config.publish.table), resolve(config.paths.work)
    try:
        make_dirs(work)
    except OSError as error:
        raise InputError(f"paths.work {work} cannot be made ({error.strerror or error}); set paths.work") from None
    inside = (posixpath.join(root, name) for name in ("_delta_log", f"ds={ds}"))
    places = [work, *((root, *inside) if is_local(root) else ())]
    for place in places:
        if os.path.lexists(place) and not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
            raise InputError(
                f"{place} is not a folder that this user may write; needed one for publishing ds {ds}: fix its "
                "permissions, or set publish.table or paths.work"
            )
    user_types, item_types = ID_TYPES[config.input.user_type], ID_TYPES[config.input.item_type]
    contracts = [recommendations(user, item, config.score.form) for user in user_types for item in item_types]
    PublishedTable(root, contracts[0]).check_ahead(ds, contracts)


def _pass_gates(config: Config, table: PublishedTable, runs: Runs, audited: Audit) -> list[str]:
    """The warnings. Raises GateRefused."""
    newest = table.newest()
    before = None
    if newest is not None:
        ds, entry = newest
        before = gates.Published(ds, entry.run_key if entry else None, entry.model_users if entry else None)
    facts = gates.Facts(
        score_run=runs.score.run_key,
        train_run=str(runs.score.inputs.get("train")),
        rows=sum(file.info.rows for file in audited.files),
        model_users=audited.model_users,
        published=before,
        evaluated=_evaluated(runs.evaluate),
        held_out=runs.prepare.config.get("split", {}).get("strategy") != "none",
    )
    verdicts = gates.judge(facts, config.publish.require)
    refused = [verdict for verdict in verdicts if verdict.refuses]
    warnings = [f"{verdict.check}: {verdict.message}" for verdict in verdicts if not verdict.refuses]
    for warning in warnings:
        log.warning("%s", warning)
    if refused:
        names = [verdict.check for verdict in refused]
        off = names if set(names) <= set(config.publish.require) else []
        raise GateRefused(
            f"ds {runs.score.ds} is not published and what is published stays: "
            + "; ".join(f"{verdict.check}: {verdict.message}" for verdict in refused)
            + (f". To publish it all the same, leave {' and '.join(off)} out of publish.require" if off else ""),
            refused=names,
            warnings=warnings,
        )
    return warnings


def _evaluated(run: Manifest | None) -> gates.Evaluated | None:
    """Raises ContractError where the run's figures cannot be read."""
    if run is None or not run.tables:
        return None if run is None else gates.Evaluated(run.run_key, None)
    path = posixpath.join(run.root, metrics.STORED)
    try:
        return gates.Evaluated(run.run_key, read_json(gates.Figures, path, more_keys=True))
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{path} cannot be read ({error}); needed the figures of evaluate run "
            f"{run.run_key}: remove {run.root} and rerun the job evaluate"
        ) from None


def _restore(config: Config, table: PublishedTable, score: Manifest, infos: dict[str, FileInfo]) -> list[str]:
    """Check what is published already and replace what is damaged. Raises ContractError."""
    sources = dict(zip(infos, score.files(table.contract.name), strict=True))
    deep = config.publish.verify == "deep"
    remedy = f"remove {score.root} and rerun the jobs score and publish for ds {score.ds}"
    repaired = restore(table.root, infos, sources, deep, remedy)
    how = "every byte" if deep else "existence and size; --set publish.verify=deep reads every byte"
    log.info("checked the %d published files of ds %s (%s)", len(infos), score.ds, how)
    return repaired


@contextlib.contextmanager
def _stops_named(config: Config, table: PublishedTable, night: Publication, infos: dict[str, Any]) -> Iterator[None]:
    """An OSError becomes an InputError that says what readers see now."""
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"publishing ds {night.ds} stopped: {said}; {table.state(night, infos)}; needed room and write access in "
            f"{table.root} and in paths.work ({config.paths.work}): fix that and run this again, which finishes it"
        ) from error
