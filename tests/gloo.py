"""Real ranks for tests: processes joined by gloo that stay up and run one function after another.

    with Ranks(2, folder) as ranks:
        left, right = ranks.run(function, argument)        # function(world, argument) on every rank

A function must be importable (at the top of a module). A rank that raises fails the call with its own
traceback. A call that takes longer than `timeout_s` fails too, and the ranks are killed: a hang is a failure,
never a wait.
"""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ncf_dist import no_compiler
from ncf_dist.train.world import World

START_S = 120


class Ranks:
    """`size` processes; ended with the `with` block."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.tasks = [context.SimpleQueue() for _ in range(size)]
        self.results: Any = context.Queue()
        rendezvous = f"file://{folder / 'rendezvous'}"
        self.processes: list[SpawnProcess] = [
            context.Process(target=_serve, args=(World(rank, size), rendezvous, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        self.run(_ready, timeout_s=START_S)
        return self

    def __exit__(self, *_: object) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(5)
            process.kill()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
        """What `function(world, *args)` returned on each rank, by rank."""
        for tasks in self.tasks:
            tasks.put((function, args))
        found: dict[int, Any] = {}
        end = time.monotonic() + timeout_s
        while len(found) < len(self.processes):
            try:
                rank, value, error = self.results.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self._kill()
                late = sorted(set(range(len(self.processes))) - set(found))
                raise AssertionError(f"ranks {late} were still busy after {timeout_s} s") from None
            if error:
                self._kill()
                raise AssertionError(f"rank {rank} failed:\n{error}")
            found[rank] = value
        return [found[rank] for rank in range(len(self.processes))]

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def _ready(world: World) -> int:
    return int(world.sum(torch.ones(1)).item())


def _serve(world: World, rendezvous: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    no_compiler.leave_out()  # As `worker.run` does.
    dist.init_process_group("gloo", init_method=rendezvous, rank=world.rank, world_size=world.size)
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((world.rank, function(world, *args), None))
        except BaseException:
            results.put((world.rank, None, traceback.format_exc()))
    dist.destroy_process_group()
