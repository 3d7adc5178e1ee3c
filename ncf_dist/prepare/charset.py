"""Bytes as text, and which values are not text in their charset."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.prepare.chunks import SLICE, Mask

NOT_IN_CHARSET = "text is not in the charset"
"""The reason for which such a row is rejected."""


def latin1_text(raw: pa.Array) -> pa.Array:
    """A binary array of Latin-1 as a string array. In UTF-8 every byte from 128 on becomes two."""
    _, offsets, data = raw.buffers()
    high = np.frombuffer(data, dtype=np.uint8) >= 128
    if not high.any():
        return raw.view(pa.string())
    ends = np.frombuffer(offsets, dtype=np.int32)
    moved = ends + np.append(0, np.cumsum(high, dtype=np.int32))[ends]
    text = pa.py_buffer(data.to_pybytes().decode("latin-1").encode())
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(moved.astype(np.int32).tobytes()), text)


def utf8_text(raw: pa.Array) -> tuple[pa.Array, Mask | None]:
    """(text, "" where it is not UTF-8; where that is, or None)."""
    wrong = not_utf8(raw)
    return (raw if wrong is None else pc.if_else(pa.array(wrong), b"", raw)).view(pa.string()), wrong


def not_utf8(raw: pa.Array) -> Mask | None:
    """(R,) which values of a binary array are not UTF-8; None where all are.

    Only slices that hold a bad value are looked at value by value, so one bad value does not make the array slow.
    """
    text = raw.view(pa.large_string() if pa.types.is_large_binary(raw.type) else pa.string())
    try:
        text.validate(full=True)
        return None
    except pa.ArrowInvalid:
        if len(raw) <= SLICE:
            return np.array([value is not None and not _is_utf8(value) for value in raw.to_pylist()])
    wrong = np.zeros(len(raw), dtype=bool)
    for at in range(0, len(raw), SLICE):
        if (part := not_utf8(raw.slice(at, SLICE))) is not None:
            wrong[at : at + SLICE] = part
    return wrong


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def can_be_encoded(value: str) -> bool:
    """Whether a Python string is text: half a surrogate pair is not, as no charset can encode it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
