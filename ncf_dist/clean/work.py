"""What one run of the job clean looks at, and what of it goes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator

from ncf_dist import locks
from ncf_dist.charts.text import bytes_text
from ncf_dist.clean import steps
from ncf_dist.clean.keep import Kept, what_stays
from ncf_dist.clean.removal import Removal
from ncf_dist.clean.runs import removals
from ncf_dist.clean.versions import Published
from ncf_dist.config import Config
from ncf_dist.errors import BusyRun, StaleRun
from ncf_dist.lake import Lake
from ncf_dist.publish.log import DeltaLog

log = logging.getLogger(__name__)
DAY = 86_400


class Work:
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


def carried_out(found: Iterable[Removal]) -> list[Removal]:
    gone = list(found)  # All of it is looked up before the first thing goes.
    steps.reached("looked-up")
    for removal in gone:
        # Else another run may be making, or have published, what looked left behind: one that was suspended wakes here.
        locks.confirm(locks.FRESH_S)
        log.info("removing %s %s (%s)", removal.kind, removal.path, bytes_text(removal.bytes))
        removal.carry_out()
    return gone


@contextlib.contextmanager
def passing_over(busy: list[str], night: str) -> Iterator[None]:
    """A night that somebody else works on is left to the next clean."""
    try:
        yield
    except (BusyRun, StaleRun) as error:
        log.warning("ds %s is passed over: %s", night, error)
        busy.append(night)
