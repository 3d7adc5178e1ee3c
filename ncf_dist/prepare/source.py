"""What the workers read: the files of a log or of a side table, where their fields are, and the units of work.

A unit is about 32 MiB of input: byte ranges of plain text (a line belongs to the range it begins in), whole files where
they are compressed or small, row groups of Parquet files. Units depend on the files alone, never on Spark's settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import pyarrow as pa

from ncf_dist.files import filesystem
from ncf_dist.prepare.footers import Footer, footer
from ncf_dist.prepare.formats import FORMATS, Field, compression
from ncf_dist.prepare.streams import Written, wide

UNIT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class FileRange:
    """Part of a file: bytes start..end of plain text, row groups start..end of Parquet, or all of it (end None).
    file: its number in `Source.files`."""

    file: int
    start: int = 0
    end: int | None = None
    first: int | None = None
    """Where the first record that begins in the range begins, once that is known (prepare/records.py)."""


Unit = tuple[FileRange, ...]
"""What one call of `read_unit` reads."""


@dataclass(frozen=True)
class Source:
    """Everything a reader on an executor needs. columns: for each file, where each wanted field is; values: for each
    file, the wanted fields that are the same in all its rows, as its folder or table says."""

    files: tuple[str, ...]
    kind: str
    columns: tuple[dict[str, Field], ...]
    units: tuple[Unit, ...]
    separator: str = ","
    quote: bool = False
    latin1: bool = False
    counts: tuple[int | None, ...] = ()
    """For each text file, how many fields a whole line has (None: at least up to the last wanted one)."""
    headers: tuple[bool, ...] = ()
    max_line_bytes: int = 65_536
    written: tuple[Written, ...] = ()
    """For each text file, how it is written; an empty tuple: all are plain."""
    values: tuple[Mapping[str, pa.Scalar], ...] = ()

    def how(self, file: int) -> Written:
        return self.written[file] if self.written else "plain"


def plan(files: Sequence[str], kind: str, written: Iterable[Written] = repeat("plain")) -> tuple[Unit, ...]:
    """Units of about UNIT_BYTES, in file order; small files share one."""
    if kind == "parquet":
        return row_group_units([footer(path) for path in files])
    return _units(
        _text_ranges(number, path, how) for number, (path, how) in enumerate(zip(files, written, strict=False))
    )


def row_group_units(footers: Sequence[Footer]) -> tuple[Unit, ...]:
    """Units of whole row groups."""
    return _units(
        [(FileRange(number, group, group + 1), size) for group, size in found.groups]
        for number, found in enumerate(footers)
    )


def _text_ranges(number: int, path: str, how: Written) -> list[tuple[FileRange, int]]:
    """The ranges of a text file, each with its size in bytes (of a compressed file about what it unpacks to)."""
    fs, inner = filesystem(path)
    size = int(fs.size(inner))
    if compression(path):
        return [(FileRange(number), size * 4)]
    if wide(how):
        return [(FileRange(number), size)]
    starts = range(0, size, UNIT_BYTES)
    return [(FileRange(number, s, min(s + UNIT_BYTES, size)), min(UNIT_BYTES, size - s)) for s in starts]


def _units(ranges: Iterable[Sequence[tuple[FileRange, int]]]) -> tuple[Unit, ...]:
    """ranges: those of each file, with their bytes."""
    units: list[Unit] = []
    held: list[FileRange] = []
    size = 0
    for file_range, cost in (each for of_file in ranges for each in of_file):
        if held and size + cost > UNIT_BYTES:
            units.append(tuple(held))
            held, size = [], 0
        held.append(file_range)
        size += cost
    if held:
        units.append(tuple(held))
    return tuple(units)


def place_of(name: str, place: int) -> str:
    """Where a row of format `name` begins. A message says this instead of what is there, which is about a person."""
    return f"{'row' if FORMATS[name].kind == 'parquet' else 'the line at byte'} {place:,}"
