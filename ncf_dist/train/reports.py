"""How a rank tells the job of its failure: `error-<rank>.json` beside the spec, which the job raises as its own."""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
import threading

from ncf_dist import errors, retries
from ncf_dist.errors import NcfError, Preempted, TrainingFailed
from ncf_dist.files import list_names, read_json, write_atomic

log = logging.getLogger(__name__)

UNEXPECTED = "unexpected"
"""The kind of a failure that is no NcfError."""
_RETRIES = "retries-"
LOST = "lost"
"""The kind of a rank's that waited for others in vain."""
WRITE_S = 20
"""What a report may take to be written."""


def report(spec: str, rank: int | str, kind: str, message: str) -> None:
    """Write a rank's report. kind: the name of an NcfError, or UNEXPECTED. A folder that cannot be written, or not
    soon, as where the network is cut, is only logged: it must neither hide the failure nor keep the process."""
    path = posixpath.join(posixpath.dirname(spec), f"error-{rank}.json")
    writing = threading.Thread(target=_write, args=(path, {"kind": kind, "message": message}), daemon=True)
    writing.start()
    writing.join(WRITE_S)
    if writing.is_alive():
        log.error("the failure could not be reported: %s was not written within %d s", path, WRITE_S)


def _write(path: str, body: dict[str, str]) -> None:
    try:
        write_atomic(path, json.dumps(body).encode())
    except Exception:  # Each kind of store has errors of its own.
        log.exception("the failure could not be reported")


def tell_retries(spec: str, rank: int | str) -> None:
    """Write down how often this rank had to ask a store again, if it had to."""
    if retries.OURS.taken:
        path = posixpath.join(posixpath.dirname(spec), f"{_RETRIES}{rank}.json")
        write_atomic(path, json.dumps({"retries": retries.OURS.taken}).encode())


def count_retries(folder: str) -> None:
    """Count what the ranks have written down as the job's."""
    for name in list_names(folder):
        if name.startswith(_RETRIES):
            with contextlib.suppress(OSError, ValueError):
                retries.OURS.add(read_json(dict[str, int], posixpath.join(folder, name)).get("retries", 0))


def reports_in(folder: str) -> list[str]:
    """Names of the reports that ranks have written."""
    return [name for name in list_names(folder) if name.startswith("error-") and name.endswith(".json")]


def raise_reported(folder: str) -> None:
    """Raise what the ranks reported. A rank that only lost its peers says no more than that, so what a peer reports
    comes first."""
    reported = []
    for name in reports_in(folder):
        said, message = _read_report(posixpath.join(folder, name))
        kind: type[NcfError] = TrainingFailed if said in (UNEXPECTED, LOST) else getattr(errors, said)
        rank = name.removeprefix("error-").removesuffix(".json")
        reported.append(((said == LOST, said == UNEXPECTED, kind is Preempted, int(rank)), kind, rank, message))
    if reported:
        _, kind, rank, message = min(reported, key=lambda report: report[0])
        raise kind(f"rank {rank}: {message}")


def _read_report(path: str) -> tuple[str, str]:
    """(kind, message) of a rank's report. A damaged report still reports a failure."""
    try:
        body = read_json(dict[str, str], path)
        kind, message = body["kind"], body["message"]
        if kind not in (UNEXPECTED, LOST) and not issubclass(getattr(errors, kind, object), NcfError):
            raise ValueError(f"{kind} is no error of ours")
        return kind, message
    except (OSError, ValueError, TypeError, KeyError) as error:
        return UNEXPECTED, f"its report {path} cannot be read ({error}); its log is above"
