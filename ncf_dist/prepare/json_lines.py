"""Lines of JSON objects as fields: text as it is, numbers as they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ncf_dist.prepare.charset import NOT_IN_CHARSET, can_be_encoded
from ncf_dist.prepare.chunks import Chunk

IDS = ("user", "item", "id")


def json_fields(chunk: Chunk, lines: pa.Array, keys: Mapping[str, str]) -> dict[str, pa.Array]:
    """(R,) text of each wanted field, null where it is missing; rejects lines that are no object, and fields that are
    neither text nor a number. keys: field → its key; `product.sku` is key sku of the object `product`."""
    values: dict[str, list[str | None]] = {name: [] for name in keys}
    wrong, odd, deep = (np.zeros(len(lines), dtype=bool) for _ in range(3))
    for row, line in enumerate(lines.to_pylist()):
        try:
            body = _JSON.decode(line)
        except ValueError:
            body = None
        except RecursionError:
            body, deep[row] = None, True
        wrong[row] = not isinstance(body, dict)
        for name, key in keys.items():
            value = _field(name, _value_at(body, key)) if isinstance(body, dict) else ""
            if value is not None and not isinstance(value, str):
                odd[row] = True
                value = ""
            values[name].append(value)
    chunk.reject(deep, "JSON is nested too deeply")
    chunk.reject(wrong, "line is not a JSON object")
    chunk.reject(odd, "a field is neither text nor a number")
    return {name: _text_column(chunk, column) for name, column in values.items()}


def _field(name: str, value: Any) -> Any:
    """The value as text or None where it may stand for the field; anything else where it may not."""
    if isinstance(value, bool) and (name == "rating" or name.startswith("column ")):
        return str(value)
    if isinstance(value, _Constant) and name in IDS:
        return None if value == "NaN" else []
    return value


def _text_column(chunk: Chunk, values: list[str | None]) -> pa.Array:
    """As a string array. JSON's \\ud83d without the \\ude00 after it is half a surrogate pair, which is no text."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        broken = np.array([value is not None and not can_be_encoded(value) for value in values])
        chunk.reject(broken, NOT_IN_CHARSET)
        return pa.array([None if bad else value for bad, value in zip(broken, values, strict=True)], pa.string())


def _value_at(body: dict[str, Any], key: str) -> Any:
    """The value of a key; where there is no key `product.sku`, of key sku in the object `product`."""
    if key in body or "." not in key:
        return body.get(key)
    value: Any = body
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class _Number(str):
    """A JSON number as it was written: 1.50 and 1e3 keep their form, big integers their digits."""

    __slots__ = ()


class _Constant(_Number):
    """NaN or Infinity. As an id, NaN is what pandas writes for a missing one; Infinity is none."""

    __slots__ = ()


_JSON = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Constant)
