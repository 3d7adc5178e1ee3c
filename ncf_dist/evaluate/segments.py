"""Segments that metrics are broken down by. Each held-out item falls into exactly one of each kind.

- activity: train and validation items of its user.
- item_popularity: deciles of interactions. Items in order of popularity, cut where they hold 10 %, 20 % … of the train
  and validation interactions; items with equally many share a decile. (Deciles of items would put nearly all held-out
  interactions into the first.)
- day, week, month or year (UTC) of the held-out interaction, by how long these span; none where the log has no
  timestamps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncf_dist.evaluate.periods import UNITS, period_codes, period_name

IntArray = npt.NDArray[np.int64]

ACTIVITY = (0, 5, 20, 50, 100, 200, 500)
"""Where the segments by activity begin."""
KINDS = ("activity", "item_popularity")
"""Beside them one of periods.UNITS, where times are known."""


@dataclass(frozen=True)
class PopularityDeciles:
    """lowest[d]: fewest train interactions of an item in decile d, most popular first, descending; the last is 0.
    A decile that no item falls into has no entry: numbers[d] is its number, from 1."""

    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, count: IntArray, items: IntArray) -> PopularityDeciles:
        """count: (V,) distinct train interactions of an item; items: (V,) how many items have so many."""
        order = np.argsort(-count)
        count, items = count[order], items[order]
        held = count * items
        before = np.cumsum(held) - held
        decile = np.minimum(9, before * 10 // max(1, int(held.sum())))
        numbers, first = np.unique(decile, return_index=True)
        last = np.append(first[1:], len(count)) - 1
        lowest = [*count[last][:-1].tolist(), 0]
        return cls(tuple(lowest), tuple(count[first].tolist()), tuple((numbers + 1).tolist()))

    def codes(self, count: IntArray) -> IntArray:
        """(S,) position in `lowest` of items with these train interactions."""
        ascending = np.array(self.lowest[::-1], dtype=np.int64)
        code: IntArray = len(self.lowest) - np.searchsorted(ascending, count, side="right")
        return code

    def name(self, code: int) -> str:
        low, high = self.lowest[code], self.highest[code]
        return (
            f"decile {self.numbers[code]}, items with {low:,}–{high:,}"
            if low < high
            else (f"decile {self.numbers[code]}, items with {low:,}")
        )


def activity_codes(seen_items: IntArray) -> IntArray:
    codes: IntArray = np.searchsorted(np.array(ACTIVITY), seen_items, side="right") - 1
    return codes


def activity_name(code: int) -> str:
    if code == len(ACTIVITY) - 1:
        return f"{ACTIVITY[code]}+ items"
    return f"{ACTIVITY[code]}–{ACTIVITY[code + 1] - 1} items"


def regroup(code: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Held-out items of one segment and one user together: (order (S,) of the items, offsets (G+1,), code (G,)).

    code: (S,) segment of each held-out item; offsets: (U+1,) where each user's items begin.
    """
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((code, user))
    new = np.flatnonzero((np.diff(code[order]) != 0) | (np.diff(user[order]) != 0)) + 1
    groups = np.concatenate([[0], new]).astype(np.int64)
    return order, np.append(groups, len(code)).astype(np.int64), code[order][groups]


def name_of(kind: str, code: int, deciles: PopularityDeciles) -> str:
    if kind in UNITS:
        return period_name(code, kind)
    return activity_name(code) if kind == "activity" else deciles.name(code)


def codes_of(
    kind: str, seen_items: IntArray, train_count: IntArray, timestamp: IntArray, deciles: PopularityDeciles
) -> IntArray:
    """(S,) the segment of each held-out item, by what is known of it, (S,) each."""
    if kind in UNITS:
        return period_codes(timestamp, kind)
    return activity_codes(seen_items) if kind == "activity" else deciles.codes(train_count)
