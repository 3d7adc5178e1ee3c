"""Tables about items, worked out from train rows: how often each is interacted with, its weight as a negative, and how
much follows it."""

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
from ncf_dist.spark_files import ROWS_PER_FILE, write_table, write_tables
from ncf_dist.spark_io import read_files

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


def write_item_tables(
    space: Workspace, indexes: Indexes, interactions: TableInfo, followed: DataFrame | None
) -> dict[str, TableInfo]:
    """Write item_stats: how many train and validation rows each item has; and next_totals, where `followed` says how
    much weight the pairs that begin with an item have: (item_idx, weight), none of items without pairs."""
    rows = read_files(space.spark, space.files(interactions), contracts.INTERACTIONS.schema)
    counts = [
        F.count("*").alias("train_count"),
        F.count_if(F.col("split") == contracts.TRAIN_SPLIT).alias("train_rows"),
    ]
    counted = rows.where(F.col("split") != contracts.TEST_SPLIT).groupBy("item_idx").agg(*counts)
    every = indexes.items.select("item_idx").join(counted, "item_idx", "left")
    tables, sums = [contracts.ITEM_STATS], ["train_count"]
    if followed is not None:
        every = every.join(followed, "item_idx", "left")
        tables, sums = [*tables, contracts.NEXT_TOTALS], [*sums, "train_rows", "weight"]
    every = every.select("item_idx", *[F.coalesce(name, F.lit(0)).cast("bigint").alias(name) for name in sums])
    return {info.path: info for info in write_tables(every, space.run, tables, file_of_item())[0]}


def file_of_item() -> Column:
    """The number of the file that holds an item, in tables of one row an item."""
    return F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
