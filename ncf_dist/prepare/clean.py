"""From valid rows to the rows that count: one row a (user, item), and the filters of the config, each row counted.

Only nights whose config filters, or cuts by a share of the time, need this pass; without it the pass over users
removes duplicates on its way.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist.config import Input
from ncf_dist.errors import ConfigError
from ncf_dist.files import file_url, remove
from ncf_dist.prepare.rows import day_start
from ncf_dist.sampling import Purpose
from ncf_dist.spark_io import spark_path

DIGIT_BITS = 16


def unique(rows: DataFrame) -> DataFrame:
    """One row a (user, item): of the test file before the train file, then the latest, then the highest rating."""
    best = F.max(F.struct("part", "timestamp", "rating")).alias("best")
    grouped = rows.groupBy("user_id", "item_id").agg(best)
    return grouped.select("user_id", "item_id", "best.rating", "best.timestamp", "best.part")


def keep(
    spark: SparkSession, rows: DataFrame, config: Input, types: tuple[pa.DataType, pa.DataType], seed: int, staging: str
) -> tuple[DataFrame, int, dict[str, int]]:
    """(unique rows that pass every filter, unique rows in all, rows left out by rule). A row is counted for the first
    rule that leaves it out. Raises ConfigError for an item that is not of the log's type."""
    marked = unique(rows).withColumn("_rule", _row_rule(config, types[1]))
    marked = _stored(spark, marked, posixpath.join(staging, "unique"))
    by_rule = {row["_rule"]: int(row["count"]) for row in marked.groupBy("_rule").count().collect()}
    total = sum(by_rule.values())
    out = {str(rule): n for rule, n in sorted(by_rule.items(), key=str) if rule is not None}
    kept, left = marked.where(F.col("_rule").isNull()).drop("_rule"), by_rule.get(None, 0)
    if config.max_user_interactions is not None:
        kept = _stored(spark, _cap(kept, config.max_user_interactions, seed), posixpath.join(staging, "capped"))
        before, left = left, kept.count()
        out["over max_user_interactions"] = before - left
    if config.k_core > 1:
        kept, size = k_core(spark, kept, left, config.k_core, posixpath.join(staging, "core"))
        out["below k_core"] = left - size
    return kept, total, {rule: n for rule, n in out.items() if n}


def _row_rule(config: Input, item_type: pa.DataType) -> Column:
    """The first rule of the config that leaves a row out, or null."""
    rules: list[tuple[Column, str]] = []
    if config.since is not None:
        rules.append((F.col("timestamp") < day_start(config.since), "before since"))
    if config.allow_items is not None:
        rules.append(
            (~F.col("item_id").isin(_items(config.allow_items, item_type, "allow_items")), "not in allow_items")
        )
    if config.deny_items:
        rules.append((F.col("item_id").isin(_items(config.deny_items, item_type, "deny_items")), "in deny_items"))
    if config.min_rating is not None:
        rules.append((F.col("rating") < F.lit(config.min_rating).cast("float"), "below min_rating"))
    found = F.lit(None).cast("string")
    for condition, name in reversed(rules):
        found = F.when(condition, F.lit(name)).otherwise(found)
    return found


def _items(given: Sequence[str | int], item_type: pa.DataType, name: str) -> list[Any]:
    try:
        return [int(item) if item_type == pa.int64() else str(item) for item in given]
    except ValueError:
        raise ConfigError(
            f"input.{name} holds {list(given)[:5]}, and this log's item ids are integers; needed integers"
        ) from None


def _cap(rows: DataFrame, most: int, seed: int) -> DataFrame:
    """The `most` latest rows of each user; equal times are ordered by a hash."""
    tie = F.xxhash64(F.lit(seed), F.lit(int(Purpose.USER_CAP)), "user_id", "item_id")
    latest = Window.partitionBy("user_id").orderBy(F.desc("timestamp"), tie, "item_id")
    return rows.withColumn("_place", F.row_number().over(latest)).where(F.col("_place") <= most).drop("_place")


def k_core(spark: SparkSession, rows: DataFrame, size: int, k: int, staging: str) -> tuple[DataFrame, int]:
    """(rows of the k-core, how many): users and items with fewer than k rows leave, until nobody does.

    The fixed point is unique, so the order of removal does not matter (Seidman, Social Networks 5(3), 1983).
    """
    turn = 0
    while True:
        kept = rows
        for column in ("user_id", "item_id"):
            enough = kept.groupBy(column).count().where(F.col("count") >= k).select(column)
            kept = kept.join(enough, column, "left_semi")
        path = posixpath.join(staging, str(turn))
        kept = _stored(spark, kept.select(*rows.columns), path)
        found = kept.count()
        if turn:
            remove(posixpath.join(staging, str(turn - 1)))
        if found == size:
            return kept, size
        rows, size, turn = kept, found, turn + 1


def _stored(spark: SparkSession, frame: DataFrame, path: str) -> DataFrame:
    frame.write.mode("overwrite").parquet(file_url(path))
    return spark.read.schema(frame.schema).parquet(spark_path(path))


def value_at(frame: DataFrame, key: Column, position: int) -> int:
    """The value that is at `position` (from 0) when `key` (bigint) is sorted: exact, in four counting passes, with
    2^16 counts at a time on the driver."""
    ordered = key.bitwiseXOR(F.lit(-(2**63)).cast("bigint"))  # As unsigned numbers these sort like the signed ones.
    keys = frame.select(ordered.alias("k"))
    found = 0
    for shift in (48, 32, 16, 0):
        digit = F.shiftrightunsigned("k", shift).bitwiseAND(F.lit(2**DIGIT_BITS - 1)).cast("int")
        within = keys if shift == 48 else keys.where(F.shiftrightunsigned("k", shift + DIGIT_BITS) == F.lit(found))
        counts = sorted(
            (int(row["d"]), int(row["count"])) for row in within.groupBy(digit.alias("d")).count().collect()
        )
        for value, count in counts:
            if position < count:
                found = (found << DIGIT_BITS) | value
                break
            position -= count
        else:
            raise IndexError(f"position is {position} rows past the end")
    return found - 2**63
