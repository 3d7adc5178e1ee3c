"""Which library computes a model's float32 dot products, oneDNN or MKL, and whether this processor has bf16 products.
Both are found by a probe on the executor.

A library is used only where its bits are MKL's, so the choice decides no byte of a table, whatever the timing says.

Importing this needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ncf_dist import no_compiler
from ncf_dist.errors import ConfigError
from ncf_dist.products import facts, numbers, one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from ncf_dist.bundle import Bundle

ROUNDED = 2**-15
"""Of the largest: bf16's products are some 2^-10 off, float32's 2^-22."""
FASTER = 1.15
"""How much quicker than MKL another library must be: on a Zen 4 a lead of .05 was none in the scorer; Zen 5 has .5."""


def choose(bundle: Bundle, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """The fields of `Products` for this model on this processor, from a probe of some 50 ms.
    Raises what `check` raises."""
    found: dict[str, Any] = facts()
    width = dot_width(bundle)
    with one_thread():
        if precision == "bf16" and rounds(width):
            return found | {"precision": "bf16"}
        return found | {"engine": engine_for(width)}


def dot_width(bundle: Bundle) -> int:
    """F: how many numbers a user's and an item's side of the scorer's dot product have. Hidden layers add one, and so
    does each part with a column."""
    import torch

    from ncf_dist.models import outline

    model = outline(bundle.model, bundle.n_users, bundle.n_items)
    with no_compiler.left_out():
        side = model.ranking_items(torch.zeros(1, dtype=torch.int64, device="meta"))
    columns = sum(part.column for part in bundle.parts.parts) if bundle.parts else 0
    return side.dot.shape[1] + bool(model.ranking_layers()) + columns


def rounds(width: int) -> bool:
    """Whether products asked for in bf16 are made in it: they then differ from float32's by more than another order of
    summation does."""
    exact = _block(width, "fp32", "mkl")().clone()
    return bool((_block(width, "bf16", "mkl")() - exact).abs().max() > ROUNDED * exact.abs().max())


def engine_for(width: int) -> Literal["mkl", "onednn"]:
    """The quicker library for dot products of so many factors, of those whose bits are MKL's."""
    import torch

    if not (torch.backends.mkldnn.is_available() and _same_bits(width)):
        return "mkl"
    mkl, other = (_seconds(_block(width, "fp32", engine)) for engine in ("mkl", "onednn"))
    return "onednn" if other * FASTER < mkl else "mkl"


def _same_bits(width: int) -> bool:
    import torch

    return torch.equal(_block(width, "fp32", "onednn")(), _block(width, "fp32", "mkl")())


def _block(width: int, precision: str, engine: str) -> Callable[[], Tensor]:
    """Makes the dot products of a block of users and items."""
    from ncf_dist.scoring import blocks

    users, items = numbers(blocks.USERS, width), numbers(width, blocks.ITEMS)
    out = users.new_empty(blocks.USERS, blocks.ITEMS)

    return lambda: blocks.multiply(users, items, out, precision, engine)


def _seconds(make: Callable[[], Tensor], rounds: int = 5, products: int = 10) -> float:
    """Processor seconds of some products, the least of several rounds: other work on the machine touches it less. As in
    the scorer one product is still held while the next is made: two buffers do not fit a small cache."""
    best = float("inf")
    held = make()
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(products):
            held = make()
            held.amax()
        best = min(best, time.process_time() - start)
    return best


def must_round(width: int) -> None:
    """Raise ConfigError on an executor that has no bf16 products although the one that was asked has."""
    if not rounds(width):
        raise ConfigError(
            "this executor has no bf16 products of this model's factors, the one that the job asked first has: their "
            "scores would differ. Needed executors of one kind of processor, or score.precision=fp32"
        )
