"""Commits of the job clean to the published table, a night each."""

from __future__ import annotations

import logging
import posixpath

from ncf_dist.clean.removal import Removal
from ncf_dist.clean.versions import DROPPED
from ncf_dist.contracts import PARTITION
from ncf_dist.publish.commits import swap
from ncf_dist.publish.log import DeltaLog

log = logging.getLogger(__name__)


def night_of(removal: Removal) -> str:
    return posixpath.basename(removal.path).removeprefix(f"{PARTITION}=")


def drop(delta: DeltaLog, ds: str) -> None:
    """Take a night out of the table; its files stay for readers of the versions before. Raises BusyRun or StaleRun
    where another commit came first."""
    swap(delta, delta.opened(), ds, [], {"ncf.files": {}, DROPPED: "retention"})
    log.info("ds %s has left %s, as it is older than the nights that retention.published keeps", ds, delta.root)
