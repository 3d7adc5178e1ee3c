"""Writes rows as text lines in MovieLens' `.dat` layout, the same bytes however the rows are partitioned.

Table `ratings.dat` is one plain file where its keys (users, or items) fit one file, else a folder of the same name with
`ratings-00000.dat`, `ratings-00001.dat`, …; `input.path` is the same in both cases. A file holds a range of keys and is
sorted, and one task writes all of it, so a retried task replaces a file by the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist.fetch.delivery import DeliveredFile
from ncf_dist.files import make_dirs, write_atomic
from ncf_dist.spark_files import runs_of
from ncf_dist.spark_io import Pass, batch_of, map_in_arrow

LINES_PER_FILE = 1_000_000
"""About how many lines a file has (25 MB); a writer holds one file in memory."""

_FILE, _LINE = "_file", "_line"
_WRITTEN = pa.schema([("path", pa.string()), ("lines", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])
_WRITTEN_DDL = "path string, lines long, bytes long, sha256 string"


def write_lines(
    rows: DataFrame, folder: str, table: str, keys: int, keys_per_file: int, order: tuple[str, ...]
) -> list[DeliveredFile]:
    """Write `rows` as `folder/table`: columns joined by `::`, sorted by `order`, whose first is the key.

    Keys are 1..`keys`, all of them present.
    """
    files = math.ceil(keys / keys_per_file)
    file = F.floor((F.col(order[0]) - 1) / keys_per_file).cast("int")
    line = F.concat(F.concat_ws("::", *[F.col(name).cast("string") for name in rows.columns]), F.lit("\n"))
    ordered = (
        rows.select(*order, file.alias(_FILE), line.alias(_LINE)).repartition(_FILE).sortWithinPartitions(_FILE, *order)
    )
    make_dirs(folder if files == 1 else posixpath.join(folder, table))
    written = map_in_arrow(ordered.select(_FILE, _LINE), _writer(folder, table, files), _WRITTEN_DDL).collect()
    return sorted((DeliveredFile(**row.asDict()) for row in written), key=lambda file: file.path)


def part_path(table: str, file: int, files: int) -> str:
    """Path of file number `file` of `files`, relative to the folder that holds the table."""
    stem, dot, suffix = table.rpartition(".")
    return table if files == 1 else f"{table}/{stem}-{file:05d}{dot}{suffix}"


def _writer(folder: str, table: str, files: int) -> Pass:
    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        number, lines, written = -1, list[str](), list[DeliveredFile]()

        def flush() -> None:
            if lines:
                data, path = "".join(lines).encode(), part_path(table, number, files)
                write_atomic(posixpath.join(folder, path), data)
                written.append(DeliveredFile(path, len(lines), len(data), hashlib.sha256(data).hexdigest()))
                lines.clear()

        for batch in batches:
            for value, start, end in runs_of(batch.column(0).to_numpy()):
                if value != number:
                    flush()
                    number = value
                lines.extend(batch.column(1).slice(start, end - start).to_pylist())
        flush()
        yield batch_of([vars(file) for file in written], _WRITTEN)

    return write
