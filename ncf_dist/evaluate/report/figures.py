"""From the data of a report to its drawings: which numbers, on which scale, with which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ncf_dist.charts.svg import Dot, Series, bars, dots, plot
from ncf_dist.charts.text import called, compact, count_text, metric_text, percent_text
from ncf_dist.charts.training import training_figures
from ncf_dist.evaluate.periods import UNITS
from ncf_dist.evaluate.report.verdict import Verdict

SEGMENTS = {
    "activity": ("By activity of the user", "Items in train and validation."),
    "item_popularity": (
        "By popularity of the held-out item",
        "Each decile holds a tenth of the interactions, the first by the most popular items.",
    ),
    **{unit: (f"By {unit} of the held-out item", "") for unit in UNITS},
}
"""Kind of segment: title, note."""
MOST_PERIODS = 120
MOST_DATES = 4
"""Dates that stand side by side below a figure."""
WEEKS = " A week is named by its Monday."


def figures(data: Mapping[str, Any], k: int, verdict: Verdict) -> dict[str, Any]:
    """Every drawing by name; those without data are None or empty."""
    return {
        "systems": _systems(data, verdict),
        "segments": _segments(data, k),
        "times": _held_out_times(data, k),
        "scores": _scores(data),
        "training": _training(data["training"] or {}, k),
        **_profile(data["profile"] or {}),
    }


def _systems(data: Mapping[str, Any], verdict: Verdict) -> Markup | None:
    """The verdict's metric of the model and of everything that has one."""
    protocol, name = verdict.protocol, verdict.metric
    rows = [Dot("Model", verdict.model, _pair(data["intervals"].get(protocol, {}).get(name)))]
    for system, found in data["baselines"].items():
        if name in found.get(protocol, {}):
            interval = _pair(found.get("intervals", {}).get(protocol, {}).get(name))
            rows.append(Dot(called(system), found[protocol][name], interval, model=False))
    rows = [row._replace(text=metric_text(row.value)) for row in rows]
    label = f"{called(name)} over {verdict.where}: " + ", ".join(f"{r.name} {r.text}" for r in rows)
    return dots(label, rows, called(name), from_zero=protocol != "rating") if len(rows) > 1 else None


def _segments(data: Mapping[str, Any], k: int) -> list[tuple[str, str, Markup]]:
    name, drawn = f"ndcg@{k}", []
    for kind, segments in data["segments"].items():
        if not segments or (kind in UNITS and len(segments) > 2):
            continue
        rows = [
            Dot(s["name"], s["full"][name], _pair(s.get("intervals", {}).get(name)), True,
                s.get("popularity", {}).get(name), metric_text(s["full"][name]), f"n {count_text(s['users'])}")
            for s in segments
        ]  # fmt: skip
        title, note = SEGMENTS.get(kind, (f"By {kind}", ""))
        label = f"{title}: {called(name)} of the model and of popularity"
        drawn.append((title, note, dots(label, rows, called(name))))
    return drawn


def _held_out_times(data: Mapping[str, Any], k: int) -> tuple[str, str, Markup] | None:
    """(title, note, figure) by the time of the held-out item, where that is three periods or more."""
    name = f"ndcg@{k}"
    unit, times = next(((u, data["segments"][u][-MOST_PERIODS:]) for u in UNITS if data["segments"].get(u)), ("", []))
    if len(times) < 3:
        return None
    bands = [_pair(at.get("intervals", {}).get(name)) or (at["full"][name],) * 2 for at in times]
    series = [Series("model", [(i, at["full"][name]) for i, at in enumerate(times)], "model", bands)]
    if all(name in at.get("popularity", {}) for at in times):
        series.insert(0, Series("popularity", [(i, at["popularity"][name]) for i, at in enumerate(times)], "other"))
    title, users = SEGMENTS[unit][0], [at["users"] for at in times]
    note = f"Users in a {unit}: {count_text(min(users))} to {count_text(max(users))}.{WEEKS if unit == 'week' else ''}"
    label = f"{called(name)} by {unit} of the held-out item, {times[0]['name']} to {times[-1]['name']}"
    figure = plot(label, series, (f"{unit} of the held-out item", called(name)), lambda i: times[int(i)]["name"],
                  [0, len(times) - 1], from_zero=True)  # fmt: skip
    return title, note, figure


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
    return plot(label, series, ("score", "share"), y_text=percent_text, from_zero=True) if series else None


def _training(found: Mapping[str, Any], k: int) -> list[tuple[str, Markup]]:
    """Loss, and at most two validation metrics."""
    epochs = found.get("epochs") or []
    if not epochs:
        return []
    names = [name for name in (f"ndcg@{k}", f"hr@{k}", "mse", "mae", "rmse") if name in epochs[-1]][:2]
    return training_figures(epochs, found["curve"], found["best_epoch"], names)


def _profile(found: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = dict.fromkeys(("long_tail", "activity", "item_counts", "by_time"))
    if tail := found.get("long_tail"):
        points = [(0.0, 0.0), *((float(percent), share) for percent, share in tail)]
        shares = {int(percent): share for percent, share in tail}
        at = 10 if 10 in shares else int(tail[0][0])
        series = [Series("", [(0, 0), (100, 1)], "faint"), Series("", points, "data")]
        label = f"The most popular {at} % of the items hold {percent_text(shares[at])} of the interactions"
        made["long_tail"] = plot(label, series, ("share of items, most popular first", "share of interactions"),
                                 lambda v: f"{v:.0f} %", [0, 20, 50, 100], percent_text, True,
                                 mark=(at, f"top {at} % of items: {percent_text(shares[at])}"))  # fmt: skip
    for key, values in (("activity", "users"), ("item_counts", "items")):
        if (bins := found.get(key)) and bins[values]:
            names = [compact(edge) for edge in bins["edges"]]
            label = f"{values.capitalize()} by number of interactions, {bin_text(bins, values)} most often"
            axes = (f"interactions of {'a user' if values == 'users' else 'an item'}", values)
            made[key] = bars(label, names, bins[values], axes, every=-(-len(names) // 9))
    if times := found.get("by_time"):
        made["by_time"] = _by_time(times["unit"], times["counts"])
    return made


def _by_time(unit: str, counts: Sequence[Sequence[Any]]) -> tuple[str, str, Markup]:
    """(title, note, figure) of the interactions in each period."""
    names = [name for name, _ in counts]
    figure = bars(f"Interactions by {unit}, {names[0]} to {names[-1]}", names, [n for _, n in counts],
                  (f"{unit} (UTC)", "interactions"), every=-(-len(counts) // MOST_DATES))  # fmt: skip
    return f"Interactions by {unit}", WEEKS.strip() if unit == "week" else "", figure


def bin_text(bins: Mapping[str, Any], values: str) -> str:
    """The fullest bin: `20 to 49`."""
    peak = max(range(len(bins[values])), key=bins[values].__getitem__)
    return f"{bins['edges'][peak]:,} to {bins['edges'][peak + 1] - 1:,}"


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None
