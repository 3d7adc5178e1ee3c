"""Batches of windows, for models of histories: the loader of `loaders.py` over the table `sequences`.

A row is a window of a user's train items, and predicts every item but its first from those before it. So the laws of
the loader hold as they are: which rank takes which window in which step is arithmetic on row counts.

A step's windows are computed in groups of like length, each as wide as its longest: a window is up to an eighth of L
shorter. The loss is a sum over all that is predicted in the step, divided by a number that follows from the manifest
and the number of windows alone: two ranks then train what one trains on twice the windows, and need not tell each other
how long theirs are.

Letters: B windows of a step, R of a group, L sequences.length, T what is to be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist import contracts
from ncf_dist.config import Loader
from ncf_dist.gaps import GAP_CODES
from ncf_dist.manifests import Manifest
from ncf_dist.models import Sequences, Windows
from ncf_dist.train.copies import Copies
from ncf_dist.train.loaders import Batch, Columns, Task, TrainLoader
from ncf_dist.train.negatives import shared_items
from ncf_dist.train.spec import window_length
from ncf_dist.train.world import World

GROUPS = 8
"""Lengths within a group differ by less than L / GROUPS."""
Array = npt.NDArray[Any]


def row_bytes(length: int) -> int:
    """What a row of the table takes in memory: user and length, and an item and a gap for each of L + 1 places."""
    return 2 * 4 + (4 + 1) * (length + 1)


class WindowLoader(TrainLoader):
    """Batches of windows for one rank, on its device."""

    def __init__(
        self, manifest: Manifest, task: Task, config: Loader, world: World, copies: Copies | None = None
    ) -> None:
        self.length = window_length(manifest)
        if (
            config.cache == "device"
        ):  # Windows are put into groups on the host: from a GPU each step would wait for them.
            config = config.model_copy(update={"cache": "host"})
        super().__init__(manifest, contracts.sequences(self.length), task, config, world, copies)
        facts = manifest.facts["sequences"]
        self.mean_targets: float = facts["targets"] / facts["rows"]

    def _names(self, epoch: int) -> list[str]:
        return ["user_idx", "length", "items", "gaps"]

    def _row_bytes(self, names: Sequence[str]) -> tuple[int, str]:
        size = row_bytes(self.length)
        return size, f"{size} bytes"

    def _decoded(self, table: Columns) -> Columns:
        return {
            **table,
            "items": unpacked(table["items"], "<i4", self.length + 1),
            "gaps": unpacked(table["gaps"], "u1", self.length + 1),
        }

    def _bounds(self, name: str) -> tuple[int, int, str]:
        contract = "as its contract says"
        known = {"length": (2, self.length + 1, contract), "gaps": (0, GAP_CODES - 1, contract)}
        return known[name] if name in known else super()._bounds(name)

    def _arranged(self, columns: list[Tensor]) -> list[Tensor]:
        return columns

    def _batch(self, epoch: int, used: int, columns: list[Tensor]) -> Batch:
        task, device = self.task, self.world.device
        user, length, items, gaps = (column.numpy() for column in columns)
        order, windows, targets = grouped(length.astype(np.int64), items, gaps, -(-self.length // GROUPS))
        shared = shared_items(task.seed, epoch, used, task.shared, task.n_items, device) if task.shared else None
        parts = [part for group in windows.groups for part in (group.items, group.gaps, group.length)]
        users, predicted, known, *parts = on_device(device, [user[order], targets, windows.known, *parts])
        groups = tuple(Sequences(*parts[first : first + 3]) for first in range(0, len(parts), 3))
        return Batch(
            users,
            predicted[:, None],
            shared=shared,
            windows=Windows(groups, known),
            divisor=len(user) * self.mean_targets,
        )


def unpacked(column: Array, kind: str, width: int) -> Array:
    """(R,) bytes objects, or NumPy's fixed-width bytes → (R, width) numbers."""
    data = column.tobytes() if column.dtype.kind == "S" else b"".join(column.tolist())
    return np.frombuffer(data, kind).reshape(len(column), width)


def on_device(device: str, parts: Sequence[Array | Tensor]) -> list[Tensor]:
    """Integers as int64 there. On a GPU by one copy, for which the host does not wait: it would wait for each part's,
    three a group."""
    tensors = [torch.as_tensor(part, dtype=torch.int64) for part in parts]
    if device == "cpu":
        return tensors
    together = torch.cat([tensor.reshape(-1) for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    pieces = together.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def grouped(length: npt.NDArray[np.int64], items: Array, gaps: Array, spread: int) -> tuple[Array, Windows, Array]:
    """length (B,); items, gaps (B, L + 1) → the order of the windows, longest first; these in groups, within which
    lengths differ by less than `spread`; and the item to be predicted at each known position (T,)."""
    order = np.argsort(-length, kind="stable")
    known, length = length[order] - 1, length[order]
    groups, places, targets, first, begun = [], [], [], 0, 0
    while first < len(order):
        width = int(known[first])
        last = first + int(np.searchsorted(-known[first:], spread - width, side="left"))
        rows, count = order[first:last], known[first:last]
        here = np.arange(width) < count[:, None]
        places.append(begun + np.flatnonzero(here))
        targets.append(items[rows, 1 : width + 1][here])
        parts = (items[rows, :width], gaps[rows, :width], count)
        groups.append(Sequences(*(torch.from_numpy(part.astype(np.int64)) for part in parts)))
        begun, first = begun + here.size, last
    return order, Windows(tuple(groups), torch.from_numpy(np.concatenate(places))), np.concatenate(targets)
