"""How a rank's OpenMP threads wait: they spin while the cores are theirs, and sleep while others need them.

A step has many short parallel parts. Between them, GNU OpenMP's threads spin for about 3 ms. On an idle machine that is
fast: asleep, they lose up to 40 % of the speed, for waking takes longer than many a part. Beside other work a thread
that spins takes the time of the one that it waits for, and training was 3 to 40 times slower. No length of spinning is
good for both, and OpenMP reads its settings once.

It does have a rule that we can use: where a process has more OpenMP threads than there are cores, they hardly spin (its
manual, under GOMP_SPINCOUNT). So while threads of this process wait for cores that others have, further threads with
OpenMP teams of their own are kept, which sleep. Who computes what stays as it is, and so do the numbers.

That threads wait says little by itself: alone on its machine, a rank's loader and its OpenMP threads wait for each
other up to half of the time. But then this process has all the cores. So what counts is the time that its threads
waited for and that it did not get.

Tried, two cores, NeuMF and mf, share of the idle speed alone and beside one busy core: GOMP_SPINCOUNT 1,000 and passive
waiting .5-.75 and .5, 3,000 .7-.8 and .4, 10,000 .8 and .3, 30,000 1 and .2, the default 1 and .3. A busy loop of the
lowest priority on every core, so that waking is quick, did not help.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path

import torch

from ncf_dist import machine

TASKS = Path("/proc/self/task")
LOOK_S, LOOKS = 0.2, 5
"""Looks are added up over the last second: a single one is too short to tell."""
CROWDED = 0.25
"""Cores that our threads waited for and others had."""
HOLD_S, LONGEST_S = 2.0, 60.0
"""How long to go without spinning before it is tried again; doubled each time that it was no good."""
PARALLEL = 2**18
"""Numbers that torch adds up in parallel."""
OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What this process has used and waited for so far, in seconds."""

    at: float
    used: float
    """Time on a core, of all threads."""
    waited: dict[str, float]
    """Thread → time ready to run, without a core."""

    @classmethod
    def now(cls) -> Usage:
        waited = {}
        for task in TASKS.iterdir():
            with contextlib.suppress(OSError, IndexError):  # It may just have ended.
                waited[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        return cls(time.monotonic(), time.process_time(), waited)


def taken(before: Usage, after: Usage, cores: int) -> float:
    """Cores that threads waited for and that this process did not have, on average between the two.

    >>> taken(Usage(0, 0, {"1": 0}), Usage(1, 1.25, {"1": 1}), cores=2)  # One of two threads always waited.
    0.75
    """
    seconds = after.at - before.at
    waited = sum(now - before.waited.get(thread, 0) for thread, now in after.waited.items())
    return min(waited / seconds, cores - (after.used - before.used) / seconds)


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
        cores = machine.cores_of_mask()
        seen = collections.deque([Usage.now()], maxlen=1 + LOOKS)
        while not self.over.wait(LOOK_S):
            seen.append(Usage.now())
            if len(seen) > LOOKS:
                spun = not self.teams
                self.look(taken(seen[0], seen[-1], cores), seen[-1].at)
                if spun == bool(self.teams):  # What was seen before says nothing of how it is now.
                    seen.clear()
                    seen.append(Usage.now())
        self.teams.close()

    def look(self, crowded: float, now: float) -> None:
        """`crowded`: cores that others had lately while threads waited for them."""
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
