"""Ranking the users with held-out items: the rows that tasks get, and the table `ranks` that they write."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.evaluate.evaluation import Evaluation
from ncf_dist.evaluate.histogram import Histogram
from ncf_dist.evaluate.periods import unit_of
from ncf_dist.evaluate.spec import ALS_USER, EvaluationPass
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.recent import recent_lists
from ncf_dist.spark_files import table_info
from ncf_dist.spark_io import on_executor, read_table, task_stats

MIN_FILES = 16
USERS_A_FILE = 25_000
"""Bounds the rows of `ranks` that a task holds."""


class Ranked(NamedTuple):
    """The table `ranks`; histograms of the model's scores by name; the unit that suits the times of the held-out items,
    if they have any; how many of the users a model of an earlier night does not know."""

    table: TableInfo
    scores: dict[str, Histogram]
    unit: str | None
    unknown_users: int


def rank_held_out(job: Evaluation, fitted: Mapping[str, tuple[str, ...]], als_users: DataFrame | None) -> Ranked:
    files = max(MIN_FILES, -(-job.prepare.tables[contracts.HISTORY.name].rows // USERS_A_FILE))
    spec = EvaluationPass(
        job.bundle,
        job.n_items,
        tuple(job.prepare.files(contracts.ITEM_STATS.name)),
        posixpath.join(job.run, contracts.RANKS.name),
        max(job.config.evaluate.ks),
        tuple(fitted.items()),
        job.since is not None,
        job.products,
        job.config.evaluate,
        job.kept,
        job.champion,
    )
    rows = held_out_users(job.spark, job.prepare, als_users, job.config.evaluate.als_rank)
    if job.looks_back:
        rows = rows.join(recent_lists(job.spark, job.prepare), "user_idx")
    rows = rows.withColumn("_file", F.pmod("user_idx", F.lit(files)))
    # With a number of partitions: Spark would else merge a small input into one task, and the work is heavy.
    rows = rows.repartition(files, "_file").sortWithinPartitions("_file", "user_idx")
    work = on_executor("ncf_dist.evaluate.ranks:evaluation_pass", spec)
    stats = task_stats(rows, work)
    histograms: dict[str, Histogram] = {}
    for task in stats:
        for name, body in task["scores"].items():
            histograms.setdefault(name, Histogram()).merge(Histogram.from_json(body))
    table = table_info(contracts.RANKS, [FileInfo(**info) for task in stats for info in task["files"]], job.run)
    times = [time for task in stats for time in task["times"]]
    unit = unit_of(min(times), max(times)) if times else None
    return Ranked(table, histograms, unit, sum(task["unknown_users"] for task in stats))


def held_out_users(
    spark: SparkSession, prepare: Manifest, als_users: DataFrame | None = None, als_rank: int = 0
) -> DataFrame:
    """One row a user with held-out items: user_idx, seen (train and validation items), held_out (list of item_idx,
    rating, timestamp, candidates, ascending by item), and ALS factors if any (zeros for a user without)."""
    history = read_table(spark, prepare, contracts.HISTORY).selectExpr("user_idx", "item_idx as seen")
    times = (
        read_table(spark, prepare, contracts.INTERACTIONS)
        .where(F.col("split") == contracts.TEST_SPLIT)
        .select("user_idx", "item_idx", "timestamp")
    )
    held_out = (
        read_table(spark, prepare, contracts.TEST)
        .join(times, ["user_idx", "item_idx"])
        .groupBy("user_idx")
        .agg(F.sort_array(F.collect_list(F.struct("item_idx", "rating", "timestamp", "candidates"))).alias("held_out"))
    )
    rows = held_out.join(history, "user_idx").select("user_idx", "seen", "held_out")
    if als_users is None:
        return rows
    zeros = F.array_repeat(F.lit(0.0).cast("float"), als_rank)
    return rows.join(als_users, "user_idx", "left").withColumn(ALS_USER, F.coalesce(ALS_USER, zeros))
