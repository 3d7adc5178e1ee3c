"""Plain ways to compute what the kernel computes fast."""

from __future__ import annotations

import torch
from torch import Tensor


def catalogue_rank(scores: Tensor, item: Tensor) -> Tensor:
    """Rank (from 1) of item[u] among the items of row u, ordered as `top_k` orders them.

    scores (U, I), item (U,) → (U,) int64; item (U, T), several a user → (U, T) int64, each ranked as if asked alone.
    """
    if item.ndim == 2:
        ranks = [catalogue_rank(scores, column) for column in item.unbind(1)]
        return torch.stack(ranks, 1) if ranks else item.clone()
    own = scores.gather(1, item[:, None])
    place = torch.arange(scores.shape[1], device=scores.device)
    ties_before = (scores == own) & (place[None] < item[:, None])
    return 1 + (scores > own).sum(1) + ties_before.sum(1)
