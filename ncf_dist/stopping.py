"""A request to stop: SIGTERM or SIGINT is noted from the first moment, and raised where a job may be cut short.

The standard library only: a process listens before it imports anything large.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)

before_raising: list[Callable[[], object]] = []
"""Called in the signal handler: ends what the main thread waits for, so that no clean-up waits for it again."""

_asked: str | None = None
_raises = False


class Stopped(BaseException):
    """This process was asked to stop. No Exception, because libraries swallow those."""


def _note(number: int, _: FrameType | None) -> None:
    global _asked
    first, _asked = _asked is None, signal.Signals(number).name
    # Once is enough: what is left is cleaning up, which a second signal must not cut short.
    if first and _raises:
        for end in before_raising:
            end()
        raise Stopped(_asked)


def asked() -> str | None:
    """The signal that asked this process to stop, or None."""
    return _asked


def listen() -> None:
    """Note both signals from now on. Only a main thread can; elsewhere nothing happens.

    A signal that was ignored (a shell does that to its background jobs) is listened to all the same: who sends one
    means it.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Note both signals while inside; a request from before counts if it was noted."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    already = _note in before.values()
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if not already:
            _asked = None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first request raises Stopped, wherever the main thread is; one from before does so at once."""
    global _raises
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _raises = True
    try:
        if _asked is not None:
            raise Stopped(_asked)
        yield
    finally:
        _raises = False


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back the handler of SIGINT that a library replaces while inside, if it was not Python's own."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
