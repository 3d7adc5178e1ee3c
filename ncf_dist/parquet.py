"""Tables' Parquet files: writing, describing and reading them. Each has one row group."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.contracts import Contract
from ncf_dist.files import filesystem, make_dirs, write_atomic


@dataclass(frozen=True)
class FileInfo:
    """One Parquet file of a table; `path` is relative to the table."""

    path: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableInfo:
    """A stored table: `path` relative to the run, its files in order, and the fingerprint of its schema."""

    path: str
    schema: str
    files: tuple[FileInfo, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


def read_schema(path: str) -> pa.Schema:
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as source:
        return pq.read_schema(source)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as an Arrow table."""
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as source:
        return pq.ParquetFile(source).read(columns=columns)


def write_parts(parts: Iterable[pa.Table], run: str, contract: Contract) -> TableInfo:
    """Write each part as a file of table `contract.name` under `run`: for tables that are made without Spark."""
    folder = posixpath.join(run, contract.name)
    files = [write_parquet(part, folder, f"part-{number:05d}-000.parquet") for number, part in enumerate(parts)]
    return TableInfo(contract.name, contract.fingerprint, tuple(files))


def write_parquet(table: pa.Table, folder: str, name: str) -> FileInfo:
    """Write `table` as one file with one row group, zstd, and say what was written.

    The same table gives the same bytes, so a task that is retried, or runs twice, replaces a file by its equal.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), compression="zstd", write_statistics=True)
    data = sink.getvalue().to_pybytes()
    make_dirs(folder)
    write_atomic(posixpath.join(folder, name), data)
    return FileInfo(name, table.num_rows, 1, len(data), hashlib.sha256(data).hexdigest())
