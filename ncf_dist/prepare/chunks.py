"""A chunk: rows of one file as columns, between text and types, with the first thing wrong with each row so far.

One row never ends the night: where work on a chunk raises, it is repeated on the halves of the chunk, down to the rows
that raise by themselves. These are rejected.
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
"""Rows of a slice. Where a chunk holds an odd value, only the slice with that value takes the slow path."""
RAW_LIMIT = 1_000
"""Characters of a rejected line that the quarantine keeps."""
UNREADABLE = "unreadable"
"""The reason of last resort: for a row whose parsing raised."""

Mask = npt.NDArray[np.bool_]
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass
class Chunk:
    """R rows of one file. place: (R,) where each begins; raw: what it looked like; columns: name → (R,) text, null
    where it is missing, or a typed Parquet column; reason: (R,) object, None where nothing is wrong yet; spoiled:
    whether any row has a reason (searching `reason` for one takes as long as typing a column)."""

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
    """Whether work raises on this chunk; on one without rows it does where a column's type cannot be read."""
    try:
        work(chunk)
    except Exception:
        return True
    return False


class Raw:
    """What rows looked like, as text; made only for rows that are rejected."""

    def __init__(self, lines: pa.Array | None = None, table: pa.RecordBatch | None = None) -> None:
        self.lines, self.table = lines, table

    def take(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """The text of some rows, each cut at RAW_LIMIT characters."""
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
    """A value to show, also one that Python cannot hold: text not in its charset, a time after the year 9999."""
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
    """A NumPy mask of a NumPy or Arrow one; null is False."""
    if isinstance(values, np.ndarray):
        return values
    mask: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask
