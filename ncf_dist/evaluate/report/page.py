"""report.html: shapes the data of a report for templates/page.html. The same data gives the same bytes.

Nothing on the page is loaded from anywhere, and nothing on it runs: style and figures are inline, a policy in its head
forbids the rest. Text from logs is escaped (autoescape), and characters that do not print are shown as escapes.
"""

from __future__ import annotations

import functools
import json
import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ncf_dist import metrics
from ncf_dist.charts import svg, text
from ncf_dist.charts.text import FAMILIES, called, in_prose, visible
from ncf_dist.evaluate.report.figures import figures
from ncf_dist.evaluate.report.verdict import verdicts
from ncf_dist.files import write_atomic

PROTOCOLS = {"rating": "predicted ratings", "full": "full catalogue", "candidates": "candidates"}
TABLES = ("full", "candidates", "rating", "lists")
COMPARED = (("rating",), ("full", "candidates"))
"""Protocols that have the same baselines share a table of comparisons."""
SAME = {False: ("hr", "recall"), True: ("ndcg", "hr", "recall", "precision", "map")}
"""Metrics that are one with one held-out item a user: at any K, and at K = 1. The first stands for the others."""
OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("n_rows", "scores", "profile", "training", "peak_memory_bytes", "lineage")),
    **{name: {} for name in ("candidates", "rating", "lists", "intervals", "baselines", "segments")},
    **{name: [] for name in ("comparisons", "examples", "resources")},
}
"""What data without a section is drawn as."""


def write_report(run: str, data: Mapping[str, Any]) -> str:
    """Write report.html into the folder `run`; its path."""
    path = posixpath.join(run, metrics.PAGE)
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
        "in_prose": in_prose,
        "capital": lambda words: words[:1].upper() + words[1:],
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
    folded = {name: folded_metrics(data, name) for name in TABLES}
    told = verdicts(data, folded)
    config = (data["lineage"] or {}).get("config", {})
    replicates = config.get("evaluate", {}).get("bootstrap")
    return {
        "data": data,
        "verdicts": told,
        "ranking": next(verdict for verdict in told if verdict.protocol == "full"),
        "figures": figures(data, k, told[0]),
        "tiles": tiles(data, k),
        "tables": {name: metric_table(data, name, systems, k, folded[name]) for name in TABLES},
        "comparisons": [table for protocols in COMPARED if (table := comparison_table(data, k, folded, protocols))],
        "protocols": PROTOCOLS,
        "chart_style": Markup(svg.STYLE),
        "p_floor": 2 / (replicates + 1) if replicates else None,
        "candidates": config.get("negatives", {}).get("candidates"),
        "log_has_ratings": any(item.get("rating") is not None for e in data["examples"] for item in e["liked"]),
    }


def headline_k(data: Mapping[str, Any]) -> int:
    """K of the headline metric."""
    return metrics.headline_k(data["ks"])


def tiles(data: Mapping[str, Any], k: int) -> list[dict[str, Any]]:
    """The handful of figures that matter; each {label, key, value, interval, and name and value of the first baseline
    that has it}."""
    wanted = [("rating", "rmse"), ("full", f"ndcg@{k}"), ("full", f"hr@{k}")]
    wanted += [("candidates", f"ndcg@{k}"), ("candidates", f"hr@{k}"), ("lists", f"coverage@{k}")]
    return [
        {
            "label": called(name),
            "where": PROTOCOLS.get(group, "of the catalogue"),
            "key": f"{group}.{name}",
            "value": data[group][name],
            "interval": data["intervals"].get(group, {}).get(name),
            "baseline": next(
                ((in_prose(b), v[group][name]) for b, v in data["baselines"].items() if name in v.get(group, {})), None
            ),
        }
        for group, name in wanted
        if name in data[group]
    ]


# ---- tables --------------------------------------------------------------------------------------------------------


def folded_metrics(data: Mapping[str, Any], group: str) -> dict[str, str]:
    """{metric: the one that says the same}. With one held-out item a user Recall is HR, and at K = 1 so are NDCG, MAP
    and Precision."""
    if data["n_rows"] != data["n_users"]:
        return {}
    systems = [data[group], *(values.get(group, {}) for values in data["baselines"].values())]
    found = {}
    for name, value in data[group].items():
        family, _, at = name.partition("@")
        leader = next((f"{f}@{at}" for f in SAME[at == "1"] if f"{f}@{at}" in data[group]), name)
        alike = all(values.get(name) == values.get(leader) for values in systems)
        if family in SAME[at == "1"] and leader != name and alike and math.isfinite(value):
            found[name] = leader
    return found


def metric_table(
    data: Mapping[str, Any], group: str, systems: Sequence[str], k: int, folded: Mapping[str, str]
) -> dict[str, Any] | None:
    """Every metric of a group, the model's with its interval, beside the baselines'; metrics that say the same share a
    row."""
    if not data[group]:
        return None
    values = {"model": data[group], **{s: data["baselines"][s].get(group, {}) for s in systems[1:]}}
    shown = [s for s in systems if values[s]]
    intervals = data["intervals"].get(group, {})
    names = sorted((name for name in data[group] if name not in folded), key=_order)
    rows = [
        {
            "names": [name, *sorted((same for same, leader in folded.items() if leader == name), key=_order)],
            "strong": name == ("rmse" if group == "rating" else f"ndcg@{k}"),
            "first": number > 0 and name.split("@")[0] != names[number - 1].split("@")[0],
            "interval": intervals.get(name),
            "cells": [(system, values[system].get(name)) for system in shown],
        }
        for number, name in enumerate(names)
    ]
    return {"group": group, "systems": shown, "rows": rows, "intervals": bool(intervals)}


def comparison_table(
    data: Mapping[str, Any], k: int, folded: Mapping[str, Mapping[str, str]], protocols: Sequence[str]
) -> dict[str, Any] | None:
    """One row a (protocol, metric) at the headline's K or without one, one column a system that the model was compared
    with in these protocols."""
    shown = [
        c
        for c in data["comparisons"]
        if c["protocol"] in protocols
        and c["metric"].partition("@")[2] in ("", str(k))
        and c["metric"] not in folded[c["protocol"]]
    ]
    found = {(c["protocol"], c["metric"], c["with"]): c for c in shown}
    systems = list(dict.fromkeys(system for *_, system in found))
    rows = sorted({key[:2] for key in found}, key=lambda row: (list(PROTOCOLS).index(row[0]), _order(row[1])))
    cells = [(*row, [found.get((*row, system)) for system in systems]) for row in rows]
    return {"systems": systems, "rows": cells, "count": len(found)} if found else None


def _order(name: str) -> tuple[int, str, int]:
    """Families in the order of FAMILIES, then by K."""
    family, _, k = name.partition("@")
    return (list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES), family, int(k or 0))
