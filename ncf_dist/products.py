"""How float32 matrices are multiplied on a CPU, and the check that it is lawful.

The law: a row of a product has the same bits wherever it stands and whatever else is in the matrix. Else a user's
scores would depend on the block, the task and the cluster. MKL keeps it in the modes of conditional reproducibility
that `MKL_CBWR` names, of which `ncf_dist/__init__.py` sets one. Without, it breaks it on AMD processors, in layers of 4
to 10 outputs whose inputs are no multiple of 4.

A mode names a branch of MKL's code on Intel processors. Others have `COMPATIBLE`, and for every other name one branch
of MKL's choice. So the same bits are promised on one kind of processor. `check` gives a digest of some products:
processors with the same digest round these alike.

`choose` finds the quicker library for a model's float32 dot products, oneDNN or MKL, on the executor that it runs on. A
library is used only where its bits are MKL's, so the choice decides no byte of a table, whatever the timing says.

Importing this needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ncf_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ncf_dist.bundle import Bundle

log = logging.getLogger(__name__)

MODE = "MKL_CBWR"
ROUNDED = 2**-15
"""Of the largest: bf16's products are some 2^-10 off, float32's 2^-22."""
FASTER = 1.15
"""How much quicker than MKL another library must be: on a Zen 4 a lead of .05 was none in the scorer; Zen 5 has .5."""
LAYERS = ((256, 10, 10), (1024, 13, 6), (256, 64, 4))
"""Rows, inputs and outputs of linear layers, as sides of a model have them: these are the ones that break the law."""
BLOCKS = ((256, 64, 1024), (256, 9, 1024), (16, 32, 4096), (1, 8, 4096))
"""(R, K, C): products (R, K) × (K, C), as blocks of scores have them: dot products and hidden layers."""
ROWS, COLUMNS = 7, 11
"""Distinct rows and columns of a check, repeated: no vector length is a multiple of these."""


@dataclass(frozen=True)
class Products:
    """How a pass multiplies, the same on all executors. mode: of MKL. bits: the digest of `check`. engine: what makes
    float32 dot products. precision: bf16 where it was asked for and is to be had."""

    mode: str = ""
    bits: str = ""
    engine: Literal["mkl", "onednn"] = "mkl"
    precision: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def agreed(cls, found: Mapping[str, Any], asked: str = "fp32") -> Products:
        """What `choose` found on an executor; warns where the precision that was asked for is not to be had."""
        ours = cls(**found)
        if ours.precision != asked:
            log.warning(
                "score.precision is %s, and the executors have no such products of this model's factors (the processor "
                "has none, or the factors are too few): scores are %s; set score.precision=fp32",
                asked, ours.precision,
            )  # fmt: skip
        return ours

    def facts(self, tasks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """For the manifest: this, and the digests that the tasks report; warns where there are several."""
        found = sorted({task["bits"] for task in tasks if task.get("bits")})
        if len(found) > 1:
            log.warning(
                "the executors have %d kinds of processor, which round products differently: which of them does a task "
                "decides the last bits of its scores; run on one kind where the same bytes are wanted", len(found)
            )  # fmt: skip
        return {**asdict(self), "executors": found}


PLAIN = Products()
"""What holds on every processor."""


@functools.cache
def check() -> str:
    """The position canary, a few milliseconds, once a process: products of repeated rows and columns must repeat to the
    bit. Returns a digest of their bits. Raises ConfigError where they depend on the position. One thread, as in a Spark
    worker: with more, MKL cuts a matrix by their number."""
    import torch
    from torch.nn import functional

    digest = hashlib.sha256()
    with one_thread(), torch.no_grad():
        for rows, inputs, outputs in LAYERS:
            x = numbers(ROWS, inputs)[torch.arange(rows) % ROWS]
            found = functional.linear(x, numbers(outputs, inputs), numbers(1, outputs)[0])
            _must_repeat(found, found.shape[1], f"({rows}, {inputs}) x ({inputs}, {outputs})")
            digest.update(found[:ROWS].numpy().tobytes())
        for rows, inner, columns in BLOCKS:
            a, b = numbers(ROWS, inner), numbers(inner, COLUMNS)
            found = torch.mm(a[torch.arange(rows) % ROWS], b[:, torch.arange(columns) % COLUMNS])
            _must_repeat(found, COLUMNS, f"({rows}, {inner}) x ({inner}, {columns})")
            digest.update(found[:ROWS, :COLUMNS].contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def facts() -> dict[str, str]:
    """What a manifest says of this process's products: the mode and the digest. Raises what `check` raises."""
    return {"mode": os.environ.get(MODE, ""), "bits": check()}


def choose(bundle: Bundle, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """The fields of `Products` for this model on this processor, from a probe of some 50 ms.
    Raises what `check` raises."""
    found: dict[str, Any] = facts()
    width = dot_width(bundle)
    with one_thread():
        if not width:
            return found
        if precision == "bf16" and rounds(width):
            return found | {"precision": "bf16"}
        return found | {"engine": engine_for(width)}


def dot_width(bundle: Bundle) -> int:
    """F: how many numbers a user's and an item's side of the model's dot product have; 0 for a model without."""
    import torch

    from ncf_dist.models import build_model

    with torch.device("meta"):
        model = build_model(bundle.model, bundle.n_users, bundle.n_items)
        parts = model.item_parts(torch.zeros(1, dtype=torch.int64))
    return 0 if parts is None else parts.dot.shape[1] + bool(model.joining_layers())


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


def repeats(found: Tensor, columns: int) -> bool:
    """Whether (R, C) is its first `ROWS` rows and `columns` columns, repeated, to the bit."""
    import torch

    one = found[:ROWS, :columns]
    row, column = torch.arange(found.shape[0]) % ROWS, torch.arange(found.shape[1]) % columns
    # As integers: a score that is not a number is not equal to itself.
    return torch.equal(found.contiguous().view(torch.int32), one[row][:, column].view(torch.int32))


def _must_repeat(found: Tensor, columns: int, shape: str) -> None:
    if not repeats(found, columns):
        raise ConfigError(refusal(f"a float32 product {shape}"))


def refusal(what: str) -> str:
    """The message where `what` depends on the position."""
    return (
        f"{what} has other bits in another row or column on this processor, with {MODE}={os.environ.get(MODE)}; scores "
        f"must not depend on their place in a block. Needed a mode that MKL read before this process's first product: "
        f"import ncf_dist before torch is used, or start the process with {MODE}=AVX2"
    )


def other_engine() -> str:
    """The message where oneDNN's products have other bits than MKL's."""
    return (
        f"oneDNN and MKL round this model's products differently here ({MODE}={os.environ.get(MODE)}), and did not on "
        "the executor that the job probed: scores would depend on the executor. Needed executors of one kind of "
        "processor, with one version of torch"
    )


def numbers(rows: int, columns: int) -> Tensor:
    """(rows, columns) of [-0.5, 0.5), the same bits on every processor; torch's generator stays as it is."""
    import torch

    return ((torch.arange(rows * columns) * 40_503 + 12_345) % 65_521 / 65_536 - 0.5).view(rows, columns)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations inside run on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
