"""The job clean: runs, attempts that died, checkpoints, old nights and versions of the published table, and entries of
its log go as `retention` says; what readers, the published model and the next night need stays.

Nights that another run holds are passed over. A clean that is stopped anywhere leaves a whole lake: a run ceases to
exist before its files go, readers' files are looked up under the night's lock, and of the log the oldest goes first.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from ncf_dist.charts.text import bytes_text
from ncf_dist.clean import checkpoint
from ncf_dist.clean.forget import forget_in
from ncf_dist.clean.keep import Kept, what_stays
from ncf_dist.clean.nights import drop, night_of
from ncf_dist.clean.removal import Removal, totals
from ncf_dist.clean.runs import removals, remove_empty
from ncf_dist.clean.versions import Published
from ncf_dist.config import Config
from ncf_dist.errors import BusyRun, ConfigError, ContractError, StaleRun
from ncf_dist.files import resolve
from ncf_dist.lake import Lake
from ncf_dist.prepare.forget import Forget
from ncf_dist.publish import latest
from ncf_dist.publish.log import DeltaLog
from ncf_dist.stage import Outcome

log = logging.getLogger(__name__)
DAY = 86_400


def clean(config: Config, ds: str) -> Outcome:
    """Remove what `retention` does not keep. Raises ContractError where the published table is damaged, and then
    removes nothing."""
    work = _Clean(config)
    done, busy = list[Removal](), list[str]()
    for removal in work.leaving():
        with _passing_over(busy, night_of(removal)), work.lake.hold(night_of(removal)):
            drop(work.delta, night_of(removal))
            done.append(removal)
    published = work.published()
    for night in work.nights:
        if any(work.of_night(night, published)):
            with _passing_over(busy, night), work.lake.hold(night):
                # Once more, now that nobody else can change this night.
                done += _carried_out(work.of_night(night, work.published()))
                remove_empty(work.lake, night, f"{work.delta.root}/ds={night}")
    if (published := work.published()) is not None:
        if checkpoint.is_due(published):
            checkpoint.write(published, resolve(config.paths.work))
        done += _carried_out(checkpoint.outdated(published, work.before))
    log.info("removed %s", _in_words(done))
    warnings = [f"passed over, as another run holds it: ds {night}" for night in busy]
    return Outcome("done", None, {}, _metrics(done), {"removed": totals(done), "warnings": warnings})


def forecast(config: Config, ds: str) -> Outcome:
    """What `clean` would remove, to stderr; nothing is written."""
    work = _Clean(config)
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
        with _passing_over(busy, night), lake.hold(night):
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


class _Clean:
    """What is there, and what of it goes."""

    def __init__(self, config: Config) -> None:
        self.config, self.now = config, time.time()
        self.before = self.now - config.retention.days * DAY
        self.lake = Lake(config.paths.lake)
        self.delta = DeltaLog(self.lake.path(config.publish.table))
        published = self.published()
        self.kept = self._what_stays(published)
        runs = self.lake.nights()
        self.recorded = set(runs[-config.retention.records :])
        self.nights = sorted({*runs, *(published.nights() if published is not None else ())})
        """Every night that has a run, or files in the published table."""

    def published(self) -> Published | None:
        return Published.open(self.delta, self.config.retention, self.before)

    def leaving(self) -> Iterator[Removal]:
        """Nights that leave the published table."""
        published = self.published()
        for night in published.leaving() if published is not None else ():
            yield Removal("night", f"{self.delta.root}/ds={night}", 0)

    def of_night(self, ds: str, published: Published | None) -> Iterator[Removal]:
        """published: the table as it is now, where nobody else may change this night."""
        yield from removals(self.lake, ds, self.kept, self.before, ds in self.recorded)
        if published is not None:
            yield from published.unneeded(ds, self.now)

    def _what_stays(self, published: Published | None) -> Kept:
        shown = {night: published.explained(night) for night in published.shown} if published is not None else {}
        keys = [(night, str(found[1].run_key)) for night, found in shown.items() if found is not None]
        return what_stays(self.lake, self.config, keys)


def _carried_out(found: Iterable[Removal]) -> list[Removal]:
    gone = list(found)  # All of it is looked up before the first thing goes.
    for removal in gone:
        log.info("removing %s %s (%s)", removal.kind, removal.path, bytes_text(removal.bytes))
        removal.carry_out()
    return gone


@contextlib.contextmanager
def _passing_over(busy: list[str], night: str) -> Iterator[None]:
    """A night that somebody else works on is left to the next clean."""
    try:
        yield
    except (BusyRun, StaleRun) as error:
        log.warning("ds %s is passed over: %s", night, error)
        busy.append(night)


def _metrics(found: list[Removal]) -> dict[str, int]:
    return {"clean.bytes": sum(removal.bytes for removal in found), "clean.removed": len(found)}


def _in_words(found: list[Removal]) -> str:
    parts = [f"{of['count']:,} {kind} ({bytes_text(of['bytes'])})" for kind, of in totals(found).items()]
    return ", ".join(parts) or "nothing"
