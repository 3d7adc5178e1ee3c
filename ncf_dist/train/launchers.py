"""How the ranks are started: a command each. All run the same file, `worker.py`; none of them is imported here.

- torchrun: `ranks` processes on this machine under `supervisor.py`, with the environment that torchrun gives; with
  `nodes` > 1 the others run the command that the job prints, or tasks of Spark run it there
  (`ncf_dist/other_nodes.py`, a process of its own). Not torch's own program, whose store listens on every interface of
  the machine. A rank that a cluster's torchrun starts works all the same
- spark: TorchDistributor, one barrier task a rank (`ncf_dist/distribute.py`, a process of its own: the trainer never
  imports pyspark)
- none: one plain process
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ncf_dist import machine
from ncf_dist.config import Config
from ncf_dist.train.network import MEET_S

WORKER = "ncf_dist.train.worker"
SUPERVISOR = "ncf_dist.train.supervisor"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""glibc's malloc returns the memory that a step frees to the system, and the next step pays for every page again: up to
a third of a large step's time. With these settings it keeps up to 1 GiB, but for blocks above 32 MiB, the highest
threshold that all versions accept."""


def torchrun(config: Config, spec: str, node: int = 0) -> list[str]:
    """`node`: which machine the command is for; 0 is the one that the job runs on."""
    train = config.train
    several = ["--nodes", str(train.nodes), "--rendezvous", str(train.rendezvous)] if train.nodes > 1 else []
    other = ["--node-rank", str(node)] if node else []
    return [
        *(sys.executable, "-m", SUPERVISOR, "--ranks", str(train.ranks), *several, *other),
        *(WORKER, "--spec", spec),
    ]


def other_nodes(config: Config, spec: str) -> list[str] | None:
    """The command that starts the other machines' ranks from here; None where there are none, or a person does."""
    if config.train.nodes == 1 or config.train.other_nodes == "command":
        return None
    return [sys.executable, "-m", "ncf_dist.other_nodes", "--spec", spec]


def others(config: Config) -> str:
    """What a person has to do on the other machines, and what network that takes."""
    train = config.train
    which = "1" if train.nodes == 2 else f"N, N from 1 to {train.nodes - 1}"
    by_hand = train.other_nodes == "command"
    how = f"the same command with --node-rank {which}" if by_hand else "a free slot of Spark on each"
    return (
        f"needed on {train.nodes - 1} other machine(s): {how}, within {max(train.timeout_s, MEET_S)} s. Rank 0 "
        f"listens at {train.rendezvous}, all ranks at ports of the interface that faces it. Whoever reaches these may "
        "disturb the training or run code as this user: let only these machines reach them"
    )


def spark(config: Config, spec: str) -> list[str]:
    gpu = ["--gpu"] if config.train.device == "cuda" else []
    return [sys.executable, "-m", "ncf_dist.distribute", "--ranks", str(config.train.ranks), *gpu, "--spec", spec]


def none(config: Config, spec: str) -> list[str]:
    return [sys.executable, "-m", WORKER, "--spec", spec]


LAUNCHERS: dict[str, Callable[[Config, str], list[str]]] = {"torchrun": torchrun, "spark": spark, "none": none}


def world_size(config: Config) -> int:
    """Ranks on all machines."""
    train = config.train
    return 1 if train.launcher == "none" else train.ranks * train.nodes


def threads(config: Config) -> int:
    """Threads of each rank: its share of this machine's cores."""
    return max(1, machine.cores() // (1 if config.train.launcher == "none" else config.train.ranks))


def rank_environment(threads: int) -> dict[str, str]:
    """Environment of a rank of so many threads, where a person has not set it otherwise."""
    return {"OMP_NUM_THREADS": str(threads), **KEEP_MEMORY}
