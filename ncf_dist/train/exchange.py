"""How ranks add up their gradients: DistributedDataParallel with an exchange of our own, which sends fewer bytes.

A step looks up some rows of the users' and items' tables; the gradient of all others is zero. So a rank sends the rows
that it looked up, with their numbers, wherever this is fewer bytes than the whole table, and every rank adds them up in
the order of ranks: the same bits on all of them. Everything else is all-reduced as a whole.

- Which rows these are is known from the batch. The ranks tell each other before they compute, and hear it while they do
  (`announce`). From what all ranks said each decides alike, step by step, what is sent.
- On one machine bytes are cheap, and tables go as a whole unless rows save millions of them.
- DDP calls `send` with a bucket of gradients as soon as they are complete, while others are still computed; `finish`
  waits for what was sent.
- train.exchange_dtype=bf16 halves it: gradients travel in bfloat16, the rows' sums and the weights stay float32.

W: ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncf_dist.config import Train
from ncf_dist.errors import ConfigError
from ncf_dist.train.loaders import Batch
from ncf_dist.train.losses import Objective
from ncf_dist.train.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_BYTES = 4_000_000
"""What rows must save in a step among ranks of one machine, whose messages are copies in its memory: naming, gathering
and adding up rows takes as long as these bytes (benchmarks/exchange.py --rate none)."""

BUCKET_MB = {True: 1024.0, False: 0.25}
"""By whether the step is one compiled call. It has all gradients at once: one bucket. Otherwise small ones, so that the
gradients of the last layers travel while those of the first are computed."""


@dataclass(frozen=True)
class Lookups:
    """What a batch may look up in the tables of users or of items. most: of any rank's batch of this step."""

    index: Tensor
    most: int


def lookups(batch: Batch, history: int, whole_catalogue: bool) -> dict[str, Lookups]:
    """{"user" or "item": what a batch looks up}, without a kind of which all rows may have a gradient.

    history: `Recommender.history`; whole_catalogue: whether the loss compares with all items. Ranks have equally many
    rows in a step, but windows of different lengths."""
    if batch.windows is None:
        found = {"user": Lookups(batch.user, batch.user.numel())}
        items, most = [batch.items], batch.items.numel()
    else:
        found = {}
        items = [batch.items, *(group.items for group in batch.windows.groups)]
        most = len(batch.user) * (history + 1)
    if batch.shared is not None:
        items, most = [*items, batch.shared], most + batch.shared.numel()
    if not whole_catalogue:
        found["item"] = Lookups(torch.cat([part.reshape(-1) for part in items]), most)
    return found


def saved(longest: int, rows: int, ranks: int) -> float:
    """Rows that a rank does not send because it gives its own to W - 1 others, and not a table of `rows` to an
    all-reduce, which sends it 2 (W - 1) / W times. longest: the most rows that a rank has.

    >>> [saved(300, rows=1000, ranks=ranks) for ranks in (2, 4, 8)]
    [700.0, 600.0, -350.0]
    """
    return (2 * rows / ranks - longest) * (ranks - 1)


@dataclass
class _Kind:
    """The tables of users, or of items. most: rows that a rank may name in this step, 0 where all may be touched. says:
    the bytes in which it names them. index: the rows of each rank, by rank; None where the tables are sent whole."""

    tables: list[Tensor]
    most: int = 0
    says: int = 0
    index: list[Tensor] | None = None

    @property
    def rows(self) -> int:
        return len(self.tables[0])

    @property
    def width(self) -> int:
        """Of all its tables."""
        return sum(table.shape[1] for table in self.tables)


def said(index: Tensor, rows: int, most: int) -> Tensor:
    """Which rows of a table of `rows`, at most `most`, as bytes, equally many on all ranks: a bit a row, or a count and
    numbers of 4 bytes where that is shorter. index: may name a row twice."""
    if rows <= 32 * most:
        there = torch.zeros(rows, dtype=torch.bool)
        there[index] = True
        return torch.from_numpy(np.packbits(there.numpy()))
    unique, message = index.unique(), torch.zeros(1 + most, dtype=torch.int32)
    message[0], message[1 : 1 + len(unique)] = len(unique), unique
    return message.view(torch.uint8)


def understood(message: Tensor, rows: int, most: int) -> Tensor:
    """The rows, ascending, int64."""
    if rows <= 32 * most:
        return torch.from_numpy(np.flatnonzero(np.unpackbits(message.numpy(), count=rows)))
    numbers = message.clone().view(torch.int32)
    return numbers[1 : 1 + int(numbers[0])].long()


def _bytes(values: Tensor) -> Tensor:
    """The same memory: a backend need not know the type of what it does not add up."""
    return values.view(torch.uint8)


class _Sent(NamedTuple):
    """What is on its way. done: puts what came back into the gradients."""

    work: Any
    done: Callable[[], None]


class Exchange:
    """`objective` is the module that the trainer calls. In a world of one rank nothing is exchanged."""

    def __init__(self, signals: Objective, loss: str, config: Train, world: World) -> None:
        """signals: already on its device. Raises ConfigError."""
        self.objective: nn.Module = signals
        self.model, self.world, self.whole = signals.model, world, loss == "softmax"
        self.how, self.dtype = config.exchange, DTYPES[config.exchange_dtype]
        self.least = LEAST_BYTES if world.one_machine else 0
        self.kinds: dict[str, _Kind] = {}
        self.heard: tuple[Any, Tensor] | None = None
        self.sent: list[_Sent] = []
        if world.size == 1:
            return
        on_gpu = world.device.startswith("cuda")
        if on_gpu and self.how == "rows":
            raise ConfigError(
                "train.exchange is rows with ranks on GPUs; needed ranks on CPUs, as sending rows was made for their "
                "networks alone: leave it at auto"
            )
        if not on_gpu and self.how != "dense":
            tables = {kind: [table.weight for table in self.model.tables(kind)] for kind in ("user", "item")}
            self.kinds = {kind: _Kind(found) for kind, found in tables.items() if found}
            if self.how == "auto" and sum(self._saves(kind, 0) for kind in self.kinds.values()) <= self.least:
                self.kinds = {}
        ddp = DistributedDataParallel(
            signals,
            device_ids=[world.local_rank] if on_gpu else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=BUCKET_MB[signals.compiled],
        )
        ddp.register_comm_hook(None, lambda _, bucket: self.send(bucket))  # DDP knows no annotation but its own.
        self.objective = ddp

    # ---- before the step computes

    def announce(self, batch: Batch) -> None:
        """Tell the other ranks which rows this step looks up. Returns at once."""
        if not self.kinds:
            return
        found = lookups(batch, self.model.history, self.whole)
        says = []
        for name, kind in self.kinds.items():
            kind.index, kind.most = None, 0
            if name in found:
                kind.most = min(kind.rows, found[name].most)
                says.append(said(found[name].index, kind.rows, kind.most))
                kind.says = len(says[-1])
        if says:
            mine = torch.cat(says)
            every = mine.new_empty(self.world.size * len(mine))
            self.heard = dist.all_gather_single(every, mine, async_op=True), every

    def _listen(self) -> None:
        """Decide what is sent of each kind, from what all ranks have said."""
        if self.heard is None:
            return
        (work, every), self.heard = self.heard, None
        work.wait()
        parts, saves = every.view(self.world.size, -1), 0.0
        for kind in (kind for kind in self.kinds.values() if kind.most):
            mine, parts = parts[:, : kind.says], parts[:, kind.says :]
            index = [understood(message, kind.rows, kind.most) for message in mine]
            fewer = self._saves(kind, max(map(len, index)))
            if self.how == "rows" or fewer > 0:
                kind.index, saves = index, saves + fewer
        if self.how == "auto" and saves <= self.least:
            for kind in self.kinds.values():
                kind.index = None

    def _saves(self, kind: _Kind, longest: int) -> float:
        """Bytes that a rank does not send where it sends rows of the kind's tables."""
        return saved(longest, kind.rows, self.world.size) * kind.width * self.dtype.itemsize

    # ---- while it computes, and after

    def send(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """DDP's hook for a bucket whose gradients are complete."""
        self._listen()
        left = dict(zip(map(id, bucket.parameters()), bucket.gradients(), strict=True))
        for kind in self.kinds.values():
            tables = [left.pop(id(table)) for table in kind.tables if id(table) in left and kind.index is not None]
            if tables and kind.index is not None:
                self.sent.append(self._rows(tables, kind.index))
        if left:
            whole = len(left) == len(bucket.parameters())
            self.sent.append(self._whole([bucket.buffer()] if whole else list(left.values())))
        # DDP keeps the bucket as it is: the gradients are views of it, and `finish` completes them there.
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def finish(self) -> None:
        """Wait until every gradient is the mean over ranks. Call it after backward."""
        for sent in self.sent:
            sent.work.wait()
            sent.done()
        self.sent = []

    def _whole(self, gradients: list[Tensor]) -> _Sent:
        """All-reduce gradients as they are."""
        alone = len(gradients) == 1 and self.dtype == gradients[0].dtype
        flat = gradients[0] if alone else torch.cat([part.reshape(-1) for part in gradients]).to(self.dtype)
        work = dist.all_reduce(flat.div_(self.world.size), async_op=True)

        def done() -> None:
            if not alone:
                for part, values in zip(gradients, flat.split([part.numel() for part in gradients]), strict=True):
                    part.copy_(values.view_as(part))

        return _Sent(work, done)

    def _rows(self, tables: list[Tensor], index: list[Tensor]) -> _Sent:
        """Send the rows of tables (R, ·), one table after another, to all ranks. index: the rows of each rank."""
        own, longest = index[self.world.rank], max(map(len, index))
        sizes = [longest * table.shape[1] for table in tables]
        mine = torch.zeros(sum(sizes), dtype=self.dtype)
        for table, part in zip(tables, mine.split(sizes), strict=True):
            part.view(longest, -1)[: len(own)] = table.index_select(0, own).div_(self.world.size)
        every = mine.new_empty(len(index) * len(mine))
        work = dist.all_gather_single(_bytes(every), _bytes(mine), async_op=True)

        def done() -> None:
            for table in tables:
                table.index_fill_(0, own, 0)
            for rows, values in zip(index, every.view(len(index), -1), strict=True):
                for table, part in zip(tables, values.split(sizes), strict=True):
                    table.index_add_(0, rows, part.view(longest, -1)[: len(rows)].to(table.dtype))

        return _Sent(work, done)
