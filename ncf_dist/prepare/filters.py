"""The step filters: from whole rows to those that count: one a (user, item), without those that a filter leaves out.

Only nights whose config filters rows, or cuts time by a share of the rows, need this step; without it the pass over
users removes duplicates on its way. Every row that is left out is counted by its rule.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from ncf_dist.config import Config, Input
from ncf_dist.contracts import day_start
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.files import remove
from ncf_dist.prepare.ingest import Ingested
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import Purpose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filtered:
    """The rows that go on to the tables. user_ids, item_ids: one column, repeats allowed; count: how many rows there
    are; unique: how many there were before filters, None where duplicates are still among the rows; left_out: rows by
    rule."""

    rows: DataFrame
    user_ids: DataFrame
    item_ids: DataFrame
    count: int
    unique: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)


def filter_rows(space: Workspace, config: Config, ingested: Ingested, item_type: pa.DataType) -> Filtered:
    """Raises InputError where no row is left, ConfigError for an item of the config that is not of the log's type."""
    if not _needs_unique_rows(config):
        return Filtered(ingested.rows, ingested.user_ids, ingested.item_ids, ingested.whole)
    rows, total, left_out = apply_filters(space, ingested.rows, config.input, item_type, config.seed)
    log.info("%s unique rows, left out: %s", f"{total:,}", left_out or "none")
    count = total - sum(left_out.values())
    if not count:
        raise InputError(
            f"input {config.input.path} has no row left ({ingested.read:,} rows read, {left_out} left out); "
            "needed at least one: check the filters of input"
        )
    return Filtered(rows, rows.select("user_id"), rows.select("item_id"), count, total, left_out)


def _needs_unique_rows(config: Config) -> bool:
    split = config.split
    by_share = split.test_from is None or (split.validation and split.validation_from is None)
    return bool(config.input.filters or (split.strategy == "temporal" and by_share))


def apply_filters(
    space: Workspace, rows: DataFrame, config: Input, item_type: pa.DataType, seed: int
) -> tuple[DataFrame, int, dict[str, int]]:
    """(unique rows that pass every filter, unique rows in all, rows left out by rule). A row is counted for the first
    rule that leaves it out."""
    marked = space.stored(unique(rows).withColumn("_rule", _row_rule(config, item_type)), "unique")
    by_rule = {row["_rule"]: int(row["count"]) for row in marked.groupBy("_rule").count().collect()}
    total = sum(by_rule.values())
    left_out = {str(rule): n for rule, n in sorted(by_rule.items(), key=str) if rule is not None}
    kept, count = marked.where(F.col("_rule").isNull()).drop("_rule"), by_rule.get(None, 0)
    if config.max_user_interactions is not None:
        kept = space.stored(cap_users(kept, config.max_user_interactions, seed), "capped")
        before, count = count, kept.count()
        left_out["over max_user_interactions"] = before - count
    if config.k_core > 1:
        kept, size = k_core(space, kept, count, config.k_core)
        left_out["below k_core"] = count - size
    return kept, total, {rule: n for rule, n in left_out.items() if n}


def unique(rows: DataFrame) -> DataFrame:
    """One row a (user, item): of the test file before the train file, then the latest, then the highest rating, and of
    rows that are equal in all of these the last of the log, where their places are known."""
    place = [name for name in rows.columns if name == "place"]
    best = F.max(F.struct("part", "timestamp", "rating", *place)).alias("best")
    grouped = rows.groupBy("user_id", "item_id").agg(best)
    return grouped.select("user_id", "item_id", *[f"best.{name}" for name in ("rating", "timestamp", "part", *place)])


def _row_rule(config: Input, item_type: pa.DataType) -> Column:
    """The first rule of the config that leaves a row out, or null."""
    rules: list[tuple[Column, str]] = []
    if config.since is not None:
        rules.append((F.col("timestamp") < day_start(config.since), "before since"))
    if config.allow_items is not None:
        allowed = _listed_items(config.allow_items, item_type, "allow_items")
        rules.append((~F.col("item_id").isin(allowed), "not in allow_items"))
    if config.deny_items:
        denied = _listed_items(config.deny_items, item_type, "deny_items")
        rules.append((F.col("item_id").isin(denied), "in deny_items"))
    if config.min_rating is not None:
        rules.append((F.col("rating") < F.lit(config.min_rating).cast("float"), "below min_rating"))
    first = F.lit(None).cast("string")
    for condition, name in reversed(rules):
        first = F.when(condition, F.lit(name)).otherwise(first)
    return first


def _listed_items(given: Sequence[str | int], item_type: pa.DataType, name: str) -> list[Any]:
    try:
        return [int(item) if item_type == pa.int64() else str(item) for item in given]
    except ValueError:
        raise ConfigError(
            f"input.{name} holds {list(given)[:5]}, and this log's item ids are integers; needed integers"
        ) from None


def cap_users(rows: DataFrame, most: int, seed: int) -> DataFrame:
    """The `most` latest rows of each user; equal times are ordered by the place in the log where that is known, else by
    a hash."""
    tie = F.xxhash64(F.lit(seed), F.lit(int(Purpose.USER_CAP)), "user_id", "item_id")
    first = F.desc("place") if "place" in rows.columns else tie
    latest = Window.partitionBy("user_id").orderBy(F.desc("timestamp"), first, "item_id")
    return rows.withColumn("_place", F.row_number().over(latest)).where(F.col("_place") <= most).drop("_place")


def k_core(space: Workspace, rows: DataFrame, size: int, k: int) -> tuple[DataFrame, int]:
    """(rows of the k-core, how many): users and items with fewer than k rows are removed until none is left.

    The fixed point is unique, so the order of removal does not matter (Seidman, Social Networks 5(3), 1983).
    """
    turn = 0
    while True:
        kept = rows
        for column in ("user_id", "item_id"):
            enough = kept.groupBy(column).count().where(F.col("count") >= k).select(column)
            kept = kept.join(enough, column, "left_semi")
        kept = space.stored(kept.select(*rows.columns), "core", str(turn))
        count = kept.count()
        if turn:
            remove(space.staged("core", str(turn - 1)))
        if count == size:
            return kept, size
        rows, size, turn = kept, count, turn + 1
