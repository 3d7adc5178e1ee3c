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
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ncf_dist.artifacts import filesystem
from ncf_dist.prepare.source import BOM, Piece, Source, compression

BLOCK_BYTES = 4 * 2**20
RAW_LIMIT = 1_000
"""Characters of a rejected line that the quarantine keeps."""
PARQUET_BATCH = 262_144

Mask = npt.NDArray[np.bool_]


@dataclass
class Chunk:
    """R rows of one file. place: (R,) where each begins; raw: what it looked like; columns: name → (R,) text, null
    where it is missing, or a typed Parquet column; reason: (R,) object, None where nothing is wrong yet."""

    file: int
    place: npt.NDArray[np.int64]
    raw: Raw
    columns: dict[str, pa.Array]
    reason: npt.NDArray[np.object_]

    def reject(self, bad: Any, reason: str) -> None:
        """The first thing wrong with a row is its reason. bad: (R,) mask, NumPy or Arrow (null is False)."""
        mask = as_mask(bad)
        if mask.any():
            self.reason[mask & (self.reason == None)] = reason  # noqa: E711 - elementwise


class Raw:
    """What rows looked like, made only for those that are rejected."""

    def __init__(self, lines: pa.Array | None = None, table: pa.RecordBatch | None = None) -> None:
        self.lines, self.table = lines, table

    def take(self, rows: npt.NDArray[np.int64]) -> list[str]:
        if self.lines is not None:
            return [line[:RAW_LIMIT] for line in self.lines.take(pa.array(rows)).to_pylist()]
        assert self.table is not None
        return [
            json.dumps(row, default=str, ensure_ascii=False)[:RAW_LIMIT]
            for row in self.table.take(pa.array(rows)).to_pylist()
        ]


def as_mask(values: Any) -> Mask:
    if isinstance(values, np.ndarray):
        return values
    found: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return found


def read_unit(source: Source, unit: tuple[Piece, ...]) -> Iterator[Chunk]:
    """Every row of a unit. Raises OSError, pa.ArrowInvalid where a file cannot be read or decompressed."""
    for piece in unit:
        if source.kind == "parquet":
            yield from _parquet(source, piece)
        else:
            yield from _text(source, piece)


def _text(source: Source, piece: Piece) -> Iterator[Chunk]:
    header = piece.start == 0 and bool(source.headers) and source.headers[piece.file]
    for offset, block in _blocks(source, piece):
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(data == 10) + 1
        if not len(ends) or ends[-1] != len(data):
            ends = np.append(ends, len(data))
        starts = np.concatenate([[0], ends[:-1]])
        if header:
            starts, ends, header = starts[1:], ends[1:], False
        if len(starts):
            yield _lines(source, piece.file, block, starts, ends, offset)


def _blocks(source: Source, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes of whole lines) of the lines that begin in the piece."""
    path = source.files[piece.file]
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as raw:
        stream = pa.CompressedInputStream(raw, compression(path)) if compression(path) else raw
        yield from whole_lines(stream, piece.start, piece.end, source.max_line_bytes)


def whole_lines(
    stream: BinaryIO, start: int, end: int | None, max_line_bytes: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, bytes]]:
    """(offset, block) of whole lines, all that begin at start ≤ p < end. A line longer than max_line_bytes may come cut
    (to still more than that), so that memory is bounded. The byte-order mark of a file is left out."""
    held, at = b"", start
    if start:
        stream.seek(start - 1)
        at -= 1
        while True:
            held = bytes(stream.read(block_bytes))
            if not held:
                return
            cut = held.find(b"\n")
            at += len(held) if cut < 0 else cut + 1
            if cut >= 0:
                held = held[cut + 1 :]
                break
        if end is not None and at >= end:
            return
    skipping, more = False, True
    while more:
        data = bytes(stream.read(block_bytes))
        more = bool(data)
        if skipping:
            cut = data.find(b"\n")
            if cut < 0:
                at += len(data)
                continue
            at, data, skipping = at + cut + 1, data[cut + 1 :], False
            if end is not None and at >= end:
                return
        held += data
        stop = -1 if end is None else held.find(b"\n", max(0, end - 1 - at))
        if stop >= 0:
            held, more = held[: stop + 1], False
        cut = held.rfind(b"\n") + 1 if more else len(held)
        block, rest = held[:cut], held[cut:]
        if at == 0 and block.startswith(BOM):
            yield len(BOM), block[len(BOM) :]
        elif block:
            yield at, block
        at, held = at + cut, rest
        if len(held) > max(max_line_bytes, block_bytes):
            yield at, held[: max_line_bytes + 2]
            at, held, skipping = at + len(held), b"", True


def _lines(
    source: Source,
    file: int,
    block: bytes,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    offset: int,
) -> Chunk:
    """Lines to columns. starts, ends: (R,) of each line in the block, its end included."""
    offsets = np.append(starts, ends[-1]).astype(np.int32)
    raw = pa.BinaryArray.from_buffers(
        pa.binary(), len(starts), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(block)]
    )
    place = starts + offset
    reason = np.full(len(starts), None, dtype=object)
    lines, wrong = _decoded(raw, source.latin1)
    bare = Chunk(file, place, Raw(lines), {}, reason)
    bare.reject(wrong, "text is not in the charset")
    long = ends - starts > source.max_line_bytes + 2
    long |= (ends - starts > source.max_line_bytes) & (
        as_mask(pc.greater(pc.binary_length(lines), source.max_line_bytes))
    )
    bare.reject(long, "line is too long")
    if wrong.any():
        bare.raw = Raw(pc.if_else(pa.array(wrong), _shown(raw), lines))
    if (bad := wrong | long).any():
        lines = pc.if_else(pa.array(bad), "", lines)
    split = _objects if source.kind == "jsonl" else _fields
    bare.columns = split(source, bare, lines)
    return bare


def _decoded(raw: pa.Array, latin1: bool) -> tuple[pa.Array, Mask]:
    """(R,) text of the lines without their ends, "" where they are not in the charset; and where that is."""
    wrong = np.zeros(len(raw), dtype=bool)
    if latin1:
        if _is_ascii(raw):
            lines = raw.view(pa.string())
        else:
            lines = pa.array([value.decode("latin-1") for value in raw.to_pylist()], pa.string())
    else:
        lines = raw.view(pa.string())
        try:
            lines.validate(full=True)
        except pa.ArrowInvalid:
            wrong = np.array([not _is_utf8(value) for value in raw.to_pylist()])
            lines = pa.array(
                ["" if bad else value.decode() for bad, value in zip(wrong, raw.to_pylist(), strict=True)], pa.string()
            )
    return pc.ascii_rtrim(lines, characters="\r\n"), wrong


def _is_ascii(raw: pa.Array) -> bool:
    data = np.frombuffer(raw.buffers()[2], dtype=np.uint8)
    return bool((data < 128).all())


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(raw: pa.Array) -> pa.Array:
    return pa.array([value.decode(errors="replace").rstrip("\r\n") for value in raw.to_pylist()], pa.string())


def _fields(source: Source, chunk: Chunk, lines: pa.Array) -> dict[str, pa.Array]:
    """Fields of separated text, by name."""
    places = {name: int(place) for name, place in source.columns[chunk.file].items()}
    count = source.counts[chunk.file]
    least = max(places.values()) + 1 if count is None else count
    parts = pc.split_pattern(lines, source.separator)
    size = found = pc.list_value_length(parts)
    quoted = as_mask(pc.match_substring(lines, '"')) if source.quote else np.zeros(len(lines), dtype=bool)
    by_hand: list[list[str]] = []
    if quoted.any():
        by_hand = _unquoted(lines.filter(pa.array(quoted)), source.separator)
        lengths = pa.array([len(row) for row in by_hand], pa.int32())
        size = pc.replace_with_mask(found, pa.array(quoted), lengths)
        open_quote = quoted.copy()
        open_quote[quoted] = [not row for row in by_hand]
        chunk.reject(open_quote, "a quoted field does not end")
    chunk.reject(pc.less(size, least), "too few fields")
    if count is not None:
        chunk.reject(pc.greater(size, count), "too many fields")
    short = pc.less(found, least)
    if as_mask(short).any():
        # list_element wants every list long enough: lines that are not get one that is.
        filler = pa.array([[""] * least], parts.type)
        index = pc.if_else(short, len(parts), pa.array(np.arange(len(parts))))
        parts = pa.concat_arrays([parts, filler]).take(index)
    columns = {name: pc.list_element(parts, place) for name, place in places.items()}
    if by_hand:
        for name, place in places.items():
            values = pa.array([row[place] if len(row) > place else "" for row in by_hand], pa.string())
            columns[name] = pc.replace_with_mask(columns[name], pa.array(quoted), values)
    return columns


def _unquoted(lines: pa.Array, separator: str) -> list[list[str]]:
    """Fields of lines with quotes (RFC 4180); an empty list where a quoted field does not end on its line."""
    found = []
    for line in lines.to_pylist():
        try:
            found.append(next(csv.reader([line], delimiter=separator, strict=True)))
        except (csv.Error, StopIteration):
            found.append([])
    return found


def _objects(source: Source, chunk: Chunk, lines: pa.Array) -> dict[str, pa.Array]:
    """Fields of JSON objects, by name: text as it is, numbers as they are written, null where missing."""
    names = {name: str(key) for name, key in source.columns[chunk.file].items()}
    values: dict[str, list[str | None]] = {name: [] for name in names}
    wrong, odd = np.zeros(len(lines), dtype=bool), np.zeros(len(lines), dtype=bool)
    for row, line in enumerate(lines.to_pylist()):
        try:
            body = json.loads(line, parse_int=_Number, parse_float=_Number, parse_constant=_Number)
        except ValueError:
            body = None
        wrong[row] = not isinstance(body, dict)
        for name, key in names.items():
            value = body.get(key) if isinstance(body, dict) else ""
            if isinstance(value, bool) and name.startswith("column "):
                value = str(value)
            if value is not None and not isinstance(value, str):
                odd[row] = True
                value = ""
            values[name].append(value)
    chunk.reject(wrong, "line is not a JSON object")
    chunk.reject(odd, "a field is neither text nor a number")
    return {name: pa.array(column, pa.string()) for name, column in values.items()}


class _Number(str):
    """A JSON number as it was written: 1.50 and 1e3 keep their form, big integers their digits."""

    __slots__ = ()


def _parquet(source: Source, piece: Piece) -> Iterator[Chunk]:
    """Row groups of a Parquet file; columns keep their types."""
    fs, inner = filesystem(source.files[piece.file])
    names = {name: str(column) for name, column in source.columns[piece.file].items()}
    with fs.open(inner, "rb") as raw:
        file = pq.ParquetFile(raw)
        groups = range(piece.start, file.num_row_groups if piece.end is None else piece.end)
        first = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
        for batch in file.iter_batches(PARQUET_BATCH, row_groups=list(groups), columns=sorted(set(names.values()))):
            columns = {name: _plain(batch.column(column)) for name, column in names.items()}
            reason = np.full(batch.num_rows, None, dtype=object)
            place = np.arange(first, first + batch.num_rows)
            yield Chunk(piece.file, place, Raw(table=batch), columns, reason)
            first += batch.num_rows


def _plain(column: pa.Array) -> pa.Array:
    """Dictionaries unpacked, text as string, UUIDs as their text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16:
        texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    return column.cast(pa.string()) if pa.types.is_large_string(kind) or pa.types.is_binary(kind) else column
