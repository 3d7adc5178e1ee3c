"""How much memory this process and all that it started took together."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil

EVERY_S = 1.0


class Peak:
    """Looks once a second while inside. `bytes`: the most that was seen, resident; what processes share counts for
    each."""

    def __init__(self) -> None:
        self.bytes = resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident())

    def _watch(self) -> None:
        while not self._end.wait(EVERY_S):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Bytes of this process and those below it, now."""
    total = 0
    with contextlib.suppress(psutil.Error):
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total
