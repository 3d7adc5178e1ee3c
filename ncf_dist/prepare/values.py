"""Columns of text, or of whatever type a file has, as integers, floats and moments; and which values really are one.

A column is cast at once; where that fails, its slices are cast one by one, and in a slice that fails only the odd rows
are parsed one by one. Integers may be written as floats (454.0, 1e3): pandas does so where a value is missing.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.prepare.chunks import SLICE, Mask, as_mask

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
YEAR_2200 = 7_258_118_400_000_000
"""In microseconds since 1970. A later time is a wrong unit."""
YEAR_1995 = 788_918_400_000_000
"""In microseconds since 1970. Hardly any log is so old: where most rows are earlier, the unit is wrong, too."""
Values = tuple[npt.NDArray[Any], Mask]
"""(R,) values, and (R,) which of them are one."""
_INTEGER = r"^[+-]?[0-9]+$"
_SHORT_INTEGER = r"^-?[0-9]{1,18}$"
_POINTED = r"^[+-]?[0-9]+\.0*$"
_POWER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]{1,3}$"
NO_FRACTION = r"\.0*$"
NAN = r"^[+-]?nan$"
INT64_MAX = pa.scalar(2**63 - 1, pa.uint64())
EXACT_FLOAT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
"""Up to this size each integer has a float of its own; beyond it an id may have been rounded to its neighbour."""
_FLOAT = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NOT_FINITE = r"^[+-]?(nan|inf|infinity)$"
_ZONE = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_REAL_DATE = (
    r"^(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_REAL_TIME = r"(?:[ T](?:[01][0-9]|2[0-3])(?::[0-5][0-9](?::[0-5][0-9](?:\.[0-9]+)?)?)?)?"
_REAL_ZONE = r"(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?$"
"""Of the same form as _DATE, _TIME and _ZONE: those that a calendar and a clock show."""
_TIME = r"[ T][0-9]{2}(:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"


def truths(column: pa.Array) -> tuple[npt.NDArray[np.float32], Mask]:
    """As `floats`; but true and false, as a type or as a word, are 1 and 0: liked or not."""
    if pa.types.is_boolean(column.type):
        return pc.fill_null(column, False).cast(pa.float32()).to_numpy(), as_mask(pc.is_valid(column))
    values, ok = floats(column)
    if not ok.all() and pa.types.is_string(column.type):
        word = pc.index_in(pc.ascii_lower(pc.ascii_trim_whitespace(column)), pa.array(["false", "true"]))
        said = as_mask(pc.is_valid(word))
        values, ok = np.where(said, pc.fill_null(word, 0).to_numpy(), values).astype(np.float32), ok | said
    return values, ok


def moments(column: pa.Array, scale: int) -> tuple[npt.NDArray[np.int64], Mask]:
    """((R,) microseconds since 1970, (R,) which values are a number). scale: microseconds of one unit of the column.
    Fractions are rounded to a microsecond; a time below 0 or beyond the year 2199 becomes one just out of bounds."""
    values, ok = integers(column)
    times = np.clip(values, -1, YEAR_2200 // scale) * scale
    if not ok.all() and not pa.types.is_boolean(column.type):
        text = pa.types.is_string(column.type)
        numbers = _doubles(column) if text else column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        fraction = ~ok & np.isfinite(numbers)
        rounded = np.rint(np.where(fraction, np.clip(numbers, -1, YEAR_2200 // scale), 0) * scale)
        times, ok = np.where(fraction, rounded.astype(np.int64), times), ok | fraction
    return times, ok


def _doubles(column: pa.Array) -> npt.NDArray[np.float64]:
    """(R,) numbers of text; NaN where it is none."""
    text = pc.ascii_trim_whitespace(column)
    number = pc.fill_null(pc.match_substring_regex(text, _FLOAT), False)
    return pc.if_else(number, text, "nan").cast(pa.float64()).to_numpy()


def bytes_of(text: pa.Array) -> npt.NDArray[np.uint8]:
    """All bytes of a string array: checking these takes a thirtieth of the time of checking every value."""
    _, offsets, data = text.buffers()
    if not len(text) or data is None:
        return np.zeros(0, dtype=np.uint8)
    ends = np.frombuffer(offsets, dtype=np.int32)
    return np.frombuffer(data, dtype=np.uint8)[ends[text.offset] : ends[text.offset + len(text)]]


def integers(column: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
    """((R,) int64, (R,) which of them really are one). Text may have blanks around it and a sign."""
    if pa.types.is_string(column.type):
        return _integers_of_text(column)
    if pa.types.is_integer(column.type):
        fits = pc.less_equal(column, INT64_MAX) if column.type == pa.uint64() else pc.is_valid(column)
        values = pc.if_else(pc.fill_null(fits, False), column, None).fill_null(0).cast(pa.int64())
        return values.to_numpy(zero_copy_only=False), as_mask(fits)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        ok = np.abs(np.nan_to_num(numbers, nan=np.inf)) <= EXACT_FLOAT[column.type]
        ok &= np.where(ok, numbers, 0.5) == np.floor(np.where(ok, numbers, 0))
        return np.where(ok, numbers, 0).astype(np.int64), ok
    if pa.types.is_boolean(column.type):
        return np.zeros(len(column), dtype=np.int64), np.zeros(len(column), dtype=bool)
    if pa.types.is_decimal(column.type):
        return _integers_of_text(pc.replace_substring_regex(column.cast(pa.string()), NO_FRACTION, ""))
    return _integers_of_text(column.cast(pa.string()))


def _in_slices(column: pa.Array, whole: Callable[[pa.Array], Values], each: Callable[[pa.Array], Values]) -> Values:
    """The column cast by `whole`; where that raises ArrowInvalid for an odd value, slice by slice, and odd slices by
    `each`, which takes any value."""
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
        if (bytes_of(part) | 32 == ord("x")).any():
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
    """Integers with a plus sign, leading zeros or any number of digits, compared as text, since Python's int() refuses
    5,000 digits. A float such as 454.0 or 1e3 is an integer where it is whole and small enough to be exact."""
    pointed = as_mask(pc.match_substring_regex(text, _POINTED))
    if pointed.any():
        text = pc.if_else(pa.array(pointed), pc.replace_substring_regex(text, NO_FRACTION, ""), text)
    whole = pc.fill_null(pc.match_substring_regex(text, _INTEGER), False)
    minus = pc.fill_null(pc.starts_with(text, "-"), False)
    digits = pc.if_else(whole, pc.replace_substring_regex(text, r"^[+-]?0*", ""), "0")
    digits = pc.if_else(pc.equal(digits, ""), "0", digits)
    size = pc.binary_length(digits)
    most = pc.if_else(minus, str(2**63), str(2**63 - 1))
    fits = pc.or_(pc.less(size, 19), pc.and_(pc.equal(size, 19), pc.less_equal(digits, most)))
    sound = pc.and_(whole, fits)
    signed = pc.binary_join_element_wise(pc.if_else(minus, "-", ""), pc.if_else(sound, digits, "0"), "")
    values, ok = signed.cast(pa.int64()).to_numpy().copy(), as_mask(sound).copy()
    ok &= ~pointed | (np.abs(values) <= EXACT_FLOAT[pa.float64()])
    for row in np.flatnonzero(as_mask(pc.match_substring_regex(text, _POWER))):
        power = Decimal(text[int(row)].as_py())
        ok[row] = abs(power) <= EXACT_FLOAT[pa.float64()] and power == power.to_integral_value()
        values[row] = int(power) if ok[row] else 0
    return np.where(ok, values, 0), ok


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
    """((R,) microseconds since 1970, which of them are ISO 8601). Without a zone it is UTC; a zone may stand apart, as
    ` UTC` or ` +0200`, and have hours alone, `+02`."""
    return _in_slices(pc.ascii_trim_whitespace(column.cast(pa.string())), _iso_whole, _iso_one_by_one)


def _iso_whole(text: pa.Array) -> Values:
    """All values written as the first one: with a zone, or without. Raises ArrowInvalid."""
    first = text[0].as_py() if len(text) else None
    return _iso_cast(text, pa.timestamp("us", "UTC" if first is not None and re.search(_ZONE, first[10:]) else None))


def _iso_cast(text: pa.Array, kind: pa.DataType) -> Values:
    times = text.cast(kind).cast(pa.int64())
    return pc.fill_null(times, 0).to_numpy(), as_mask(pc.is_valid(times))


def _iso_one_by_one(text: pa.Array) -> Values:
    """Arrow parses the forms that it knows; Python parses the others one by one."""
    text = pc.replace_substring_regex(text, r"(\.[0-9]{6})[0-9]+", r"\1")  # Arrow refuses what it would have to cut.
    text = pc.replace_substring_regex(text, r"([0-9])\s*(?:UTC|GMT|[Zz])$", r"\1Z")
    text = pc.replace_substring_regex(text, r"(:[0-9.]+)\s+([+-][0-9]{2}(?::?[0-9]{2})?)$", r"\1\2")
    timed = as_mask(pc.match_substring_regex(text, f"{_DATE}{_TIME}{_ZONE}"))
    local = as_mask(pc.match_substring_regex(text, f"{_DATE}({_TIME})?$"))
    # 30 February is sorted out here: each such value that reached a cast would make it fail for all.
    real = as_mask(pc.match_substring_regex(text, _REAL_DATE + _REAL_TIME + _REAL_ZONE))
    values, ok = np.zeros(len(text), dtype=np.int64), np.zeros(len(text), dtype=bool)
    for form, kind in ((timed, pa.timestamp("us", "UTC")), (local, pa.timestamp("us"))):
        mask = form & real
        values[mask], ok[mask] = _iso_halves(text.filter(pa.array(mask)), kind)
    for row in np.flatnonzero(~(timed | local) & as_mask(pc.is_valid(text))):
        moment = _iso(text[int(row)].as_py())
        values[row], ok[row] = (0, False) if moment is None else (moment, True)
    return values, ok


def _iso_halves(text: pa.Array, kind: pa.DataType) -> Values:
    """Casts, halving the array where that fails, so that one value that Arrow refuses makes no other invalid."""
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
