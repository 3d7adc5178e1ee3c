"""The footer of a Parquet file: its columns, how many rows it has, and its row groups."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.errors import InputError
from ncf_dist.files import filesystem


@dataclass(frozen=True)
class Footer:
    """groups: (number, bytes) of each row group that has rows."""

    path: str
    schema: pa.Schema
    rows: int
    groups: tuple[tuple[int, int], ...]
    metadata: pq.FileMetaData

    @property
    def names(self) -> list[str]:
        return list(self.schema.names)

    def type_of(self, column: str) -> pa.DataType | None:
        """The type of a column, of its values where it is dictionary-encoded; `a.b` is the column of that name, else
        field b of struct a. None where there is no such column."""
        if column in self.schema.names:
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
        leaves = [n for n in range(self.metadata.num_columns) if self.metadata.schema.column(n).path == column]
        chunks = [(group, group.column(leaf)) for group in map(self._group, self.groups) for leaf in leaves]
        counts = [(group.num_rows, chunk.statistics) for group, chunk in chunks]
        return bool(counts) and all(s is not None and s.has_null_count and s.null_count == n for n, s in counts)

    def _group(self, numbered: tuple[int, int]) -> pq.RowGroupMetaData:
        return self.metadata.row_group(numbered[0])


def plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def footer(path: str) -> Footer:
    """Raises InputError where it is not a Parquet file."""
    fs, inner = filesystem(path)
    try:
        with fs.open(inner, "rb") as file:
            read = pq.ParquetFile(file)
            metadata, schema = read.metadata, read.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}); set input.format to what it is") from None
    groups = [(g, metadata.row_group(g)) for g in range(metadata.num_row_groups)]
    sizes = tuple((g, int(group.total_byte_size)) for g, group in groups if group.num_rows)
    return Footer(path, schema, metadata.num_rows, sizes, metadata)
