"""The rows that score's tasks get: who is ranked, in which file and task, and what is popular.

The model ranks for users with train or validation rows tonight. Everybody else who is known (users of earlier nights
whose rows are gone, users of the side table who never interacted, users with nothing but test rows) has an embedding
that no row of tonight trained, or none. They get popular items, or nothing where `fallback_days` is None. So do users
whom a model of an earlier night does not know: one of ids those who have come since, one of histories those who did
nothing that it knows.
"""

from __future__ import annotations

import datetime as dt

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.ancestry import Sizes, index_sizes
from ncf_dist.bundle import Bundle
from ncf_dist.config import Score
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_schema
from ncf_dist.recent import COLUMN, no_lists, recent_lists
from ncf_dist.spark_io import read_files, read_table

DAY = 86_400 * 10**6
"""Microseconds, as timestamps count."""


def midnight(day: dt.date) -> int:
    """Microseconds from 1970 to the beginning of `day` (UTC)."""
    return (day - dt.date(1970, 1, 1)).days * DAY


def active_from(config: Score, ds: str) -> dt.date | None:
    """The first day of an active user's last interaction; None where everybody counts."""
    since = config.active_since
    return dt.date.fromisoformat(ds) - dt.timedelta(days=since) if isinstance(since, int) else since


def users_to_rank(spark: SparkSession, prepare: Manifest, bundle: Bundle, config: Score, ds: str) -> DataFrame:
    """A row a user: user_id, user_idx (-1 without one), item_idx and test_item_idx (what they have seen), by_model; and
    `recent` where the model looks back on what a user did last."""
    files = prepare.files(contracts.USER_INDEX)
    index = read_files(spark, files, read_schema(files[0]))
    history = read_table(spark, prepare, contracts.HISTORY)
    since, fallback = active_from(config, ds), config.fallback_days is not None
    rows = index.join(history, "user_idx", "left" if fallback else "inner")
    if fallback and since is None and contracts.UNSEEN_USERS in prepare.tables:
        files = prepare.files(contracts.UNSEEN_USERS)
        rows = rows.unionByName(read_files(spark, files, read_schema(files[0])), allowMissingColumns=True)
    if bundle.looks_back:
        rows = rows.join(recent_lists(spark, prepare), "user_idx", "left")
    none = F.array().cast("array<int>")
    seen, held_out = (F.coalesce(name, none) for name in ("item_idx", "test_item_idx"))
    rows = rows.select(
        "user_id",
        F.coalesce("user_idx", F.lit(-1)).alias("user_idx"),
        seen.alias("item_idx"),
        held_out.alias("test_item_idx"),
        known(bundle, index_sizes(prepare), seen).alias("by_model"),
        *([F.coalesce(COLUMN, no_lists(rows)).alias(COLUMN)] if bundle.looks_back else []),
    )
    if not fallback:
        rows = rows.where("by_model")
    if since is not None:
        recent = read_table(spark, prepare, contracts.INTERACTIONS).where(F.col("timestamp") >= midnight(since))
        rows = rows.join(recent.select("user_idx").distinct(), "user_idx", "left_semi")
    return rows


def known(bundle: Bundle, tonight: Sizes, seen: Column) -> Column:
    """Whether the model ranks for a user. seen: train and validation items."""
    if tonight == (bundle.n_users, bundle.n_items):
        return F.size(seen) > 0
    if bundle.by_history:
        return F.exists(seen, lambda item: item < bundle.n_items)
    return (F.size(seen) > 0) & (F.col("user_idx") < bundle.n_users)


def in_files(rows: DataFrame, files: int, indexed: int) -> DataFrame:
    """Each user's file, a function of the user alone. Neighbours in the index share a file, so that a task reads only
    one stretch of the model's memory-mapped user table. Users without an index get a file by a hash."""
    stretch = F.floor(F.col("user_idx") / F.lit(max(1, -(-indexed // files))))
    file = F.when(F.col("user_idx") >= 0, stretch).otherwise(F.pmod(F.xxhash64("user_id"), F.lit(files)))
    return rows.select(file.cast("int").alias("_file"), *rows.columns)


def in_tasks(rows: DataFrame, tasks: int) -> DataFrame:
    """File f in partition f mod `tasks`, sorted by file and user. Spark places a row by the hash of its key, and hashes
    of file numbers would leave some partitions empty and give others several files. So each partition has a key that
    hashes to it, and a row gets the key of its partition."""
    number = F.col("id").cast("int")
    # In one partition, so that Spark groups without a shuffle.
    hashed = rows.sparkSession.range(0, 32 * tasks, 1, 1).groupBy(F.pmod(F.hash(number), F.lit(tasks)).alias("task"))
    keys = {row["task"]: row["key"] for row in hashed.agg(F.min(number).alias("key")).collect()}
    # Rarely, none of so many numbers hashes to a partition; its files then go where its own number hashes to.
    key = F.lit([keys.get(task, task) for task in range(tasks)])[F.pmod("_file", F.lit(tasks))]
    # With a number of partitions: Spark would else merge a small input into one task, and the work is heavy.
    return rows.repartition(tasks, key).sortWithinPartitions("_file", "user_id")


def popularity(spark: SparkSession, prepare: Manifest, config: Score, ds: str) -> DataFrame:
    """Rows of contracts.POPULARITY. Test rows count as what `seen` says of them."""
    assert config.fallback_days is not None
    rows = read_table(spark, prepare, contracts.INTERACTIONS)
    if config.seen == "train":
        rows = rows.where(F.col("split") != contracts.TEST_SPLIT)
    first = dt.date.fromisoformat(ds) - dt.timedelta(days=config.fallback_days)
    recent = F.sum((F.col("timestamp") >= midnight(first)).cast("bigint"))
    return rows.groupBy("item_idx").agg(recent.alias("recent"), F.count("*").alias("total"))
