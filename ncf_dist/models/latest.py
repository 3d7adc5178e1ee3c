"""What users did last, from the table `recent`, as models and item-to-item parts read it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from ncf_dist.gaps import gap_code
from ncf_dist.models.sequences import Sequences


def latest(recent: pa.Table, last_split: int, length: int, n_items: int | None = None) -> Sequences:
    """recent: rows of contracts.RECENT, R of them → the `length` latest items of each whose split is `last_split` at
    most: TRAIN_SPLIT for what training knows, VALIDATION_SPLIT for what evaluate does, TEST_SPLIT for all. n_items:
    only items below it, which are those that a model of an earlier night knows. Gaps are between the items that are
    left; the first has 0."""
    lists = recent["item_idx"].combine_chunks()
    row = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy(zero_copy_only=False))
    item, time, split = (
        recent[name].combine_chunks().flatten().to_numpy() for name in ("item_idx", "timestamp", "split")
    )
    known = split <= last_split if n_items is None else (split <= last_split) & (item < n_items)
    row, item, time = row[known], item[known], time[known]
    sizes = np.bincount(row, minlength=len(lists))
    age = np.cumsum(sizes)[row] - 1 - np.arange(len(row))
    row, item, time, age = (values[age < length] for values in (row, item, time, age))
    sizes = np.minimum(sizes, length)
    place = sizes[row] - 1 - age
    gap = gap_code(np.diff(time, prepend=time[:1]))
    gap[place == 0] = 0
    items, gaps = np.zeros((2, len(lists), length), np.int64)
    items[row, place], gaps[row, place] = item, gap
    return Sequences(torch.from_numpy(items), torch.from_numpy(gaps), torch.from_numpy(sizes))
