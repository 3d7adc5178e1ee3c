"""A few users a reader can judge by eye: what they liked, what was held out, and what the model offers them.

Chosen by the stateless hash, so the same night shows the same people. The driver holds their rows, a handful each.
What they get is what evaluate stored of them: nothing is scored again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.evaluate.report.profile import Counted
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_schema
from ncf_dist.parquet import read_table as read_file
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
    spark: SparkSession, prepare: Manifest, ranks: DataFrame, counted: Counted, seed: int, k: int = 10
) -> list[dict[str, Any]]:
    """The section `examples` of the report.

    ranks: one row a user, what evaluate saw of the model: user_idx, top (item indexes, best first), item_idx (held-out
    items), full_rank (of each of those).
    """
    offered = offers(ranks, seed, k)
    return described(spark, prepare, histories(spark, prepare, counted, list(offered)), offered)


def offers(ranks: DataFrame, seed: int, k: int, count: int = USERS) -> dict[int, Offer]:
    """The first K items of each list, and the ranks of the held-out items, of `count` users: the first in the order of
    a hash (fewer where there are fewer)."""
    order = hash64_column(seed, int(Purpose.EXAMPLE), F.col("user_idx"))
    rows = ranks.select("user_idx", "top", "item_idx", "full_rank").orderBy(order, "user_idx").limit(count).collect()
    return {
        row["user_idx"]: Offer(tuple(row["top"][:k]), dict(zip(row["item_idx"], row["full_rank"], strict=True)))
        for row in rows
    }


def histories(spark: SparkSession, prepare: Manifest, counted: Counted, users: Sequence[int]) -> dict[int, History]:
    """What is shown of each user's past, in the order of `users`."""
    test = (F.col("split") == contracts.TEST_SPLIT).alias("test")
    rows = read_table(spark, prepare, contracts.INTERACTIONS).where(F.col("user_idx").isin(list(users)))
    best = F.when(~test, F.col("rating")).otherwise(0.0).desc()
    place = F.row_number().over(Window.partitionBy("user_idx", test).orderBy(best, F.desc("timestamp"), "item_idx"))
    shown = rows.select("user_idx", "item_idx", "rating", test, place.alias("place")).where(F.col("place") <= SHOWN)
    liked = well_rated(counted)
    found: dict[tuple[int, bool], list[tuple[int, float]]] = {}
    for row in sorted(shown.collect(), key=itemgetter("place")):
        # Whoever's best rated is not liked has none further down that is.
        if row["test"] or row["rating"] >= liked:
            found.setdefault((row["user_idx"], row["test"]), []).append((row["item_idx"], row["rating"]))
    return {user: History(tuple(found.get((user, False), ())), tuple(found.get((user, True), ()))) for user in users}


def well_rated(counted: Counted) -> float:
    """The least rating of train and validation that counts as liking: the middle of the scale in use, or the mean where
    that is lower, as it is of counts with a long tail. Where all ratings are the same, that one."""
    lowest, highest, mean = counted.rated or (0.0, 0.0, 0.0)
    return min((lowest + highest) / 2, round(mean, 3))  # A mean depends on the order of its sum in the last digits.


def described(
    spark: SparkSession, prepare: Manifest, seen: Mapping[int, History], offered: Mapping[int, Offer]
) -> list[dict[str, Any]]:
    """Indexes become the customer's ids and titles; ratings are given where the log has any."""
    items = {i for past in seen.values() for i, _ in (*past.liked, *past.held_out)}
    items |= {i for offer in offered.values() for i in offer.items}
    user_ids = _ids_of_users(spark, prepare, seen)
    item_ids = _of_items(prepare, contracts.ITEM_INDEX, "item_id", items)
    titles = _of_items(prepare, contracts.ITEMS, "title", items) if contracts.ITEMS in prepare.tables else {}
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


def _ids_of_users(spark: SparkSession, prepare: Manifest, wanted: Iterable[int]) -> dict[int, Any]:
    files = prepare.files(contracts.USER_INDEX)
    rows: DataFrame = read_files(spark, files, read_schema(files[0])).where(F.col("user_idx").isin(sorted(wanted)))
    return {row["user_idx"]: row["user_id"] for row in rows.select("user_idx", "user_id").collect()}


def _of_items(prepare: Manifest, table: str, column: str, wanted: Iterable[int]) -> dict[int, Any]:
    """{item_idx: value of `column`} of the wanted items. Read here, a file at a time: less than a job of Spark's costs,
    for the catalogue, which the driver counts anyway."""
    found: dict[int, Any] = {}
    for path in prepare.files(table):
        rows = read_file(path, ["item_idx", column])
        index = rows["item_idx"]
        rows = rows.filter(pc.is_in(index, pa.array(sorted(wanted), index.type)))
        found.update(zip(rows["item_idx"].to_pylist(), rows[column].to_pylist(), strict=True))
    return found
