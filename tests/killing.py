"""Real processes that are killed at a named step, or at any moment, at the cost of a fork each.

One process imports everything and uses nothing of it (delta-rs dies in the fork of a process that has used it); for
each request it forks a child that runs one job and kills itself where it is told to.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncf_dist.config import Config

REPO = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
SERVER = """
import importlib, json, os, signal, sys, time

import duckdb, pandas, pyarrow.dataset, pyarrow.parquet

from ncf_dist.config import Config
from ncf_dist.errors import NcfError
from ncf_dist.publish import steps

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

os.fsync = lambda handle: None  # What is killed loses nothing that it has written.
functions = {}
for name in sys.argv[1:]:
    module, function = name.split(":")
    functions[function] = getattr(importlib.import_module(module), function)

def meet(folder, count):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    end = time.monotonic() + 300
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        time.sleep(0.001)

def run(job, config, ds, step, nth, meeting):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    left = [nth]
    def listener(name):
        if name == step:
            left[0] -= 1
            if left[0] == 0 and meeting:
                meet(*meeting)
            elif left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    steps.listener = listener
    def change(event, args):
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            listener("any change")
    if step == "any change":
        sys.addaudithook(change)
    try:
        functions[job](Config.model_validate(config), ds)
    except NcfError as error:
        os._exit(int(error.exit_code))
    except BaseException:
        os._exit(99)
    os._exit(0)

def start(asked):
    child = os.fork()
    if child == 0:
        run(**asked)
    return child

print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    delays = [one.pop("delay") for one in asked]
    began = time.monotonic()
    children = [start(one) for one in asked]
    for delay, child in sorted((delay, child) for delay, child in zip(delays, children) if delay is not None):
        time.sleep(max(0, began + delay - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([codes, time.monotonic() - began]), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """A job that is killed when it reaches `step` for the nth time, or after `delay` seconds; else it runs to its end.
    step: `any change` stands for whatever Python is about to do to a file. meeting: (a folder, how many): at `step` the
    job waits there for others, and is not killed."""

    job: str
    config: Config
    ds: str
    step: str = ""
    nth: int = 1
    delay: float | None = None
    meeting: tuple[str, int] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.model_dump(mode="json", by_alias=True)}


class Killer:
    """The process that forks. jobs: their functions, as `module:function`."""

    def __init__(self, *jobs: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *jobs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPO)},
        )
        assert self._said() == "ready"

    def run(
        self, job: str, config: Config, ds: str, step: str = "", nth: int = 1, delay: float | None = None
    ) -> tuple[int, float]:
        """(exit code, seconds) of one."""
        [code], seconds = self.at_once([Run(job, config, ds, step, nth, delay)])
        return code, seconds

    def at_once(self, runs: Sequence[Run]) -> tuple[list[int], float]:
        """(exit codes, seconds until the last has ended) of some at the same time, each a process of its own."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([run.asked for run in runs]) + "\n")
        self._process.stdin.flush()
        codes, seconds = json.loads(self._said())
        return list(codes), float(seconds)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._process.wait()


@contextlib.contextmanager
def killer(*jobs: str) -> Iterator[Killer]:
    made = Killer(*jobs)
    try:
        yield made
    finally:
        made.close()


def shown(run: list[tuple[str, Any]]) -> list[tuple[str, int]]:
    """The steps of a run as (name, how many times until then)."""
    counts: dict[str, int] = {}
    found = []
    for kind, name in run:
        if kind == "step":
            counts[name] = counts.get(name, 0) + 1
            found.append((name, counts[name]))
    return found


def steps_named_in(*packages: str) -> set[str]:
    """Every step that the code of these packages of ncf_dist tells of."""
    named = set[str]()
    for path in (path for package in packages for path in (REPO / "ncf_dist" / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "steps.reached":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}: a step is named where it is reached"
                named.add(str(argument.value))
    return named
