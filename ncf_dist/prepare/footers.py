"""The footer of a Parquet file: its columns, how many rows it has, and its row groups.

A footer may also say how Arrow held the columns (the key ARROW:schema). A newer writer names types there that this
pyarrow does not know, as delta-rs does for text (Utf8View): such a file is read by its Parquet schema alone. Times of
96 bits are read as microseconds: as nanoseconds, which is pyarrow's default, a year from 2262 on wraps around.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.errors import InputError
from ncf_dist.files import filesystem, open_read

_MAGIC, _TAIL = b"PAR1", 8
"""What a Parquet file begins and ends with; the bytes at its end: the length of the footer before them, and that."""
_ARROW_SCHEMA = bytes([len("ARROW:schema")]) + b"ARROW:schema"
_UNREAD_SCHEMA = _ARROW_SCHEMA.lower()


@dataclass(frozen=True)
class Footer:
    """groups: (number, bytes) of each row group that has rows; metadata: None where the file has no byte."""

    path: str
    schema: pa.Schema
    rows: int
    groups: tuple[tuple[int, int], ...]
    metadata: pq.FileMetaData | None

    @property
    def names(self) -> list[str]:
        return list(self.schema.names)

    def type_of(self, column: str) -> pa.DataType | None:
        """The type of a column, of its values where it is dictionary-encoded; `a.b` is the column of that name, else
        field b of struct a. None where there is no such column. Raises InputError where there are two."""
        if (count := self.schema.names.count(column)) > 1:
            raise InputError(
                f"{self.path} has {count} columns named {column}; needed one, as nobody can say which is meant: give "
                "the others names of their own where the file is written, or set another column in the config"
            )
        if count:
            return plain_type(self.schema.field(column).type)
        parts = column.split(".")
        kind: pa.DataType = pa.struct(self.schema)
        for part in parts:
            if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
                return None
            kind = kind.field(part).type
        return plain_type(kind)

    def all_null(self, column: str) -> bool:
        """Whether no row has a value, by the statistics. pandas writes such a column as floats, whatever it was."""
        if (metadata := self.metadata) is None:
            return False
        leaves = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path == column]
        groups = [metadata.row_group(number) for number, _ in self.groups]
        chunks = [(group, group.column(leaf)) for group in groups for leaf in leaves]
        counts = [(group.num_rows, chunk.statistics) for group, chunk in chunks]
        return bool(counts) and all(s is not None and s.has_null_count and s.null_count == n for n, s in counts)


def plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def footer(path: str) -> Footer:
    """Raises InputError where it is not a Parquet file. One without a byte is a file without rows."""
    fs, inner = filesystem(path)
    try:
        if fs.size(inner) == 0:
            return Footer(path, pa.schema([]), 0, (), None)
        with open_read(path) as file:
            read = parquet_file(file)
            metadata, schema = read.metadata, read.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}); set input.format to what it is") from None
    groups = [(g, metadata.row_group(g)) for g in range(metadata.num_row_groups)]
    sizes = tuple((g, int(group.total_byte_size)) for g, group in groups if group.num_rows)
    return Footer(path, schema, metadata.num_rows, sizes, metadata)


def parquet_file(file: Any) -> pq.ParquetFile:
    """A file of an input, opened. Raises OSError, pa.ArrowException."""
    try:
        return pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    except pa.ArrowException:
        metadata = _without_arrow_schema(file)
        if metadata is None:
            raise
        return pq.ParquetFile(file, metadata=metadata, coerce_int96_timestamp_unit="us")


def _without_arrow_schema(file: Any) -> pq.FileMetaData | None:
    """The metadata of a file, as if its writer had not said how Arrow held the columns; None where none has.

    pyarrow parses that key of every footer that it opens. So the footer is copied into a file of its own, with another
    name of the same length for the key. Of a string the Thrift protocol stores the length before the text.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length + _TAIL > size:
        return None
    file.seek(size - _TAIL - length)
    found = file.read(length)
    if _ARROW_SCHEMA not in found:
        return None
    return pq.read_metadata(io.BytesIO(_MAGIC + found.replace(_ARROW_SCHEMA, _UNREAD_SCHEMA) + tail))
