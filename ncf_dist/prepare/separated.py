"""Lines of separated text (CSV, TSV, `::`) as fields; records with quotes follow RFC 4180."""

from __future__ import annotations

import csv
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.prepare.chunks import SLICE, UNREADABLE, Chunk, Mask, as_mask

WRONG_SIZE = ("too few fields", "too many fields")
"""The reasons for which a line is rejected whose fields may not be the wanted ones."""


def separated_fields(
    chunk: Chunk, lines: pa.Array, positions: Mapping[str, int], separator: str, count: int | None, quote: bool
) -> dict[str, pa.Array]:
    """(R,) text of each wanted field; rejects lines with too few or too many fields, or with wrong quotes.

    positions: field → its position in a line; count: fields of a whole line, None where only the last wanted one must
    be there; quote: whether fields may be quoted.
    """
    least = max(positions.values(), default=0) + 1 if count is None else count
    parts = pc.split_pattern(lines, separator)
    size = split_size = pc.list_value_length(parts)
    quoted = as_mask(pc.match_substring(lines, '"')) if quote else np.zeros(len(lines), dtype=bool)
    parsed: list[list[str]] = []
    if quoted.any():
        parsed = _quoted_fields(chunk, lines, quoted, separator)
        size = pc.replace_with_mask(size, pa.array(quoted), pa.array(map(len, parsed), pa.int32()))
    few, many = WRONG_SIZE
    chunk.reject(pc.less(size, least), few)
    if count is not None:
        chunk.reject(pc.greater(size, count), many)
    columns = _fields_at(parts, split_size, positions, least)
    if parsed:
        for name, position in positions.items():
            values = pa.array([row[position] if len(row) > position else "" for row in parsed], pa.string())
            columns[name] = pc.replace_with_mask(columns[name], pa.array(quoted), values)
    return columns


def _fields_at(parts: pa.ListArray, size: pa.Array, positions: Mapping[str, int], least: int) -> dict[str, pa.Array]:
    """(R,) the field at each position. size: (R,) fields of each line.

    A line with fewer than `least` fields is rejected: the text at its positions does not matter, but for the user. That
    must be its own or "", as the user decides whether the row may be kept in the quarantine.
    """
    begin, short = parts.offsets.to_numpy()[:-1], as_mask(pc.less(size, least))
    columns = {
        name: parts.values.take(pa.array(np.where(short, 0, begin + position))) for name, position in positions.items()
    }
    if short.any() and "user" in positions:
        present = as_mask(pc.greater(size, positions["user"]))
        values = parts.values.take(pa.array(np.where(present, begin + positions["user"], 0)))
        columns["user"] = pc.if_else(pa.array(present), values, "")
    return columns


def _quoted_fields(chunk: Chunk, lines: pa.Array, quoted: Mask, separator: str) -> list[list[str]]:
    """The fields of each line with quotes; none where it is wrong, and then it is rejected."""
    parsed, wrong = _parse_records(lines.filter(pa.array(quoted)), separator)
    rows = np.flatnonzero(quoted)
    for reason in sorted(set(wrong.values())):
        bad = np.zeros(len(lines), dtype=bool)
        bad[rows[[row for row in wrong if wrong[row] == reason]]] = True
        chunk.reject(bad, reason)
    return parsed


def _parse_records(records: pa.Array, separator: str) -> tuple[list[list[str]], dict[int, str]]:
    """(fields of each record, none where it is wrong; what is wrong, by row)."""
    parsed: list[list[str]] = []
    wrong: dict[int, str] = {}
    for at in range(0, len(records), SLICE):
        texts = records.slice(at, SLICE).to_pylist()
        rows, bad = _csv(texts, separator)
        if len(rows) != len(texts):
            # A record whose quote is not closed swallowed the next one: parse each by itself.
            alone = [_csv([text], separator) for text in texts]
            rows, bad = [first[0] for first, _ in alone], {row: one[0] for row, (_, one) in enumerate(alone) if one}
        parsed += rows
        wrong |= {at + row: reason for row, reason in bad.items()}
    return parsed, wrong


def _csv(texts: list[str], separator: str) -> tuple[list[list[str]], dict[int, str]]:
    reader = csv.reader(texts, delimiter=separator, strict=True)
    rows: list[list[str]] = []
    wrong: dict[int, str] = {}
    while True:
        try:
            rows.extend(reader)
            return rows, wrong
        except csv.Error as error:
            known = (reason for part, reason in _CSV_ERRORS.items() if part in str(error))
            wrong[len(rows)] = next(known, UNREADABLE)
            rows.append([])


_CSV_ERRORS = {
    "unexpected end": "a quoted field does not end",
    "expected after": "a quoted field is followed by other text",
    "new-line character": "a line break is in a field that is not quoted",
}
"""Reasons by a part of the csv module's message."""
