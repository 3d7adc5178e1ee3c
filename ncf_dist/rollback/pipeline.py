"""The job rollback: readers get an earlier version of one night, atomically, as a new commit that says what it undoes.

The models and tables of the run that is undone stay; publish refuses that run until somebody overrides it.
"""

from __future__ import annotations

import functools
import logging

import numpy as np
import pyarrow as pa

from ncf_dist.config import Config
from ncf_dist.errors import InputError
from ncf_dist.lake import Lake
from ncf_dist.prepare.forget import Forget
from ncf_dist.publish.undo import Listed, roll_back
from ncf_dist.stage import Outcome

log = logging.getLogger(__name__)


def rollback(config: Config, ds: str) -> Outcome:
    """Undo the last publication of `ds`, or go back to the version `publish.rollback_to`. A second run says
    `already-done`. Raises what `roll_back` raises; InputError where the table cannot be written, and then the same
    command finishes it."""
    root = Lake(config.paths.lake).path(config.publish.table)
    try:
        made = roll_back(root, ds, config.publish.rollback_to, _listed(config.input.forget))
    except OSError as error:
        raise InputError(
            f"rolling back ds {ds} stopped: {' '.join(str(error).split())}; needed room and write access in {root}: "
            "readers see what they saw before, or the earlier version whole; fix that and run this again, which "
            "finishes it"
        ) from error
    now = f"of run {made.run_key}" if made.run_key else "gone"
    log.info("%s: ds %s is %s, version %d; undone: %s", root, ds, now, made.version, ", ".join(made.keys) or "nothing")
    extra = {"version": made.version, "undone": made.keys}
    return Outcome(made.status, made.run_key, {config.publish.table: root}, {}, extra)


def _listed(path: str | None) -> Listed | None:
    """Who is on the list of input.forget, by user ids of whatever type the table has; None without a list."""
    if path is None:
        return None
    read = functools.cache(functools.partial(Forget.read, path))

    def among(ids: pa.Array) -> np.ndarray:
        return read(ids.type).among(ids)

    return among
