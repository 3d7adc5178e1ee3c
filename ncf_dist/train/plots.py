"""Two figures for people: how a training went, and the learning-rate curve. SVG, equal bytes for equal numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ncf_dist.charts.svg import Series, document, plot
from ncf_dist.charts.training import training_figures


def history_figure(history: Mapping[str, Any]) -> bytes:
    """Loss over updates, and the validation metrics of each epoch with the one that was kept."""
    epochs = history["epochs"]
    names = [name for name in epochs[-1] if "@" in name or name in ("mrr", "mse", "mae")]
    return document([figure for _, figure in training_figures(epochs, history["curve"], history["epoch"], names)])


def rate_figure(curve: Sequence[Sequence[float]], smooth: Sequence[float], suggestion: float) -> bytes:
    """Loss over learning rate, and the rate that is suggested."""
    powers = [math.log10(rate) for rate, _ in curve]
    steps = Series("", [(power, loss) for power, (_, loss) in zip(powers, curve, strict=True)], "faint")
    line = Series("", list(zip(powers, smooth, strict=True)))
    figure = plot(
        f"Loss by learning rate; suggested: {suggestion:.2g}", [steps, line], ("learning rate (log scale)", "loss"),
        lambda power: f"{10**power:.0e}", range(math.ceil(powers[0]), math.floor(powers[-1]) + 1),
        mark=(math.log10(suggestion), f"suggested: {suggestion:.2g}"), scale_by=[1], highest=smooth[0] * 1.5,
    )  # fmt: skip
    return document([figure])
