"""How a training went: its loss and its validation metrics by epoch, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ncf_dist.charts.svg import Series, plot, ticks
from ncf_dist.charts.text import called, compact, metric_text


def training_figures(
    epochs: Sequence[Mapping[str, float]], curve: Sequence[Sequence[Any]], kept: int, metrics: Sequence[str]
) -> list[tuple[str, Markup]]:
    """(title, figure) of the loss and of each metric. epochs, curve: as in history.json; kept: index of an epoch."""
    across = [at for at in (0.0, *ticks(1, len(epochs))) if at == round(at)]
    steps: dict[int, int] = {}
    for epoch, step, *_ in curve:
        steps[epoch] = max(steps.get(epoch, 0), step + 1)
    points = [(epoch + step / steps[epoch], loss) for epoch, step, loss, *_ in curve]
    single_steps = [Series("", points, "faint")] if points else []

    def drawn(name: str, axis: str, below: Sequence[Series] = ()) -> Markup:
        line = Series("", [(e["epoch"] + 1, e[name]) for e in epochs if name in e])
        text = f"epoch {kept + 1}, kept: {metric_text(epochs[kept][name])}"
        return plot(f"{axis} by epoch; {text}", [*below, line], ("epoch", axis), compact, across,
                    mark=(kept + 1, text), scale_by=[len(below)])  # fmt: skip

    found = [("Training loss", drawn("loss", "loss", single_steps))]
    return found + [(f"Validation {called(name)}", drawn(name, called(name))) for name in metrics]
