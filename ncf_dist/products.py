"""How float32 matrices are multiplied on a CPU, and the check that it is lawful.

The law: a row of a product has the same bits wherever it stands and whatever else is in the matrix. Else a user's
scores would depend on the block, the task and the cluster. MKL keeps it in the modes of conditional reproducibility
that `MKL_CBWR` names, of which `ncf_dist/__init__.py` sets one. Without, it breaks it on AMD processors, in layers of 4
to 10 outputs whose inputs are no multiple of 4.

A mode names a branch of MKL's code on Intel processors. Others have `COMPATIBLE`, and for every other name one branch
of MKL's choice. So the same bits are promised on one kind of processor. `check` gives a digest of some products:
processors with the same digest round these alike.

Importing this needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ncf_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MODE = "MKL_CBWR"
LAYERS = ((256, 10, 10), (1024, 13, 6), (256, 64, 4))
"""Rows, inputs and outputs of linear layers, as sides of a model have them: these are the ones that break the law."""
BLOCKS = ((256, 64, 1024), (256, 9, 1024), (16, 32, 4096), (1, 8, 4096))
"""(R, K, C): products (R, K) × (K, C), as blocks of scores have them: dot products and hidden layers."""
ROWS, COLUMNS = 7, 11
"""Distinct rows and columns of a check, repeated: no vector length is a multiple of these."""


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
    return {MODE: os.environ.get(MODE, ""), "bits": check()}


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
