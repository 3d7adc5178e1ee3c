"""The curve of a learning-rate range test, loss over rate: smoothed, and the rate that it suggests. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from ncf_dist.errors import TrainingFailed

LOW, HIGH = 1e-7, 10.0
SMOOTHING = 0.9


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start at 0."""
    values, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        values.append(mean / (1 - SMOOTHING**count))
    return values


def suggest(curve: Sequence[tuple[float, float]]) -> float:
    """The rate at which the smoothed loss falls steepest over log(rate), before its lowest point.
    Raises TrainingFailed where it never falls."""
    losses = smoothed([loss for _, loss in curve])
    end = losses.index(min(losses)) if losses else 0
    falls = [losses[i + 1] - losses[i - 1] for i in range(1, end)]
    if not falls or min(falls) >= 0:
        raise TrainingFailed(
            f"the loss never falls over {len(curve)} learning rates from {LOW} up; needed a rate that lowers it: "
            "raise train.batch_size, or look at the input"
        )
    return curve[1 + falls.index(min(falls))][0]
