"""How float32 matrices are multiplied on a CPU, and the check that it is lawful.

The law: a row of a product has the same bits wherever it stands and whatever else is in the matrix. Else a user's
scores would depend on the block, the task and the cluster. MKL keeps it in the modes of conditional reproducibility
that `MKL_CBWR` names, of which `ncf_dist/__init__.py` sets one. Without, it breaks it on AMD processors, in layers of 4
to 10 outputs whose inputs are no multiple of 4; and so does the branch AVX2 on Intel's with AVX-512 (Xeon, family 6,
model 207), where `AUTO`, AVX512, `AVX2,STRICT` and `COMPATIBLE` keep it.

A mode names a branch of MKL's code on Intel processors; `AUTO` is the one of the processor's instructions. Others have
`COMPATIBLE`, and for every other name the branch that `AUTO` is. So the same bits are promised on one kind of
processor. `check` gives a digest of some products: processors with the same digest round these alike.

Importing this needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ncf_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MODE = "MKL_CBWR"
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
        """What `engines.choose` found on an executor; warns where the precision that was asked for is not to be had."""
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


def facts(device: str = "cpu") -> dict[str, str]:
    """What a manifest says of this process's products: the mode and the digest. Raises what `check` raises. Where a GPU
    makes them the CPU's are not asked for: no digest."""
    return {"mode": os.environ.get(MODE, ""), "bits": check() if device == "cpu" else ""}


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
        f"import ncf_dist before torch is used; or start the process with {MODE}=COMPATIBLE, which is slower"
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
