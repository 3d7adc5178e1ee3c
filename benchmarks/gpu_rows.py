"""What the checks of gpu_check.py give: rows of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LOSS_BOUND, GRADIENT_BOUND, SCORE_BOUND = 1e-5, 1e-4, 1e-4
"""Largest differences, relative to the largest value: float32 sums are taken in other orders."""
ROUNDING = 20
"""Times the CPU's own rounding that a GPU may be off: some gradients are 0 but for rounding, such as that of a bias
that all scores of a softmax have."""
FALLS_TO = 0.9
"""Share of the first epoch's loss that the last epoch's may be at most."""
RESUME_BOUND = {"cpu": 0.0, "cuda": 1e-5}
"""On a CPU to the bit. On a GPU every operation of ours is deterministic too, but libraries do not promise it."""


@dataclass(frozen=True)
class Row:
    """A line of the table: it is well where `value` is at most `bound`."""

    check: str
    value: float
    bound: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and self.value <= self.bound  # NaN is not.


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    wanted = wanted.double().cpu()
    scale = max(float(wanted.abs().max()), 1e-30)
    return float((found.double().cpu() - wanted).abs().max()) / scale


def beyond_rounding(found: Sequence[Tensor], cpu: Sequence[Tensor], exact: Sequence[Tensor], bound: float) -> float:
    """How far the worst of `found` is from `exact` (float64), as a multiple of what is allowed: `bound` of its own
    largest value, and ROUNDING times what `cpu` (float32) is off by at most."""
    off = ROUNDING * max(_off(mine, wanted) for mine, wanted in zip(cpu, exact, strict=True))
    allowed = [bound * float(wanted.abs().max()) + off for wanted in exact]
    return max(_off(mine, wanted) / max(most, 1e-30) for mine, wanted, most in zip(found, exact, allowed, strict=True))


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).abs().max())
