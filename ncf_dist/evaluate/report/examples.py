"""A few users a reader can judge by eye: what they liked, what was held out, and what the model offers them.

Chosen by the stateless hash, so the same night shows the same people. The driver holds their rows, a handful each.
What they get is what evaluate stored of them: nothing is scored again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_schema
from ncf_dist.sampling import Purpose, hash64_column
from ncf_dist.spark_io import read_files, read_table

USERS = 10
SHOWN = 5
"""Liked items, and held-out ones, of a user: the best rated and the latest."""


@dataclass(frozen=True)
class History:
    """Item indexes and ratings: of the best-rated, then latest, train and validation items, and of the latest test
    items. What was rated below `well_rated` is not liked, even where the user rated nothing better."""

    liked: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Offer:
    """The items a user is offered, best first, and the rank in the catalogue of each of their held-out items."""

    items: tuple[int, ...]
    ranks: Mapping[int, int]


def examples(
    spark: SparkSession, prepare: Manifest, ranks: DataFrame, seed: int, k: int = 10, count: int = USERS
) -> list[dict[str, Any]]:
    """The section `examples` of the report.

    ranks: one row a user, what evaluate saw of the model: user_idx, top (item indexes, best first), item_idx (held-out
    items), full_rank (of each of those).
    """
    users = example_users(spark, prepare, seed, count)
    return described(spark, prepare, histories(spark, prepare, users), offers(ranks, users, k))


def example_users(spark: SparkSession, prepare: Manifest, seed: int, count: int = USERS) -> list[int]:
    """`count` user_idx of users with a test row, the first in the order of a hash (fewer where there are fewer)."""
    users = read_table(spark, prepare, contracts.HISTORY).where(F.size("test_item_idx") > 0).select("user_idx")
    first = users.orderBy(hash64_column(seed, int(Purpose.EXAMPLE), F.col("user_idx")), "user_idx").limit(count)
    return [row["user_idx"] for row in first.collect()]


def histories(spark: SparkSession, prepare: Manifest, users: Sequence[int]) -> dict[int, History]:
    """What is shown of each user's past, in the order of `users`."""
    every = read_table(spark, prepare, contracts.INTERACTIONS)
    test = (F.col("split") == contracts.TEST_SPLIT).alias("test")
    rows = every.where(F.col("user_idx").isin(list(users)) & (test | (F.col("rating") >= well_rated(every))))
    best = F.when(~test, F.col("rating")).otherwise(0.0).desc()
    place = F.row_number().over(Window.partitionBy("user_idx", test).orderBy(best, F.desc("timestamp"), "item_idx"))
    shown = rows.select("user_idx", "item_idx", "rating", test, place.alias("place")).where(F.col("place") <= SHOWN)
    found: dict[tuple[int, bool], list[tuple[int, float]]] = {}
    for row in shown.orderBy("user_idx", "test", "place").collect():
        found.setdefault((row["user_idx"], row["test"]), []).append((row["item_idx"], row["rating"]))
    return {user: History(tuple(found.get((user, False), ())), tuple(found.get((user, True), ()))) for user in users}


def well_rated(interactions: DataFrame) -> float:
    """The least rating of train and validation that counts as liking: the middle of the scale in use, or the mean where
    that is lower, as it is of counts with a long tail. Where all ratings are the same, that one."""
    rating = F.col("rating")
    learned = interactions.where(F.col("split") != contracts.TEST_SPLIT)
    row = learned.select(F.min(rating), F.max(rating), F.avg(rating)).first()
    lowest, highest, mean = row if row and row[0] is not None else (0.0, 0.0, 0.0)
    return min((lowest + highest) / 2, round(mean, 3))  # A mean depends on the order of its sum in the last digits.


def offers(ranks: DataFrame, users: Sequence[int], k: int) -> dict[int, Offer]:
    """The first K items of each user's list, and the ranks of the held-out items."""
    rows = ranks.where(F.col("user_idx").isin(list(users))).select("user_idx", "top", "item_idx", "full_rank").collect()
    return {
        row["user_idx"]: Offer(tuple(row["top"][:k]), dict(zip(row["item_idx"], row["full_rank"], strict=True)))
        for row in rows
    }


def described(
    spark: SparkSession, prepare: Manifest, seen: Mapping[int, History], offered: Mapping[int, Offer]
) -> list[dict[str, Any]]:
    """Indexes become the customer's ids and titles; ratings are given where the log has any."""
    items = {i for past in seen.values() for i, _ in (*past.liked, *past.held_out)}
    items |= {i for offer in offered.values() for i in offer.items}
    user_ids = _column(spark, prepare, "user_index", "user_idx", "user_id", seen)
    item_ids = _column(spark, prepare, "item_index", "item_idx", "item_id", items)
    titles = _column(spark, prepare, "items", "item_idx", "title", items) if "items" in prepare.tables else {}
    rated = has_ratings(prepare)

    def item(index: int, **more: Any) -> dict[str, Any]:
        return {"item_id": item_ids[index], "title": titles.get(index), **more}

    return [
        {
            "user_id": user_ids[user],
            "liked": [item(i, rating=rating if rated else None) for i, rating in past.liked],
            "held_out": [item(i, rank=offered[user].ranks.get(i)) for i, _ in past.held_out],
            "recommended": [item(i, rank=rank) for rank, i in enumerate(offered[user].items, 1)],
        }
        for user, past in seen.items()
    ]


def has_ratings(prepare: Manifest) -> bool:
    """Whether the log has ratings; without them every interaction counts as 1."""
    given = prepare.config["input"]
    return str(given["format"]).startswith("movielens") or given["columns"]["rating"] is not None


def _column(
    spark: SparkSession, prepare: Manifest, table: str, key: str, value: str, wanted: Iterable[int]
) -> dict[int, Any]:
    """{key: value} of the wanted keys."""
    files = prepare.files(table)
    rows: DataFrame = read_files(spark, files, read_schema(files[0])).where(F.col(key).isin(sorted(wanted)))
    return {row[key]: row[value] for row in rows.select(key, value).collect()}
