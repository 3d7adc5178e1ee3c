"""How names and figures are written on the page and in its drawings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

NAMES = {
    "popularity": "Popular",
    "recent_popularity": "Recent",
    "item_to_item": "Item to item",
    "ease": "EASE",
    "item_knn": "Item kNN",
    "als": "ALS",
    "mean": "Mean",
    "biases": "Biases",
    "model": "Model",
}
"""At the head of a column."""
PROSE = {
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "item_to_item": "item to item",
    "item_knn": "item kNN",
    "mean": "the mean",
    "biases": "biases",
}
"""In a sentence, where it differs."""
FAMILIES = {
    "ndcg": "NDCG",
    "hr": "HR",
    "mrr": "MRR",
    "auc": "AUC",
    "map": "MAP",
    "recall": "Recall",
    "precision": "Precision",
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "coverage": "Coverage",
    "novelty": "Novelty",
    "gini": "Gini",
    "popularity_bias": "Popularity bias",
}
NONE = "–"
HARMLESS = "\n\xa0\u200c\u200d"
"""Line ends, fixed spaces, and what joins or parts letters in Persian, Indic scripts and emoji."""


def visible(text: str) -> str:
    """Characters that do not print, or that turn the direction of text, as escapes: a page shows what a log holds, and
    no log changes the page."""
    return "".join(c if c.isprintable() or c in HARMLESS else repr(c)[1:-1] for c in text)


def compact(value: float) -> str:
    """1234567 → 1.23M; for axes and labels."""
    if abs(value) < 1e-12:
        return "0"
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, unit = next((found for found in units if abs(value) >= found[0]), (1.0, ""))
    return f"{value / size:.3g}{unit}".replace("-", "−")


def called(name: str) -> str:
    """hr@10 → HR@10; names nobody has told us stay as they are."""
    family, at, k = name.partition("@")
    return FAMILIES.get(family, NAMES.get(family, family)) + at + k


def in_prose(name: str) -> str:
    """popularity stays so, ease → EASE; a model's version stays as it is."""
    return PROSE.get(name, NAMES.get(name, name))


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def metric_text(value: float | None) -> str:
    """Four decimals, a true minus sign."""
    return NONE if _missing(value) else f"{value:.4f}".replace("-", "−")


def signed_text(value: float | None) -> str:
    return NONE if _missing(value) else f"{value:+.4f}".replace("-", "−")


def interval_text(interval: Sequence[float] | None) -> str:
    """A dash between, but not beside a minus sign."""
    if not interval:
        return ""
    return (" to " if min(interval) < 0 else "–").join(metric_text(end) for end in interval)


def p_text(value: float | None, floor: float | None = None) -> str:
    """0.042; `< 0.002` for the floor, the smallest p that so many replicates can give (2 of 1,001: 0.001998)."""
    if value is None or not math.isfinite(value):
        return NONE
    if floor is not None and value <= floor:
        digits = max(3, -math.floor(math.log10(floor)))
        above = math.ceil(round(floor * 10**digits, 6)) / 10**digits
        return f"{'<' if floor < above else '≤'}\xa0{above:.{digits}f}"
    return "<\xa00.001" if value < 0.001 else f"{value:.3f}"


def count_text(value: float | None) -> str:
    return NONE if _missing(value) else f"{value:,.0f}"


def percent_text(share: float | None) -> str:
    """0.0527 → 5.3 %"""
    if _missing(share):
        return NONE
    percent = share * 100  # type: ignore[operator]
    return f"{percent:.0f} %" if abs(percent) >= 10 or percent == round(percent) else f"{percent:.2g} %"


def seconds_text(seconds: float) -> str:
    """75.2 → 1 min 15 s"""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def bytes_text(count: float) -> str:
    """Three figures: 5.25 MiB, 75.2 MiB, 1,011 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"


def aligned(head: Iterable[str], rows: Sequence[Sequence[str]], to_the_left: Collection[str]) -> str:
    """A table for a terminal: a line a row, columns as wide as their widest cell; `to_the_left`: names of columns of
    words, the others being figures."""
    names = list(head)
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = zip(names, cells, widths, strict=True)
        padded = (cell.ljust(width) if name in to_the_left else cell.rjust(width) for name, cell, width in parts)
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, (names, *rows)))
