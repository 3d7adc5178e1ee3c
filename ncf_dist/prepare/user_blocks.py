"""Blocks of whole users as NumPy arrays: what the pass over users works on.

Rows arrive grouped by user and ascending in user_idx. Of rows with the same (user, item) one is kept: a row of the test
file before one of the train file, then the latest, then the highest rating. Rows equal in all of these are the same,
but for their place in the log, where rows have one: then the last is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist.prepare.splits import SplitRule, latest_first
from ncf_dist.sampling import IntArray

BLOCK_ROWS = 262_144


@dataclass(frozen=True)
class Block:
    """Whole users, rows ascending by (user, item), each pair once. R rows, U users.
    candidates: (R,) object, the given list of a test row or None; place: (R,) where rows stand in the log."""

    user: IntArray
    item: IntArray
    rating: npt.NDArray[np.float32]
    timestamp: IntArray
    part: npt.NDArray[np.int8]
    offsets: IntArray
    candidates: npt.NDArray[np.object_] | None = None
    place: IntArray | None = None

    @property
    def users(self) -> IntArray:
        return self.user[self.offsets[:-1]]

    @property
    def row(self) -> IntArray:
        """(R,) position of each row's user in the block."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def split(self, rule: SplitRule) -> tuple[npt.NDArray[np.int8], int]:
        return rule(self.user, self.item, self.timestamp, self.part, self.offsets, self.place)

    def in_time(self, rule: SplitRule) -> IntArray:
        """(R,) the rows of each user in order of time."""
        return latest_first(self.timestamp, rule.tie(self.user, self.item, self.place), self.offsets)[0]


def whole_users(
    batches: Iterable[pa.RecordBatch], block_rows: int = BLOCK_ROWS
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Regroup batches so that no user is split: at least `block_rows` rows at a time, fewer at the end."""
    held: list[pa.Table] = []
    rows = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        held.append(pa.Table.from_batches([batch]))
        rows += batch.num_rows
        if rows < block_rows:
            continue
        table = pa.concat_tables(held)
        users = table.column("user_idx").to_numpy()
        cut = int(np.searchsorted(users, users[-1]))
        if cut:
            yield _arrays(table.slice(0, cut))
        held, rows = [table.slice(cut)], rows - cut
    if rows:
        yield _arrays(pa.concat_tables(held))


def _arrays(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    return {
        name: np.fromiter(table.column(name).to_pylist(), dtype=object, count=table.num_rows)
        if pa.types.is_list(table.column(name).type)
        else table.column(name).to_numpy()
        for name in table.column_names
    }


def deduplicate(columns: dict[str, npt.NDArray[Any]], n_items: int) -> Block:
    """A block of rows of whole users: sorted by (user, item), each pair once. columns: (R,) arrays by name."""
    user, item = columns["user_idx"].astype(np.int64), columns["item_idx"].astype(np.int64)
    rating, timestamp, part = columns["rating"], columns["timestamp"], columns["part"]
    pair = user * n_items + item
    order = np.argsort(pair)
    repeated = np.diff(pair[order]) == 0
    if repeated.any():
        latest = [-columns["place"]] if "place" in columns else []
        order = np.lexsort((*latest, -rating, -timestamp, -part, pair))
        order = order[np.concatenate([[True], np.diff(pair[order]) != 0])]
    user = user[order]
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]]).astype(np.int64)
    given, place = (columns[name][order] if name in columns else None for name in ("candidates", "place"))
    return Block(user, item[order], rating[order], timestamp[order], part[order], offsets, given, place)
