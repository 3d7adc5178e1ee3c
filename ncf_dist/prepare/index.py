"""Dense, append-only indexes without the driver and without a single-task window.

New keys are put into a fixed number of hash buckets. Counting the buckets gives each bucket's first index (a
prefix sum over BUCKETS numbers, the only thing the driver sees); inside a bucket keys are ordered by value. So
an index depends on the set of new keys and on the old table alone: not on partitions, file order or retries.
A number once given is kept, and never given again: not even where the one it stood for is to be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist.ancestry import joined, partial_digest
from ncf_dist.errors import InputError
from ncf_dist.parquet import read_table
from ncf_dist.spark_io import map_in_arrow

BUCKETS = 4096
"""Part of the meaning of an index: never change it."""
INT32_MAX = 2**31 - 1


def extend_index(
    spark: SparkSession, keys: DataFrame, old: DataFrame | None, start: int, id_column: str, index_column: str
) -> tuple[DataFrame, int]:
    """(`old` and, from number `start` on, every key of `keys` that it does not hold: (id_column, index_column int32);
    how many numbers have been given now).

    keys: one column `id_column`, repeats allowed, no nulls. start: how many numbers `old` and the indexes before it
    have given, which are more than its rows where keys were forgotten. Raises InputError past 2^31 - 1 numbers.
    """
    new = keys.select(id_column).distinct()
    if old is not None:
        new = new.join(old, id_column, "left_anti")
    new = new.select(id_column, F.pmod(F.xxhash64(id_column), F.lit(BUCKETS)).cast("int").alias("_bucket"))
    counts: dict[int, int] = dict(new.groupBy("_bucket").count().toLocalIterator())
    sizes = [int(counts.get(bucket, 0)) for bucket in range(BUCKETS)]
    size = start + sum(sizes)
    if size > INT32_MAX:
        raise InputError(
            f"{index_column}: {size:,} distinct {id_column} do not fit int32; needed at most {INT32_MAX:,}"
        )
    starts = enumerate([start + before for before in [0, *accumulate(sizes)][:-1]])
    # A table, not an array of literals: Spark would plan and compile four thousand expressions for minutes.
    first = F.broadcast(spark.createDataFrame(list(starts), "_bucket int, _first int"))
    position = F.row_number().over(Window.partitionBy("_bucket").orderBy(id_column)) - 1
    numbered = new.join(first, "_bucket").select(
        id_column, (F.col("_first") + position).cast("int").alias(index_column)
    )
    return (numbered if old is None else old.select(id_column, index_column).unionByName(numbered)), size


def digests(spark: SparkSession, files: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The digest of each index table by name, from its files."""
    named = [(name, path) for name, paths in files.items() for path in paths]

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number in (number for batch in batches for number in batch.column(0).to_pylist()):
            name, path = named[number]
            entries, total = partial_digest(read_table(path))
            yield pa.RecordBatch.from_pydict({"name": [name], "entries": [entries], "total": [str(total)]})

    numbers = spark.range(0, len(named), 1, len(named))
    rows = map_in_arrow(numbers, run, "name string, entries long, total string").collect()
    return {name: joined((row["entries"], int(row["total"])) for row in rows if row["name"] == name) for name in files}
