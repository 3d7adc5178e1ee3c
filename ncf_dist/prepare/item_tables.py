"""Tables about items, worked out from train rows: how often each is interacted with, and its weight as a negative."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.parquet import TableInfo, read_table
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import IntArray
from ncf_dist.spark_io import ROWS_PER_FILE, read_files, write_table

WEIGHT_TOTAL = 2**36
"""About what all items weigh together as negatives: fine enough for a long tail, and users times it fit 64 bits."""


def item_weights(space: Workspace, indexes: Indexes, counts: DataFrame, alpha: float) -> TableInfo:
    """Write item_weights: popularity^alpha as integers, whose sum does not depend on its order. An item without train
    rows counts as one with a single row. counts: item_idx, train_count, several rows an item allowed."""
    summed = counts.groupBy("item_idx").agg(F.sum("train_count").alias("train_count"))
    every = indexes.items.select("item_idx").join(summed, "item_idx", "left")
    power = F.pow(F.coalesce("train_count", F.lit(1)), F.lit(alpha))
    powers = every.select("item_idx", F.floor(power * F.lit(float(2**20))).cast("bigint").alias("_power"))
    total = int(powers.agg(F.sum("_power")).collect()[0][0])
    weight = F.greatest(F.lit(1), F.floor(F.col("_power") / F.lit(float(total)) * F.lit(float(WEIGHT_TOTAL))))
    weighted = powers.select("item_idx", weight.cast("bigint").alias("weight"))
    return write_table(weighted, space.run, contracts.ITEM_WEIGHTS, file_of_item())


def read_weights(files: Sequence[str], n_items: int) -> IntArray:
    """(I,) weight of each item as a negative."""
    weights = np.ones(n_items, dtype=np.int64)
    for path in files:
        table = read_table(path)
        weights[table.column("item_idx").to_numpy()] = table.column("weight").to_numpy()
    return weights


def write_item_stats(space: Workspace, indexes: Indexes, interactions: TableInfo) -> TableInfo:
    """Write item_stats: how many train and validation rows each item has."""
    rows = read_files(space.spark, space.files(interactions), contracts.INTERACTIONS.schema)
    counted = (
        rows.where(F.col("split") != contracts.TEST_SPLIT).groupBy("item_idx").agg(F.count("*").alias("train_count"))
    )
    stats = indexes.items.join(counted, "item_idx", "left").select(
        "item_idx", F.coalesce("train_count", F.lit(0)).cast("bigint").alias("train_count")
    )
    return write_table(stats, space.run, contracts.ITEM_STATS, file_of_item())


def file_of_item() -> Column:
    """The number of the file that holds an item, in tables of one row an item."""
    return F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
