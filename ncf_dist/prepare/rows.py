"""From columns of text to typed interactions: each row is whole, or rejected with a reason.

A chunk is tried whole first (one cast a column), then in slices; only the odd rows of a slice are looked at one by one.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.contracts import QUARANTINE
from ncf_dist.prepare.chunks import SLICE, Chunk, Mask, as_mask, row_by_row
from ncf_dist.prepare.reading import read_unit
from ncf_dist.prepare.records import Seam
from ncf_dist.prepare.source import Source
from ncf_dist.spark_io import ROWS_PER_FILE, FileSink, Pass

NULLS = pa.array(["\\N", "NULL", "null"])
"""What writes a missing id as text."""
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
YEAR_2200 = 7_258_118_400_000_000
"""In microseconds since 1970. A later time is a wrong unit."""
LATE = "timestamp is at or after the end of the window"
"""The one reason that does not speak against the file: the log goes on after ds."""
Values = tuple[npt.NDArray[Any], Mask]
"""(R,) values, and (R,) which of them are one."""
_INTEGER = r"^[+-]?[0-9]+$"
_SHORT_INTEGER = r"^-?[0-9]{1,18}$"
_FLOAT = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NOT_FINITE = r"^[+-]?(nan|inf|infinity)$"
_ZONE = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
_TIME = r"[ T][0-9]{2}(:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"


@dataclass(frozen=True)
class RowSpec:
    """What a row must be; travels to the workers. until: microseconds since 1970. part: 0 train file, 1 test file."""

    source: Source
    user_id: pa.DataType
    item_id: pa.DataType
    time_unit: str
    until: int
    rating_range: tuple[float, float] | None
    staging: str
    part: int = 0

    @property
    def schema(self) -> pa.Schema:
        return staged_schema(self.user_id, self.item_id)


def staged_schema(user_id: pa.DataType, item_id: pa.DataType) -> pa.Schema:
    """Accepted rows on their way to the tables. part: 0, or 1 where the row is from the test file."""
    kinds = {
        "user_id": user_id, "item_id": item_id, "rating": pa.float32(), "timestamp": pa.int64(), "part": pa.int8(),
    }  # fmt: skip
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def read_pass(spec: RowSpec) -> Pass:
    """For mapInArrow over unit numbers (column `id`): writes each unit's rows under `staging` and yields `stats`
    (JSON): counts by reason, files of rows and of rejects, or the error that kept a file from being read."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found = [read_one(spec, unit) for batch in batches for unit in batch.column(0).to_pylist()]
        yield pa.RecordBatch.from_pydict({"stats": [json.dumps(stats) for stats in found]})

    return run


def read_one(spec: RowSpec, unit: int) -> dict[str, Any]:
    """Read, type and stage one unit, a block and a file's rows at a time."""
    reasons: Counter[str] = Counter()
    total = 0
    keys = [pa.schema([spec.schema.field(name)]) for name in ("user_id", "item_id")]
    schemas = {"rows": spec.schema, "rejects": QUARANTINE.schema, "user_id": keys[0], "item_id": keys[1]}
    sinks = {kind: FileSink(f"{spec.staging}/{kind}-{spec.part}", schema) for kind, schema in schemas.items()}
    distinct = [_Distinct(sinks[name], unit) for name in ("user_id", "item_id")]
    seams: list[Seam] = []
    try:
        for chunk in read_unit(spec.source, spec.source.units[unit], seams):
            total += len(chunk.place)
            for rows, rejects in row_by_row(chunk, lambda part: typed(part, spec)):
                sinks["rows"].add(unit, rows)
                for one in distinct:
                    one.add(rows)
                if rejects is not None:
                    sinks["rejects"].add(unit, rejects)
                    reasons.update(rejects.column("reason").to_pylist())
    except (OSError, pa.ArrowException) as error:
        named = ", ".join(spec.source.files[piece.file] for piece in spec.source.units[unit][:3])
        return {"unit": unit, "seams": [], "error": f"{named} cannot be read: {error}"}
    for one in distinct:
        one.flush()
    files = {kind: [f"{sink.folder}/{info.path}" for info in sink.close()] for kind, sink in sinks.items()}
    return {"unit": unit, "rows": total, "reasons": reasons, "seams": seams, "files": files}


class _Distinct:
    """The ids of a unit, each about once: an index is small beside the rows, so Spark need not see each row's."""

    def __init__(self, sink: FileSink, unit: int) -> None:
        self.sink, self.unit = sink, unit
        self._held: list[pa.Array] = []
        self._size = 0

    def add(self, rows: pa.Table) -> None:
        [name] = self.sink.schema.names
        self._held.append(pc.unique(rows[name]))
        self._size += len(self._held[-1])
        if self._size > ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if self._size:
            self.sink.add(self.unit, pa.table([pc.unique(pa.chunked_array(self._held))], schema=self.sink.schema))
        self._held, self._size = [], 0


def typed(chunk: Chunk, spec: RowSpec) -> tuple[pa.Table, pa.Table | None]:
    """(the whole rows, the rejected ones or None)."""
    size = len(chunk.place)
    columns = {
        "user_id": _id(chunk, "user", spec.user_id),
        "item_id": _id(chunk, "item", spec.item_id),
        "rating": _rating(chunk, spec.rating_range),
        "timestamp": _timestamp(chunk, spec.time_unit, spec.until),
        "part": pa.array(np.full(size, spec.part, dtype=np.int8)),
    }
    rejected: Mask = chunk.reason != None  # noqa: E711 - elementwise
    if not rejected.any():
        return pa.table(list(columns.values()), schema=spec.schema), None
    keep = pa.array(~rejected)
    rows = pa.table([column.filter(keep) for column in columns.values()], schema=spec.schema)
    at = np.flatnonzero(rejected)
    rejects = pa.table(
        [
            pa.array([spec.source.files[chunk.file]] * len(at), pa.string()),
            pa.array(chunk.place[at], pa.int64()),
            pa.array(chunk.reason[at], pa.string()),
            pa.array(chunk.raw.take(at), pa.string()),
        ],
        schema=QUARANTINE.schema,
    )
    return rows, rejects


def _id(chunk: Chunk, name: str, kind: pa.DataType) -> pa.Array:
    """(R,) ids of the wanted type; anything where the row is rejected."""
    column = chunk.columns[name]
    if not pa.types.is_string(column.type) and kind == pa.string():
        column = column.cast(pa.string())
    if pa.types.is_string(column.type) and as_mask(null := pc.is_in(column, NULLS)).any():
        column = pc.if_else(null, None, column)
    chunk.reject(pc.is_null(column), f"{name} id is null")
    if kind == pa.string():
        visible = _visible_ascii(column)
        chunk.reject(pc.equal(column if visible else pc.utf8_trim_whitespace(column), ""), f"empty {name} id")
        if not visible:
            chunk.reject(pc.match_substring(column, "\0"), f"{name} id holds a NUL character")
        return pc.fill_null(column, "")
    values, ok = integers(column)
    if not ok.all():
        if pa.types.is_string(column.type):
            chunk.reject(pc.equal(pc.utf8_trim_whitespace(column), ""), f"empty {name} id")
        chunk.reject(~ok, f"{name} id is not an integer")
    return pa.array(values)


def _bytes(text: pa.Array) -> npt.NDArray[np.uint8]:
    """All bytes of a string array: a look at them costs a thirtieth of one at every value."""
    _, offsets, data = text.buffers()
    if not len(text) or data is None:
        return np.zeros(0, dtype=np.uint8)
    ends = np.frombuffer(offsets, dtype=np.int32)
    return np.frombuffer(data, dtype=np.uint8)[ends[text.offset] : ends[text.offset + len(text)]]


def _visible_ascii(text: pa.Array) -> bool:
    """Whether no value holds a blank or a NUL."""
    found = _bytes(text)
    return not len(found) or bool(found.min() > 32 and found.max() < 127)


def _rating(chunk: Chunk, bounds: tuple[float, float] | None) -> pa.Array:
    if "rating" not in chunk.columns:
        return pa.array(np.ones(len(chunk.place), dtype=np.float32))
    values, ok = floats(chunk.columns["rating"])
    finite = np.isfinite(values)
    chunk.reject(~ok, "rating is not a number")
    chunk.reject(~finite, "rating is not finite")
    if bounds is not None:
        low, high = (np.float32(bound) for bound in bounds)
        chunk.reject((values < low) | (values > high), "rating is out of range")
    # Plus zero: -0.0 and 0.0 are equal, but not the same bytes.
    return pa.array(np.where(finite, values, 0).astype(np.float32) + np.float32(0))


def _timestamp(chunk: Chunk, unit: str, until: int) -> pa.Array:
    """Microseconds since 1970; 0 where the log has no times."""
    if "timestamp" not in chunk.columns:
        return pa.array(np.zeros(len(chunk.place), dtype=np.int64))
    column = chunk.columns["timestamp"]
    if pa.types.is_timestamp(column.type):
        missing = as_mask(pc.is_null(column))
        chunk.reject(missing, "timestamp is null")
        # In the column's own unit: a year that microseconds cannot hold must not wrap around to a plausible one.
        values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
        scale = MICROSECONDS.get(column.type.unit, 1)
        values = values // 1_000 if column.type.unit == "ns" else values
    elif unit == "iso":
        values, ok = iso_times(column)
        chunk.reject(~ok, "timestamp is not ISO 8601")
        scale = 1
    else:
        values, ok = integers(column)
        chunk.reject(~ok, "timestamp is not an integer")
        scale = MICROSECONDS[unit]
    chunk.reject(values < 0, "timestamp is negative")
    implausible = values >= YEAR_2200 // scale
    chunk.reject(implausible, "timestamp is after the year 2199")
    found = np.where(implausible | (values < 0), 0, values) * scale
    chunk.reject(found >= until, LATE)
    return pa.array(found)


def integers(column: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
    """((R,) int64, (R,) which of them really are one). Text may have blanks around it and a sign."""
    if pa.types.is_string(column.type):
        return _integers_of_text(column)
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        values = pc.fill_null(column, 0).cast(pa.int64()).to_numpy(zero_copy_only=False)
        return values, as_mask(pc.is_valid(column))
    if pa.types.is_floating(column.type):
        # pandas writes integers with a null among them as floats.
        numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        ok = np.isfinite(numbers) & (np.abs(np.nan_to_num(numbers)) < 2**53) & (numbers == np.floor(numbers))
        return np.where(ok, numbers, 0).astype(np.int64), ok
    if pa.types.is_boolean(column.type):
        return np.zeros(len(column), dtype=np.int64), np.zeros(len(column), dtype=bool)
    return _integers_of_text(column.cast(pa.string()))


def _in_slices(column: pa.Array, whole: Callable[[pa.Array], Values], each: Callable[[pa.Array], Values]) -> Values:
    """`whole` reads a column at once and raises ArrowInvalid where it holds something odd: then it reads the column's
    slices, and `each`, which reads anything, those that are odd."""
    try:
        return whole(column)
    except pa.ArrowInvalid:
        if len(column) <= SLICE:
            return each(column)
    parts = [_in_slices(column.slice(at, SLICE), whole, each) for at in range(0, len(column), SLICE)]
    values, ok = zip(*parts, strict=True)
    return np.concatenate(values), np.concatenate(ok)


def _cast(column: pa.Array, kind: pa.DataType) -> Values:
    """Raises ArrowInvalid where a value is missing, or cannot be cast."""
    if column.null_count:
        raise pa.ArrowInvalid("a value is missing")
    return column.cast(kind).to_numpy(zero_copy_only=False), np.ones(len(column), dtype=bool)


def _integers_of_text(column: pa.Array) -> Values:
    def whole(part: pa.Array) -> Values:
        if (_bytes(part) | 32 == ord("x")).any():
            raise pa.ArrowInvalid("Arrow reads 0x1F as a number")
        return _cast(part, pa.int64())

    return _in_slices(column, whole, _integers_one_by_one)


def _integers_one_by_one(column: pa.Array) -> Values:
    text = pc.ascii_trim_whitespace(column)
    ok = as_mask(pc.match_substring_regex(text, _SHORT_INTEGER)).copy()
    values = np.zeros(len(text), dtype=np.int64)
    values[ok] = text.filter(pa.array(ok)).cast(pa.int64()).to_numpy()
    if not ok.all():
        odd = ~ok
        values[odd], ok[odd] = _odd_integers(text.filter(pa.array(odd)))
    return values, ok


def _odd_integers(text: pa.Array) -> Values:
    """Signs, leading zeros and any number of digits, by their text: Python's int() refuses 5,000 digits."""
    whole = pc.fill_null(pc.match_substring_regex(text, _INTEGER), False)
    minus = pc.fill_null(pc.starts_with(text, "-"), False)
    digits = pc.if_else(whole, pc.replace_substring_regex(text, r"^[+-]?0*", ""), "0")
    digits = pc.if_else(pc.equal(digits, ""), "0", digits)
    size = pc.binary_length(digits)
    most = pc.if_else(minus, str(2**63), str(2**63 - 1))
    fits = pc.or_(pc.less(size, 19), pc.and_(pc.equal(size, 19), pc.less_equal(digits, most)))
    sound = pc.and_(whole, fits)
    signed = pc.binary_join_element_wise(pc.if_else(minus, "-", ""), pc.if_else(sound, digits, "0"), "")
    return signed.cast(pa.int64()).to_numpy(), as_mask(sound)


def floats(column: pa.Array) -> tuple[npt.NDArray[np.float32], Mask]:
    """((R,) float32, which of them are a number at all; NaN and infinity are)."""
    if pa.types.is_boolean(column.type):
        return np.zeros(len(column), dtype=np.float32), np.zeros(len(column), dtype=bool)
    if not pa.types.is_string(column.type):
        ok = as_mask(pc.is_valid(column))
        with np.errstate(over="ignore"):
            values = pc.fill_null(column.cast(pa.float64()), 0).to_numpy().astype(np.float32)
        return values, ok
    return _in_slices(column, lambda part: _cast(part, pa.float32()), _floats_one_by_one)


def _floats_one_by_one(column: pa.Array) -> Values:
    text = pc.ascii_trim_whitespace(column)
    number = pc.fill_null(pc.match_substring_regex(text, _FLOAT), False)
    odd = as_mask(pc.match_substring_regex(text, _NOT_FINITE, ignore_case=True))
    values = pc.if_else(number, text, "0").cast(pa.float32()).to_numpy().copy()
    values[odd] = np.nan
    return values, as_mask(number) | odd


def iso_times(column: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
    """((R,) microseconds since 1970, which of them are ISO 8601). Without a zone it is UTC."""
    return _in_slices(pc.ascii_trim_whitespace(column.cast(pa.string())), _iso_whole, _iso_one_by_one)


def _iso_whole(text: pa.Array) -> Values:
    """All as the first value is: with a zone or without. Raises ArrowInvalid."""
    first = text[0].as_py() if len(text) else None
    return _iso_cast(text, pa.timestamp("us", "UTC" if first is not None and re.search(_ZONE, first[10:]) else None))


def _iso_cast(text: pa.Array, kind: pa.DataType) -> Values:
    found = text.cast(kind).cast(pa.int64())
    return pc.fill_null(found, 0).to_numpy(), as_mask(pc.is_valid(found))


def _iso_one_by_one(text: pa.Array) -> Values:
    """Most are of a form that Arrow reads; the others are Python's."""
    text = pc.replace_substring_regex(text, r"(\.[0-9]{6})[0-9]+", r"\1")  # Arrow refuses what it would have to cut.
    timed = as_mask(pc.match_substring_regex(text, f"{_DATE}{_TIME}{_ZONE}"))
    local = as_mask(pc.match_substring_regex(text, f"{_DATE}({_TIME})?$"))
    values, ok = np.zeros(len(text), dtype=np.int64), np.zeros(len(text), dtype=bool)
    for mask, kind in ((timed, pa.timestamp("us", "UTC")), (local, pa.timestamp("us"))):
        values[mask], ok[mask] = _iso_halves(text.filter(pa.array(mask)), kind)
    for row in np.flatnonzero(~(timed | local) & as_mask(pc.is_valid(text))):
        moment = _iso(text[int(row)].as_py())
        values[row], ok[row] = (0, False) if moment is None else (moment, True)
    return values, ok


def _iso_halves(text: pa.Array, kind: pa.DataType) -> Values:
    """Casts, halving where that fails, so that 30 February alone is none."""
    try:
        return _iso_cast(text, kind)
    except pa.ArrowInvalid:
        if len(text) == 1:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool)
    half = len(text) // 2
    parts = [_iso_halves(part, kind) for part in (text.slice(0, half), text.slice(half))]
    values, ok = zip(*parts, strict=True)
    return np.concatenate(values), np.concatenate(ok)


def _iso(text: str) -> int | None:
    """Other forms of ISO 8601: without hyphens, with a week. None where it is none."""
    try:
        moment = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)) // dt.timedelta(microseconds=1)


def day_start(day: dt.date) -> int:
    """Microseconds since 1970 at which `day` begins in UTC."""
    return (day - dt.date(1970, 1, 1)).days * 86_400_000_000
