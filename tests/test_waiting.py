"""OpenMP's threads stop spinning while others need the cores: measured in processor time, never by the clock."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ncf_dist.config import Model
from ncf_dist.machine import cores_of_mask
from ncf_dist.train import waiting, worker
from ncf_dist.train.spec import Spec
from ncf_dist.train.waiting import HOLD_S, LONGEST_S, LOOK_S, Usage, Waiting, taken
from tests.tables import prepared, small_config

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
needs_two = pytest.mark.skipif(cores_of_mask() < 2, reason="needs two cores")

BURNT = """
import time
from pathlib import Path
import torch
from ncf_dist.train.waiting import PARALLEL, Teams, Waiting

def burnt():
    "Milliseconds of processor time of 20 parallel parts, with nothing to do between them."
    def of(task):
        try:
            return int((task / "schedstat").read_text().split()[0])
        except OSError:  # A thread that ended meanwhile.
            return 0
    used = lambda: sum(map(of, Path("/proc/self/task").iterdir()))
    before = used()
    for _ in range(20):
        torch.ones(PARALLEL).add_(1)
        time.sleep(0.02)
    return (used() - before) / 1e6
"""


def run(program: str) -> str:
    """Standard output, in a fresh process where nobody has set OpenMP up."""
    environment = {name: value for name, value in os.environ.items() if name not in waiting.OWN_SETTINGS}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


@needs_two
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="needs a torch with OpenMP")
def test_threads_sleep_while_teams_are_open() -> None:
    """Spinning burns about 3 ms after each part."""
    program = "burnt(); teams = Teams(); print(burnt()); teams.open(); burnt(); print(burnt()); teams.close()"
    program += "; print(burnt())"
    spinning, asleep, again = map(float, run(BURNT + program).split())
    assert asleep < spinning / 3
    assert asleep < again / 3


@needs_two
def test_others_that_need_the_cores_are_noticed() -> None:
    """A busy process more than there are cores, once torch is imported; the program ends when it has noticed, and they
    end with it."""
    program = (
        "import os, subprocess, sys\n"
        "busy = f'import os\\nwhile os.getppid() == {os.getpid()}: pass'\n"
        f"others = [subprocess.Popen([sys.executable, '-c', busy]) for _ in range({cores_of_mask() + 1})]\n"
        "with Waiting() as it:\n    while not it.teams:\n        torch.ones(PARALLEL).add_(1)\nprint('noticed')\n"
        "for other in others: other.kill(), other.wait()"
    )
    assert run(BURNT + program).strip() == "noticed"


class Counted:
    """Teams that only say whether they are open."""

    def __init__(self) -> None:
        self.opened = False

    def open(self) -> None:
        self.opened = True

    def close(self) -> None:
        self.opened = False

    def __bool__(self) -> bool:
        return self.opened


def spinning_at(crowded: Any, seconds: float) -> Iterator[tuple[float, bool]]:
    """(time, whether threads spin) after each look; `crowded(now)`: what the kernel says while they spin."""
    it = Waiting()
    it.teams = Counted()  # type: ignore[assignment]
    now = 1000.0
    while now < 1000 + seconds:
        now += LOOK_S
        it.look(0.0 if it.teams else crowded(now), now)
        yield now - 1000, not it.teams


def test_alone_threads_spin() -> None:
    assert all(spinning for _, spinning in spinning_at(lambda now: 0.05, 100))


def test_beside_others_they_seldom_try_to_spin() -> None:
    """After 2, 4, 8, … seconds, and then once a minute."""
    trials = [at for at, spinning in spinning_at(lambda now: 0.5, 600) if spinning]
    assert trials[0] == pytest.approx(LOOK_S + HOLD_S, abs=2 * LOOK_S)
    assert len(trials) <= 5 + (600 / LONGEST_S)


def test_when_the_others_have_gone_they_spin_again() -> None:
    found = dict(spinning_at(lambda now: 0.5 if now < 1010 else 0.0, 100))
    assert not found[min(found)]
    assert all(spinning for at, spinning in found.items() if at > 10 + 16)


def test_waiting_for_a_core_is_counted() -> None:
    """Two threads on one core: what one runs, the other waits."""
    before, mask = Usage.now(), os.sched_getaffinity(0)
    data = bytes(2**22)

    def work() -> None:
        os.sched_setaffinity(0, {min(mask)})
        for _ in range(100):
            hashlib.sha256(data).digest()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    found = 0.0
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.05)
        after = Usage.now()
        waits = sum(after.waited[thread] - before.waited.get(thread, 0) for thread in after.waited)
        found = max(found, waits)
    assert found > 0.01


def usage(at: float, used: float, **waited: float) -> Usage:
    return Usage(at, used, waited)


def test_what_threads_of_one_process_take_from_each_other_is_no_crowd() -> None:
    """Three threads on two cores, alone: together they wait 1 s a second, and have 2."""
    assert taken(usage(0, 0, a=0, b=0, c=0), usage(2, 4, a=0.7, b=0.7, c=0.6), cores=2) == 0


def test_what_others_have_while_threads_wait_is() -> None:
    """(1.2 - 0.2) s waited in 2 s: .5; had 3 of 4: .5. A thread that ended no longer counts."""
    assert taken(usage(5, 10, a=0.2, gone=9), usage(7, 13, a=0.7, new=0.5), cores=2) == 0.5


def test_cores_that_nobody_waits_for_are_no_crowd() -> None:
    """A rank of two threads on 16 cores."""
    assert taken(usage(0, 0, a=0, b=0), usage(1, 2, a=0.01, b=0), cores=16) == pytest.approx(0.01)


@pytest.mark.parametrize("name", waiting.OWN_SETTINGS)
def test_a_persons_own_settings_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in waiting.OWN_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert waiting.wanted()
    monkeypatch.setenv(name, "1")
    assert not waiting.wanted()


def test_one_thread_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with Waiting() as it:
        assert not it.is_alive()


def test_a_rank_looks_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, Model(name="gmf", factors=4))
    path = tmp_path / "run/ranks/spec.json"
    path.parent.mkdir(parents=True)
    Spec(config.model_dump_json(by_alias=True), prepared(config, 41).root, str(tmp_path / "run")).save(str(path))
    entered: list[Any] = []

    class Seen(Waiting):
        def __enter__(self) -> Waiting:
            entered.append(self)
            return self

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "Waiting", Seen)
    monkeypatch.setattr(os, "_exit", end)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit, match="0"):
            worker.run(str(path))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        torch.set_flush_denormal(False)
    assert len(entered) == 1
