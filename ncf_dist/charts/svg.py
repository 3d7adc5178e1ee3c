"""Inline SVG. Every figure is drawn for a phone, 360 units wide with text of 12, so that it is legible on the narrowest
screen and three stand abreast on a wide one. Colours are classes of STYLE: the model is the one that is filled in and
coloured, what it is compared with is hollow and grey, so a figure reads without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from ncf_dist.charts.text import compact, visible

WIDTH = 360
TOP, BOTTOM = 42, 190
HEIGHT = BOTTOM + 42
"""Of `plot` and `bars`, and of the area they draw in; the name of the upright axis stands above it."""
GAP = 24
CHARACTER, BOLD = 6.4, 7.2
"""Mean width of a character of the text, for margins."""
NEAR, LINE = 60, 15
"""Labels nearer than this, across and down, are pushed apart."""

Interval = tuple[float, float]


class Dot(NamedTuple):
    """One row of `dots`: a value with its interval, and what it is compared with, if anything."""

    name: str
    value: float
    interval: Interval | None = None
    model: bool = True
    other: float | None = None
    text: str = ""
    below: str = ""
    """What stands at the right end, and below that."""


class Series(NamedTuple):
    """One line of `plot`. style: a class, `model`, `other`, `first`, `data` or `faint`. label_at: index of the labelled
    point; the last one stands beside the figure, any other above the line."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "model"
    band: Sequence[Interval] | None = None
    label_at: int = -1


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    fits = [m for m in (1, 2, 5, 10) if rough * 0.999 <= m * power <= high - low]
    step = (fits[0] if fits else 2) * power  # Only 5 can be wider than what is shown, which then has no round number.
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def dots(label: str, rows: Sequence[Dot], axis: str, from_zero: bool = True) -> Markup:
    """Values with intervals, one row each, over an axis of this name; the first row names the marks where there are
    pairs. What follows the first comma of a name stands below it."""
    paired = any(row.other is not None for row in rows)
    names = [row.name.partition(", ")[::2] for row in rows]
    left = min(170.0, max(len(part) for name in names for part in name) * CHARACTER + 14)
    right = WIDTH - max(max(len(row.text), len(row.below)) for row in rows) * BOLD - 18
    ends = [
        v for row in rows for v in (row.value, *(row.interval or ()), *([row.other] if row.other is not None else []))
    ]
    low, high = min(ends), max(ends)
    low, high = (min(0.0, low), max(0.0, high)) if from_zero else (low, high)
    x = _scale(low, high, left, right)
    top, step = 24 if paired else 6, 38 if any(below for _, below in names) or any(row.below for row in rows) else 28
    bottom = top + step * len(rows)
    grid = ticks(low, high, 3)
    parts = [_text(x(v), bottom + 15, compact(v)) for v in grid]
    parts += [_line(x(v), top, x(v), bottom, "zero" if v == 0 else "grid") for v in grid]
    for number, (row, (name, below)) in enumerate(zip(rows, names, strict=True)):
        y = top + step * (number + 0.5)
        style = "model" if row.model else "other"
        parts.append(_text(0, y - 3 if below else y + 4, _short(name, left), "start", "name"))
        parts.append(_text(0, y + 11, _short(below, left), "start"))
        if row.interval:
            parts.append(_line(x(row.interval[0]), y, x(row.interval[1]), y, f"whisker {style}"))
        if row.other is not None:
            parts.append(_diamond(x(row.other), y, "other"))
        parts.append(_circle(x(row.value), y, "model") if row.model else _diamond(x(row.value), y, "other"))
        parts.append(_text(WIDTH, y - 3 if row.below else y + 4, row.text, "end", "value"))
        parts.append(_text(WIDTH, y + 11, row.below, "end"))
    if rows[0].other is not None:
        parts += _pair_names(x(rows[0].value), x(rows[0].other), top - 8)
    parts.append(_text((left + right) / 2, bottom + 33, axis, style="axis"))
    return _svg(label, bottom + 38, parts)


def plot(
    label: str,
    series: Sequence[Series],
    axes: tuple[str, str],
    x_text: Callable[[float], str] = compact,
    x_ticks: Sequence[float] | None = None,
    y_text: Callable[[float], str] | None = None,
    from_zero: bool = False,
    mark: tuple[float, str] | None = None,
    scale_by: Sequence[int] | None = None,
    highest: float = math.inf,
) -> Markup:
    """Lines over one another. axes: names of the level and of the upright one. x_ticks widen the figure to hold them.
    mark: (x, text) of a vertical line. scale_by: the series that decide the height (all), up to `highest`; points that
    are out of it are left out."""
    beside = [s.name for s in series if s.label_at == -1 and s.name]
    across = [x for s in series for x, _ in s.points] + list(x_ticks or ())
    deciding = [series[i] for i in scale_by] if scale_by else series
    down = [v for s in deciding for i, (_, y) in enumerate(s.points) for v in (y, *(s.band[i] if s.band else ()))]
    low, high = min(down), min(max(down), highest)
    air = (high - low) * 0.06
    low, high = (min(0.0, low), high) if from_zero else (low - air, high + air)
    high = high if high > low else low + 1
    grid, y_text = ticks(low, high), y_text or compact
    left = max(len(y_text(v)) for v in grid) * CHARACTER + 10
    right = WIDTH - (max((len(name) for name in beside), default=0) * BOLD + 10 if beside else 8)
    top, bottom = TOP, BOTTOM
    x, y = _scale(min(across), max(across), left, right), _scale(low, high, bottom, top)
    parts = [_line(left, y(v), right, y(v), "zero" if v == low else "grid") for v in grid]
    parts += [_text(left - 8, y(v) + 4, y_text(v), "end") for v in grid]
    for value in x_ticks if x_ticks is not None else ticks(min(across), max(across)):
        parts.append(_text(x(value), bottom + 18, x_text(value)))
    if mark:
        parts.append(_line(x(mark[0]), top - 4, x(mark[0]), bottom, "mark"))
        room = len(mark[1]) * CHARACTER / 2 < x(mark[0]) - left
        parts.append(_text(x(mark[0]), top - 10, mark[1], "middle" if room else "start"))
    labels: list[tuple[float, float, str, str, str]] = []
    for one in series:
        points = [(x(a), y(b)) for a, b in one.points if low <= b <= high]
        if one.band:
            sides = list(zip(one.points, one.band, strict=True))
            edge = [(x(a), y(hi)) for (a, _), (_, hi) in sides] + [(x(a), y(lo)) for (a, _), (lo, _) in reversed(sides)]
            parts.append(_path(edge, "band", closed=True))
        parts.append(_path(points, f"line {one.style}"))
        if one.name and one.label_at == -1:
            labels.append((points[-1][0] + 7, points[-1][1] + 4, one.name, "start", one.style))
        elif one.name:
            labels.append((points[one.label_at][0], points[one.label_at][1] - 7, one.name, "middle", one.style))
    return _svg(label, HEIGHT, [*parts, *_named(axes, left, right), *_apart(labels, top)])


def bars(label: str, names: Sequence[str], values: Sequence[float], axes: tuple[str, str], every: int = 1) -> Markup:
    """Columns from zero; every n-th is named. The highest carries its value. One name more than values: names of the
    edges between columns. axes: names of the level and of the upright one."""
    top, bottom, left, right = TOP, BOTTOM, 44, WIDTH - 4
    high = max(values) or 1
    y, width = _scale(0, high, bottom, top), (right - left) / len(values)
    gap = min(3.0, width * 0.15)
    grid = ticks(0, high)
    parts = [_line(left, y(v), right, y(v), "zero" if v == 0 else "grid") for v in grid]
    parts += [_text(left - 8, y(v) + 4, compact(v), "end") for v in grid]
    for i, value in enumerate(values):
        at = left + i * width + gap / 2
        parts.append(_tag("rect", x=at, y=y(value), width=width - gap, height=bottom - y(value), class_="bar"))
    at = left if len(names) > len(values) else left + width / 2
    parts += [_text(at + i * width, bottom + 18, name) for i, name in enumerate(names) if i % every == 0]
    peak = max(range(len(values)), key=values.__getitem__)
    at = left + (peak + 0.5) * width
    parts.append(_text(at, y(values[peak]) - 6, compact(values[peak]), style="value"))
    return _svg(label, HEIGHT, [*parts, *_named(axes, left, right)])


def _named(axes: tuple[str, str], left: float, right: float) -> list[Markup]:
    across, up = axes
    return [_text((left + right) / 2, BOTTOM + 36, across, style="axis"), _text(0, 14, up, "start", "axis")]


def _apart(labels: list[tuple[float, float, str, str, str]], top: float) -> list[Markup]:
    """Labels, the ones that would overlap moved up."""
    placed: list[tuple[float, float]] = []
    parts = []
    for x, y, name, anchor, style in sorted(labels, key=lambda found: -found[1]):
        while any(abs(x - a) < NEAR and abs(y - b) < LINE for a, b in placed):
            y -= 1
        placed.append((x, y))
        parts.append(_text(x, max(y, top - 14), name, anchor, f"label {style}"))
    return parts


def _pair_names(model: float, other: float, y: float) -> list[Markup]:
    """Whose marks these are, above the first row: one name to the left, one to the right, never over one another."""
    names = sorted([(model, "model", "model"), (other, "popularity", "other")])
    (first, *before), (second, *after) = names
    middle = (first + second) / 2
    if middle - len(before[0]) * BOLD < 0:  # No room on the left: the second name goes far enough to the right.
        middle = max(middle, first + len(before[0]) * BOLD)
        return [_text(first, y, before[0], "start", f"label {before[1]}"),
                _text(max(second, middle + 8), y, after[0], "start", f"label {after[1]}")]  # fmt: skip
    return [_text(min(first + 6, middle - 4), y, before[0], "end", f"label {before[1]}"),
            _text(max(second - 6, middle + 4), y, after[0], "start", f"label {after[1]}")]  # fmt: skip


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _short(name: str, room: float) -> str:
    most = int((room - 8) / CHARACTER)
    return name if len(name) <= most else name[: most - 1] + "…"


# ---- files --------------------------------------------------------------------------------------------------------

STYLE = """:root {
  --paper: #ffffff; --ink: #16191d; --muted: #565f6b; --line: #d9dee5;
  --model: #0b5fa8; --band: #0b5fa822; --other: #6a7280; --data: #7a8593; --first: #a8480a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e8eaed; --muted: #a3acb8; --line: #343b45;
    --model: #6cb4f5; --band: #6cb4f52e; --other: #98a1ae; --data: #8893a1; --first: #f2a65a;
  }
}
svg text { font-size: 12px; fill: var(--muted); }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg .name, svg .value { fill: var(--ink); }
svg .value, svg .label { font-weight: 600; }
svg .axis { font-style: italic; }
svg .label.model { fill: var(--model); } svg .label.other { fill: var(--other); }
svg .label.first { fill: var(--first); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--muted); stroke-width: 1; }
svg .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 3; }
svg .whisker { stroke-width: 2.5; stroke-linecap: round; } svg .whisker.model { stroke: var(--model); opacity: .55; }
svg .whisker.other { stroke: var(--other); opacity: .7; }
svg circle.model { fill: var(--model); } svg .bar { fill: var(--data); }
svg .diamond { fill: var(--paper); stroke: var(--other); stroke-width: 1.8; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; stroke: var(--model); }
svg .line.other { stroke: var(--other); stroke-width: 1.7; stroke-dasharray: 6 3; }
svg .line.first { stroke: var(--first); stroke-width: 1.7; }
svg .line.data { stroke: var(--data); }
svg .line.faint { stroke: var(--other); stroke-width: 1; opacity: .55; }
svg .band { fill: var(--band); }
"""
"""Colours and strokes, for light and for dark, of a page that holds figures or of a file of them."""


def document(figures: Sequence[Markup]) -> bytes:
    """A file of its own: figures of `plot` or `bars` side by side."""
    step = WIDTH + GAP
    placed = [Markup('<g transform="translate({} {})">{}</g>').format(GAP + n * step, GAP, figure)
              for n, figure in enumerate(figures)]  # fmt: skip
    found = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" '
        'font-family="system-ui, sans-serif"><style>{2}</style>'
        '<rect width="100%" height="100%" fill="var(--paper)"/>{3}</svg>\n'
    ).format(GAP + len(figures) * step, HEIGHT + 2 * GAP, Markup(STYLE), Markup("").join(placed))
    return found.encode()


# ---- elements ------------------------------------------------------------------------------------------------------


def _svg(label: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>').format(
        WIDTH, round(height), visible(label), Markup("").join(parts)
    )


def _tag(name: str, body: str = "", **attributes: object) -> Markup:
    """An element; `class_` is class, numbers have one decimal."""
    text = Markup(" ").join(
        Markup('{}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    )
    return Markup("<{0} {1}>{2}</{0}>").format(name, text, escape(visible(body)))


def _text(x: float, y: float, body: str, anchor: str = "middle", style: str = "tick") -> Markup:
    if anchor == "middle":  # Kept within the figure.
        half = len(body) * CHARACTER / 2
        x = min(max(x, half), WIDTH - half)
    return _tag("text", body, x=float(x), y=float(y), text_anchor=anchor, class_=style)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return _tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=style)


def _circle(x: float, y: float, style: str) -> Markup:
    return _tag("circle", cx=float(x), cy=float(y), r=4.5, class_=style)


def _diamond(x: float, y: float, style: str) -> Markup:
    return _path([(x - 5, y), (x, y - 5), (x + 5, y), (x, y + 5)], f"diamond {style}", closed=True)


def _path(points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> Markup:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
    return _tag("path", d=d, class_=style)
