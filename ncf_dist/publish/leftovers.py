"""What runs that died left in the published table, and nothing that a version or latest.json needs.

Half-written files of our own go as soon as their writer is dead, those of delta-rs when they are old. Whole files that
were staged and never committed go after a day, and only where the log still has all its entries: then whatever no
entry ever added was never visible to anybody. Object stores have no half-written files, and a bucket's rules for the
rest."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Iterator

from ncf_dist.contracts import PARTITION
from ncf_dist.files import is_local, list_names, remove
from ncf_dist.publish import steps
from ncf_dist.publish.log import DeltaLog
from ncf_dist.scratch import sweep_temporary

STALE_SECONDS = 3_600
"""Age at which a half-written file is swept up whose owner cannot be asked."""
STAGED_SECONDS = 86_400
"""Age at which a staged file is taken for left behind: a publication takes minutes."""
_HALF_WRITTEN = re.compile(r"\.tmp$|\.json#\d+$")

log = logging.getLogger(__name__)


def sweep(folder: str) -> None:
    """Remove what killed writers left half-written in a folder, which readers ignore."""
    if not is_local(folder):
        return
    sweep_temporary(folder)
    for name in list_names(folder):
        path = posixpath.join(folder, name)
        if _HALF_WRITTEN.search(name) and _age(path) > STALE_SECONDS:
            remove(path)
            steps.reached("swept")


def sweep_table(delta: DeltaLog) -> None:
    """Remove what is left of runs that died, in the whole table."""
    if not is_local(delta.root):
        return
    sweep_log(delta)
    with _tolerated(delta.root):
        needed = _ever_added(delta)
        for night in [name for name in list_names(delta.root) if name.startswith(f"{PARTITION}=")]:
            sweep(posixpath.join(delta.root, night))
            if needed is not None:
                _sweep_staged(delta.root, night, needed)


def sweep_log(delta: DeltaLog) -> None:
    """Remove what killed writers left half-written beside the log and in it."""
    with _tolerated(delta.root):
        for name in ("", "_delta_log"):
            sweep(posixpath.join(delta.root, name))


@contextlib.contextmanager
def _tolerated(root: str) -> Iterator[None]:
    """What cannot be removed is said, and stops nothing."""
    try:
        yield
    except OSError as error:
        log.warning("leftovers in %s cannot be removed (%s); the next run tries again", root, error)


def _sweep_staged(root: str, night: str, needed: set[str]) -> None:
    folder = posixpath.join(root, night)
    old = _age(folder) > STAGED_SECONDS
    for name in list_names(folder):
        path = posixpath.join(folder, name)
        if name.endswith(".parquet") and f"{night}/{name}" not in needed and _age(path) > STAGED_SECONDS:
            log.info("removed %s, which was staged and never published", path)
            remove(path)
            steps.reached("swept")
    if old and not list_names(folder):
        os.rmdir(folder)
        steps.reached("swept")


def _ever_added(delta: DeltaLog) -> set[str] | None:
    """Every path that an entry of the log ever added, and those of latest.json; None where the log lacks entries."""
    table = delta.opened()
    entries = [delta.entry(version) for version in range(table.version() + 1)]
    if any(entry is None for entry in entries):
        return None
    latest = delta.latest()
    if latest is None:
        return None
    return {*latest.files, *(path for entry in entries if entry is not None for path in entry.added)}


def _age(path: str) -> float:
    """Seconds since it was written; 0 for what has gone meanwhile."""
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
