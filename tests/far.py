"""A device that is not there: tensors on it say `meta` and hold their numbers on the CPU. As on a GPU, `numpy()`
refuses them, and so does an operation that would mix them with tensors of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
CROSSING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
"""May take indexes of the CPU on a GPU, too."""


class Far(Tensor):
    """A tensor on the device; `near` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Any:
        far = Tensor._make_wrapper_subclass(cls, near.size(), strides=near.stride(), dtype=near.dtype, device=DEVICE)
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return called(function, args, kwargs or {})


class FarDevice(TorchDispatchMode):
    """Makes `device="meta"` this device for what runs inside."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(function, args, kwargs or {})


def called(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    fars = [x for x in given if isinstance(x, Far)]
    if fars and function not in CROSSING + INDEXING:
        near = [x for x in given if not isinstance(x, Far) and x.ndim]
        assert not near, f"{function} mixes devices: {[tuple(x.shape) for x in near]} on the CPU"
    assert not (function in INDEXING and fars and not isinstance(args[0], Far)), f"{function} by indexes of the device"
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    inner = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
    if target is not None:
        inner[1]["device"] = torch.device("cpu")
    found = function(*inner[0], **inner[1])
    far = target.type == DEVICE.type if target is not None else bool(fars)
    if function is torch.ops.aten.copy_.default:
        far = isinstance(args[0], Far)
    known = {id(x.near): x for x in fars}

    def out(x: Any) -> Any:
        return known.get(id(x), Far(x)) if far and isinstance(x, Tensor) else x

    return tree_map(out, found)
