"""Log lines on stderr: with date and level, without secrets, and with the night, the stage, its run key and the attempt
that they are of. As text, or one JSON object a line (`log.format`).

What a line is of is known to this process and, by its environment, to the ranks that it starts.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
from collections.abc import Iterator

from ncf_dist.stopping import asked
from ncf_dist.urls import scrub, scrub_all

ENVIRONMENT = "NCF_LOG"
"""Holds what lines are of, a JSON object: some of FIELDS, and `format`."""
FIELDS = ("ds", "stage", "run_key", "attempt")


def said() -> dict[str, str]:
    """What the lines of this process are of now."""
    return dict(json.loads(os.environ.get(ENVIRONMENT, "{}")))


def say(**facts: str | None) -> None:
    """Have lines say so from now on; None takes a fact away."""
    known = {name: value for name, value in {**said(), **facts}.items() if value is not None}
    os.environ[ENVIRONMENT] = json.dumps(known)


@contextlib.contextmanager
def saying(**facts: str | None) -> Iterator[None]:
    """Have lines say so while inside; what is said inside goes with it."""
    before = os.environ.get(ENVIRONMENT)
    say(**facts)
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


class Formatter(logging.Formatter):
    """who: what stands for the logger, such as `rank 0`; None for its name."""

    def __init__(self, who: str | None = None) -> None:
        super().__init__("%(message)s", "%Y-%m-%d %H:%M:%S")
        self.who = who

    def format(self, record: logging.LogRecord) -> str:
        known, who = said(), self.who or record.name
        message = super().format(record)  # With its traceback, where it has one.
        if known.get("format") == "json":
            when = dt.datetime.fromtimestamp(record.created, dt.timezone.utc).isoformat(timespec="milliseconds")
            line = {"time": when, "level": record.levelname, "logger": who, "message": message}
            return json.dumps(scrub_all({**line, **{name: known[name] for name in FIELDS if name in known}}))
        of = " ".join(known[name] for name in FIELDS if name in known)
        when = self.formatTime(record, self.datefmt)
        return scrub(f"{when} {record.levelname} {who}{f' [{of}]' if of else ''}: {message}")


def log_to_stderr(who: str | None = None) -> None:
    """Have this process log to stderr as all of ours do."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(who))
    # Once this process was asked to stop, Spark's JVM is gone, which is no news.
    handler.addFilter(lambda record: not (asked() and "py4j" in record.pathname))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("botocore", "aiobotocore"):  # Each client says where it found its credentials.
        logging.getLogger(library).setLevel(logging.WARNING)
