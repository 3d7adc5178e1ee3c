"""An item-to-item matrix as a part of a model's scores: what a user did last, each item worth less the longer ago.

    score(u, b) += weight · Σ_{age < last} ½^(age / half_life) · (rows[a_age, b] + column[b])

a_0 is the user's latest item, and age counts items, not time. Letters: U users, L items looked back on, I items.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ncf_dist.item_item.rows import ItemRows


def decay(half_life: float, last: int, weight: float = 1.0) -> Tensor:
    """(last,) float32, what an item is worth by its age: weight · ½^(age / half_life).

    >>> decay(2.0, 3).tolist()
    [1.0, 0.7071067690849304, 0.5]
    """
    return torch.from_numpy((weight * 0.5 ** (np.arange(last) / half_life)).astype(np.float32))


@dataclass(frozen=True)
class Part:
    """weight: of the part in the score; half_life: items after which one is worth half; last: items looked back on."""

    name: str
    weight: float
    half_life: float
    last: int
    rows: ItemRows

    @property
    def decay(self) -> Tensor:
        """(last,) float32, by age, the part's weight included."""
        return decay(self.half_life, self.last, self.weight)


def dense_scores(part: Part, items: Tensor, length: Tensor) -> Tensor:
    """(U, L) int64 items, oldest first, of which the first `length` (U,) are real → (U, I) float32: the formula as it
    stands, an age at a time. For a few users at once: what was scored is compared with it."""
    rows = part.rows
    scores = torch.zeros(len(items), rows.n_items)
    total = torch.zeros(len(items))
    for age, worth in enumerate(part.decay[: items.shape[1]]):
        user = torch.nonzero(length > age)[:, 0]
        item = items[user, length[user] - 1 - age]
        total[user] += worth
        first, sizes = rows.offsets[item], rows.offsets[item + 1] - rows.offsets[item]
        ends = sizes.cumsum(0)
        entry = torch.arange(int(ends[-1]) if len(ends) else 0) + (first - ends + sizes).repeat_interleave(sizes)
        place = user.repeat_interleave(sizes) * rows.n_items + rows.items[entry]
        scores.view(-1).index_add_(0, place, rows.values[entry] * worth)
    return scores if rows.column is None else scores.add_(total[:, None] * rows.column)


def product_scores(part: Part, items: Tensor, length: Tensor) -> Tensor:
    """The same within rounding, ten times as fast, as one product of what the users' items are worth (U, I) and the
    matrix."""
    rows, last = part.rows, min(part.last, items.shape[1])
    age = length[:, None] - 1 - torch.arange(items.shape[1])
    user, place = torch.nonzero((age >= 0) & (age < last), as_tuple=True)
    worth = torch.zeros(len(items), rows.n_items)
    worth.index_put_((user, items[user, place]), part.decay[age[user, place]], accumulate=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
        matrix = torch.sparse_csr_tensor(
            rows.offsets, rows.items.long(), rows.values, (rows.n_items, rows.n_items), check_invariants=True
        )
    scores: Tensor = worth @ matrix
    return scores if rows.column is None else scores.add_(worth.sum(1, keepdim=True) * rows.column)
