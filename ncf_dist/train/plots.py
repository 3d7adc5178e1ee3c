"""Two figures for people: how a training went, and the learning-rate curve. SVG, equal bytes for equal numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

STEADY: dict[Any, Any] = {"svg.hashsalt": "ncf-dist", "svg.fonttype": "none", "font.size": 9}


def history_figure(history: dict[str, Any]) -> bytes:
    """Loss over updates, and the validation metrics of each epoch with the one that was kept."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    epochs = history["epochs"]
    names = [name for name in epochs[-1] if "@" in name or name in ("mrr", "mse", "mae")]
    with rc_context(STEADY):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps: dict[int, int] = {}
        for epoch, step, *_ in history["curve"]:
            steps[epoch] = max(steps.get(epoch, 0), step + 1)
        points = [(epoch + step / steps[epoch], loss) for epoch, step, loss, _ in history["curve"]]
        left.plot(*zip(*points, strict=True), color="#9bbcd6", linewidth=0.8, label="a step of rank 0")
        left.plot(
            [e["epoch"] + 1 for e in epochs],
            [e["loss"] for e in epochs],
            "o-",
            color="#1f4e79",
            label="mean of the epoch",
        )
        left.set(xlabel="epochs", ylabel="loss")
        left.legend(frameon=False)
        for name in names:
            right.plot([e["epoch"] + 1 for e in epochs], [e[name] for e in epochs], "o-", label=name)
        right.axvline(history["epoch"] + 1, color="#888888", linestyle=":", label="kept")
        right.set(xlabel="epochs", ylabel="validation")
        right.legend(frameon=False)
        return _svg(figure)


def rate_figure(curve: Sequence[Sequence[float]], smooth: Sequence[float], suggestion: float) -> bytes:
    """Loss over learning rate, and the rate that is suggested."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STEADY):
        figure = Figure(figsize=(5.5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*curve, strict=True), color="#9bbcd6", linewidth=0.8, label="a step")
        axes.plot([rate for rate, _ in curve], smooth, color="#1f4e79", label="smoothed")
        axes.axvline(suggestion, color="#c0504d", linestyle=":", label=f"suggested: {suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(min(smooth) * 0.9, smooth[0] * 1.5))
        axes.legend(frameon=False)
        return _svg(figure)


def _svg(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
