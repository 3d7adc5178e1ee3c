"""Ranking metrics on examples small enough to check by hand."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, mean_squared_error

from ncf_dist.metrics import hit, mean_rank, means, ndcg, rating_errors, rating_sums, reciprocal_rank, sums

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

    draw = np.random.default_rng(1)
    predicted, rating = draw.random(50) * 5, draw.integers(1, 6, 50).astype(float)
    parts = [rating_sums(predicted[part], rating[part]) for part in (slice(0, 20), slice(20, 50))]
    found = rating_errors({name: sum(part[name] for part in parts) for name in parts[0]})
    mse = mean_squared_error(rating, predicted)
    assert found == pytest.approx({"mse": mse, "rmse": mse**0.5, "mae": mean_absolute_error(rating, predicted)})
    assert rating_errors(rating_sums(np.array([3.0, 5.0]), np.array([1.0, 4.0]))) == pytest.approx(
        {"mse": 2.5, "rmse": 2.5**0.5, "mae": 1.5}
    )
