"""Ids of users and items, in logs and side tables alike: each is of the wanted type, or its row is rejected.

Numbers are one id however a column holds them: 454, 454.0 and a decimal 454.00 are the same, as integers and as text. A
number with a fraction, and a float that may have been rounded to a neighbour, are no id of either type.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.prepare.chunks import Chunk, Mask, as_mask
from ncf_dist.prepare.values import EXACT_FLOAT, NAN, NO_FRACTION, bytes_of, integers

NULLS = pa.array(["\\N", "NULL", "null"])
"""How databases write a missing id as text."""


def typed_ids(chunk: Chunk, name: str, kind: pa.DataType) -> pa.Array:
    """(R,) ids of the wanted type; null or "" where the id cannot be read. Floats that pandas made of integers, because
    a value was missing, become integers again."""
    column = chunk.columns[name]
    if pa.types.is_floating(column.type):
        chunk.reject(pc.is_nan(column), f"{name} id is null")
    if not pa.types.is_string(column.type) and kind == pa.string():
        column = _text_of(chunk, name, column)
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
            chunk.reject(pc.match_substring_regex(column, NAN, ignore_case=True), f"{name} id is null")
            chunk.reject(pc.equal(pc.utf8_trim_whitespace(column), ""), f"empty {name} id")
        _reject_numbers(chunk, name, column, ok)
    return pa.array(values, mask=None if ok.all() else ~ok)


def _reject_numbers(chunk: Chunk, name: str, column: pa.Array, ok: Mask) -> None:
    """ok: (R,) which values are integers."""
    if pa.types.is_floating(column.type):
        beyond = pc.and_(pc.greater(pc.abs(column), float(EXACT_FLOAT[column.type])), pc.is_finite(column))
        chunk.reject(beyond, f"{name} id is an inexact float")
    chunk.reject(~ok, f"{name} id is not an integer")


def _text_of(chunk: Chunk, name: str, column: pa.Array) -> pa.Array:
    """(R,) ids as text; null where a number is no integer."""
    chunk.reject(pc.is_null(column), f"{name} id is null")
    if pa.types.is_floating(column.type):
        values, ok = integers(column)
        text = pa.array(values).cast(pa.string())
    elif pa.types.is_decimal(column.type):
        ok, text = _whole_decimals(column)
    else:
        return column.cast(pa.string())
    _reject_numbers(chunk, name, column, ok)
    return pc.if_else(pa.array(ok), text, None)


def _whole_decimals(column: pa.Array) -> tuple[Mask, pa.Array]:
    """(R,) which are integers, and these as text: all their digits and no exponent. Arrow writes some with one, as
    0.E-18 for a 0 with 18 decimals."""
    text = pc.replace_substring_regex(column.cast(pa.string()), NO_FRACTION, "")
    ok = as_mask(pc.match_substring_regex(text, r"^-?[0-9]+$")).copy()
    odd = np.flatnonzero(~ok & as_mask(pc.is_valid(column)))
    numbers = [column[int(row)].as_py() for row in odd]
    ok[odd] = [number == number.to_integral_value() for number in numbers]
    whole = [f"{number:.0f}" for number in numbers if number == number.to_integral_value()]
    mask = np.zeros(len(text), dtype=bool)
    mask[odd[ok[odd]]] = True
    return ok, pc.replace_with_mask(text, pa.array(mask), pa.array(whole, pa.string()))


def _visible_ascii(text: pa.Array) -> bool:
    """Whether all characters are visible ASCII, so that no value holds a space or a NUL."""
    data = bytes_of(text)
    return not len(data) or bool(data.min() > 32 and data.max() < 127)
