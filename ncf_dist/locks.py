"""The lock of a lake that is a URL: an object that says who holds it, which its owner writes anew every few seconds.

An owner whose heartbeat has stopped is dead, or as good as dead: whoever waits sees its lock grow old by the store's
own clock, and takes it over. Each change is a put on condition (`files.create`, `files.replace`), so that one of
several wins. An owner that was only slow, or cut off, learns with its next heartbeat that it has lost the lock, and
`confirm` stops it before it makes anything visible. A lock that is given back stays as an object that says so: it
cannot be removed on condition everywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ncf_dist import files
from ncf_dist.errors import BusyRun, StaleRun
from ncf_dist.stored import parse_json

BEAT_S = 10.0
"""Between two heartbeats."""
DEAD_S = 60.0
"""Age at which a lock is taken over: its owner has missed six heartbeats."""
FRESH_S = 2 * BEAT_S
"""So soon after a heartbeat nobody can have taken a lock over."""
POLL_S = 1.0

log = logging.getLogger(__name__)
_held: list[Lock] = []


@dataclass(frozen=True)
class Owner:
    """What a lock's object says. token: of one holding; beat: counts the heartbeats; free: it was given back."""

    token: str
    host: str
    process: int
    machine: str
    beat: int = 0
    free: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def here(cls) -> Owner:
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _machine())

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine, since it was started, that has ended. (Where its number is another
        process's by now, the lock has to grow old.)"""
        return self.machine == _machine() != "" and not os.path.exists(f"/proc/{self.process}")


def _machine() -> str:
    """Names this start of this machine and its space of process numbers; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _now() -> tuple[float, float]:
    """Two clocks: one stands still while the machine sleeps, the other may be set."""
    return time.monotonic(), time.time()


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: str, what: str, owner: Owner, tag: str) -> None:
        self.path, self.what, self.owner, self._tag = path, what, owner, tag
        self.lost = False
        self._renewed, self._asked = time.monotonic(), (-math.inf, -math.inf)
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._thread.start()

    def confirm(self, fresh_s: float = 0.0) -> None:
        """Raise StaleRun where the lock is not ours any more. It is asked of the store, now, unless a heartbeat of the
        last `fresh_s` seconds says it."""
        asked = max(now - then for now, then in zip(_now(), self._asked, strict=True))
        if (self.lost or asked >= fresh_s) and not self._beat():
            raise StaleRun(
                f"this run has lost {self.what} to another one, as its heartbeat had stopped for more than "
                f"{DEAD_S:.0f} s; it makes nothing visible any more: look at what the other run does, and run this "
                "again"
            )

    def give_back(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._busy:
            if not self.lost:
                free = Owner(**{**asdict(self.owner), "free": True})
                self.lost = files.replace(self.path, free.encoded(), self._tag) is None

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if not self._beat():
                    log.error("%s was lost to another run: this one will stop", self.what)
                    return
            except Exception as error:  # The store may answer again before the lock has grown old.
                since = time.monotonic() - self._renewed
                log.warning("no heartbeat of %s for %.0f s: %s", self.what, since, error)

    def _beat(self) -> bool:
        """Whether the lock is still ours."""
        with self._busy:
            if self.lost:
                return False
            began, owner = _now(), Owner(**{**asdict(self.owner), "beat": self.owner.beat + 1})
            tag = files.replace(self.path, owner.encoded(), self._tag)
            if tag is None:
                self.lost = True
                return False
            self.owner, self._tag, self._renewed, self._asked = owner, tag, time.monotonic(), began
            return True


@contextlib.contextmanager
def held(path: str, what: str) -> Iterator[Lock]:
    """Hold the lock whose object is at `path` while inside. what: names it in messages. Raises BusyRun where a live
    process holds it, which is seen by its next heartbeat; a dead one's is taken over."""
    lock = _acquired(path, what, Owner.here())
    _held.append(lock)
    try:
        yield lock
    finally:
        _held.remove(lock)
        try:
            lock.give_back()
        except Exception as error:
            log.warning("%s could not be given back (%s): it can be taken over in %.0f s", what, error, DEAD_S)


def confirm(fresh_s: float = 0.0) -> None:
    """Raise StaleRun where this process has lost a lock that it holds. To be asked before anything becomes visible, or
    goes. fresh_s: as for `Lock.confirm`."""
    for lock in _held:
        lock.confirm(fresh_s)


def check() -> None:
    """Raise StaleRun where a heartbeat has found that this process lost a lock. Asks the store nothing: for what waits
    long, and makes nothing visible meanwhile."""
    for lock in _held:
        if lock.lost:
            lock.confirm()


def _acquired(path: str, what: str, owner: Owner) -> Lock:
    seen, began = None, time.monotonic()
    while True:
        if tag := files.create(path, owner.encoded()):
            return Lock(path, what, owner, tag)
        try:
            found = files.read_tagged(path)
        except FileNotFoundError:  # Somebody has removed it.
            if time.monotonic() - began > DEAD_S:
                raise
            time.sleep(POLL_S)
            continue
        other = _owner(found.data)
        # A store may have several clocks, of which one is wrong: so a change while we look is a heartbeat whatever the
        # clocks say, one has time to come, and nobody waits for longer than a heartbeat can.
        if seen is not None and found.tag != seen:
            raise _busy(what, other)
        watched = time.monotonic() - began
        old = (found.age_s > DEAD_S and watched > 2 * BEAT_S) or watched > DEAD_S
        if other is None or other.free or other.is_dead or old:
            if tag := files.replace(path, owner.encoded(), found.tag):
                if other is not None and not other.free:
                    log.warning("took over %s of %s, which is dead", what, other)
                return Lock(path, what, owner, tag)
            raise _busy(what, None)  # Another one was faster.
        seen = found.tag
        time.sleep(POLL_S)


def _owner(data: bytes) -> Owner | None:
    """None where the object is none of ours."""
    try:
        return parse_json(Owner, data, more_keys=True)
    except ValueError:
        return None


def _busy(what: str, other: Owner | None) -> BusyRun:
    by = f" ({other})" if other is not None else ""
    return BusyRun(f"another run{by} holds {what}; wait for it, or stop it, and run this again")
