"""Tables' Parquet files: writing, describing and reading them. Each has one row group."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ncf_dist.contracts import Contract
from ncf_dist.errors import ContractError
from ncf_dist.files import is_local, make_dirs, read_bytes, write_atomic

StoredPath = Annotated[str, Field(pattern=r"^[^\x00]+$")]
"""What a system can open."""


@dataclass(frozen=True)
class FileInfo:
    """One Parquet file of a table; `path` is relative to the table."""

    path: StoredPath
    rows: int
    row_groups: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableInfo:
    """A stored table: `path` relative to the run, its files in order, and the fingerprint of its schema."""

    path: StoredPath
    schema: str
    files: tuple[FileInfo, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def paths(self, run: str) -> list[str]:
        """Full paths of the files, in order. run: the folder that the table's path is relative to."""
        return [posixpath.join(run, self.path, file.path) for file in self.files]


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of ours that is open for reading. Raises ContractError where it is gone or damaged.

    Arrow opens local files itself. Through a Python file its threads may still need the interpreter when the process
    is about to end, which then sometimes aborts with a code of its own instead of the job's (apache/arrow#34314). So a
    file elsewhere is read whole: it has one row group, and a request for each column would take longer.
    """
    with _as_ours(path), contextlib.ExitStack() as stack:
        source = path if is_local(path) else pa.BufferReader(read_bytes(path))
        yield stack.enter_context(pq.ParquetFile(source))


_NOT_THERE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""None: Arrow's own word for a file that it cannot read."""


@contextlib.contextmanager
def _as_ours(path: str) -> Iterator[None]:
    """What Arrow says of a file that is not there or not whole becomes ContractError. Of what a system refuses, such as
    permission, an OSError passes."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_THERE:
            raise
        raise _not_whole(path, error) from None


def _not_whole(path: str, error: Exception) -> ContractError:
    why = " ".join(str(error).split())[:200]
    return ContractError(f"{path} cannot be read ({why}); needed it as it was written: rerun the job that made it")


def read_schema(path: str) -> pa.Schema:
    with open_parquet(path) as file:
        return file.schema_arrow


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as an Arrow table."""
    with open_parquet(path) as file:
        return file.read(columns=columns)


def write_parts(parts: Iterable[pa.Table], run: str, contract: Contract) -> TableInfo:
    """Write each part as a file of table `contract.name` under `run`: for tables that are made without Spark."""
    folder = posixpath.join(run, contract.name)
    files = [write_parquet(part, folder, f"part-{number:05d}-000.parquet") for number, part in enumerate(parts)]
    return TableInfo(contract.name, contract.fingerprint, tuple(files))


def encoded(table: pa.Table) -> bytes:
    """`table` as the bytes of a file with one row group."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), compression="zstd", write_statistics=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_parquet(table: pa.Table, folder: str, name: str) -> FileInfo:
    """Write `table` as one file with one row group, zstd, and say what was written.

    The same table gives the same bytes, so a task that is retried, or runs twice, replaces a file by its equal.
    """
    data = encoded(table)
    make_dirs(folder)
    write_atomic(posixpath.join(folder, name), data)
    return FileInfo(name, table.num_rows, 1, len(data), hashlib.sha256(data).hexdigest())
