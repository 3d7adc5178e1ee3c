"""A job of ours as a process of its own: what it said, its wall seconds, and how much memory its processes held."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from ncf_dist import last_line

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
MIB = 2**20
SAMPLE_S = 2.0


class Watch(threading.Thread):
    """Samples the processes below the given one. MiB: `python`, the most that one Python process had resident, and
    `all`, the most that all of them, and the JVM, held together: a page that several share counts once (Linux' PSS)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.ended = psutil.Process(pid), threading.Event()
        self.most = {"python": 0.0, "all": 0.0}

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            sizes = [size for p in self._family() if (size := _sizes(p))]
            self.most["python"] = max([self.most["python"], *(rss for name, rss, _ in sizes if "python" in name)])
            self.most["all"] = max(self.most["all"], sum(pss for _, _, pss in sizes))

    def _family(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return []


def _sizes(process: psutil.Process) -> tuple[str, float, float] | None:
    """(its name, resident MiB, its share of them in MiB), or None of a process that has ended."""
    try:
        found = process.memory_full_info()
        return process.name(), found.rss / MIB, found.pss / MIB
    except psutil.Error:
        return None


class Watcher(Protocol):
    """A thread that looks at a process until `ended`."""

    ended: threading.Event

    def start(self) -> None: ...


W = TypeVar("W", bound=Watcher)


def watched(
    command: list[str], watch: Callable[[int], W], environment: Mapping[str, str] | None = None
) -> tuple[str, float, W]:
    """(stdout, wall seconds, what watched the process). Stops the benchmark where it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    watcher = watch(process.pid)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - start
    watcher.ended.set()
    if process.returncode:
        sys.exit(f"{command[:3]} exited {process.returncode}; its log is above")
    return out, seconds, watcher


def job(name: str, config: Path, settings: list[str]) -> dict[str, Any]:
    """What the job said, its `wall` seconds and MiB of memory as `Watch` counts them. Stops the benchmark where it
    fails."""
    command = [str(ROOT / "spark-submit.sh"), name, "--config", str(config), "--ds", DS]
    command += [part for setting in settings for part in ("--set", setting)]
    out, wall, watch = watched(command, Watch)
    return {**last_line.read(out.splitlines()[-1]), "wall": wall, **watch.most}
