"""The fallback: the items with most interactions, without those that the user has seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist.parquet import read_table
from ncf_dist.scoring import Lists

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Popular:
    """items: (E,) eligible item indexes, most popular first; scores: (E,) their counts; place: (I,) where an item is in
    `items`, E for one that is not."""

    items: IntArray
    scores: npt.NDArray[np.float32]
    place: IntArray

    @classmethod
    def read(cls, files: Iterable[str], n_items: int, eligible: IntArray | None) -> Popular:
        """From the popularity table: by recent interactions, then by all interactions, then by item_idx. Where no
        interaction is recent, as in an old log, by all of them alone."""
        table = pa.concat_tables([read_table(path) for path in files])
        recent, total = (np.zeros(n_items, dtype=np.int64) for _ in range(2))
        for counts, name in ((recent, "recent"), (total, "total")):
            counts[table["item_idx"].to_numpy()] = table[name].to_numpy()
        counts = recent if recent.any() else total
        items = np.arange(n_items) if eligible is None else eligible
        items = items[np.lexsort((items, -total[items], -counts[items]))]
        place = np.full(n_items, len(items), dtype=np.int64)
        place[items] = np.arange(len(items))
        return cls(items, counts[items].astype(np.float32), place)

    def top(self, masked: Lists, k: int) -> tuple[npt.NDArray[np.float32], IntArray]:
        """(scores, items), both (U, min(K, E)), of the most popular items that a user's list does not mask; -inf where
        nothing is left."""
        users, k = len(masked.offsets) - 1, min(k, len(self.items))
        # Down to this depth even the user with the most masked items finds K others, if there are any.
        depth = min(len(self.items), k + int(np.diff(masked.offsets).max(initial=0)))
        place = self.place[masked.values]
        hidden = np.zeros((users, depth), dtype=bool)
        hidden[masked.row[place < depth], place[place < depth]] = True
        chosen = np.argsort(hidden, axis=1, kind="stable")[:, :k]
        values = np.where(np.take_along_axis(hidden, chosen, axis=1), np.float32(-np.inf), self.scores[chosen])
        return values, self.items[chosen]
