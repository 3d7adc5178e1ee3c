"""Dense, append-only indexes without the driver and without a single-task window.

New keys are put into a fixed number of hash buckets. Counting the buckets gives each bucket's first index (a
prefix sum over BUCKETS numbers, the only thing the driver sees); inside a bucket keys are ordered by value. So
an index depends on the set of new keys and on the old table alone: not on partitions, file order or retries.
Indexes once given are kept for ever.
"""

from __future__ import annotations

from itertools import accumulate

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist.errors import InputError

BUCKETS = 4096
"""Part of the meaning of an index: never change it."""
INT32_MAX = 2**31 - 1


def extend_index(
    spark: SparkSession, keys: DataFrame, old: DataFrame | None, id_column: str, index_column: str
) -> DataFrame:
    """`old` and, after its last index, every key of `keys` that it does not hold: (id_column, index_column int32).

    keys: one column `id_column`, repeats allowed, no nulls. Raises InputError past 2^31 - 1 keys.
    """
    new = keys.select(id_column).distinct()
    start = 0
    if old is not None:
        new = new.join(old, id_column, "left_anti")
        start = old.count()
    new = new.select(id_column, F.pmod(F.xxhash64(id_column), F.lit(BUCKETS)).cast("int").alias("_bucket"))
    counts: dict[int, int] = dict(new.groupBy("_bucket").count().toLocalIterator())
    sizes = [int(counts.get(bucket, 0)) for bucket in range(BUCKETS)]
    if start + sum(sizes) > INT32_MAX:
        raise InputError(
            f"{index_column}: {start + sum(sizes):,} distinct {id_column} do not fit int32; "
            f"needed at most {INT32_MAX:,}"
        )
    starts = enumerate([start + before for before in [0, *accumulate(sizes)][:-1]])
    # A table, not an array of literals: Spark would plan and compile four thousand expressions for minutes.
    first = F.broadcast(spark.createDataFrame(list(starts), "_bucket int, _first int"))
    position = F.row_number().over(Window.partitionBy("_bucket").orderBy(id_column)) - 1
    numbered = new.join(first, "_bucket").select(
        id_column, (F.col("_first") + position).cast("int").alias(index_column)
    )
    return numbered if old is None else old.select(id_column, index_column).unionByName(numbered)
