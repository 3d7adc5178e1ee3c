"""Every metric, defined once: ranking over one or many held-out items a user, the lists themselves, predicted ratings.

`rank` counts from 1. Among candidates equal scores share the mean of the places they take (a constant scorer gets
chance, not luck); in the full catalogue they are ordered by item_idx, as the published table is.

Letters: U users, S held-out items of all users together, m those of one user, K list length, I items, V distinct
values.
Ranks of several items a user are ragged: rank (S,), offsets (U+1,) where each user's begin, at least one each. Without
offsets there is one a user. Formulas are those of Manning, Raghavan & Schütze 2008 (chapter 8) unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


STORED, PAGE = "metrics.json", "report.html"
"""The files of an evaluate run that hold its figures: for programs, and for people."""


def headline_k(ks: Iterable[int]) -> int:
    """10, or the largest K that was asked for: the one that segments are broken down by."""
    ks = tuple(ks)
    return 10 if 10 in ks else max(ks)


def headline(ks: Iterable[int]) -> tuple[str, str]:
    """(protocol, metric) by which a model is judged first, whatever the feedback: NDCG over the full catalogue."""
    return "full", f"ndcg@{headline_k(ks)}"


# ---- ranking -----------------------------------------------------------------------------------------------------


def hit(rank: FloatArray, k: int, offsets: IntArray | None = None) -> FloatArray:
    """HR@K: 1 where any of the user's held-out items is within the first K. (S,) → (U,)"""
    return (_best(rank, offsets) <= k).astype(np.float64)


def recall(rank: FloatArray, k: int, offsets: IntArray | None = None) -> FloatArray:
    """Recall@K: held-out items within the first K / m. With m = 1 it is HR@K. (S,) → (U,)"""
    return _sum(np.asarray(rank) <= k, offsets) / _sizes(rank, offsets)


def precision(rank: FloatArray, k: int, offsets: IntArray | None = None) -> FloatArray:
    """Precision@K: held-out items within the first K / K. (S,) → (U,)"""
    return _sum(np.asarray(rank) <= k, offsets) / k


def ndcg(rank: FloatArray, k: int, offsets: IntArray | None = None) -> FloatArray:
    """NDCG@K with binary gains: Σ 1 / log2(rank + 1) over held-out items within the first K, divided by that of the
    ideal list, Σ_{j ≤ min(m, K)} 1 / log2(j + 1) (Järvelin & Kekäläinen 2002). (S,) → (U,)"""
    rank = np.asarray(rank, dtype=np.float64)
    gain = np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)
    if offsets is None:
        return gain
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))
    found: FloatArray = _sum(gain, offsets) / ideal[np.minimum(_sizes(rank, offsets), k) - 1]
    return found


def average_precision(rank: FloatArray, k: int, offsets: IntArray | None = None) -> FloatArray:
    """AP@K, whose mean over users is MAP@K: Σ (j / rank of the j-th best held-out item) over those within the first K,
    divided by min(m, K). (S,) → (U,)"""
    rank = np.asarray(rank, dtype=np.float64)
    sizes = _sizes(rank, offsets)
    row = np.repeat(np.arange(len(sizes)), sizes)
    rank = rank[np.lexsort((rank, row))]
    place = np.arange(1, len(rank) + 1) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found: FloatArray = _sum(np.where(rank <= k, place / rank, 0.0), offsets) / np.minimum(sizes, k)
    return found


def reciprocal_rank(rank: FloatArray, offsets: IntArray | None = None) -> FloatArray:
    """Reciprocal rank of the user's best held-out item; its mean is MRR. (S,) → (U,)"""
    return 1.0 / _best(rank, offsets)


def per_user(rank: FloatArray, ks: tuple[int, ...], offsets: IntArray | None = None) -> dict[str, FloatArray]:
    """Every ranking metric of one list of a user's unseen items, by name: each (U,)."""
    found = {"mrr": reciprocal_rank(rank, offsets)}
    for k in ks:
        found[f"hr@{k}"] = hit(rank, k, offsets)
        found[f"recall@{k}"] = recall(rank, k, offsets)
        found[f"precision@{k}"] = precision(rank, k, offsets)
        found[f"ndcg@{k}"] = ndcg(rank, k, offsets)
        found[f"map@{k}"] = average_precision(rank, k, offsets)
    return found


def _best(rank: FloatArray, offsets: IntArray | None) -> FloatArray:
    rank = np.asarray(rank, dtype=np.float64)
    if offsets is None or not len(rank):
        return rank
    best: FloatArray = np.minimum.reduceat(rank, _starts(offsets))
    return best


def _sum(values: npt.NDArray[Any], offsets: IntArray | None) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    if offsets is None or not len(values):
        return values
    total: FloatArray = np.add.reduceat(values, _starts(offsets))
    return total


def _sizes(rank: FloatArray, offsets: IntArray | None) -> IntArray:
    sizes: IntArray = np.ones(len(rank), dtype=np.int64) if offsets is None else np.diff(offsets)
    return sizes


def _starts(offsets: IntArray) -> IntArray:
    if (np.diff(offsets) < 1).any():
        raise ValueError("a user without held-out items has no metric: leave such users out")
    return offsets[:-1]


# ---- ranking among candidates ------------------------------------------------------------------------------------


def mean_rank(greater: IntArray, equal: IntArray) -> FloatArray:
    """Rank of a positive that `greater` candidates beat and `equal` candidates tie with:
    the mean of the tied places."""
    return 1.0 + np.asarray(greater, dtype=np.float64) + np.asarray(equal, dtype=np.float64) / 2.0


def auc(greater: IntArray, equal: IntArray, candidates: IntArray) -> FloatArray:
    """Area under the ROC curve of one positive among `candidates` others: the share of them that it beats, ties
    counted half (Mann & Whitney 1947); 1/2 where there are none. (S,) each → (S,)"""
    lost = np.asarray(greater, dtype=np.float64) + np.asarray(equal, dtype=np.float64) / 2.0
    return np.where(np.asarray(candidates) > 0, 1.0 - lost / np.maximum(candidates, 1), 0.5)


def per_user_among_candidates(
    greater: IntArray, equal: IntArray, candidates: IntArray, offsets: IntArray, ks: tuple[int, ...]
) -> dict[str, FloatArray]:
    """HR@K, NDCG@K, MRR and AUC by name, each (U,). Every held-out item has a list of its own, itself and its
    candidates (He et al. 2017, section 4.1): a user's value is the mean over these lists. (S,) each, offsets (U+1,)"""
    rank = mean_rank(greater, equal)
    found = {"mrr": reciprocal_rank(rank), "auc": auc(greater, equal, candidates)}
    for k in ks:
        found |= {f"hr@{k}": hit(rank, k), f"ndcg@{k}": ndcg(rank, k)}
    return {name: _sum(values, offsets) / np.diff(offsets) for name, values in found.items()}


# ---- the lists of all users together -----------------------------------------------------------------------------


def coverage(recommended: int, n_items: int) -> float:
    """Share of the catalogue that is in anybody's list."""
    return recommended / n_items


def gini(count: IntArray, items: IntArray) -> float:
    """Gini index of how often items are recommended, all of the catalogue counted:
    Σ_r (2 r - I - 1) c_(r) / (I Σ c), c_(1) ≤ … ≤ c_(I); 0 for all alike, near 1 for one item only
    (Shani & Gunawardana 2011, section 3.11).

    count: (V,) distinct counts; items: (V,) how many items have each. Raises ValueError where nothing is recommended.
    """
    order = np.argsort(count)
    c, n = np.asarray(count, dtype=np.float64)[order], np.asarray(items, dtype=np.float64)[order]
    if not (c * n).sum() > 0:
        raise ValueError("nothing was recommended: its Gini index is not defined")
    before = np.cumsum(n) - n
    # The ranks before + 1 … before + n share a count; their mean is before + (n + 1) / 2.
    return float((n * c * (2 * before + n - n.sum())).sum() / (n.sum() * (n * c).sum()))


def novelty(train_count: IntArray, recommended: IntArray, interactions: int) -> float:
    """Mean self-information of a recommended item, in bits: - log2 of its share of all train interactions
    (Zhou et al. 2010; Vargas & Castells 2011). An item without any counts as one with a single interaction.

    train_count: (V,); recommended: (V,) places in lists that items of this count take.
    """
    bits = -np.log2(np.maximum(train_count, 1) / interactions)
    return float((bits * recommended).sum() / np.sum(recommended))


def popularity_bias(train_count: IntArray, recommended: IntArray, items: IntArray) -> float:
    """Mean train interactions of a recommended item, over the same mean of what users took (Σ c² / Σ c):
    1 recommends as popular items as people choose, more is a bias to the popular
    (average recommendation popularity, Abdollahpouri et al. 2019).

    train_count: (V,); recommended: (V,) places in lists that items of this count take; items: (V,) items of it.
    """
    c = np.asarray(train_count, dtype=np.float64)
    taken = (c * c * items).sum() / (c * items).sum()
    return float((c * recommended).sum() / np.sum(recommended) / taken)


# ---- sums, which tasks and ranks add up before dividing ----------------------------------------------------------


def sums(rank: FloatArray, ks: tuple[int, ...]) -> dict[str, float]:
    """Sums of MRR, HR@K and NDCG@K of one held-out item a user, and their number `n`."""
    total = {"n": float(len(rank)), "mrr": float(reciprocal_rank(rank).sum())}
    for k in ks:
        total[f"hr@{k}"] = float(hit(rank, k).sum())
        total[f"ndcg@{k}"] = float(ndcg(rank, k).sum())
    return total


def rating_sums(predicted: FloatArray, rating: FloatArray, offsets: IntArray | None = None) -> dict[str, FloatArray]:
    """Sums over each user's held-out ratings of squared and absolute errors, and their number `n`. (S,), (S,) → (U,)"""
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(rating, dtype=np.float64)
    n = _sizes(error, offsets).astype(np.float64)
    return {"n": n, "se": _sum(error**2, offsets), "ae": _sum(np.abs(error), offsets)}


def rating_errors(total: dict[str, float]) -> dict[str, float]:
    """MSE, RMSE and MAE over all ratings, of `rating_sums` added up over users. Raises ValueError without ratings."""
    mean = means(total)
    return {"mse": mean["se"], "rmse": math.sqrt(mean["se"]), "mae": mean["ae"]}


def means(total: dict[str, float]) -> dict[str, float]:
    """Sums to means over users. Raises ValueError without users."""
    if not total.get("n"):
        raise ValueError("no held-out rows: there is nothing to average; check that the split holds some out")
    return {name: value / total["n"] for name, value in total.items() if name != "n"}
