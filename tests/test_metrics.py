"""Every metric on examples small enough to check by hand, and beside scikit-learn."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    mean_absolute_error,
    mean_squared_error,
    ndcg_score,
    roc_auc_score,
)

from ncf_dist.metrics import (
    auc,
    average_precision,
    coverage,
    gini,
    hit,
    mean_rank,
    means,
    ndcg,
    novelty,
    per_user,
    per_user_among_candidates,
    popularity_bias,
    precision,
    rating_errors,
    rating_sums,
    recall,
    reciprocal_rank,
    sums,
)

RANKS = np.array([1.0, 2.0, 3.0, 10.0, 11.0])


def test_hit_is_one_within_the_first_k() -> None:
    assert hit(RANKS, 2).tolist() == [1, 1, 0, 0, 0]
    assert hit(RANKS, 10).tolist() == [1, 1, 1, 1, 0]


def test_ndcg_discounts_by_the_logarithm_of_the_rank() -> None:
    expected = [1 / log2(2), 1 / log2(3), 1 / log2(4), 1 / log2(11), 0]
    assert ndcg(RANKS, 10).tolist() == pytest.approx(expected)
    assert ndcg(RANKS, 2).tolist() == pytest.approx([1 / log2(2), 1 / log2(3), 0, 0, 0])


def test_reciprocal_rank() -> None:
    assert reciprocal_rank(RANKS).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11])


def test_ties_share_the_mean_of_the_places_they_take() -> None:
    """The positive with `equal` others takes the places greater + 1 … greater + 1 + equal."""
    greater, equal = np.array([0, 0, 2, 0]), np.array([0, 1, 3, 99])
    places = [[1], [1, 2], [3, 4, 5, 6], range(1, 101)]
    assert mean_rank(greater, equal).tolist() == [sum(p) / len(p) for p in places]


def test_a_constant_scorer_gets_no_hit_among_a_hundred() -> None:
    rank = mean_rank(np.array([0]), np.array([99]))
    assert rank.tolist() == [(1 + 100) / 2]
    assert hit(rank, 10).tolist() == [0]


def test_means_over_users() -> None:
    total = sums(np.array([1.0, 3.0, 20.0]), ks=(1, 10))
    assert total["n"] == 3
    assert means(total) == pytest.approx(
        {
            "mrr": (1 + 1 / 3 + 1 / 20) / 3,
            "hr@1": 1 / 3,
            "ndcg@1": 1 / 3,
            "hr@10": 2 / 3,
            "ndcg@10": (1 / log2(2) + 1 / log2(4)) / 3,
        }
    )


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.data())
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(ranks: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ranks)))
    whole, first, second = (sums(np.array(part, dtype=float), (5, 10)) for part in (ranks, ranks[:cut], ranks[cut:]))
    assert whole == pytest.approx({name: first[name] + second[name] for name in whole})


@given(st.integers(1, 300), st.integers(1, 50))
def test_bounds(rank: int, k: int) -> None:
    """0 <= NDCG@K <= HR@K <= 1, and HR@K is 0 or 1."""
    found = np.array([float(rank)])
    assert 0 <= ndcg(found, k)[0] <= hit(found, k)[0] <= 1
    assert hit(found, k)[0] in (0, 1)


def test_no_rows_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no held-out rows"):
        means(sums(np.array([]), (10,)))
    with pytest.raises(ValueError, match="no held-out rows"):
        means({})


def test_errors_of_ratings_are_scikit_learns() -> None:
    """Two users with 20 and 30 ratings."""
    draw = np.random.default_rng(1)
    predicted, rating = draw.random(50) * 5, draw.integers(1, 6, 50).astype(float)
    parts = rating_sums(predicted, rating, np.array([0, 20, 50]))
    assert parts["n"].tolist() == [20, 30]
    found = rating_errors({name: float(part.sum()) for name, part in parts.items()})
    mse = mean_squared_error(rating, predicted)
    assert found == pytest.approx({"mse": mse, "rmse": mse**0.5, "mae": mean_absolute_error(rating, predicted)})
    parts = rating_sums(np.array([3.0, 5.0]), np.array([1.0, 4.0]))
    assert rating_errors({name: float(part.sum()) for name, part in parts.items()}) == pytest.approx(
        {"mse": (2**2 + 1**2) / 2, "rmse": 2.5**0.5, "mae": (2 + 1) / 2}
    )


# ---- several held-out items a user -------------------------------------------------------------------------

TWO_USERS = np.array([2.0, 7.0, 4.0, 11.0]), np.array([0, 3, 4])
"""The first user's three items are ranked 2, 7 and 4, the second one's only item 11."""


def test_several_held_out_items_by_hand() -> None:
    rank, offsets = TWO_USERS
    assert hit(rank, 5, offsets).tolist() == [1, 0]
    assert hit(rank, 1, offsets).tolist() == [0, 0]
    assert recall(rank, 5, offsets).tolist() == [2 / 3, 0]
    assert precision(rank, 5, offsets).tolist() == [2 / 5, 0]
    assert reciprocal_rank(rank, offsets).tolist() == [1 / 2, 1 / 11]
    # Of the first K places 2 and 4 are right: 1 right of 2, 2 right of 4; at K = 10 also 3 of 7.
    assert average_precision(rank, 5, offsets).tolist() == [(1 / 2 + 2 / 4) / 3, 0]
    assert average_precision(rank, 10, offsets).tolist() == [(1 / 2 + 2 / 4 + 3 / 7) / 3, 0]
    ideal = 1 / log2(2) + 1 / log2(3) + 1 / log2(4)
    assert ndcg(rank, 5, offsets).tolist() == pytest.approx([(1 / log2(3) + 1 / log2(5)) / ideal, 0])
    # With K = 2 only two of the three items fit.
    assert ndcg(rank, 2, offsets).tolist() == pytest.approx([(1 / log2(3)) / (1 / log2(2) + 1 / log2(3)), 0])
    assert average_precision(rank, 2, offsets).tolist() == [(1 / 2) / 2, 0]


@st.composite
def held_out(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Ranks of the held-out items of some users among n unseen items."""
    n = draw(st.integers(2, 40))
    ranks = st.sets(st.integers(1, n), min_size=1, max_size=n - 1)
    return [sorted(user) for user in draw(st.lists(ranks, min_size=1, max_size=5))], n


def ragged(users: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([float(rank) for ranks in users for rank in ranks])
    return flat, np.cumsum([0, *(len(ranks) for ranks in users)])


@given(held_out(), st.integers(1, 45))
def test_ndcg_and_average_precision_are_scikit_learns(case: tuple[list[list[int]], int], k: int) -> None:
    users, n = case
    rank, offsets = ragged(users)
    scores = -np.arange(1, n + 1, dtype=float)
    right = [np.isin(np.arange(1, n + 1), ranks) for ranks in users]
    wanted = [ndcg_score(truth[None].astype(int), scores[None], k=k) for truth in right]
    assert ndcg(rank, k, offsets).tolist() == pytest.approx(wanted)
    wanted = [average_precision_score(truth, scores) for truth in right]
    assert average_precision(rank, n, offsets).tolist() == pytest.approx(wanted)


@given(held_out(), st.integers(1, 45), st.randoms())
def test_counts_within_k(case: tuple[list[list[int]], int], k: int, random: object) -> None:
    """By sets; and the order in which a user's items are given does not matter."""
    users, _ = case
    rank, offsets = ragged(users)
    top = [len(set(ranks) & set(range(1, k + 1))) for ranks in users]
    assert hit(rank, k, offsets).tolist() == [float(found > 0) for found in top]
    assert recall(rank, k, offsets).tolist() == [f / len(ranks) for f, ranks in zip(top, users, strict=True)]
    assert precision(rank, k, offsets).tolist() == [found / k for found in top]
    assert reciprocal_rank(rank, offsets).tolist() == [1 / min(ranks) for ranks in users]
    for ranks in users:
        random.shuffle(ranks)  # type: ignore[attr-defined]
    shuffled = per_user(ragged(users)[0], (k,), offsets)
    for name, values in per_user(rank, (k,), offsets).items():
        assert shuffled[name].tolist() == pytest.approx(values.tolist()), name


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 50))
def test_one_held_out_item_is_the_special_case(ranks: list[int], k: int) -> None:
    rank, offsets = np.array(ranks, dtype=float), np.arange(len(ranks) + 1)
    for name, values in per_user(rank, (k,)).items():
        assert per_user(rank, (k,), offsets)[name].tolist() == values.tolist(), name
    found = per_user(rank, (k,))
    assert found[f"recall@{k}"].tolist() == found[f"hr@{k}"].tolist()
    total = sums(rank, (k,))
    assert all(total[name] == pytest.approx(found[name].sum()) for name in total if name != "n")


def test_a_user_without_held_out_items_is_refused() -> None:
    with pytest.raises(ValueError, match="without held-out items"):
        hit(np.array([1.0, 2.0]), 5, np.array([0, 1, 1, 2]))


# ---- candidates --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_auc_is_scikit_learns(scores: list[int]) -> None:
    """The first score is the positive's; whole numbers, so that many tie."""
    own, others = scores[0], np.array(scores[1:])
    truth = [1, *[0] * len(others)]
    found = auc(np.array([(others > own).sum()]), np.array([(others == own).sum()]), np.array([len(others)]))
    assert found.tolist() == pytest.approx([roc_auc_score(truth, scores)])


def test_a_user_with_several_lists_of_candidates_counts_once() -> None:
    """Two users: one has two held-out items, first of 10 and beaten by 3 of 10; the other's ties with all 4. Then one
    with no candidates at all."""
    greater, equal, candidates = np.array([0, 3, 0, 0]), np.array([0, 0, 4, 0]), np.array([10, 10, 4, 0])
    found = per_user_among_candidates(greater, equal, candidates, np.array([0, 2, 3, 4]), (2,))
    assert found["hr@2"].tolist() == [(1 + 0) / 2, 0, 1]
    assert found["mrr"].tolist() == [(1 + 1 / 4) / 2, 1 / 3, 1]
    assert found["ndcg@2"].tolist() == [(1 + 0) / 2, 0, 1]
    assert found["auc"].tolist() == [(1 + 7 / 10) / 2, 1 / 2, 1 / 2]


# ---- the lists themselves ----------------------------------------------------------------------------------


def test_gini_by_hand() -> None:
    """Counts 0, 0, 1, 3: Σ (2 r - 5) c = (2 · 3 - 5) · 1 + (2 · 4 - 5) · 3 = 10, over 4 · 4."""
    assert gini(np.array([3, 0, 1]), np.array([1, 2, 1])) == 10 / 16
    assert gini(np.array([7]), np.array([5])) == 0
    with pytest.raises(ValueError, match="nothing was recommended"):
        gini(np.array([0]), np.array([5]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any))
def test_gini_is_the_mean_difference_of_all_pairs(counts: list[int]) -> None:
    """G = Σ_i Σ_j |c_i - c_j| / (2 I Σ c)."""
    c = np.array(counts)
    wanted = np.abs(c[:, None] - c[None]).sum() / (2 * len(c) * c.sum())
    assert gini(*np.unique(c, return_counts=True)) == pytest.approx(wanted)


def test_lists_by_hand() -> None:
    """Five items with 8, 4, 2, 2 and 0 of 16 interactions; the first is in 3 lists, one of the 2s in one, the last in
    one."""
    assert coverage(3, 5) == 3 / 5
    count, items = np.array([0, 2, 4, 8]), np.array([1, 2, 1, 1])
    shown = np.array([1, 1, 0, 3])
    # 8/16 → 1 bit, 2/16 → 3 bits; an item without interactions counts as one with 1/16 → 4 bits.
    assert novelty(count, shown, 16) == (3 * 1 + 1 * 3 + 1 * 4) / 5
    taken = (8 * 8 + 4 * 4 + 2 * 2 + 2 * 2) / 16
    assert popularity_bias(count, shown, items) == (3 * 8 + 2 + 0) / 5 / taken


def test_recommending_what_people_took_is_no_bias() -> None:
    count, items = np.array([1, 5, 9]), np.array([4, 2, 1])
    assert popularity_bias(count, count * items, items) == pytest.approx(1)
