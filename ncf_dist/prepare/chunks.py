"""A chunk: some rows of one file as columns, on their way from text to types, with what is wrong with each so far.

One row never ends the night: work on a chunk that raises is done again on its halves, until the rows that raise alone
are known.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

SLICE = 1_024
"""Rows that are looked at together where the whole chunk holds something odd: it costs its neighbours little."""
RAW_LIMIT = 1_000
"""Characters of a rejected line that the quarantine keeps."""
UNREADABLE = "unreadable"
"""Of a row whose parsing raised: the last resort."""

Mask = npt.NDArray[np.bool_]
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass
class Chunk:
    """R rows of one file. place: (R,) where each begins; raw: what it looked like; columns: name → (R,) text, null
    where it is missing, or a typed Parquet column; reason: (R,) object, None where nothing is wrong yet; spoiled:
    whether anything is (a look at all reasons costs as much as typing a column)."""

    file: int
    place: npt.NDArray[np.int64]
    raw: Raw
    columns: dict[str, pa.Array]
    reason: npt.NDArray[np.object_]
    spoiled: bool = False

    def reject(self, bad: Any, reason: str) -> None:
        """The first thing wrong with a row is its reason. bad: (R,) mask, NumPy or Arrow (null is False)."""
        mask = as_mask(bad)
        if mask.any():
            self.reason[mask & (self.reason == None)] = reason  # noqa: E711 - elementwise
            self.spoiled = True

    def rejected(self) -> Mask:
        """(R,) which rows have a reason."""
        if not self.spoiled:
            return np.zeros(len(self.place), dtype=bool)
        return as_mask(self.reason != None)  # noqa: E711 - elementwise

    def slice(self, start: int, end: int) -> Chunk:
        """Rows start..end."""
        columns = {name: column.slice(start, end - start) for name, column in self.columns.items()}
        raw = self.raw.slice(start, end)
        return Chunk(self.file, self.place[start:end], raw, columns, self.reason[start:end].copy(), self.spoiled)

    def unreadable(self) -> Chunk:
        """The same rows, rejected, and without values."""
        blank: dict[str, pa.Array] = dict.fromkeys(self.columns, pa.array([""] * len(self.place), pa.string()))
        chunk = Chunk(self.file, self.place, self.raw, blank, self.reason.copy(), self.spoiled)
        chunk.reject(np.ones(len(self.place), dtype=bool), UNREADABLE)
        return chunk


def row_by_row(chunk: Chunk, work: Callable[[Chunk], Result]) -> Iterator[Result]:
    """work(chunk); where that raises, of the chunk's halves, so that the rows that raise alone are rejected."""
    untouched = chunk.slice(0, len(chunk.place))
    try:
        result = work(chunk)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        log.debug("%d rows: %r", len(chunk.place), error)
    else:
        yield result
        return
    if len(chunk.place) <= 1 or _raises(work, untouched.slice(0, 0)):
        yield work(untouched.unreadable())
        return
    half = len(chunk.place) // 2
    yield from row_by_row(untouched.slice(0, half), work)
    yield from row_by_row(untouched.slice(half, len(chunk.place)), work)


def _raises(work: Callable[[Chunk], object], chunk: Chunk) -> bool:
    """Whether not even no row can be read: a column is of a type that nothing is made of."""
    try:
        work(chunk)
    except Exception:
        return True
    return False


class Raw:
    """What rows looked like, made only for those that are rejected."""

    def __init__(self, lines: pa.Array | None = None, table: pa.RecordBatch | None = None) -> None:
        self.lines, self.table = lines, table

    def take(self, rows: npt.NDArray[np.int64]) -> list[str]:
        if self.lines is not None:
            return [line[:RAW_LIMIT] for line in self.lines.take(pa.array(rows)).to_pylist()]
        assert self.table is not None
        chosen = self.table.take(pa.array(rows))
        columns = [[_shown_value(value) for value in column] for column in chosen.columns]
        names = chosen.schema.names
        return [
            json.dumps(dict(zip(names, row, strict=True)), default=str, ensure_ascii=False)[:RAW_LIMIT]
            for row in zip(*columns, strict=True)
        ]

    def slice(self, start: int, end: int) -> Raw:
        if self.lines is not None:
            return Raw(self.lines.slice(start, end - start))
        assert self.table is not None
        return Raw(table=self.table.slice(start, end - start))


def _shown_value(value: pa.Scalar) -> Any:
    """A value for people, also one that Python has no object for: text in no charset, a time beyond the year 9999."""
    with contextlib.suppress(Exception):
        return value.as_py()
    if isinstance(value, pa.DictionaryScalar):
        return _shown_value(value.value)
    if isinstance(value, pa.StringScalar):
        return value.as_buffer().to_pybytes().decode(errors="replace")
    with contextlib.suppress(Exception):
        return f"{value.cast(pa.int64()).as_py()} {value.type}"
    return f"a {value.type} that cannot be shown"


def as_mask(values: Any) -> Mask:
    if isinstance(values, np.ndarray):
        return values
    found: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return found
