"""What goes of one night's folder: runs, attempts that died, checkpoints of finished trainings, old records."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import posixpath
from collections.abc import Iterator

from ncf_dist.clean import steps
from ncf_dist.clean.keep import Kept
from ncf_dist.clean.removal import Kind, Removal
from ncf_dist.errors import ContractError
from ncf_dist.files import is_local, list_names, remove, sizes
from ncf_dist.lake import Lake
from ncf_dist.stage import LINE

CHECKPOINTS = "checkpoints"
RECORDS = ("jobs", "attempts", "gates")


def removals(lake: Lake, ds: str, kept: Kept, before: float, records: bool) -> Iterator[Removal]:
    """What goes of night `ds`, what was made last first, so that no run that is there lacks one that it was made from.

    before: seconds since 1970; nothing goes that was finished, or written by an attempt, after that. records: whether
    what its jobs said stays.
    """
    for stage in reversed(list(LINE)):
        runs = lake.stage(ds, stage)
        for name in list_names(runs.root):
            path, finished = runs.run_path(name), None
            with contextlib.suppress(ContractError):
                finished = runs.find(name)
            if finished is None:
                if ds not in kept.nights and _written(path) < before:
                    yield _removal("attempt", path)
            elif path not in kept.runs and _seconds(finished.finished) < before:
                yield _removal("run", path)
            elif stage == "train" and list_names(posixpath.join(path, CHECKPOINTS)):
                yield _removal("checkpoints", posixpath.join(path, CHECKPOINTS))
    for name in RECORDS if not records else ():
        path = lake.path("runs", ds, name)
        if list_names(path) and _written(path) < before:
            yield _removal("record", path)


def remove_empty(lake: Lake, ds: str, partition: str) -> None:
    """Remove the folders of stages and of the published night where they hold nothing any more. The night's own folder
    stays: its lock is in it."""
    for folder in (*(lake.stage(ds, stage).root for stage in LINE), partition):
        if is_local(folder) and not list_names(folder):
            remove(folder)
            steps.reached("empty")


def _removal(kind: Kind, path: str) -> Removal:
    return Removal(kind, path, sum(size.bytes for size in sizes(path).values()))


def _written(path: str) -> float:
    """When the newest file below was written; infinity where a store does not say, as an attempt may be going on."""
    times = [math.inf if size.modified is None else size.modified for size in sizes(path).values()]
    return max(times, default=0.0)


def _seconds(finished: str) -> float:
    """Of an ISO time; 0 for a manifest of an early version, which does not say."""
    return dt.datetime.fromisoformat(finished).timestamp() if finished else 0.0
