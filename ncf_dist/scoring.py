"""The one scorer: evaluation and publication rank with this code, so the metric is about what ships.

A scorer gives the scores of a block of users for the whole catalogue. What a user has seen is masked
from a compact list before the top K is taken. Equal scores are ordered by item_idx, so a result depends
on no block, batch or partition.

Letters: U users of a block, I items, K list length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist.models import Recommender

PAIRS_A_BLOCK = 65_536
"""Pairs joined at once: bounds what a hidden layer of all pairs takes, and keeps it in cache."""
USERS_A_CALL = 64
"""Upper bound of the users joined at once."""

IntArray = npt.NDArray[np.int64]


class Scorer(Protocol):
    """Scores a block of users for all items."""

    n_items: int

    def scores(self, users: Tensor) -> Tensor:
        """(U,) int64 → (U, I) float32; a fresh tensor that the caller may change."""
        ...


class ModelScorer:
    """A trained model; its item side is computed once. eligible: ascending item indexes, None for all.

    The model is always called with the same number of users, a power of two, the last call filled up: a matrix product
    rounds differently for 1, 3 or 17 rows, and a score must not depend on who else is in the block.
    """

    @torch.no_grad()
    def __init__(
        self, model: Recommender, n_items: int, eligible: Tensor | None = None, precision: str = "fp32"
    ) -> None:
        self.model, self.n_items, self.eligible, self.precision = model.eval(), n_items, eligible, precision
        self.items = model.item_side(torch.arange(n_items))
        most = min(USERS_A_CALL, max(1, PAIRS_A_BLOCK // n_items))
        self.step = 1 << (most.bit_length() - 1)

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        filled = torch.cat([users, users[:1].expand(-len(users) % self.step)])
        with torch.autocast(users.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            parts = filled.split(self.step)
            blocks = [self.model.score_block(self.model.user_side(part), self.items) for part in parts]
        return torch.cat(blocks)[: len(users)].float() if len(users) else torch.empty(0, self.n_items)


class PopularityScorer:
    """Every user gets the items most interacted with in train: the baseline a model must beat."""

    def __init__(self, train_count: IntArray) -> None:
        self.n_items = len(train_count)
        # Counts past 2^24 are not exact in float32; their order is kept by ranking them first.
        self.places = torch.from_numpy(np.unique(train_count, return_inverse=True)[1].astype(np.float32))

    def scores(self, users: Tensor) -> Tensor:
        return self.places.expand(len(users), -1).clone()


@dataclass(frozen=True)
class Lists:
    """Ragged lists, one a user: values (S,), offsets (U+1,)."""

    values: IntArray
    offsets: IntArray

    @property
    def row(self) -> IntArray:
        """(S,) the user each value belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def mask(scores: Tensor, seen: Lists) -> Tensor:
    """Set the scores (U, I) of seen items to -inf, in place. Returns `scores`."""
    scores[torch.from_numpy(seen.row), torch.from_numpy(seen.values)] = -torch.inf
    return scores


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(U, I) → the K best (values, item indexes), each (U, min(K, I)), best first, equal scores by ascending index.

    Masked items (-inf) come last; a user with fewer than K unmasked items has them at the end.
    """
    k = min(k, scores.shape[1])
    values, index = torch.topk(scores, k, dim=1)
    last = values[:, -1:]
    # topk picks freely among items that tie with the last place:
    # where there are more of them than places, choose again by index.
    for row in torch.nonzero((scores >= last).sum(1) > k)[:, 0].tolist():
        better = torch.nonzero(scores[row] > last[row])[:, 0]
        tied = torch.nonzero(scores[row] == last[row])[:, 0][: k - len(better)]
        index[row] = torch.cat([better, tied])
    index = index.sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def recommend(scorer: ModelScorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    """(U,) users → the K best eligible unmasked items of each: (values, item indexes), both (U, min(K, I)), as `top_k`
    orders them; -inf where nothing is left."""
    scores = mask(scorer.scores(users), masked)
    if scorer.eligible is not None:
        wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        wanted[scorer.eligible] = True
        scores.masked_fill_(~wanted, -torch.inf)
    return top_k(scores, k)


def catalogue_rank(scores: Tensor, item: Tensor) -> Tensor:
    """Rank (from 1) of item[u] among the items of row u, ordered as `top_k` orders them. (U, I), (U,) → (U,) int64"""
    own = scores.gather(1, item[:, None])
    ties_before = (scores == own) & (torch.arange(scores.shape[1])[None] < item[:, None])
    return 1 + (scores > own).sum(1) + ties_before.sum(1)
