"""Publish one night: fence → audit → gates → copy → canary → one atomic commit → latest.json.

Any night, in any order: the first run of a ds, another run in its place, or an older ds (a backfill). Readers see the
old night or the new one. A run that is stopped anywhere leaves the old night in place, or the new one whole; the same
command then finishes the job, and says `already-done` where nothing was left to do.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ncf_dist.config import UNDONE, Config
from ncf_dist.errors import InputError
from ncf_dist.files import exists, read_bytes, resolve
from ncf_dist.inputs import ids_digest, listed_ids
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo
from ncf_dist.publish import latest, leftovers, steps
from ncf_dist.publish.audit import Promise, audit, contract_of
from ncf_dist.publish.canary import canary
from ncf_dist.publish.judging import judge
from ncf_dist.publish.log import LATEST, DeltaLog
from ncf_dist.publish.repair import restore, restore_all
from ncf_dist.publish.runs import Runs, find_runs
from ncf_dist.publish.standing_in import standing_in
from ncf_dist.publish.table import Publication, PublishedTable
from ncf_dist.refits import REFIT
from ncf_dist.stage import Outcome, Upstream

log = logging.getLogger(__name__)


def publish(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Make the score run of `ds` that fits this config what readers see.

    Raises ContractError: a rule of the audit is broken, or the table is damaged. GateRefused: the night is not good
    enough. StaleRun: a rollback took this run back, or another run has changed this ds meanwhile. BusyRun: another
    publication came first. InputError: the lake or the work
    folder cannot be written. What readers see changes in none of these, but for InputError, which says so.
    """
    lake = Lake(config.paths.lake)
    runs = find_runs(lake, config, ds, given if given is not None else standing_in(config, ds))
    score, promise = runs.score, Promise.of(runs.score)
    contract = contract_of(runs.prepare, promise.form)
    forget, path = runs.prepare.inputs.get("forget"), config.input.forget
    listed = ids_digest(listed_ids(path)) if forget is not None and path is not None else None
    said = {name: why for name, why in config.gates.overrides.items() if name == UNDONE}
    named = (ds, score.run_key, promise.model_version, promise.k)
    night = Publication(*named, forget=forget, listed=listed, overrides=said, refit=score.facts.get(REFIT))
    table = PublishedTable(lake.path(config.publish.table), contract)
    infos = {table.path_of(night, info.path, info.sha256): info for info in score.table(contract).files}
    warnings: list[str] = []
    repaired: list[str] = []
    judged: dict[str, Any] = {}
    with _stops_named(config, table, night, infos):
        steps.reached("begun")
        done = table.holds(night, infos)
        steps.reached("checked")
        if done:
            repaired = _restore(config, table, score, infos)
        else:
            warnings, judged = _make_visible(config, table, runs, night, infos)
        version = table.settle(night)
        leftovers.sweep_table(table.log)
    what = "repaired" if repaired else "already published" if done else "published"
    log.info("%s: %s, ds %s, version %d, %s rows", what, table.root, ds, version, f"{table.rows(ds):,}")
    status = "already-done" if done and not repaired else "done"
    extra = {"version": version, "warnings": warnings, **judged, **({"repaired": repaired} if repaired else {})}
    return Outcome(status, score.run_key, {contract.name: table.root}, {}, extra)


def _make_visible(
    config: Config, table: PublishedTable, runs: Runs, night: Publication, infos: dict[str, FileInfo]
) -> tuple[list[str], dict[str, Any]]:
    """Audit, judge, copy, read as consumers do, and commit. (warnings, what the gates said). Raises what `publish`
    does."""
    lake = Lake(config.paths.lake)
    audited = audit(runs.score, runs.prepare, resolve(config.paths.work))
    steps.reached("audited")
    decision, measured = judge(config, table, runs, audited)
    if decision.refused:
        decision.enforce(lake)
    steps.reached("judged")
    table.copy(night, audited.files)
    candidates = {posixpath.join(table.root, path): info.rows for path, info in infos.items()}
    decision = replace(decision, checks=[*decision.checks, canary(config.gates, table.contract, candidates)])
    warnings = decision.enforce(lake)
    night = replace(
        night,
        model_users=audited.model_users,
        values=measured.stored(),
        overrides={**night.overrides, **decision.overridden},
    )
    table.commit(night, audited.files)
    return warnings, {"gates": decision.gates()}


def repair(config: Config, ds: str) -> Outcome:
    """Make latest.json anew from the log, and damaged published files from the score runs, of every night: `--repair`.
    Nothing is published, so `ds` does not matter. Raises InputError, ContractError."""
    lake = Lake(config.paths.lake)
    delta = DeltaLog(lake.path(config.publish.table))
    path = posixpath.join(delta.root, LATEST)
    try:
        if delta.open() is None:
            raise InputError(f"{delta.root} has no published night; look at paths.lake and publish.table")
        before = read_bytes(path) if exists(path) else None
        version = latest.settle(delta).version()
        written = before != (read_bytes(path) if exists(path) else None)
        repaired = [*([LATEST] if written else []), *restore_all(lake, delta, config.publish.verify == "deep")]
        leftovers.sweep_table(delta)
    except OSError as error:
        raise InputError(
            f"the repair of {delta.root} stopped: {' '.join(str(error).split())}; needed to read and write it: fix "
            "that and run this again"
        ) from error
    log.info("%s, version %d: repaired %s", delta.root, version, ", ".join(repaired) or "nothing, as all is whole")
    extra = {"version": version, "repaired": repaired}
    return Outcome("done" if repaired else "already-done", None, {config.publish.table: delta.root}, {}, extra)


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
