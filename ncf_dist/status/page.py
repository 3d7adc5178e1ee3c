"""status.html: the last nights on one page that needs nothing beside it: what became of each, and trends over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from ncf_dist.charts.svg import STYLE, Series, plot
from ncf_dist.charts.text import compact, metric_text, percent_text, visible
from ncf_dist.status.nights import Night
from ncf_dist.status.table import TO_THE_LEFT, columns, metric_name, outcome_text

MOST_TICKS = 4
LAYOUT = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0 .3rem; } h2 { font-size: 1rem; margin: 0 0 .3rem; }
p { color: var(--muted); margin: 0 0 1rem; }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--model); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.35; }
th, td { padding: .35rem 0 .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; } th:first-child, td:first-child { padding-left: 0; }
td:last-child { white-space: normal; min-width: 12rem; }
thead th { color: var(--muted); font-weight: 600; font-size: .8125rem; } tbody th { font-weight: 400; }
tr.bad td.outcome { color: var(--first); font-weight: 600; }
.grid { display: grid; gap: 1.8rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); margin-top: 1.8rem; }
figure { margin: 0; max-width: 27rem; } svg { display: block; width: 100%; height: auto; overflow: visible; }
@media print { .wide { overflow: visible; } figure, tr { break-inside: avoid; } }
"""
_PAGE = Markup("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><p>{about}</p>
<div class="wide" tabindex="0" role="region" aria-label="The last nights">{table}</div>
<div class="grid">{figures}</div></body></html>
""")


def page(nights: Sequence[Night], name: str, made: str) -> str:
    """name: of the published table; made: when, for the reader."""
    seen = [night for night in nights if night.published is not None]
    about = f"{len(nights)} nights, the latest first, as of {made}. "
    about += f"Readers see {len(seen)} of them, the newest of {seen[-1].ds}." if seen else "Readers see none of them."
    about += (
        " − champion: the model minus the one that was published before it, on the same rows; ~ where each was judged "
    )
    about += "on the rows of its own night."
    found = [Markup("<figure><h2>{}</h2>{}</figure>").format(title, figure) for title, figure in _figures(nights)]
    return _PAGE.format(
        title=f"{name}: the last nights",
        style=Markup(STYLE + LAYOUT),
        about=about,
        table=_table(nights),
        figures=Markup("").join(found),
    )


def _table(nights: Sequence[Night]) -> Markup:
    written = columns(nights)
    style = {name: "text" if name in TO_THE_LEFT else "number" for name in written}
    head = [Markup('<th scope="col" class="{}">{}</th>').format(style[name], name) for name in written]
    rows = []
    for night in reversed(nights):
        cells = [
            Markup('<td class="{} {}">{}</td>').format(style[name], name.replace(" ", "-"), visible(write(night)))
            for name, write in written.items()
            if name != "ds"
        ]
        bad = "bad" if outcome_text(night) not in ("done", "published") else "good"
        first = Markup('<th scope="row" class="text">{}</th>').format(night.ds)
        rows.append(Markup('<tr class="{}">{}{}</tr>').format(bad, first, Markup("").join(cells)))
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("").join(head), Markup("\n").join(rows)
    )


Value = Callable[[Night], float | None]


def _figures(nights: Sequence[Night]) -> list[tuple[str, Markup]]:
    """(title, figure) of each trend that has two nights at least."""
    metric = metric_name(nights)
    trends: list[tuple[str, str, dict[str, tuple[Value, str]], Callable[[float], str], bool]] = [
        (f"{metric} by night", metric,
         {"model": (lambda n: n.value, "model"), "popular": (lambda n: n.popularity, "other")}, metric_text, False),
        ("Rows that are published", "rows", {"": (lambda n: n.rows, "data")}, compact, True),
        ("Interactions that were kept", "interactions", {"": (lambda n: n.interactions, "data")}, compact, True),
        ("Share in the quarantine", "share", {"": (lambda n: n.quarantined, "first")}, percent_text, True),
        ("Churn of the lists", "share", {"": (lambda n: n.churn, "model")}, percent_text, True),
        ("Time of all attempts", "minutes", {"": (lambda n: _per(n.seconds, 60), "data")}, compact, True),
        ("Tables that were made", "MiB", {"": (lambda n: _per(n.bytes, 2**20), "data")}, compact, True),
    ]  # fmt: skip
    found = []
    for title, axis, values, text, from_zero in trends:
        series = [
            Series(name, points, style)
            for name, (value, style) in values.items()
            if len(points := [(float(at), v) for at, night in enumerate(nights) if (v := value(night)) is not None]) > 1
        ]
        if series:
            found.append((title, _figure(title, series, axis, text, nights, from_zero)))
    return found


def _per(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _figure(
    title: str, series: list[Series], axis: str, text: Callable[[float], str], nights: Sequence[Night], from_zero: bool
) -> Markup:
    last, count = len(nights) - 1, min(len(nights), MOST_TICKS)
    at = sorted({round(step * last / (count - 1)) for step in range(count)}) if count > 1 else [0]

    def day(x: float) -> str:
        return nights[round(x)].ds[5:]

    return plot(title, series, ("night", axis), day, at, text, from_zero)
