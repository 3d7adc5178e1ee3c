"""How the ranks are started: a command each. All run the same file, `worker.py`; none of them is imported here.

- torchrun: `ranks` processes on this machine; with `nodes` > 1 the others run the command that the job prints
- spark: TorchDistributor, one barrier task a rank (`ncf_dist/distribute.py`, a process of its own: the trainer never
  imports pyspark)
- none: one plain process
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ncf_dist import machine
from ncf_dist.config import Config

WORKER = "ncf_dist.train.worker"
SHUTDOWN_S = 5
"""What torchrun leaves a rank between SIGTERM and SIGKILL when another one has failed."""


def torchrun(config: Config, spec: str) -> list[str]:
    train = config.train
    several = train.nodes > 1
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(train.nodes), "--nproc-per-node", str(train.ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", train.rendezvous or "127.0.0.1:0"),
        *(["--rdzv-id", os.path.basename(os.path.dirname(os.path.dirname(spec)))] if several else []),
        *("--shutdown-timeout", str(SHUTDOWN_S)),
        *("-m", WORKER, "--spec", spec),
    ]


def spark(config: Config, spec: str) -> list[str]:
    gpu = ["--gpu"] if config.train.device == "cuda" else []
    return [sys.executable, "-m", "ncf_dist.distribute", "--ranks", str(config.train.ranks), *gpu, "--spec", spec]


def none(config: Config, spec: str) -> list[str]:
    return [sys.executable, "-m", WORKER, "--spec", spec]


LAUNCHERS: dict[str, Callable[[Config, str], list[str]]] = {"torchrun": torchrun, "spark": spark, "none": none}


def threads(config: Config) -> int:
    """Threads of each rank: its share of this machine's cores."""
    ranks = 1 if config.train.launcher == "none" else config.train.ranks
    return max(1, machine.cores() // ranks)
