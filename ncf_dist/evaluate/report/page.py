"""report.html: shapes the data of a report for templates/page.html. The same data gives the same bytes.

Nothing on the page is loaded from anywhere, and nothing on it runs: style and figures are inline, a policy in its head
forbids the rest. Text from logs is escaped (autoescape), and characters that do not print are shown as escapes.
"""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ncf_dist import metrics
from ncf_dist.evaluate.report import text
from ncf_dist.evaluate.report.figures import figures
from ncf_dist.evaluate.report.text import FAMILIES, called, visible
from ncf_dist.files import write_atomic

REPORT = "report.html"
PROTOCOLS = {"full": "full catalogue", "candidates": "candidates", "rating": "predicted ratings"}
TABLES = ("full", "candidates", "rating", "lists")
OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("n_rows", "scores", "profile", "training", "peak_memory_bytes", "lineage")),
    **{name: {} for name in ("candidates", "rating", "lists", "intervals", "baselines", "segments")},
    **{name: [] for name in ("comparisons", "examples", "resources")},
}
"""What data without a section is drawn as."""


def write_report(run: str, data: Mapping[str, Any]) -> str:
    """Write report.html into the folder `run`; its path."""
    path = posixpath.join(run, REPORT)
    write_atomic(path, render(data).encode())
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page of `report_data`'s result. Sections that the data does not have are left out."""
    return _environment().get_template("page.html").render(view(data))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ncf_dist.evaluate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else "" if value is None else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": text.metric_text,
        "count": text.count_text,
        "percent": text.percent_text,
        "seconds": text.seconds_text,
        "bytes": text.bytes_text,
        "signed": text.signed_text,
        "p": text.p_text,
        "called": called,
        "interval": text.interval_text,
        "cut": lambda found, most: found if len(found) <= most else found[: most - 1] + "…",
        "json": lambda value: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False),
    }
    return environment


def view(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the template reads: the data, and what is worked out from it."""
    data = {**OPTIONAL, **data}
    k = headline_k(data)
    systems = ["model", *data["baselines"]]
    return {
        "data": data,
        "verdict": verdict(data),
        "figures": figures(data, k),
        "tiles": tiles(data, k),
        "tables": {name: metric_table(data, name, systems, k) for name in TABLES},
        "comparisons": comparison_table(data, k),
        "candidates": (data["lineage"] or {}).get("config", {}).get("negatives", {}).get("candidates"),
        "log_has_ratings": any(item.get("rating") is not None for e in data["examples"] for item in e["liked"]),
    }


# ---- the verdict ---------------------------------------------------------------------------------------------------


def headline_k(data: Mapping[str, Any]) -> int:
    """K of the headline metric."""
    return metrics.headline_k(data["ks"])


def verdict(data: Mapping[str, Any]) -> dict[str, Any]:
    """Did the model beat popularity: `state` (ahead, behind, level, alone), a title, the figures, and in which metrics
    of the full catalogue the model is not ahead. An interval that holds 0 is no victory."""
    _, name = metrics.headline(data["ks"])
    model, popular = data["full"][name], data["baselines"].get("popularity", {}).get("full", {})
    if name not in popular:
        return {"state": "alone", "title": "How the model did", "metric": name, "model": model, "behind": []}
    compared = {c["with"]: c for c in data["comparisons"] if (c["protocol"], c["metric"]) == ("full", name)}
    found = compared.pop("popularity", None)
    difference = found["difference"] if found else model - popular[name]
    low, high = found["interval"] if found and found.get("interval") else (difference, difference)
    behind = [m for m, value in data["full"].items() if m in popular and value <= popular[m]]
    state = "ahead" if low > 0 else "behind" if high < 0 else "level"
    title = {
        "ahead": "The model beats popularity" + (", but not in every metric" if behind else ""),
        "behind": "The model is worse than popularity",
        "level": "The model is not clearly better than popularity",
    }[state]
    ratio = model / popular[name] if popular[name] else None
    return {"state": state, "title": title, "metric": name, "model": model, "popularity": popular[name],
            "difference": difference, "interval": (found or {}).get("interval"), "p": (found or {}).get("p"),
            "ratio": ratio, "behind": behind, "others": list(compared.values())}  # fmt: skip


def tiles(data: Mapping[str, Any], k: int) -> list[dict[str, Any]]:
    """The handful of figures that matter; each {label, key, value, interval, baseline}."""
    wanted = [("rating", "rmse"), ("full", f"ndcg@{k}"), ("full", f"hr@{k}")]
    wanted += [("candidates", f"ndcg@{k}"), ("candidates", f"hr@{k}"), ("lists", f"coverage@{k}")]
    return [
        {
            "label": called(name),
            "where": PROTOCOLS.get(group, "of the catalogue"),
            "key": f"{group}.{name}",
            "value": data[group][name],
            "interval": data["intervals"].get(group, {}).get(name),
            "baseline": data["baselines"].get("popularity", {}).get(group, {}).get(name),
        }
        for group, name in wanted
        if name in data[group]
    ]


# ---- tables --------------------------------------------------------------------------------------------------------


def metric_table(data: Mapping[str, Any], group: str, systems: Sequence[str], k: int) -> dict[str, Any] | None:
    """Every metric of a group, the model's with its interval, beside the baselines'."""
    if not data[group]:
        return None
    values = {"model": data[group], **{s: data["baselines"][s].get(group, {}) for s in systems[1:]}}
    shown = [s for s in systems if values[s]]
    intervals = data["intervals"].get(group, {})
    names = sorted(data[group], key=_order)
    rows = [
        {
            "name": name,
            "strong": name == f"ndcg@{k}",
            "first": number > 0 and name.split("@")[0] != names[number - 1].split("@")[0],
            "interval": intervals.get(name),
            "cells": [(system, values[system].get(name)) for system in shown],
        }
        for number, name in enumerate(names)
    ]
    return {"group": group, "systems": shown, "rows": rows, "intervals": bool(intervals)}


def comparison_table(data: Mapping[str, Any], k: int) -> dict[str, Any]:
    """One row a (protocol, metric) at the headline's K or without one, one column a system that the model was compared
    with."""
    shown = [c for c in data["comparisons"] if c["metric"].partition("@")[2] in ("", str(k))]
    found = {(c["protocol"], c["metric"], c["with"]): c for c in shown}
    systems = list(dict.fromkeys(system for *_, system in found))
    rows = sorted({key[:2] for key in found}, key=lambda row: (list(PROTOCOLS).index(row[0]), _order(row[1])))
    cells = [(*row, [found.get((*row, system)) for system in systems]) for row in rows]
    return {"systems": systems, "rows": cells, "count": len(found)}


def _order(name: str) -> tuple[int, str, int]:
    """Families in the order of FAMILIES, then by K."""
    family, _, k = name.partition("@")
    return (list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES), family, int(k or 0))
