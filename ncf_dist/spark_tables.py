"""Parquet files of ours as Spark's rows, and rows as files, where Spark itself has no connector for their store: Python
tasks read and write them through `files`, with its credentials.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from ncf_dist.files import is_local, write_bytes
from ncf_dist.parquet import open_parquet
from ncf_dist.spark_tasks import map_in_arrow

BATCH_ROWS, LIST_BATCH_ROWS = 65_536, 4_096
STAGED_BYTES = 2**26
"""About what a file of `staged` holds in memory."""
MOST_SLICES = 1_000
_OF_SPARK = ("hdfs://", "viewfs://")


def spark_reads(path: str) -> bool:
    """Whether every Spark can read it."""
    return is_local(path) or path.startswith(_OF_SPARK)


def local_rows(spark: SparkSession, table: pa.Table) -> DataFrame:
    """A small table of this process as Spark's rows. The rows of a list would pass through Python workers, which Spark
    starts for that alone; of Spark 3.5 there is no other way."""
    if pyspark.__version__.startswith("3."):
        return spark.createDataFrame(table.to_pylist(), from_arrow_schema(table.schema))
    return spark.createDataFrame(table)


def rows_of(spark: SparkSession, files: Sequence[str], schema: StructType) -> DataFrame:
    """The rows of these files, whose columns are read by name; none where there is no file."""
    if not files:
        return local_rows(spark, to_arrow_schema(schema).empty_table())
    _know_no_sizes(spark)
    names, wanted = tuple(files), to_arrow_schema(schema)

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from _batches(names[number], wanted)

    numbers = spark.range(0, len(names), 1, min(len(names), MOST_SLICES))
    return map_in_arrow(numbers, read, schema)


def _batches(path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    size = LIST_BATCH_ROWS if any(map(pa.types.is_nested, schema.types)) else BATCH_ROWS
    with open_parquet(path) as file:
        for batch in file.iter_batches(size, columns=schema.names):
            yield from pa.Table.from_batches([batch]).select(schema.names).cast(schema).to_batches()


def staged(frame: DataFrame, folder: str) -> list[str]:
    """Write the rows into files of `folder`, a new one; the files. Each attempt of a task writes its own, and those of
    the one that Spark counts are returned."""
    schema = to_arrow_schema(frame.schema)

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        assert context is not None
        stem = posixpath.join(folder, f"part-{context.partitionId():05d}-{context.taskAttemptId()}")
        held, size, paths = list[pa.RecordBatch](), 0, list[str]()

        def flush() -> None:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_batches(held).cast(schema), sink, compression="zstd")
            paths.append(f"{stem}-{len(paths):03d}.parquet")
            write_bytes(paths[-1], sink.getvalue().to_pybytes())
            held.clear()

        for batch in batches:
            if batch.num_rows:
                held.append(batch)
                size += batch.nbytes
            if size > STAGED_BYTES:
                flush()
                size = 0
        if held:
            flush()
        yield pa.RecordBatch.from_pydict({"path": pa.array(paths, pa.string())})

    return sorted(row["path"] for row in map_in_arrow(frame, write, "path string").collect())


def _know_no_sizes(spark: SparkSession) -> None:
    """Of rows that come from Python Spark's planner takes the size for that of the numbers they are made from: a table
    of any size would be sent whole to every executor. So which joins send a side is decided while they run, when the
    sizes are known."""
    before, when_running = "spark.sql.autoBroadcastJoinThreshold", "spark.sql.adaptive.autoBroadcastJoinThreshold"
    if (threshold := spark.conf.get(before, "10MB")) != "-1":
        spark.conf.set(when_running, str(threshold))
        spark.conf.set(before, "-1")
