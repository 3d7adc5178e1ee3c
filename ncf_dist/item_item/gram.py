"""Models that are one item-item matrix, made from the Gram matrix G = XᵀX of who has what.

- EASE (Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019): P = (XᵀX + λ I)⁻¹ and
  B = I - P · diag(1 / diag P), so that diag B = 0; a user's scores are the sum of the rows of B of the user's items.
- item k-nearest-neighbours (Sarwar et al., WWW 2001): cosine of item columns, shrunk; each item keeps its nearest.

X is binary, (users, I). Letters: I items.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ncf_dist.sampling import IntArray

USERS_A_BLOCK = 512


def gram(histories: Iterable[tuple[IntArray, IntArray]], n_items: int) -> Tensor:
    """XᵀX, (I, I) float64. histories: (values (S,), offsets (users+1,)), the items of some users."""
    total = torch.zeros(n_items, n_items, dtype=torch.float64)
    for values, offsets in histories:
        for start in range(0, len(offsets) - 1, USERS_A_BLOCK):
            ends = offsets[start : start + USERS_A_BLOCK + 1]
            x = torch.zeros(len(ends) - 1, n_items)
            row = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
            x[torch.from_numpy(row), torch.from_numpy(values[ends[0] : ends[-1]])] = 1
            total += x.T @ x  # Whole numbers up to the block's users: exact in float32.
    return total


def ease(g: Tensor, ridge: float) -> Tensor:
    """(I, I) float32 weights B of EASE. g is changed."""
    g.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g))
    weights = inverse.div_(-inverse.diagonal().clone()[None, :])
    weights.fill_diagonal_(0)
    return weights.float()


def item_knn(g: Tensor, neighbours: int, shrink: float) -> Tensor:
    """(I, I) float32: cosine of items i and j, g_ij / (√(g_ii g_jj) + shrink), among the `neighbours` nearest of j."""
    norms = g.diagonal().sqrt()
    product = norms[:, None] * norms[None]
    similar = torch.div(g, product.add_(shrink).clamp_min_(torch.finfo(g.dtype).tiny), out=product).float()
    similar.fill_diagonal_(0)
    if neighbours < len(similar):
        least = similar.topk(neighbours, dim=0).values[-1]
        similar.masked_fill_(similar < least[None], 0)
    return similar
