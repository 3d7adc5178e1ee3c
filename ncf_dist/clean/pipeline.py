"""The job clean: runs, attempts that died, checkpoints, old nights and versions of the published table, and entries of
its log go as `retention` says; what readers, the published model and the next night need stays.

Nights that another run holds are passed over. A clean that is stopped anywhere leaves a whole lake: a run ceases to
exist before its files go, readers' files are looked up under the night's lock, and of the log the oldest goes first.
"""

from __future__ import annotations

import functools
import logging
import sys

from ncf_dist.charts.text import bytes_text
from ncf_dist.clean import checkpoint
from ncf_dist.clean.forget import forget_in
from ncf_dist.clean.nights import drop, night_of
from ncf_dist.clean.removal import Removal, totals
from ncf_dist.clean.runs import remove_empty
from ncf_dist.clean.work import Work, carried_out, passing_over
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.files import resolve
from ncf_dist.lake import Lake
from ncf_dist.prepare.forget import Forget
from ncf_dist.publish import latest, leftovers
from ncf_dist.publish.log import DeltaLog
from ncf_dist.stage import Outcome

log = logging.getLogger(__name__)


def clean(config: Config, ds: str) -> Outcome:
    """Remove what `retention` does not keep. Raises ContractError where the published table is damaged, and then
    removes nothing."""
    work = Work(config)
    done, busy = list[Removal](), list[str]()
    for removal in work.leaving():
        with passing_over(busy, night_of(removal)), work.lake.hold(night_of(removal)):
            drop(work.delta, night_of(removal))
            done.append(removal)
    published = work.published()
    for night in work.nights:
        if any(work.of_night(night, published)):
            with passing_over(busy, night), work.lake.hold(night):
                # Once more, now that nobody else can change this night.
                done += carried_out(work.of_night(night, work.published()))
                remove_empty(work.lake, night, f"{work.delta.root}/ds={night}")
    if (published := work.published()) is not None:
        leftovers.sweep_log(work.delta)
        if checkpoint.is_due(published):
            checkpoint.write(published, resolve(config.paths.work))
        else:
            checkpoint.name_newest(published)
        done += carried_out(checkpoint.outdated(published, work.before))
    log.info("removed %s", _in_words(done))
    warnings = [f"passed over, as another run holds it: ds {night}" for night in busy]
    return Outcome("done", None, {}, _metrics(done), {"removed": totals(done), "warnings": warnings})


def forecast(config: Config, ds: str) -> Outcome:
    """What `clean` would remove, to stderr; nothing is written."""
    work = Work(config)
    found = list(work.leaving())
    published = work.published()
    found += [removal for night in work.nights for removal in work.of_night(night, published)]
    if published is not None:
        found += checkpoint.outdated(published, work.before)
    for removal in found:
        print(f"{bytes_text(removal.bytes):>10}  {removal.kind:<11}  {removal.path}", file=sys.stderr)
    print(f"would remove {_in_words(found)}", file=sys.stderr, flush=True)
    listed = [{"kind": removal.kind, "path": removal.path, "bytes": removal.bytes} for removal in found]
    return Outcome("done", None, {}, _metrics(found), {"would_remove": totals(found), "removals": listed})


def forget(config: Config, ds: str) -> Outcome:
    """clean --forget: take the people on the list of input.forget out of every night that readers see, a commit a
    night. Raises ConfigError without a list; ContractError where a night could not be read or is not ours, once all
    others are done."""
    path, lake = config.input.forget, Lake(config.paths.lake)
    if path is None:
        raise ConfigError("clean --forget without input.forget; needed the path of a list of people to be forgotten")
    delta = DeltaLog(lake.path(config.publish.table))
    table, done, busy, wrong = delta.open(), dict[str, int](), list[str](), list[str]()
    for night in sorted(delta.nights(table)) if table is not None else ():
        with passing_over(busy, night), lake.hold(night):
            leftovers.sweep(f"{delta.root}/ds={night}")  # What a killed forget was writing here.
            try:
                done[night] = forget_in(delta, night, functools.partial(Forget.read, path))
            except ContractError as error:
                log.error("%s", error)
                wrong.append(str(error))
    if any(done.values()):
        latest.settle(delta)
    if wrong:
        raise ContractError(f"{len(wrong)} published nights may still name people of input.forget: {'; '.join(wrong)}")
    changed = {night: rows for night, rows in done.items() if rows}
    log.info("took %d rows of people on the list out of %d nights", sum(changed.values()), len(changed))
    warnings = [f"passed over, as another run holds it: ds {night}; run this again" for night in busy]
    status = "done" if changed else "already-done"
    extra = {"forgotten_rows": changed, "warnings": warnings}
    return Outcome(status, None, {}, {"clean.forgotten_rows": sum(changed.values())}, extra)


def _metrics(found: list[Removal]) -> dict[str, int]:
    return {"clean.bytes": sum(removal.bytes for removal in found), "clean.removed": len(found)}


def _in_words(found: list[Removal]) -> str:
    parts = [f"{of['count']:,} {kind} ({bytes_text(of['bytes'])})" for kind, of in totals(found).items()]
    return ", ".join(parts) or "nothing"
