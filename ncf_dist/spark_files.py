"""Writing tables of the contracts from Spark.

By our own Arrow writer, because the layout is part of what a table promises: a row's file is a function of the row,
each file is sorted and has one row group, and the same rows give the same bytes with any number of partitions and after
any retry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, DataFrame

from ncf_dist.contracts import Contract
from ncf_dist.parquet import FileInfo, TableInfo, write_parquet
from ncf_dist.spark_io import stats_batch, task_stats
from ncf_dist.spark_tasks import Pass

ROWS_PER_FILE = 1_000_000
"""Upper bound of what a writer holds in memory."""
_FILE = "_file"


def write_table(frame: DataFrame, run: str, contract: Contract, file: Column) -> TableInfo:
    """Write `frame` as table `contract.name` under `run`.

    `file`: the number of the file that a row belongs to, a function of the row alone. Rows of a file are
    sorted by the contract's key (all columns where it has none). At most ROWS_PER_FILE rows a file: a longer
    one goes on in a further part.
    """
    return write_tables(frame, run, (contract,), file)[0][0]


def write_tables(
    frame: DataFrame, run: str, tables: Sequence[Contract], file: Column, told: Callable[[pa.Table], Any] | None = None
) -> tuple[list[TableInfo], list[Any]]:
    """Write columns of `frame` as each of `tables`, which have one key, in one pass: (their entries, what `told` says,
    of JSON's types, of each piece of the rows that is written)."""
    columns = list(dict.fromkeys(name for contract in tables for name in contract.columns))
    rows = frame.select(*columns, file.cast("int").alias(_FILE))
    rows = rows.repartition(_FILE).sortWithinPartitions(_FILE, *(tables[0].key or columns))
    schemas = {contract.name: contract.schema for contract in tables}
    tasks = task_stats(rows, _writer(run, schemas, told))
    infos = [table_info(contract, files_of(tasks, contract.name), run) for contract in tables]
    return infos, [said for task in tasks for said in task["told"]]


def files_of(tasks: Iterable[Mapping[str, Any]], name: str) -> list[FileInfo]:
    """What the tasks of a pass say of the files of one table, in their stats' `files`."""
    return [FileInfo(**info) for task in tasks for info in task["files"][name]]


def written_by(sinks: Mapping[str, FileSink]) -> dict[str, list[dict[str, Any]]]:
    """What a task says in its stats' `files`, for `files_of`. Closes the sinks, each named by its table."""
    return {name: [vars(info) for info in sink.close()] for name, sink in sinks.items()}


def table_info(contract: Contract, files: Iterable[FileInfo], run: str) -> TableInfo:
    """A table's entry in the manifest; a table without rows still gets one (empty) file,
    so that readers find its schema."""
    found = sorted(files, key=lambda info: info.path)
    if not found:
        found = [write_parquet(contract.schema.empty_table(), f"{run}/{contract.name}", part_name(0, 0))]
    return TableInfo(contract.name, contract.fingerprint, tuple(found))


def part_name(file: int, part: int) -> str:
    return f"part-{file:05d}-{part:03d}.parquet"


class FileSink:
    """Collects tables a file number at a time and writes each file when the next one begins."""

    def __init__(self, folder: str, schema: pa.Schema, rows_per_file: int = ROWS_PER_FILE) -> None:
        self.folder, self.schema, self.rows_per_file = folder, schema, rows_per_file
        self.files: list[FileInfo] = []
        self._tables: list[pa.Table] = []
        self._rows = self._part = 0
        self._file = -1

    def add(self, file: int, table: pa.Table) -> None:
        """Append `table` to file number `file`. Numbers must not decrease."""
        if file != self._file:
            self.close()
            self._file, self._part = file, 0
        self._tables.append(table)
        self._rows += table.num_rows
        while self._rows >= self.rows_per_file:
            merged = pa.concat_tables(self._tables)
            self._write(merged.slice(0, self.rows_per_file))
            self._tables = [merged.slice(self.rows_per_file)]
            self._rows = self._tables[0].num_rows

    def close(self) -> list[FileInfo]:
        """Write what is left; returns every file written so far."""
        if self._rows:
            self._write(pa.concat_tables(self._tables))
        self._tables, self._rows = [], 0
        return self.files

    def _write(self, table: pa.Table) -> None:
        # One chunk a column: the bytes must not depend on how the rows arrived.
        whole = table.cast(self.schema).combine_chunks()
        self.files.append(write_parquet(whole, self.folder, part_name(self._file, self._part)))
        self._part += 1


def runs_of(values: npt.NDArray[Any]) -> Iterator[tuple[int, int, int]]:
    """(value, start, end) of each run of equal neighbours."""
    edges = np.flatnonzero(np.diff(values)) + 1
    for start, end in zip([0, *edges], [*edges, len(values)], strict=True):
        if end > start:
            yield int(values[start]), int(start), int(end)


def _writer(run: str, schemas: Mapping[str, pa.Schema], told: Callable[[pa.Table], Any] | None) -> Pass:
    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sinks = {name: FileSink(f"{run}/{name}", schema) for name, schema in schemas.items()}
        said = []
        for batch in batches:
            table = pa.Table.from_batches([batch])
            for file, start, end in runs_of(table.column(_FILE).to_numpy()):
                part = table.slice(start, end - start)
                for sink in sinks.values():
                    sink.add(file, part.select(sink.schema.names))
                said += [] if told is None else [told(part)]
        yield stats_batch({"files": written_by(sinks), "told": said})

    return write
