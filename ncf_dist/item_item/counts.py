"""What follows what: how much likelier item b is in the steps after item a.

Prepare counts T_ab, the pairs a→b at most `sequences.steps` rows apart in a user's row, each worth 1 / distance, and
keeps an item's heaviest (contracts.NEXT_ITEMS). p_b is b's share of all train rows, m the smoothing:

    p(b | a) = (T_ab + m p_b) / (T_a + m),   T_a = Σ_b T_ab

and having a adds to b's score  log( p(b | a) / √p_b ): half of popularity is taken out, as all of it would leave rare
items alone. (Pointwise mutual information divides by p_b, conditional probability by nothing.) Written apart:

    log p(b | a) - ½ log p_b = log(1 + T_ab / (m p_b)) + ½ log p_b + log(m / (T_a + m))

The last term is the same for all b: it orders nothing and is left out. The second does not depend on a: it is one
column for all rows. The first is 0 where a→b was never seen. So a pair that was counted and not kept loses its first
term alone, and all others are exact. An item that nobody has in train counts as half a row in p_b.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ncf_dist.contracts import STEP_UNIT
from ncf_dist.item_item.rows import ItemRows, from_entries
from ncf_dist.sampling import IntArray

SMOOTHING = 20.0
"""m: what is known of an item before anything follows it, in pairs of neighbours."""
LEAST_ROWS = 0.5


def follow_rows(tables: Iterable[pa.Table], train_rows: IntArray, smoothing: float = SMOOTHING) -> ItemRows:
    """tables: the files of NEXT_ITEMS; train_rows: (I,) of NEXT_TOTALS, by item_idx."""
    shares = np.maximum(train_rows, LEAST_ROWS) / max(1, int(train_rows.sum()))
    parts: list[tuple[Any, Any, Any]] = []
    for table in tables:
        item, following = (table[name].to_numpy() for name in ("item_idx", "next_item_idx"))
        times = table["weight"].to_numpy() / STEP_UNIT
        parts.append((item, following, np.log1p(times / (smoothing * shares[following])).astype(np.float32)))
    empty = np.empty(0, np.int32)
    row, item, values = (np.concatenate(some) for some in zip(*(parts or [(empty, empty, empty)]), strict=True))
    found = from_entries(row, item, values, len(train_rows))
    column = torch.from_numpy((0.5 * np.log(shares)).astype(np.float32))
    return ItemRows(found.offsets, found.items, found.values, column)


def train_rows_of(tables: Iterable[pa.Table], n_items: int) -> IntArray:
    """(I,) train rows of every item. tables: the files of NEXT_TOTALS."""
    rows = np.zeros(n_items, np.int64)
    for table in tables:
        rows[table["item_idx"].to_numpy()] = table["train_rows"].to_numpy()
    return rows
