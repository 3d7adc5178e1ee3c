"""From files to columns of text, on the executors: lines are split here, and no line is lost.

Text is read in blocks of whole lines and split by Arrow's kernels: Spark's CSV reader silently fills short records with
nulls and drops the extra fields of long ones. Every line, object or row becomes exactly one row of a `Chunk`, with the
first thing wrong with it so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.prepare.charset import NOT_IN_CHARSET, latin1_text, utf8_text
from ncf_dist.prepare.chunks import Chunk, Raw, as_mask, row_by_row
from ncf_dist.prepare.json_lines import json_fields
from ncf_dist.prepare.parquet_rows import parquet_chunks
from ncf_dist.prepare.records import Quotes, Records, RecordSpan, lines_of, whole_lines, whole_records
from ncf_dist.prepare.separated import separated_fields
from ncf_dist.prepare.source import FileRange, Source, Unit
from ncf_dist.prepare.streams import opened, wide

BLOCK_BYTES = 4 * 2**20


def read_unit(source: Source, unit: Unit, spans: list[RecordSpan] | None = None) -> Iterator[Chunk]:
    """Every row of a unit; where fields are quoted, appends the span of each file range to `spans`.
    Raises OSError, pa.ArrowInvalid where a file cannot be read or decompressed."""
    spans = [] if spans is None else spans
    for part in unit:
        known = source.values[part.file] if source.values else {}
        for chunk in parquet_chunks(source, part) if source.kind == "parquet" else _text_chunks(source, part, spans):
            chunk.columns |= {name: pa.repeat(value, len(chunk.place)) for name, value in known.items()}
            yield chunk


def _text_chunks(source: Source, part: FileRange, spans: list[RecordSpan]) -> Iterator[Chunk]:
    header = part.start == 0 and bool(source.headers) and source.headers[part.file]
    for offset, block, starts, ends in _records(source, part, spans):
        if header:
            starts, ends, header = starts[1:], ends[1:], False
        if len(starts):
            lines = _lines(source, part.file, block, starts, ends, offset)
            yield from row_by_row(lines, partial(_with_fields, source))


def _records(source: Source, part: FileRange, spans: list[RecordSpan]) -> Iterator[Records]:
    """The records that begin in a range of a file."""
    with opened(source.files[part.file], source.how(part.file)) as stream:
        if not source.quote:
            for offset, block in whole_lines(stream, part.start, part.end, source.max_line_bytes, BLOCK_BYTES):
                yield offset, block, *lines_of(block)
            return
        charset = "latin-1" if source.latin1 and not wide(source.how(part.file)) else "utf-8"
        quotes = Quotes(source.separator, charset, source.max_line_bytes, source.counts[part.file])
        first = part.first
        if first is None:
            first = quotes.guess(stream, part.start) if part.start else 0
        spans.append((first, (yield from whole_records(stream, first, part.end, quotes, BLOCK_BYTES))))


def _lines(
    source: Source,
    file: int,
    block: bytes,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    offset: int,
) -> Chunk:
    """Records as the column `line`. starts, ends: (R,) of each in the block, its line end included; offset: of the
    block in its file."""
    offsets = np.append(starts, ends[-1]).astype(np.int32)
    raw = pa.BinaryArray.from_buffers(
        pa.binary(), len(starts), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(block)]
    )
    latin1 = source.latin1 and not wide(source.how(file))
    lines, wrong = (latin1_text(raw), None) if latin1 else utf8_text(raw)
    lines = pc.ascii_rtrim(lines, characters="\r\n")
    chunk = Chunk(file, starts + offset, Raw(lines), {}, np.full(len(starts), None, dtype=object))
    if wrong is not None:
        chunk.reject(wrong, NOT_IN_CHARSET)
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


def _with_fields(source: Source, chunk: Chunk) -> Chunk:
    """The chunk with the wanted fields as its columns in place of `line`."""
    lines, places = chunk.columns["line"], source.columns[chunk.file]
    if source.kind == "jsonl":
        chunk.columns = json_fields(chunk, lines, {name: str(key) for name, key in places.items()})
    else:
        positions = {name: int(place) for name, place in places.items()}
        chunk.columns = separated_fields(
            chunk, lines, positions, source.separator, source.counts[chunk.file], source.quote
        )
    return chunk
