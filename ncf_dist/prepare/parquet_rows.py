"""Row groups of Parquet files as columns, which keep their types."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.files import open_read
from ncf_dist.prepare.charset import NOT_IN_CHARSET, not_utf8
from ncf_dist.prepare.chunks import Chunk, Raw, row_by_row
from ncf_dist.prepare.footers import parquet_file
from ncf_dist.prepare.source import FileRange, Source

BATCH_ROWS = 262_144
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def parquet_chunks(source: Source, part: FileRange) -> Iterator[Chunk]:
    """The wanted columns of the row groups of a file range. Raises OSError, pa.ArrowInvalid."""
    names = {name: str(column) for name, column in source.columns[part.file].items()}
    with open_read(source.files[part.file]) as raw:
        file = parquet_file(raw)
        groups = range(part.start, file.num_row_groups if part.end is None else part.end)
        first = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=sorted(set(names.values()))):
            columns = {name: _column(batch, column) for name, column in names.items()}
            reason = np.full(batch.num_rows, None, dtype=object)
            place = np.arange(first, first + batch.num_rows)
            yield from row_by_row(Chunk(part.file, place, Raw(table=batch), columns, reason), _with_plain_types)
            first += batch.num_rows


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column; or `product.sku`, field sku of the column product of structs."""
    if name in batch.schema.names:
        return batch.column(batch.schema.get_field_index(name))
    first, *fields = name.split(".")
    column = batch.column(batch.schema.get_field_index(first))
    for part in fields:
        column = pc.struct_field(column, [column.type.get_field_index(part)])
    return column


def _with_plain_types(chunk: Chunk) -> Chunk:
    """Dictionaries are decoded, text and columns without any value become strings, UUIDs their text."""
    for name, column in chunk.columns.items():
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
            kind = column.type
        if pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16:
            texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in column.to_pylist()]
            column = pa.array(texts, pa.string())
        elif any(of(kind) for of in (pa.types.is_string, pa.types.is_large_string, *_BINARY)):
            column = _checked_text(chunk, column)
        elif pa.types.is_null(kind):
            column = column.cast(pa.string())
        chunk.columns[name] = column
    return chunk


def _checked_text(chunk: Chunk, column: pa.Array) -> pa.Array:
    """As a string array. Some writers put bytes that are not UTF-8 into text columns, and Arrow does not check them."""
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    raw = column.view(pa.large_binary() if large else pa.binary())
    if (broken := not_utf8(raw)) is not None:
        chunk.reject(broken, NOT_IN_CHARSET)
        raw = pc.if_else(pa.array(broken), None, raw)
    return raw.view(pa.large_string() if large else pa.string()).cast(pa.string())
