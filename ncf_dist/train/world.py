"""Which of the ranks this process is: a frozen value, read once from the environment that the launcher sets."""

from __future__ import annotations

import datetime as dt
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncf_dist.train.network import LISTENING, MEET_S, STORE, bound_to, interface_facing


@dataclass(frozen=True)
class World:
    """rank: 0..size-1 over all machines; local_rank: on this one. one_machine: that all ranks are known to be on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    one_machine: bool = False

    @classmethod
    def from_environment(cls, device: str) -> World:
        """`device`: auto, cpu or cuda. `auto` takes CUDA where this machine has a GPU for each of its ranks."""
        rank, size, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_size else "cpu"
        return cls(rank, size, local, f"cuda:{local}" if device == "cuda" else "cpu", local_size == size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def join(self, timeout_s: int) -> None:
        """Enter the process group: gloo, and NCCL for tensors on GPUs. A single process needs none. Raises ConfigError
        where the ranks' meeting place is no host.

        Flushes denormals in this thread and in those that it starts later. Decay shrinks the weights and moments of a
        factor that nobody uses until they are denormal, and a CPU computes with these ten to twenty times slower."""
        torch.set_flush_denormal(True)
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.startswith("cuda") else "gloo"
            timeout = dt.timedelta(seconds=timeout_s)
            store = meeting(self, timeout)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def leave(self) -> None:
        """Leave together: a rank that exits early breaks the connections of one that is still busy."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the CPU, on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value (JSON-like) of every rank, by rank, on all of them. Not by torch's own gathering of objects, which
        unpickles what peers send."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(gathered, nn.functional.pad(mine, (0, longest - len(mine))))
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(gathered, map(int, lengths), strict=True)]

    def same_buffers(self, module: nn.Module) -> None:
        """Give all ranks rank 0's buffers, such as the running means of batch norm."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def meeting(world: World, timeout: dt.timedelta) -> Any:
    """The store in which the ranks find each other, as the launcher set it up. None: torch's own store, at MASTER_ADDR
    and MASTER_PORT, which torchrun sets. Raises ConfigError."""
    patience = max(timeout, dt.timedelta(seconds=MEET_S))
    if path := os.environ.get(STORE):
        store = dist.FileStore(path, world.size)  # type: ignore[attr-defined]
        # Where one never comes, the supervisor ends us.
        store.set(f"here/{world.rank}", "")
        store.wait([f"here/{rank}" for rank in range(world.size)], patience)
        store.set_timeout(timeout)
        return store
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    for name, value in bound_to(interface_facing(host)).items():
        os.environ.setdefault(name, value)
    if (listening := os.environ.get(LISTENING)) is None:
        return None
    port, first = int(os.environ["MASTER_PORT"]), world.rank == 0
    far = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world.size, first, patience, master_listen_fd=int(listening) if first else None
    )
    far.set_timeout(timeout)
    return far
