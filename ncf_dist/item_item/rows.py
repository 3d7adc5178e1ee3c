"""A sparse item→item matrix: what having item a adds to the score of item b.

Letters: I items, E entries, K kept of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist.sampling import IntArray

FloatArray = npt.NDArray[np.floating[Any]]
ROWS_A_BLOCK, ENTRIES_A_BLOCK = 1_024, 2**22
"""Rows of a dense matrix that are cut at a time, and entries that are checked at a time."""


@dataclass(frozen=True)
class ItemRows:
    """Entry e of row a, offsets[a] ≤ e < offsets[a + 1], says that item a adds values[e] to item items[e]. offsets:
    (I+1,) int64; items: (E,) int32, ascending in a row; values: (E,) float32. column: (I,) float32, what every item
    adds to each one, kept in its row or not; None for nothing."""

    offsets: Tensor
    items: Tensor
    values: Tensor
    column: Tensor | None = None

    @property
    def n_items(self) -> int:
        """I"""
        return len(self.offsets) - 1

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For a file of tensors, each called `name.…`."""
        found = {"offsets": self.offsets, "items": self.items, "values": self.values}
        if self.column is not None:
            found["column"] = self.column
        return {f"{name}.{key}": tensor.contiguous() for key, tensor in found.items()}

    @classmethod
    def of_tensors(cls, name: str, tensors: Mapping[str, Tensor], n_items: int) -> ItemRows:
        """Of a file of tensors. Raises ValueError unless they are such a matrix of `n_items` items."""
        kinds = {"offsets": torch.int64, "items": torch.int32, "values": torch.float32, "column": torch.float32}
        found = {key: tensors[f"{name}.{key}"] for key in kinds if f"{name}.{key}" in tensors}
        for key in ("offsets", "items", "values"):
            if key not in found:
                raise ValueError(f"{name}.{key} is missing")
        sizes = {
            "offsets": n_items + 1,
            "items": len(found["values"]),
            "values": len(found["values"]),
            "column": n_items,
        }
        for key, tensor in found.items():
            if (tensor.dtype, tuple(tensor.shape)) != (kinds[key], (sizes[key],)):
                needed = f"{kinds[key]} [{sizes[key]}]"
                raise ValueError(f"{name}.{key} is {tensor.dtype} {list(tensor.shape)}, needed {needed}")
        rows = cls(**found)
        rows.check(name)
        return rows

    def check(self, name: str) -> None:
        """Raise ValueError where an offset or an item would lead out of the matrix, or a row does not ascend."""
        steps = self.offsets.diff()
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.items) or (len(steps) and steps.min() < 0):
            raise ValueError(f"{name}.offsets do not ascend from 0 to the {len(self.items)} entries")
        starts = torch.zeros(ENTRIES_A_BLOCK + 1, dtype=torch.bool)
        for first in range(0, len(self.items), ENTRIES_A_BLOCK):
            # With the entry before the block, so that each neighbour is compared once.
            before = max(0, first - 1)
            items = self.items[before : first + ENTRIES_A_BLOCK]
            if items.min() < 0 or items.max() >= self.n_items:
                raise ValueError(f"{name}.items are not all from 0 to {self.n_items - 1}")
            low, high = torch.searchsorted(self.offsets, torch.tensor([before + 1, before + len(items)]))
            starts.zero_()[self.offsets[low:high] - before] = True
            if ((items.diff() <= 0) & ~starts[1 : len(items)]).any():
                raise ValueError(f"{name}.items do not ascend within a row")


def from_entries(row: IntArray, item: IntArray, values: FloatArray, n_items: int) -> ItemRows:
    """row, item (E,) in any order, none twice; values (E,).

    >>> rows = from_entries(np.array([2, 0]), np.array([0, 1]), np.array([0.5, 2.0]), 3)
    >>> rows.offsets.tolist(), rows.items.tolist(), rows.values.tolist()
    ([0, 1, 1, 2], [1, 0], [2.0, 0.5])
    """
    order = np.lexsort((item, row))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_items))]).astype(np.int64)
    return ItemRows(
        torch.from_numpy(offsets),
        torch.from_numpy(item[order].astype(np.int32)),
        torch.from_numpy(values[order].astype(np.float32)),
    )


def largest(matrix: Tensor, kept: int) -> ItemRows:
    """Of a dense (I, I) matrix the `kept` entries of each row that are furthest from 0; zeros are never kept."""
    kept, n_items = min(kept, matrix.shape[1]), len(matrix)
    parts: list[tuple[IntArray, IntArray, FloatArray]] = []
    for first in range(0, n_items, ROWS_A_BLOCK):
        block = matrix[first : first + ROWS_A_BLOCK]
        items = block.abs().topk(kept, dim=1).indices.sort(dim=1).values
        values = block.gather(1, items)
        where = torch.nonzero(values, as_tuple=True)
        parts.append(((first + where[0]).numpy(), items[where].numpy(), values[where].numpy()))
    row, item, value = (np.concatenate(some) for some in zip(*parts, strict=True))
    return from_entries(row, item, value, n_items)
