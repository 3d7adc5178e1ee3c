"""The step layout: cut rows (train rows, windows of sequences) into files of equal size, in hashed order, with one
shuffle.

A row's place in the table is the rank of its order hash. Bucket counts from the pass over users give each bucket's
first rank, so it is known in which files a bucket lies: in one, or at a boundary in several. The rows of a bucket are
sent to each of its files. The writer of a file sorts its rows, knows the rank of the first one, and keeps its own
share. File f of F holds ranks [f * n // F, (f + 1) * n // F): sizes differ by one at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist.config import Config, Layout
from ncf_dist.contracts import Contract, sequences
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.sequences import staged_windows
from ncf_dist.prepare.user_files import ORDER_BUCKETS
from ncf_dist.prepare.user_tables import UserTables, staging_schema, train_contract
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import IntArray
from ncf_dist.spark_files import FileSink, files_of, runs_of, table_info, written_by
from ncf_dist.spark_io import Pass, stats_batch, task_stats
from ncf_dist.spark_tables import local_rows


def file_count(rows: int, layout: Layout) -> int:
    """Files for `rows`: enough to respect rows_per_file, at least min_files, a multiple of each of world_sizes, and
    never an empty one."""
    unit = math.lcm(*layout.world_sizes)
    files = max(layout.min_files, -(-rows // layout.rows_per_file))
    return max(1, min(rows, -(-files // unit) * unit))


def boundaries(rows: int, files: int) -> IntArray:
    """(F+1,) first rank of each file, and the end."""
    return np.arange(files + 1, dtype=np.int64) * rows // files


def write_train_table(space: Workspace, config: Config, users: UserTables) -> TableInfo:
    """Write the train table from the rows that the pass over users staged."""
    explicit = config.input.feedback == "explicit"
    staged = space.read(users.train.files, staging_schema(config.negatives, explicit))
    contract = train_contract(config.negatives, explicit)
    return write_in_hashed_order(space, staged, users.train.buckets, contract, config.layout)


def write_sequences_table(space: Workspace, config: Config, users: UserTables) -> TableInfo:
    """Write the table sequences from the windows that the pass over users staged. A window counts as sequences.length
    rows of a file, so that a reader holds about as many items at a time as of the train table."""
    length = config.sequences.length
    assert users.windows is not None
    rows_per_file = max(1, config.layout.rows_per_file // length)
    layout = config.layout.model_copy(update={"rows_per_file": rows_per_file})
    staged = space.read(users.windows.files, staged_windows(length))
    return write_in_hashed_order(space, staged, users.windows.buckets, sequences(length), layout)


def write_in_hashed_order(
    space: Workspace, staged: DataFrame, buckets: IntArray, contract: Contract, layout: Layout
) -> TableInfo:
    """Write a table from the staged rows, which have the column `order_hash` too; `buckets`: (ORDER_BUCKETS,) rows in
    each."""
    rows = int(buckets.sum())
    files = file_count(rows, layout)
    ends = boundaries(rows, files)
    ranks = np.concatenate([[0], np.cumsum(buckets)])
    first = np.searchsorted(ends, ranks[:-1], side="right") - 1
    last = np.searchsorted(ends, np.maximum(ranks[1:] - 1, ranks[:-1]), side="right") - 1
    held = np.flatnonzero(buckets)
    places = {"_bucket": held, "_first": first[held], "_last": last[held]}
    where = local_rows(space.spark, pa.table({name: pa.array(column, pa.int32()) for name, column in places.items()}))
    bucket = (F.shiftright("order_hash", 52) + ORDER_BUCKETS // 2).cast("int")
    placed = staged.withColumn("_bucket", bucket).join(F.broadcast(where), "_bucket")
    placed = placed.withColumn("_file", F.explode(F.sequence("_first", "_last"))).select(
        "_file", "order_hash", *contract.columns
    )
    # Sorted by one small number, which Spark does by radix; a file's own rows are sorted where they are written.
    placed = placed.repartition("_file").sortWithinPartitions("_file")
    starts = ranks[np.minimum(np.searchsorted(last, np.arange(files)), ORDER_BUCKETS - 1)]
    tasks = task_stats(placed, _writer(space.run, contract, starts, ends))
    return table_info(contract, files_of(tasks, contract.name), space.run)


def _writer(run: str, contract: Contract, starts: IntArray, ends: IntArray) -> Pass:
    """starts: (F,) rank of the first row that each file is sent; ends: (F+1,) ranks it keeps."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sink = FileSink(f"{run}/{contract.name}", contract.schema, rows_per_file=int(np.diff(ends).max()) + 1)
        held: list[pa.Table] = []
        file = -1

        def flush() -> None:
            if held:
                table = pa.concat_tables(held).combine_chunks()
                low, high = int(ends[file]) - int(starts[file]), int(ends[file + 1]) - int(starts[file])
                keys = [table.column(name).to_numpy() for name in (*reversed(contract.key), "order_hash")]
                sink.add(file, _of(contract.schema, table.take(pa.array(np.lexsort(keys)[low:high]))))
                held.clear()

        for batch in batches:
            table = pa.Table.from_batches([batch])
            for number, start, end in runs_of(table.column("_file").to_numpy()):
                if number != file:
                    flush()
                    file = number
                held.append(table.slice(start, end - start))
        flush()
        yield stats_batch({"files": written_by({contract.name: sink})})

    return write


def _of(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """The columns of a schema. Spark knows no fixed-width binary, and Arrow 14 does not cast to it."""
    columns = [table.column(name).combine_chunks() for name in schema.names]
    for place, field in enumerate(schema):
        if pa.types.is_fixed_size_binary(field.type):
            column = columns[place]
            width, data = field.type.byte_width, column.buffers()[2]
            columns[place] = pa.FixedSizeBinaryArray.from_buffers(
                field.type, len(column), [None, data.slice(column.offset * width, len(column) * width)]
            )
    return pa.table(columns, names=schema.names)
