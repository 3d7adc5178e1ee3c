"""What the checks of gpu_check.py give: rows of its table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOSS_BOUND, GRADIENT_BOUND, SCORE_BOUND = 1e-5, 1e-4, 1e-4
"""Largest differences, relative to the largest value: float32 sums are taken in other orders."""
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
