"""From files to columns of text, on the executors: lines are split here, and no line is lost.

Text is read in blocks of whole lines and taken apart by Arrow's kernels: Spark's CSV reader fills short records with
nulls and cuts long ones without a word. Every line, object or row comes out in exactly one `Chunk` row, with the
first thing wrong with it so far.
"""

from __future__ import annotations

import csv
import json
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ncf_dist.files import filesystem
from ncf_dist.prepare.chunks import SLICE, UNREADABLE, Chunk, Mask, Raw, as_mask, row_by_row
from ncf_dist.prepare.records import Quotes, Records, Seam, lines_of, whole_lines, whole_records
from ncf_dist.prepare.source import Piece, Source
from ncf_dist.prepare.streams import opened, wide

BLOCK_BYTES = 4 * 2**20
PARQUET_BATCH = 262_144
IDS = ("user", "item", "id")
CHARSET = "text is not in the charset"


def read_unit(source: Source, unit: tuple[Piece, ...], seams: list[Seam] | None = None) -> Iterator[Chunk]:
    """Every row of a unit; adds each piece's seam to `seams` where fields are quoted.
    Raises OSError, pa.ArrowInvalid where a file cannot be read or decompressed."""
    seams = [] if seams is None else seams
    for piece in unit:
        known = source.values[piece.file] if source.values else {}
        for chunk in _parquet(source, piece) if source.kind == "parquet" else _text(source, piece, seams):
            chunk.columns |= {name: pa.repeat(value, len(chunk.place)) for name, value in known.items()}
            yield chunk


def _text(source: Source, piece: Piece, seams: list[Seam]) -> Iterator[Chunk]:
    header = piece.start == 0 and bool(source.headers) and source.headers[piece.file]
    for offset, block, starts, ends in _records(source, piece, seams):
        if header:
            starts, ends, header = starts[1:], ends[1:], False
        if len(starts):
            yield from row_by_row(_lines(source, piece.file, block, starts, ends, offset), partial(_divided, source))


def _records(source: Source, piece: Piece, seams: list[Seam]) -> Iterator[Records]:
    """The records that begin in the piece."""
    with opened(source.files[piece.file], source.how(piece.file)) as stream:
        if not source.quote:
            for offset, block in whole_lines(stream, piece.start, piece.end, source.max_line_bytes, BLOCK_BYTES):
                yield offset, block, *lines_of(block)
            return
        charset = "latin-1" if source.latin1 and not wide(source.how(piece.file)) else "utf-8"
        quotes = Quotes(source.separator, charset, source.max_line_bytes, source.counts[piece.file])
        first = piece.first
        if first is None:
            first = quotes.guess(stream, piece.start) if piece.start else 0
        seams.append((first, (yield from whole_records(stream, first, piece.end, quotes, BLOCK_BYTES))))


def _lines(
    source: Source,
    file: int,
    block: bytes,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    offset: int,
) -> Chunk:
    """Lines as the column `line`. starts, ends: (R,) of each in the block, its end included."""
    offsets = np.append(starts, ends[-1]).astype(np.int32)
    raw = pa.BinaryArray.from_buffers(
        pa.binary(), len(starts), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(block)]
    )
    lines, wrong = (_latin1(raw), None) if source.latin1 and not wide(source.how(file)) else _utf8(raw)
    lines = pc.ascii_rtrim(lines, characters="\r\n")
    chunk = Chunk(file, starts + offset, Raw(lines), {}, np.full(len(starts), None, dtype=object))
    if wrong is not None:
        chunk.reject(wrong, CHARSET)
        shown = [value.decode(errors="replace").rstrip("\r\n") for value in raw.filter(pa.array(wrong)).to_pylist()]
        chunk.raw = Raw(pc.replace_with_mask(lines, pa.array(wrong), pa.array(shown, pa.string())))
    long = ends - starts > source.max_line_bytes + 2
    long |= (ends - starts > source.max_line_bytes) & (
        as_mask(pc.greater(pc.binary_length(lines), source.max_line_bytes))
    )
    chunk.reject(long, "line is too long")
    bad = long if wrong is None else long | wrong
    chunk.columns["line"] = pc.if_else(pa.array(bad), "", lines) if bad.any() else lines
    return chunk


def _latin1(raw: pa.Array) -> pa.Array:
    """Every byte from 128 on is two in UTF-8."""
    _, offsets, data = raw.buffers()
    high = np.frombuffer(data, dtype=np.uint8) >= 128
    if not high.any():
        return raw.view(pa.string())
    moved = (
        np.frombuffer(offsets, dtype=np.int32)
        + np.append(0, np.cumsum(high, dtype=np.int32))[np.frombuffer(offsets, dtype=np.int32)]
    )
    text = pa.py_buffer(data.to_pybytes().decode("latin-1").encode())
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(moved.astype(np.int32).tobytes()), text)


def _utf8(raw: pa.Array) -> tuple[pa.Array, Mask | None]:
    """(text, "" where it is not UTF-8; where that is, or None)."""
    wrong = broken_text(raw)
    return (raw if wrong is None else pc.if_else(pa.array(wrong), b"", raw)).view(pa.string()), wrong


def broken_text(raw: pa.Array) -> Mask | None:
    """Which values of a binary array are not UTF-8; None where all are. Bad ones cost their slice, not the array."""
    text = raw.view(pa.large_string() if pa.types.is_large_binary(raw.type) else pa.string())
    try:
        text.validate(full=True)
        return None
    except pa.ArrowInvalid:
        if len(raw) <= SLICE:
            return np.array([value is not None and not _is_utf8(value) for value in raw.to_pylist()])
    found = np.zeros(len(raw), dtype=bool)
    for at in range(0, len(raw), SLICE):
        if (part := broken_text(raw.slice(at, SLICE))) is not None:
            found[at : at + SLICE] = part
    return found


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _divided(source: Source, chunk: Chunk) -> Chunk:
    """Lines to columns."""
    lines = chunk.columns["line"]
    chunk.columns = (_objects if source.kind == "jsonl" else _fields)(source, chunk, lines)
    return chunk


def _fields(source: Source, chunk: Chunk, lines: pa.Array) -> dict[str, pa.Array]:
    """Fields of separated text, by name."""
    places = {name: int(place) for name, place in source.columns[chunk.file].items()}
    count = source.counts[chunk.file]
    least = max(places.values(), default=0) + 1 if count is None else count
    parts = pc.split_pattern(lines, source.separator)
    size = found = pc.list_value_length(parts)
    quoted = as_mask(pc.match_substring(lines, '"')) if source.quote else np.zeros(len(lines), dtype=bool)
    by_hand: list[list[str]] = []
    if quoted.any():
        by_hand, wrong = _unquoted(lines.filter(pa.array(quoted)), source.separator)
        size = pc.replace_with_mask(found, pa.array(quoted), pa.array(map(len, by_hand), pa.int32()))
        for reason in sorted(set(wrong.values())):
            bad = np.zeros(len(lines), dtype=bool)
            bad[np.flatnonzero(quoted)[[row for row in wrong if wrong[row] == reason]]] = True
            chunk.reject(bad, reason)
    chunk.reject(pc.less(size, least), "too few fields")
    if count is not None:
        chunk.reject(pc.greater(size, count), "too many fields")
    # A line with fewer fields is rejected, and any field will do for it; but whose it is must not be made up.
    begin, short = parts.offsets.to_numpy()[:-1], as_mask(pc.less(found, least))
    columns = {name: parts.values.take(pa.array(np.where(short, 0, begin + place))) for name, place in places.items()}
    if short.any() and "user" in places:
        there = as_mask(pc.greater(found, places["user"]))
        values = parts.values.take(pa.array(np.where(there, begin + places["user"], 0)))
        columns["user"] = pc.if_else(pa.array(there), values, "")
    if by_hand:
        for name, place in places.items():
            values = pa.array([row[place] if len(row) > place else "" for row in by_hand], pa.string())
            columns[name] = pc.replace_with_mask(columns[name], pa.array(quoted), values)
    return columns


def _unquoted(records: pa.Array, separator: str) -> tuple[list[list[str]], dict[int, str]]:
    """Fields of records with quotes (RFC 4180); and what is wrong, by row, with those that have none."""
    found: list[list[str]] = []
    wrong: dict[int, str] = {}
    for at in range(0, len(records), SLICE):
        texts = records.slice(at, SLICE).to_pylist()
        part, bad = _csv(texts, separator)
        if len(part) != len(texts):
            # One that does not end took in the next: each by itself.
            alone = [_csv([text], separator) for text in texts]
            part, bad = [rows[0] for rows, _ in alone], {row: one[0] for row, (_, one) in enumerate(alone) if one}
        found += part
        wrong |= {at + row: reason for row, reason in bad.items()}
    return found, wrong


def _csv(texts: list[str], separator: str) -> tuple[list[list[str]], dict[int, str]]:
    reader = csv.reader(texts, delimiter=separator, strict=True)
    found: list[list[str]] = []
    wrong: dict[int, str] = {}
    while True:
        try:
            found.extend(reader)
            return found, wrong
        except csv.Error as error:
            known = (reason for part, reason in _CSV_ERRORS.items() if part in str(error))
            wrong[len(found)] = next(known, UNREADABLE)
            found.append([])


_CSV_ERRORS = {
    "unexpected end": "a quoted field does not end",
    "expected after": "a quoted field is followed by other text",
    "new-line character": "a line break is in a field that is not quoted",
}
"""Parts of the csv module's messages."""


def _objects(source: Source, chunk: Chunk, lines: pa.Array) -> dict[str, pa.Array]:
    """Fields of JSON objects, by name: text as it is, numbers as they are written, null where missing."""
    names = {name: str(key) for name, key in source.columns[chunk.file].items()}
    values: dict[str, list[str | None]] = {name: [] for name in names}
    wrong, odd, deep = (np.zeros(len(lines), dtype=bool) for _ in range(3))
    for row, line in enumerate(lines.to_pylist()):
        try:
            body = _JSON.decode(line)
        except ValueError:
            body = None
        except RecursionError:
            body, deep[row] = None, True
        wrong[row] = not isinstance(body, dict)
        for name, key in names.items():
            value = _at(body, key) if isinstance(body, dict) else ""
            if isinstance(value, bool) and (name == "rating" or name.startswith("column ")):
                value = str(value)
            if isinstance(value, _Constant) and name in IDS:
                value = None if value == "NaN" else []
            if value is not None and not isinstance(value, str):
                odd[row] = True
                value = ""
            values[name].append(value)
    chunk.reject(deep, "JSON is nested too deeply")
    chunk.reject(wrong, "line is not a JSON object")
    chunk.reject(odd, "a field is neither text nor a number")
    return {name: _text_column(chunk, column) for name, column in values.items()}


def _text_column(chunk: Chunk, values: list[str | None]) -> pa.Array:
    """Half a surrogate pair (what a cut of JSON's \\ud83d\\ude00 leaves) is no text: no charset can write it."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        broken = np.array([value is not None and not _has_bytes(value) for value in values])
        chunk.reject(broken, CHARSET)
        return pa.array([None if bad else value for bad, value in zip(broken, values, strict=True)], pa.string())


def _has_bytes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _at(body: dict[str, Any], key: str) -> Any:
    """The value of a key; where there is no key `product.sku`, of key sku in the object `product`."""
    if key in body or "." not in key:
        return body.get(key)
    value: Any = body
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class _Number(str):
    """A JSON number as it was written: 1.50 and 1e3 keep their form, big integers their digits."""

    __slots__ = ()


class _Constant(_Number):
    """NaN or Infinity. As an id the one is what pandas writes for a missing one, the other nothing."""

    __slots__ = ()


_JSON = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Constant)


def _parquet(source: Source, piece: Piece) -> Iterator[Chunk]:
    """Row groups of a Parquet file; columns keep their types."""
    fs, inner = filesystem(source.files[piece.file])
    names = {name: str(column) for name, column in source.columns[piece.file].items()}
    with fs.open(inner, "rb") as raw:
        file = pq.ParquetFile(raw)
        groups = range(piece.start, file.num_row_groups if piece.end is None else piece.end)
        first = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
        for batch in file.iter_batches(PARQUET_BATCH, row_groups=list(groups), columns=sorted(set(names.values()))):
            columns = {name: _column(batch, column) for name, column in names.items()}
            reason = np.full(batch.num_rows, None, dtype=object)
            place = np.arange(first, first + batch.num_rows)
            yield from row_by_row(Chunk(piece.file, place, Raw(table=batch), columns, reason), _plain)
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


def _plain(chunk: Chunk) -> Chunk:
    """Dictionaries unpacked, text as string (also where no row has a value), UUIDs as their text."""
    for name, column in chunk.columns.items():
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
            kind = column.type
        if pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16:
            texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in column.to_pylist()]
            column = pa.array(texts, pa.string())
        elif any(of(kind) for of in (pa.types.is_string, pa.types.is_large_string, *_BINARY)):
            column = _checked(chunk, column)
        elif pa.types.is_null(kind):
            column = column.cast(pa.string())
        chunk.columns[name] = column
    return chunk


_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def _checked(chunk: Chunk, column: pa.Array) -> pa.Array:
    """Text as string. What other writers put into a text column is not always UTF-8, and Arrow reads it unseen."""
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    raw = column.view(pa.large_binary() if large else pa.binary())
    if (broken := broken_text(raw)) is not None:
        chunk.reject(broken, CHARSET)
        raw = pc.if_else(pa.array(broken), None, raw)
    return raw.view(pa.large_string() if large else pa.string()).cast(pa.string())
