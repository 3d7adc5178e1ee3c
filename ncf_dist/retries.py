"""Trying again what a store could not do for a moment: with back-off, within a budget, counted.

A request is tried for about a minute. All waits of a process together have a budget, so that a store which stays away
ends a job soon instead of once for each of its requests.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

TRIES = 12
FIRST_S, LONGEST_S = 0.1, 10.0
BUDGET_S = 900.0
"""What a process waits for stores in all its life."""
_BUSY = {408, 429, 500, 502, 503, 504}
_PASSING = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict"}
_OF_THE_WIRE = {
    "HTTPClientError",
    "ConnectionError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",
}
"""Names of the classes, whose packages are not imported for them: botocore's, aiohttp's."""

_OVER = "_ncf_tried_enough"
"""Set on an error that is given on: a caller who tries again, too, would multiply the tries."""

log = logging.getLogger(__name__)


class Retries:
    """The retries of one process."""

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self.budget_s = budget_s
        self.taken = 0
        self.waited_s = 0.0
        self._lock = threading.Lock()

    def pause(self, failed: int, error: BaseException) -> float | None:
        """Seconds to wait before the next try of a request that has failed so many times; None where it is over."""
        if failed >= TRIES or not transient(error):
            error.__dict__[_OVER] = True
            return None
        # Two that were turned away at once must not come again at once.
        seconds: float = min(LONGEST_S, FIRST_S * 2 ** (failed - 1)) * random.uniform(0.5, 1.0)
        with self._lock:
            if self.waited_s + seconds > self.budget_s:
                return None
            self.taken, self.waited_s = self.taken + 1, self.waited_s + seconds
            taken = self.taken
        if taken == 10 ** (len(str(taken)) - 1):  # 1, 10, 100: a store that is ill may take thousands.
            log.warning("a store did not answer as it should (%s); retries so far: %d", _shown(error), taken)
        return seconds

    def add(self, taken: int) -> None:
        """Count those of another process of this job."""
        with self._lock:
            self.taken += taken


OURS = Retries()
"""Of this process, and, in a job's, of those that it started as far as they tell."""


def retried(call: Callable[[], T]) -> T:
    """What `call` returns, at its first try that does not fail for a passing reason."""
    failed = 0
    while True:
        try:
            return call()
        except Exception as error:
            failed += 1
            if (seconds := OURS.pause(failed, error)) is None:
                raise
        time.sleep(seconds)


async def retried_async(call: Callable[[], Awaitable[T]]) -> T:
    """`retried` for a coroutine."""
    failed = 0
    while True:
        try:
            return await call()
        except Exception as error:
            failed += 1
            if (seconds := OURS.pause(failed, error)) is None:
                raise
        await asyncio.sleep(seconds)


def transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    if _OVER in error.__dict__:
        return False
    answer = answered(error)
    if answer is not None:
        return answer[0] in _BUSY or answer[1] in _PASSING
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError) or bool(names & _OF_THE_WIRE)


def answered(error: BaseException) -> tuple[int, str] | None:
    """(HTTP status, error code) that a store answered with; None where `error` is not of that kind."""
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
    return None


def _shown(error: BaseException) -> str:
    answer = answered(error)
    return " ".join(dict.fromkeys(map(str, answer))) if answer else type(error).__name__
