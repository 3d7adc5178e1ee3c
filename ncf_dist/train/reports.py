"""What ranks leave beside the spec for the job: `error-<rank>.json`, which the job reports as its own failure."""

from __future__ import annotations

import json
import logging
import posixpath

from ncf_dist.files import write_atomic

log = logging.getLogger(__name__)

UNEXPECTED = "unexpected"
"""The kind of what is no error of ours."""


def report(spec: str, rank: int | str, kind: str, message: str) -> None:
    """Leave word for the job; a place that cannot be written must not hide the failure itself.

    `kind`: the name of an NcfError, or UNEXPECTED."""
    try:
        write_atomic(
            posixpath.join(posixpath.dirname(spec), f"error-{rank}.json"),
            json.dumps({"kind": kind, "message": message}).encode(),
        )
    except OSError:
        log.exception("the failure could not be reported")
