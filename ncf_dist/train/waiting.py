"""How a rank's OpenMP threads wait: they spin while the cores are theirs, and sleep while others need them.

A step has many short parallel parts. Between them, GNU OpenMP's threads spin for about 3 ms. On an idle machine that is
fast: asleep, they lose up to 40 % of the speed, for waking takes longer than many a part. Beside other work a thread
that spins takes the time of the one that it waits for, and training was 3 to 40 times slower. No length of spinning is
good for both, and OpenMP reads its settings once.

It does have a rule that we can use: where a process has more OpenMP threads than there are cores, they hardly spin (its
manual, under GOMP_SPINCOUNT). So while the kernel says that threads of this process wait for cores, further threads
with OpenMP teams of their own are kept, which sleep. Who computes what stays as it is, and so do the numbers.

Tried, two cores, NeuMF and mf, share of the idle speed alone and beside one busy core: GOMP_SPINCOUNT 1,000 and passive
waiting .5-.75 and .5, 3,000 .7-.8 and .4, 10,000 .8 and .3, 30,000 1 and .2, the default 1 and .3. A busy loop of the
lowest priority on every core, so that waking is quick, did not help.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import torch

from ncf_dist import machine

TASKS = Path("/proc/self/task")
LOOK_S = 0.2
CROWDED = 0.1
"""Seconds a second that all threads together wait for a core."""
HOLD_S, LONGEST_S = 2.0, 60.0
"""How long to go without spinning before it is tried again; doubled each time that it was no good."""
PARALLEL = 2**18
"""Numbers that torch adds up in parallel."""
OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def waited() -> float:
    """Seconds that this process's threads have been ready to run without a core, so far."""
    found = 0
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError, IndexError):  # It may just have ended.
            found += int((task / "schedstat").read_text().split()[1])
    return found / 1e9


class Teams:
    """Sleeping OpenMP threads, more than there are cores together with those of one team at work."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        size = torch.get_num_threads()
        needed = -(-(machine.cores_of_mask() - size + 1) // (size - 1))
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._team, args=(self._over,), name="openmp-team", daemon=True)
            for _ in range(needed)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _team(over: threading.Event) -> None:
        torch.ones(PARALLEL).add_(1)  # The team is made, and stays as long as this thread.
        over.wait()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __bool__(self) -> bool:
        return bool(self._threads)


class Waiting(threading.Thread):
    """Looks after it while inside. A person's own settings of OpenMP win."""

    def __init__(self) -> None:
        super().__init__(name="openmp-waiting", daemon=True)
        self.teams, self.over = Teams(), threading.Event()
        self.hold, self.until = HOLD_S, 0.0

    def __enter__(self) -> Waiting:
        if wanted():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        before, at = waited(), time.monotonic()
        while not self.over.wait(LOOK_S):
            now, waits = time.monotonic(), waited()
            self.look((waits - before) / (now - at), now)
            before, at = waits, now
        self.teams.close()

    def look(self, crowded: float, now: float) -> None:
        """`crowded`: seconds a second that threads waited for cores since the last look."""
        if crowded > CROWDED and not self.teams:
            self.hold = min(LONGEST_S, 2 * self.hold) if now - self.until < self.hold else HOLD_S
            self.until = now + self.hold
            self.teams.open()
        elif self.teams and now >= self.until:
            self.teams.close()
            self.until = now


def wanted() -> bool:
    return (
        torch.get_num_threads() > 1
        and not any(name in os.environ for name in OWN_SETTINGS)
        and Path("/proc/self/schedstat").exists()
    )
