"""Tables of order, for models of histories: windows of each user's train items, and what each user did last.

A user's train items in order of time, i_0 … i_(n-1), are cut from the end into windows of L + 1 items that share their
border items: with L = 3 and n = 8 these are i_4 … i_7, i_1 … i_4 and i_0 i_1. So a model that predicts every item of a
window from those before it predicts each item but the user's first exactly once, from at most L items. A user with a
single train item has no window.

Letters: R rows, U users, W windows, L sequences.length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist import contracts
from ncf_dist.config import Sequences
from ncf_dist.gaps import gap_code
from ncf_dist.parquet import FileInfo
from ncf_dist.prepare.next_items import PairSink
from ncf_dist.prepare.splits import SplitRule
from ncf_dist.prepare.user_blocks import Block
from ncf_dist.prepare.user_files import StagingSink, UserSink, lists, offsets_of
from ncf_dist.sampling import IntArray, Purpose, hash64
from ncf_dist.spark_files import ROWS_PER_FILE

WINDOWS, PAIRS = "windows", "pairs"
"""The names of the staged windows and pairs."""
CELLS = 2**21
"""Items of all windows that are made at a time; what bounds the memory."""


@dataclass(frozen=True)
class InOrder:
    """Rows of whole users in order of time. users: (U,); item, timestamp, split: (R,); offsets: (U+1,), where each user
    begins."""

    users: IntArray
    item: IntArray
    timestamp: IntArray
    split: npt.NDArray[np.int8]
    offsets: IntArray

    @classmethod
    def of(cls, block: Block, split: npt.NDArray[np.int8], order: IntArray) -> InOrder:
        """order: (R,) the block's rows by user and time (`Block.in_time`)."""
        return cls(block.users, block.item[order], block.timestamp[order], split[order], block.offsets)

    @property
    def row(self) -> IntArray:
        """(R,) position of each row's user."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    def where(self, keep: npt.NDArray[np.bool_]) -> InOrder:
        """Some rows; the same users, also those who have none left."""
        offsets = offsets_of(self.row[keep], len(self.users))
        return InOrder(self.users, self.item[keep], self.timestamp[keep], self.split[keep], offsets)

    def gaps(self) -> npt.NDArray[np.uint8]:
        """(R,) code of the time since the row before; 0 for a user's first."""
        gaps = np.zeros(len(self.item), dtype=np.uint8)
        gaps[1:] = gap_code(np.maximum(np.diff(self.timestamp), 0))
        gaps[self.offsets[:-1][np.diff(self.offsets) > 0]] = 0
        return gaps


def recent(rows: InOrder, length: int) -> InOrder:
    """The rows that are among their user's `length` latest of train, or of train and validation, or of all."""
    keep = np.zeros(len(rows.item), dtype=bool)
    ends = np.repeat(rows.offsets[1:], np.diff(rows.offsets))
    for last in (contracts.TRAIN_SPLIT, contracts.VALIDATION_SPLIT, contracts.TEST_SPLIT):
        counts = rows.split <= last
        before = np.concatenate([[0], np.cumsum(counts)])
        # Of the rows that count, those from this one on: at most `length` are kept.
        keep |= counts & (before[ends] - before[:-1] <= length)
    return rows.where(keep)


def windows(train: InOrder, length: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """((W,) position of each window's user, its number, its first row in `train`, its rows). By user and number; window
    0 of a user ends with the latest item."""
    sizes = np.diff(train.offsets)
    count = np.maximum(sizes - 1 + length - 1, 0) // length
    row = np.repeat(np.arange(len(sizes)), count)
    number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    last = train.offsets[1:][row] - 1 - number * length
    first = np.maximum(last - length, train.offsets[:-1][row])
    return row, number, first, last - first + 1


def staged_windows(length: int) -> pa.Schema:
    """Windows on their way to their table, with the hash that orders them. Spark knows no fixed-width binary."""
    fields = [
        f.with_type(pa.binary()) if pa.types.is_fixed_size_binary(f.type) else f
        for f in contracts.sequences(length).schema
    ]
    return pa.schema([*fields, pa.field("order_hash", pa.int64(), nullable=False)])


def window_rows(train: InOrder, length: int, seed: int) -> Iterator[tuple[IntArray, dict[str, Any]]]:
    """((W,) users, columns of `staged_windows`), at most CELLS items at a time."""
    row, number, first, size = windows(train, length)
    gaps = train.gaps()
    step = max(1, CELLS // (length + 1))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        user = train.users[row[part]]
        places = np.arange(length + 1)
        real = places < size[part, None]
        at = np.where(real, first[part, None] + places, 0)
        items = np.where(real, train.item[at], 0).astype("<i4")
        # What was before the window is not known to whoever ranks by the latest items: no gap for the first.
        codes = np.where(real & (places > 0), gaps[at], 0).astype(np.uint8)
        yield (
            user,
            {
                "user_idx": user,
                "window": number[part],
                "length": size[part],
                "items": _binary(items),
                "gaps": _binary(codes),
                "order_hash": hash64(seed, int(Purpose.WINDOW_ORDER), user, number[part]),
            },
        )


def _binary(rows: npt.NDArray[Any]) -> pa.Array:
    """(W,) the bytes of each row of a matrix."""
    width = rows.shape[1] * rows.itemsize
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])
    return fixed.cast(pa.binary())


class OrderSinks:
    """What the pass over users writes of their order: nothing where sequences.length is 0."""

    def __init__(self, config: Sequences, run: str, staging: str, users_per_file: int, n_items: int, seed: int) -> None:
        self.config, self.users_per_file, self.seed = config, users_per_file, seed
        self.recent = UserSink(f"{run}/{contracts.RECENT.name}", contracts.RECENT.schema, users_per_file)
        # Some 40 MB a file, however long the windows are.
        rows_per_file = max(1, 8 * ROWS_PER_FILE // (config.length + 1))
        windows = staged_windows(config.length)
        self.windows = StagingSink(f"{staging}-{WINDOWS}", windows, users_per_file, rows_per_file)
        self.pairs = PairSink(f"{staging}-{PAIRS}", config, n_items)

    def close(self) -> dict[str, list[FileInfo]]:
        """Files by the name of their table."""
        return {
            contracts.RECENT.name: self.recent.close(), WINDOWS: self.windows.close(), PAIRS: self.pairs.close(),
        }  # fmt: skip

    def write(self, block: Block, split: npt.NDArray[np.int8], rule: SplitRule, counts: Counter[str]) -> None:
        if not self.config.length:
            return
        rows = InOrder.of(block, split, block.in_time(rule))
        latest = recent(rows, self.config.length)
        columns = {
            "user_idx": rows.users,
            "item_idx": lists(latest.item, latest.offsets),
            "timestamp": lists(latest.timestamp, latest.offsets, pa.int64()),
            "split": lists(latest.split, latest.offsets, pa.int8()),
        }
        self.recent.add_rows(rows.users, columns)
        train = rows.where(rows.split == contracts.TRAIN_SPLIT)
        sizes = np.diff(train.offsets)
        counts.update(window_targets=int(np.maximum(sizes - 1, 0).sum()), users_without_windows=int((sizes < 2).sum()))
        for user, window in window_rows(train, self.config.length, self.seed):
            counts["windows"] += len(user)
            self.windows.add_rows(user, window)
        if self.config.next_items:
            self.pairs.write(train.item, train.row, int(rows.users[-1]) // self.users_per_file)


def sequence_facts(config: Sequences, counts: Mapping[str, int]) -> dict[str, Any]:
    """rows: windows; targets: items to be predicted in all of them; users_without: users with fewer than two train
    items, who have no window."""
    if not config.length:
        return {}
    named = {"rows": "windows", "targets": "window_targets", "users_without": "users_without_windows"}
    return {"sequences": {name: counts[count] for name, count in named.items()} | {"length": config.length}}
