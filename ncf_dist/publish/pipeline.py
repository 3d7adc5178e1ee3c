"""Publish one night: fence → audit → copy → one atomic commit → latest.json.

Readers see the old night or the new one. A run that is stopped anywhere leaves the old night in place, or the
new one whole; the same command then finishes the job, and says `already-done` where nothing was left to do.
"""

from __future__ import annotations

import logging

from ncf_dist.artifacts import Lake, Outcome, resolve
from ncf_dist.config import Config
from ncf_dist.errors import InputError
from ncf_dist.publish.audit import Promise, audit, contract_of
from ncf_dist.publish.table import Night, PublishedTable

log = logging.getLogger(__name__)


def publish(config: Config, ds: str) -> Outcome:
    """Make the current score run of `ds` what readers see.

    Raises ContractError: a rule of the audit is broken, nothing changed. StaleRun: a later ds is published.
    BusyRun: another publication came first. InputError: the lake or the work folder cannot be written.
    """
    lake = Lake(config.paths.lake)
    score, prepare = lake.stage(ds, "score").current(), lake.stage(ds, "prepare").current()
    promise = Promise.of(score)
    contract = contract_of(prepare, promise.form)
    night = Night(ds, score.run_key, promise.model_version, promise.k)
    table = PublishedTable(lake.path(config.publish.table), contract)
    files = [table.path_of(night, info.path, info.sha256) for info in score.table(contract).files]
    try:
        done = table.holds(night, files)
        if not done:
            audited = audit(score, prepare, resolve(config.paths.work))
            table.copy(night, audited)
            table.commit(night, audited)
        version = table.settle(night)
    except OSError as error:
        raise InputError(
            f"publishing ds {ds} stopped: {error}; needed room and write access in {table.root} and in "
            f"paths.work ({config.paths.work}): mend that and run this again"
        ) from error
    said = "already published" if done else "published"
    log.info("%s: %s, ds %s, version %d, %s rows", said, table.root, ds, version, f"{table.rows(ds):,}")
    status = "already-done" if done else "done"
    return Outcome(status, score.run_key, {contract.name: table.root}, {}, {"version": version})
