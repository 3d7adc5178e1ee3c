"""Where records begin and end in text: lines, or, where fields may be quoted (RFC 4180), records of several lines.

A record that is quoted wrongly loses itself alone. Where its quoted field is followed by other text, or would run past
max_line_bytes or the end of the file, the record is its first line, and reading goes on at the next line.

Whether a line break is inside quotes depends on all text before it. So the reader of a file range guesses where its
first record begins (and is almost always right), and reports where it began and where the record after its last one
begins. `read_ranges` reads every range again that did not begin where the ranges before it ended. The result is that of
one reader that starts at byte 0, without a second pass over the file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ncf_dist.prepare.source import FileRange, Source
from ncf_dist.prepare.streams import BOM

Positions = npt.NDArray[np.int64]
Records = tuple[int, bytes, Positions, Positions]
"""Where a block begins in its file, the block, and where in the block each of its records begins and ends."""
RecordSpan = tuple[int, int]
"""Where the first record of a file range begins, and where the first record after the range begins."""
LF, CR, QUOTE = b'\n\r"'
GUESSES = 100
"""How many lines are tried as the first record of a range."""

csv.field_size_limit(2**31 - 1)  # How long a field may be is decided by max_line_bytes.


def whole_lines(
    stream: BinaryIO, start: int, end: int | None, max_line_bytes: int, block_bytes: int
) -> Generator[tuple[int, bytes], None, int]:
    """(offset, block) of whole lines, all that begin at start ≤ p < end; returns where the line after them begins.
    A line longer than max_line_bytes may come cut (to still more than that), so that memory is bounded. The byte-order
    mark of a file is left out."""
    held, at = b"", start
    if start:
        stream.seek(start - 1)
        at -= 1
        while True:
            held = bytes(stream.read(block_bytes))
            if not held:
                return at
            cut = held.find(b"\n")
            at += len(held) if cut < 0 else cut + 1
            if cut >= 0:
                held = held[cut + 1 :]
                break
        if end is not None and at >= end:
            return at
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
                return at
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
    return at


def lines_of(block: bytes) -> tuple[Positions, Positions]:
    """(where each line begins, where it ends, its line end included)."""
    ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == LF) + 1
    if len(block) and (not len(ends) or ends[-1] != len(block)):
        ends = np.append(ends, len(block))
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends


@dataclass(frozen=True)
class Quotes:
    """How records of quoted fields are split. fields: how many a whole record has, or None where that is not known."""

    separator: str
    charset: str
    max_bytes: int
    fields: int | None = None

    def records(self, block: bytes, final: bool, until: int | None = None) -> tuple[Positions, Positions, int]:
        """(where each record begins, where it ends, where the record begins that goes on after the block: the block's
        length where there is none). The block is whole lines and begins with a record. final: nothing comes after it.
        until: only records that begin before this place."""
        starts, ends = lines_of(block)
        rest = len(block)
        if QUOTE in block:
            further = np.zeros(len(starts), dtype=bool)
            line = 0
            for number in self._odd_lines(block, starts).tolist():
                if number < line:
                    continue
                if until is not None and starts[number] >= until:
                    break
                lines = self._count_lines(block, starts, ends, number, final)
                if not lines:
                    rest = int(starts[number])
                    break
                line = number + lines
                further[number + 1 : line] = True
            starts = starts[~further & (starts < rest)]
            ends = np.append(starts[1:], rest)[: len(starts)]
        if until is not None:
            starts, ends = starts[starts < until], ends[starts < until]
        return starts, ends, rest

    def _odd_lines(self, block: bytes, starts: Positions) -> Positions:
        """Lines that may not be one record each: an opening quote is not at the start of a field, a closing one is not
        at the end of a field, or a quote is open at the end of the line."""
        view = np.frombuffer(block, dtype=np.uint8)
        quotes = np.flatnonzero(view == QUOTE)
        before = np.searchsorted(quotes, starts)  # Quotes before each line.
        counts = np.diff(np.append(before, len(quotes)))
        separator = self.separator.encode(self.charset)
        if len(separator) > 1:
            return np.flatnonzero(counts)
        opens = (np.arange(len(quotes)) - np.repeat(before, counts)) % 2 == 0
        padded = np.frombuffer(b"\n" + block + b"\n\n", dtype=np.uint8)
        left, right, second = (padded[quotes + k] for k in (0, 2, 3))
        apart = separator[0]
        sound_open = (left == apart) | (left == LF) | (left == QUOTE)
        sound_close = (right == apart) | (right == LF) | (right == QUOTE) | ((right == CR) & (second == LF))
        odd = counts % 2 == 1
        wrong = quotes[~np.where(opens, sound_open, sound_close)]
        odd[np.searchsorted(starts, wrong, side="right") - 1] = True
        return np.flatnonzero(odd)

    def _count_lines(self, block: bytes, starts: Positions, ends: Positions, number: int, final: bool) -> int:
        """How many lines the record has that begins with this one; 0 where it goes on after the block."""
        begin, used_up = int(starts[number]), False

        def lines() -> Iterator[str]:
            nonlocal used_up
            for at in range(number, len(starts)):  # Not over slices: these copy the rest of the block for each record.
                start, end = int(starts[at]), int(ends[at])
                line = block[start:end]
                if end - len(_line_end(line)) - begin > self.max_bytes:
                    return
                yield line.decode(self.charset, "surrogateescape")
            used_up = True

        reader = csv.reader(lines(), delimiter=self.separator, strict=True)
        try:
            next(reader)
            return int(reader.line_num)
        except StopIteration:
            return 1
        except csv.Error:
            return 0 if used_up and not final else 1

    def guess(self, stream: BinaryIO, start: int) -> int:
        """Where the first record at `start` or later probably begins: at the first line whose fields are quoted rightly
        and are as many as they should be."""
        stream.seek(start - 1)
        data = bytes(stream.read(self.max_bytes + 1))
        lines = [start + end - 1 for end in lines_of(data)[1].tolist() if data[end - 1] == LF]
        if not lines or QUOTE not in data:
            return lines[0] if lines else start
        pattern = self._pattern()
        for place in lines[:GUESSES]:
            record = pattern.match(data, place - start + 1)
            if record and self.fields in (None, _count_fields(record[0], self.separator, self.charset)):
                return place
        return lines[0]

    def _pattern(self) -> re.Pattern[bytes]:
        """A record without a quote in a field that is not quoted."""
        separator = self.separator.encode(self.charset)
        field = rb'(?:"[^"]*(?:""[^"]*)*"|[^"\n%b]*)' % re.escape(separator[:1])
        return re.compile(rb"%b(?:%b%b)*\r?\n" % (field, re.escape(separator), field))


def _line_end(line: bytes) -> bytes:
    return line[-2:] if line.endswith(b"\r\n") else line[-1:] if line.endswith(b"\n") else b""


def _count_fields(record: bytes, separator: str, charset: str) -> int:
    try:
        return len(next(csv.reader([record.decode(charset, "surrogateescape")], delimiter=separator, strict=True)))
    except (csv.Error, StopIteration):
        return 0


def whole_records(
    stream: BinaryIO, start: int, end: int | None, quotes: Quotes, block_bytes: int
) -> Generator[Records, None, int]:
    """The records that begin at start ≤ p < end, where one begins at `start`; returns where the next one begins."""
    held, at = b"", start
    lines = _Returning(whole_lines(stream, start, end, quotes.max_bytes, block_bytes))
    for offset, block in lines:
        if held and offset != at + len(held):
            # The end of a line that is too long was left out: no record goes on after it.
            yield at, held, *quotes.records(held, True)[:2]
            held = b""
        at = at if held else offset
        data = held + block
        starts, ends, rest = quotes.records(data, False)
        if len(starts):
            yield at, data[:rest], starts, ends
        at, held = at + rest, data[rest:]
    after: int = lines.result
    if held:
        data = held
        if end is not None and after == at + len(held):
            stream.seek(after)
            data += bytes(stream.read(quotes.max_bytes + 2))
        starts, ends, _ = quotes.records(data, True, len(held))
        yield at, data, starts, ends
        after = max(after, at + int(ends[-1]))
    return after


class _Returning:
    """A generator to iterate over, and then what it returned."""

    def __init__(self, generator: Generator[Any, None, Any]) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Any]:
        self.result = yield from self.generator


def with_whole_files(source: Source) -> Source:
    """The same source with every file of quoted fields as one range: for readers that cannot read a range again."""
    if not source.quote:
        return source
    ends = {part.file: part.end for unit in source.units for part in unit}
    units = [
        tuple(FileRange(part.file, 0, ends[part.file]) for part in unit if not part.start) for unit in source.units
    ]
    return replace(source, units=tuple(unit for unit in units if unit))


def read_ranges(
    source: Source, read: Callable[[Source, Sequence[int]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What `read` returns for every unit, in order, with every range begun where the ranges before it ended.
    read(source, units): dicts with `unit` and `spans` (one a file range; none where fields are not quoted)."""
    by_unit: dict[int, dict[str, Any]] = {}
    again: Sequence[int] = range(len(source.units))
    while again:
        by_unit |= {int(stats["unit"]): stats for stats in read(source, again)}
        source, again = _corrected(source, {number: stats["spans"] for number, stats in by_unit.items()})
    return [by_unit[number] for number in sorted(by_unit)]


def _corrected(source: Source, spans: dict[int, Sequence[RecordSpan]]) -> tuple[Source, list[int]]:
    """(the source whose ranges say where their first records begin, the units that must be read again). The first wrong
    range of a file is right the next time, so this ends."""
    units, again = [list(unit) for unit in source.units], set()
    expected: dict[int, int] = {}
    for number, unit in enumerate(units):
        for k, (part, (first, after)) in enumerate(zip(unit, spans[number], strict=False)):
            begin = expected.get(part.file, first) if part.start else first
            end = 2**63 if part.end is None else part.end
            none = begin >= end  # No record begins in this range: one from before goes on past its end.
            if begin != first and not (none and first >= end):
                unit[k] = replace(part, first=begin)
                again.add(number)
            expected[part.file] = begin if none else max(begin, after)
    return replace(source, units=tuple(map(tuple, units))), sorted(again)
