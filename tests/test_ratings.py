"""Baselines of predicted ratings: by hand, whatever the partition, and on the last line of an explicit night."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist.config import Evaluate
from ncf_dist.evaluate.ratings import ITEM_SHRINK, NAMES, USER_SHRINK, file_errors, predictions
from ncf_dist.evaluate.segments import KINDS, PopularityDeciles
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.evaluate.summary import comparisons, of_scorer

LEARNED = [(0, 0, 5.0), (0, 1, 3.0), (1, 0, 4.0), (1, 2, 1.0), (2, 1, 2.0), (2, 2, 3.0)]
HELD = [(0, 2, 4.0), (1, 1, 5.0), (3, 0, 2.0), (2, 9, 1.0)]
"""User 3 and item 9 have no ratings to learn from."""


def spec(replicates: int = 30) -> FiguresPass:
    deciles = PopularityDeciles.of(np.array([1, 2]), np.array([1, 1]))
    return FiguresPass((), (), deciles, (10,), 10, True, KINDS, 1, replicates)


def test_mean_and_biases_by_hand(spark: SparkSession) -> None:
    schema = "user_idx int, item_idx int, rating float"
    learned, held = spark.createDataFrame(LEARNED, schema), spark.createDataFrame(HELD, schema)
    config = Evaluate(als_rank=2, als_iterations=2)
    rows = {(r["user_idx"], r["item_idx"]): r for r in predictions(learned, held, config, 1).collect()}
    assert {place: row["rating"] for place, row in rows.items()} == {(u, i): r for u, i, r in HELD}
    mean = (5 + 3 + 4 + 1 + 2 + 3) / 6
    item = {0: (5 + 4 - 2 * mean) / (2 + ITEM_SHRINK), 1: (3 + 2 - 2 * mean) / (2 + ITEM_SHRINK),
            2: (1 + 3 - 2 * mean) / (2 + ITEM_SHRINK)}  # fmt: skip
    user = {0: (5 - mean - item[0] + 3 - mean - item[1]) / (2 + USER_SHRINK),
            1: (4 - mean - item[0] + 1 - mean - item[2]) / (2 + USER_SHRINK),
            2: (2 - mean - item[1] + 3 - mean - item[2]) / (2 + USER_SHRINK)}  # fmt: skip
    for (u, i), row in rows.items():
        assert row["mean"] == pytest.approx(mean, abs=1e-5)
        assert row["biases"] == pytest.approx(mean + item.get(i, 0) + user.get(u, 0), abs=1e-5)
        assert 1 <= row["als"] <= 5
        if u == 3 or i == 9:
            assert row["als"] == row["biases"]


def rows_of(users: list[int], seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    columns = {name: random.uniform(1, 5, len(users)) for name in ("rating", *NAMES)}
    return {"user_idx": np.array(users), **columns}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60).map(sorted), st.integers(0, 30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_errors_of_files_add_up_to_those_of_all(users: list[int], cut: int, seed: int) -> None:
    """Replicates, too: how often a user counts depends on the user alone."""
    rows = rows_of(users, seed)
    whole = file_errors(rows, spec())
    below = rows["user_idx"] < cut
    parts = [file_errors({n: c[mask] for n, c in rows.items()}, spec()) for mask in (below, ~below) if mask.any()]
    for name, values in whole.items():
        assert len(values) == 31
        assert np.allclose(values, sum(part[name] for part in parts))
    error = rows["biases"] - rows["rating"]
    found = of_scorer(whole, "biases")["rating"]
    assert found == {
        "mse": pytest.approx(np.mean(error**2)),
        "rmse": pytest.approx(math.sqrt(np.mean(error**2))),
        "mae": pytest.approx(np.mean(np.abs(error))),
    }


def test_the_model_is_compared_with_each_by_rmse() -> None:
    """The same replicates on both sides: a model that is a baseline's equal differs by nothing in any of them."""
    sums = file_errors(rows_of(list(range(50)), 3), spec())
    sums |= {name.replace("biases", "model"): values for name, values in sums.items() if name.startswith("biases")}
    found = {(row["with"], row["metric"]): row for row in comparisons(sums, list(NAMES))}
    assert set(found) == {(name, metric) for name in NAMES for metric in ("mse", "rmse", "mae")}
    assert found["biases", "rmse"]["difference"] == 0
    assert found["biases", "rmse"]["interval"] == [0, 0]
    assert found["biases", "rmse"]["p"] == 1
