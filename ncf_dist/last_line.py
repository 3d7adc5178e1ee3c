"""What a job says at its end: one short JSON line for a scheduler, and a file beside it with all the rest.

The line is under 1 kB whatever happened, so that logs and schedulers take it whole: what does not fit is left out, the
least important first, and the file has it. That is in the lake (`runs/<ds>/jobs/`) for jobs that hold a night; for
others, and where the lake cannot be written, in the work folder (`jobs/`). Where neither can be, or no config was read,
`details` is null and all there is to say is in the log.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ncf_dist import __version__
from ncf_dist.files import make_dirs, read_bytes, write_atomic

log = logging.getLogger(__name__)

Report = Mapping[str, Any]

MAX_BYTES = 999
ERROR_CHARACTERS = 300
LEAST_CHARACTERS = 20
"""What a text is cut to at the least."""
MOST = {
    **{
        "run_key": 100,
        "error": 500,
        "nights": 300,
        "details": 400,
        "lake": 300,
        "version": 40,
        "model_version": 80,
        "rows": 250,
        "retries": 12,
    },
    **{"metrics": 130, "warnings": 100, "outputs": 400, "runs": 400},
}
"""What is wanted most, the first first, and the bytes that each of them may take; metrics and warnings take what is
left, too."""
HEADLINES = ("{}.ndcg@{}", "{}.hr@{}")
"""Of the protocols `full` and `candidates`, at ten or the largest K there is."""
RATINGS = ("rating.rmse", "rating.mae")
ORDER = (
    *("job", "ds", "run_key", "status", "error", "nights", "rows", "metrics", "version", "model_version", "warnings"),
    *("retries", "outputs", "runs", "lake", "details"),
)
"""Of the line's keys; others follow, and `seconds` is last."""
FILE_ONLY = {"traceback", "command", "work", "exit_code", "intervals", "comparisons", "gates", "details_of_nights"}
PROSE = {"error", "warnings"}
"""What may be cut anywhere. Of the rest, a path for instance, a text is there whole or not at all."""
_NO_ROOM = object()


def line(report: Report) -> str:
    """The last line of stdout for all that is known of a job (`report`, whose `details` is the file's path)."""
    found = {key: value for key, value in _lean(report).items() if value is not None}
    lake, runs = found.get("lake"), found.get("runs", {})
    found["runs"] = {name: _relative(path, lake) for name, path in runs.items()} or None
    found["outputs"] = {
        name: path for name, path in found.get("outputs", {}).items() if not _inside(path, runs.values())
    }
    found["details"] = _relative(found.get("details"), lake)
    found["error"] = _cut(found["error"], ERROR_CHARACTERS) if "error" in found else None
    found["metrics"] = _headlines_first(found.get("metrics", {}))

    made: dict[str, Any] = {"job": found["job"], "ds": found.get("ds"), "run_key": None, "status": found["status"]}
    made |= {"outputs": {}, "metrics": {}, "details": None, "seconds": found["seconds"]}
    others = {key: MAX_BYTES for key in found if key not in {*made, *ORDER, *FILE_ONLY}}
    for key, most in [*MOST.items(), ("metrics", MAX_BYTES), *others.items(), ("warnings", MAX_BYTES)]:
        value = found.get(key)
        room = MAX_BYTES - len(_text({**made, key: None})) + len("null")
        if value is not None and (part := _fitted(value, min(most, room), key in PROSE)) is not _NO_ROOM:
            made[key] = part
    seconds = made.pop("seconds")
    ordered = {key: made.pop(key) for key in ORDER if key in made}
    return _text({**ordered, **made, "seconds": seconds})


def keep(report: Report, night: str | None, work: str) -> str | None:
    """Write all of `report` into a file of its own; returns its path, or None where no place can be written, and then
    it is logged. night: the folder of this ds in the lake, for a job that holds it; work: the work folder."""
    now = dt.datetime.now(dt.timezone.utc)
    name = f"{now:%Y%m%dT%H%M%S}-{report['job']}-{os.getpid()}.json"
    whole = _lean({**report, "ncf_dist": __version__, "finished": now.isoformat()})
    for folder in (night, work):
        if folder is None:
            continue
        path = posixpath.join(folder, "jobs", name)
        try:
            make_dirs(posixpath.dirname(path))
            write_atomic(path, json.dumps(whole, indent=1).encode())
            log.info("all that this job has to say: %s", path)
            return path
        except Exception as error:  # A file system of somebody else may raise anything, and the job is over.
            log.warning("%s cannot be written (%s)", path, " ".join(str(error).split()) or type(error).__name__)
    log.warning("what the last line leaves out is in no file, so here it is: %s", json.dumps(whole))
    return None


def read(text: str) -> dict[str, Any]:
    """All that a job said, from its last line: the file that it names where there is one, else the line itself."""
    short: dict[str, Any] = json.loads(text)
    if short["details"] is None:
        return short
    whole: dict[str, Any] = json.loads(read_bytes(posixpath.join(short.get("lake", ""), short["details"])))
    return whole


# ---- fitting ---------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """ASCII, so that a character is a byte whatever the terminal takes."""
    return json.dumps(value)


def _fitted(value: Any, room: int, prose: bool) -> Any:
    """As much of `value` as JSON writes in `room` bytes: of a mapping, or of texts, those that come first; of prose its
    beginning and its end; _NO_ROOM where nothing is left."""
    if isinstance(value, Mapping) and value:
        kept: dict[str, Any] = {}
        for key, inner in value.items():
            part = _fitted(inner, room - len(_text({**kept, key: 0})) + 1, prose)
            if part is not _NO_ROOM:
                kept[key] = part
        return kept or _NO_ROOM
    if len(_text(value)) <= room:
        return value
    if isinstance(value, str) and prose:
        shorter = (_cut(value, length) for length in range(min(len(value), room), LEAST_CHARACTERS, -1))
        return next((text for text in shorter if len(_text(text)) <= room), _NO_ROOM)
    return _some(value, room) if isinstance(value, list) and prose else _NO_ROOM


def _some(entries: list[Any], room: int) -> Any:
    """The first entries, and as the last how many more there are."""
    for count in range(min(len(entries), 3), 0, -1):
        more = [f"{len(entries) - count} more"] if count < len(entries) else []
        each = (room - len(_text(more)) - len("[]")) // count - len(", ")
        shown = [_fitted(entry, each, True) for entry in entries[:count]]
        if _NO_ROOM not in shown and len(_text([*shown, *more])) <= room:
            return [*shown, *more]
    return _NO_ROOM


def _cut(text: str, most: int) -> str:
    """At most so many characters, on one line: the beginning says what was found, the end what to do."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - len(' ... ')]} ... {text[len(text) - end :]}"


def _headlines_first(metrics: Report) -> dict[str, Any]:
    """What people ask for first: the model's figures, popularity's beside them, then the order they came in."""
    names: list[str] = []
    for protocol in ("full", "candidates"):
        ks = [int(found[1]) for name in metrics if (found := re.fullmatch(rf"{protocol}\.ndcg@(\d+)", name))]
        k = 10 if 10 in ks or not ks else max(ks)
        for headline in HEADLINES:
            name = headline.format(protocol, k)
            names += [name, f"popularity.{name}"]
    names += [f"{before}{name}" for name in RATINGS for before in ("", "popularity.", "mean.")]
    first = {name: metrics[name] for name in names if name in metrics}
    return {name: _rounded(value) for name, value in {**first, **metrics}.items()}


def _rounded(value: Any) -> Any:
    """Five digits: the file has all of them. The largest numbers stay as they are, or they would be infinite."""
    if not isinstance(value, float):
        return value
    short = float(f"{value:.5g}")
    return short if math.isfinite(short) else value


def _lean(value: Any) -> Any:
    """`value` as JSON has it: keys are text, and a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _lean(inner) for key, inner in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [_lean(inner) for inner in value]
    return str(value)


def _relative(path: str | None, lake: str | None) -> str | None:
    """`path` from the lake on, where it is in it."""
    return path[len(lake) + 1 :] if path and lake and path.startswith(f"{lake}/") else path


def _inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
