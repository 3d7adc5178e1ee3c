"""Ranking metrics, and errors of predicted ratings, each defined once.

`rank` counts from 1. Among candidates equal scores share the mean of the places they take (a constant scorer gets
chance, not luck); in the full catalogue they are ordered by item_idx, as the published table is.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def hit(rank: FloatArray, k: int) -> FloatArray:
    """HR@K of one held-out item a user: 1 where it is within the first K. (U,) → (U,)"""
    return (np.asarray(rank) <= k).astype(np.float64)


def ndcg(rank: FloatArray, k: int) -> FloatArray:
    """NDCG@K of one held-out item a user: 1 / log2(rank + 1) within the first K, else 0
    (the ideal DCG is 1). (U,) → (U,)"""
    rank = np.asarray(rank, dtype=np.float64)
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def reciprocal_rank(rank: FloatArray) -> FloatArray:
    """Reciprocal rank of one held-out item a user. (U,) → (U,)"""
    return 1.0 / np.asarray(rank, dtype=np.float64)


def mean_rank(greater: npt.NDArray[np.int64], equal: npt.NDArray[np.int64]) -> FloatArray:
    """Rank of a positive that `greater` candidates beat and `equal` candidates tie with:
    the mean of the tied places."""
    return 1.0 + np.asarray(greater, dtype=np.float64) + np.asarray(equal, dtype=np.float64) / 2.0


def sums(rank: FloatArray, ks: tuple[int, ...]) -> dict[str, float]:
    """Sums over users of every metric, and their number `n`: what tasks and ranks add up before dividing."""
    total = {"n": float(len(rank)), "mrr": float(reciprocal_rank(rank).sum())}
    for k in ks:
        total[f"hr@{k}"] = float(hit(rank, k).sum())
        total[f"ndcg@{k}"] = float(ndcg(rank, k).sum())
    return total


def rating_sums(predicted: FloatArray, rating: FloatArray) -> dict[str, float]:
    """Sums over held-out ratings of squared and absolute errors, and their number `n`. (R,), (R,)"""
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(rating, dtype=np.float64)
    return {"n": float(len(error)), "se": float((error**2).sum()), "ae": float(np.abs(error).sum())}


def rating_errors(total: dict[str, float]) -> dict[str, float]:
    """MSE, RMSE and MAE of `rating_sums`. Raises ValueError without ratings."""
    mean = means(total)
    return {"mse": mean["se"], "rmse": math.sqrt(mean["se"]), "mae": mean["ae"]}


def means(total: dict[str, float]) -> dict[str, float]:
    """Sums to means over users. Raises ValueError without users."""
    if not total.get("n"):
        raise ValueError("no held-out rows: there is nothing to average; check that the split holds some out")
    return {name: value / total["n"] for name, value in total.items() if name != "n"}
