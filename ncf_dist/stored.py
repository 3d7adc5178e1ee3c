"""Reading back what we stored, JSON and tensors, whatever has happened to the bytes since.

Each function returns a sound value or raises ValueError with what is wrong; who calls it adds the file and the remedy.
No code is ever loaded from data.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 2**28
"""What a reader takes into memory. No document of ours comes near it: a manifest takes some 200 bytes a file."""
FAULTS_SHOWN = 3

T = TypeVar("T")


def parse_json(kind: type[T], data: bytes, /, *, more_keys: bool = False, **given: Any) -> T:
    """A JSON object as the dataclass (or the dict type) `kind`, types checked strictly, dataclasses in it too.
    Nesting ends at 200 levels, where the parser does.

    given: fields that are not stored. more_keys: whether keys that `kind` has not are passed over.
    """
    body = from_json(data)
    if not isinstance(body, dict):
        raise ValueError(f"it holds a {type(body).__name__} where an object is needed")
    return typed(kind, {**body, **given}, more_keys=more_keys)


def typed(kind: type[T], body: Mapping[str, Any], /, *, more_keys: bool = False) -> T:
    """What a JSON object holds, as `parse_json` gives it."""
    try:
        # Strict JSON: unlike Python's values it may give a list for a tuple.
        text = to_json(body, inf_nan_mode="constants")
        found: T = _adapter(cast(Hashable, kind)).validate_json(
            text, strict=True, extra="ignore" if more_keys else "forbid"
        )
    except ValidationError as error:
        raise ValueError(_faults(error)) from None
    return found


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _faults(error: ValidationError) -> str:
    """The first faults in one line, without the values: they may be long, or a person's."""
    faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
    return "; ".join(faults[:FAULTS_SHOWN])


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    import safetensors.torch

    with _read_as_tensors():
        return safetensors.torch.load(data)


def map_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a local file, memory-mapped. Raises OSError where it cannot be opened."""
    import safetensors.torch

    with _read_as_tensors():
        return safetensors.torch.load_file(path)


def misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference of `found` from the names, shapes and types of `wanted`; None where they agree."""
    for name, like in wanted.items():
        if name not in found:
            return f"{name} is missing"
        tensor = found[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, needed {like.dtype} {list(like.shape)}"
    unknown = found.keys() - wanted.keys()
    return f"{min(unknown)} is not part of it" if unknown else None


def not_finite(source: str | bytes) -> list[str]:
    """Names of the float32 tensors that hold NaN or infinity. Without torch, which drivers do without; the tensors of a
    local file, given by its path, are looked at one at a time."""
    import numpy as np
    import safetensors

    with _read_as_tensors():
        if isinstance(source, bytes):
            arrays = (
                (name, np.frombuffer(t["data"], "<f4"))
                for name, t in safetensors.deserialize(source)
                if t["dtype"] == "F32"
            )
            return [name for name, array in arrays if not np.isfinite(array).all()]
        with safetensors.safe_open(source, framework="numpy") as file:
            names = [name for name in file.keys() if file.get_slice(name).get_dtype() == "F32"]  # noqa: SIM118
            return [name for name in names if not np.isfinite(file.get_tensor(name)).all()]


@contextlib.contextmanager
def _read_as_tensors() -> Iterator[None]:
    """What safetensors and torch raise for bytes that are no such file becomes ValueError.
    A file that cannot be opened, or is too large for this machine, is not damaged: that passes.
    (A forged header asks for no memory: lengths and shapes that do not fit the file are refused first.)"""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"no sound safetensors file: {error}") from None
