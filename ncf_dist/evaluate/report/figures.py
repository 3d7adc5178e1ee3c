"""From the data of a report to its drawings: which numbers, on which scale, with which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ncf_dist.evaluate.report import charts
from ncf_dist.evaluate.report.charts import Dot, Series
from ncf_dist.evaluate.report.text import called, compact, metric_text, percent_text

SEGMENTS = {
    "activity": ("By activity of the user", "Items in train and validation."),
    "item_popularity": (
        "By popularity of the held-out item",
        "Each decile holds a tenth of the interactions, the first by the most popular items.",
    ),
    "month": ("By month of the held-out item", ""),
}
"""Kind of segment: title, note."""
MOST_MONTHS = 120


def figures(data: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Every drawing by name; those without data are None or empty."""
    return {
        "systems": _systems(data, k),
        "segments": _segments(data, k),
        "months": _held_out_months(data, k),
        "scores": _scores(data),
        "training": _training(data["training"] or {}, k),
        **_profile(data["profile"] or {}),
    }


def _systems(data: Mapping[str, Any], k: int) -> Markup | None:
    name, baselines = f"ndcg@{k}", data["baselines"]
    rows = [Dot("Model", data["full"][name], _pair(data["intervals"].get("full", {}).get(name)))]
    for system, found in baselines.items():
        if name in found.get("full", {}):
            interval = _pair(found.get("intervals", {}).get("full", {}).get(name))
            rows.append(Dot(called(system), found["full"][name], interval, model=False))
    rows = [row._replace(text=metric_text(row.value)) for row in rows]
    label = f"{called(name)} over the full catalogue: " + ", ".join(f"{r.name} {r.text}" for r in rows)
    return charts.dots(label, rows) if len(rows) > 1 else None


def _segments(data: Mapping[str, Any], k: int) -> list[tuple[str, str, Markup]]:
    name, drawn = f"ndcg@{k}", []
    for kind, segments in data["segments"].items():
        if not segments or (kind == "month" and len(segments) > 2):
            continue
        rows = [
            Dot(s["name"], s["full"][name], _pair(s.get("intervals", {}).get(name)), True,
                s.get("popularity", {}).get(name), metric_text(s["full"][name]))
            for s in segments
        ]  # fmt: skip
        title, note = SEGMENTS.get(kind, (f"By {kind}", ""))
        drawn.append((title, note, charts.dots(f"{title}: {called(name)} of the model and of popularity", rows)))
    return drawn


def _held_out_months(data: Mapping[str, Any], k: int) -> Markup | None:
    name, months = f"ndcg@{k}", data["segments"].get("month", [])[-MOST_MONTHS:]
    if len(months) < 3:
        return None
    bands = [_pair(m.get("intervals", {}).get(name)) or (m["full"][name],) * 2 for m in months]
    series = [Series("model", [(i, m["full"][name]) for i, m in enumerate(months)], "model", bands)]
    if all(name in m.get("popularity", {}) for m in months):
        series.insert(0, Series("popularity", [(i, m["popularity"][name]) for i, m in enumerate(months)], "other"))
    ends = [0, len(months) - 1]
    label = f"{called(name)} by month of the held-out item, {months[0]['name']} to {months[-1]['name']}"
    return charts.plot(label, series, lambda i: months[int(i)]["name"], ends, from_zero=True)


def _scores(data: Mapping[str, Any]) -> Markup | None:
    """Three histograms as shares of their own total: the scale of scores says nothing, how far they part does."""
    found = data["scores"]
    if not found:
        return None
    edges, series = found["edges"], []
    for key, name, style in (
        ("all", "all unseen", "other"),
        ("held_out", "held out", "model"),
        ("first", "rank 1", "first"),
    ):
        total = sum(found.get(key) or ())
        if total:
            shares = [count / total for count in found[key]]
            steps = [(x, share) for i, share in enumerate(shares) for x in edges[i : i + 2]]
            series.append(Series(name, [(edges[0], 0.0), *steps, (edges[-1], 0.0)], style,
                                 label_at=2 * shares.index(max(shares)) + 1))  # fmt: skip
    label = "Distribution of scores: all unseen items, held-out items, and the first of each list"
    return charts.plot(label, series, y_text=percent_text, from_zero=True) if series else None


def _training(found: Mapping[str, Any], k: int) -> list[tuple[str, Markup]]:
    """Loss, and at most two validation metrics, each on a scale of its own."""
    epochs = found.get("epochs") or []
    if not epochs:
        return []
    best, across = found["best_epoch"], [0.0, *charts.ticks(1, len(epochs))]
    across = [at for at in across if at == round(at)]
    steps: dict[int, int] = {}
    for epoch, step, *_ in found["curve"]:
        steps[epoch] = max(steps.get(epoch, 0), step + 1)
    curve = [(epoch + step / steps[epoch], loss) for epoch, step, loss, *_ in found["curve"]]
    series = [Series("", curve, "faint")] if curve else []

    def drawn(name: str, below: Sequence[Series] = ()) -> Markup:
        points = [(e["epoch"] + 1, e[name]) for e in epochs if name in e]
        kept = f"epoch {best + 1}, kept: {metric_text(epochs[best][name])}"
        return charts.plot(f"{called(name)} by epoch; {kept}", [*below, Series("", points)], compact, across,
                           mark=(best + 1, kept), scale_by=[len(below)])  # fmt: skip

    names = [name for name in (f"ndcg@{k}", f"hr@{k}", "mse", "mae", "rmse") if name in epochs[-1]][:2]
    return [("Training loss", drawn("loss", series)), *((f"Validation {called(name)}", drawn(name)) for name in names)]


def _profile(found: Mapping[str, Any]) -> dict[str, Markup | None]:
    made: dict[str, Markup | None] = dict.fromkeys(("long_tail", "activity", "item_counts", "by_month"))
    if tail := found.get("long_tail"):
        points = [(0.0, 0.0), *((float(percent), share) for percent, share in tail)]
        shares = {int(percent): share for percent, share in tail}
        at = 10 if 10 in shares else int(tail[0][0])
        series = [Series("", [(0, 0), (100, 1)], "faint"), Series("", points, "data")]
        label = f"The most popular {at} % of the items hold {percent_text(shares[at])} of the interactions"
        made["long_tail"] = charts.plot(label, series, lambda v: f"{v:.0f} %", [0, 20, 50, 100], percent_text, True,
                                        mark=(at, f"top {at} % of items: {percent_text(shares[at])}"))  # fmt: skip
    for key, values in (("activity", "users"), ("item_counts", "items")):
        if (bins := found.get(key)) and bins[values]:
            names = [compact(edge) for edge in bins["edges"]]
            label = f"{values.capitalize()} by number of interactions, {bin_text(bins, values)} most often"
            made[key] = charts.bars(label, names, bins[values], every=-(-len(names) // 9))
    if months := found.get("by_month"):
        shown = _calendar(months)
        label = f"Interactions by {'year' if len(shown[0][0]) == 4 else 'month'}, {shown[0][0]} to {shown[-1][0]}"
        every = max(1, -(-len(shown) // 5))
        made["by_month"] = charts.bars(label, [name for name, _ in shown], [n for _, n in shown], every)
    return made


def _calendar(months: Sequence[Sequence[Any]]) -> list[tuple[str, int]]:
    """Every month from the first to the last, empty ones too; years where there are more than MOST_MONTHS."""
    counted: dict[str, int] = {}
    first, last = (_month_number(months[i][0]) for i in (0, -1))
    yearly = last - first >= MOST_MONTHS
    for name, count in months:
        counted[name.rpartition("-")[0] if yearly else name] = (
            counted.get(name.rpartition("-")[0] if yearly else name, 0) + count
        )
    if yearly:
        return list(counted.items())
    return [
        (name, counted.get(name, 0)) for name in (f"{n // 12:04d}-{n % 12 + 1:02d}" for n in range(first, last + 1))
    ]


def _month_number(name: str) -> int:
    year, _, month = name.rpartition("-")
    return int(year) * 12 + int(month) - 1


def bin_text(bins: Mapping[str, Any], values: str) -> str:
    """The fullest bin: `20 to 49`."""
    peak = max(range(len(bins[values])), key=bins[values].__getitem__)
    return f"{bins['edges'][peak]:,} to {bins['edges'][peak + 1] - 1:,}"


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None
