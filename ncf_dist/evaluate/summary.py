"""From sums to the figures of `metrics.json`: means, intervals, comparisons and segments. Arithmetic on the driver."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ncf_dist import metrics
from ncf_dist.champion import CHAMPION
from ncf_dist.evaluate import segments
from ncf_dist.evaluate.bootstrap import interval, p_value
from ncf_dist.evaluate.segments import PopularityDeciles
from ncf_dist.evaluate.sums import MODEL, POPULARITY, FloatArray, Sums

log = logging.getLogger(__name__)

PROTOCOLS = ("full", "candidates", "rating")
KINDS = ("mrr", "auc", "hr", "recall", "precision", "ndcg", "map")
"""Metrics in the order in which they are given."""


class Means:
    """Means over users of one scorer and one protocol, with their replicates: (1 + B,) a metric, by name."""

    def __init__(self, sums: Sums, scorer: str, protocol: str) -> None:
        prefix = f"{scorer}/{protocol}/"
        named = {name.removeprefix(prefix): values for name, values in sums.items() if name.startswith(prefix)}
        columns = {name: named[name] for name in sorted(named, key=_order)}
        n = columns.pop("n", np.zeros(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.values = {name: values / n[: len(values)] for name, values in columns.items()}
        if protocol == "rating" and columns:
            mse, mae = self.values["se"], self.values["ae"]
            self.values = {"mse": mse, "rmse": np.sqrt(mse), "mae": mae}

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def points(self) -> dict[str, float]:
        return {name: float(values[0]) for name, values in self.values.items()}

    @property
    def intervals(self) -> dict[str, list[float]]:
        bounds_of = {name: interval(values[1:]) for name, values in self.values.items()}
        return {name: bounds for name, bounds in bounds_of.items() if bounds is not None}


def _order(metric: str) -> tuple[int, int]:
    """By K, then by kind."""
    kind, _, k = metric.partition("@")
    return int(k or 0), KINDS.index(kind) if kind in KINDS else 0


def of_scorer(sums: Sums, scorer: str) -> dict[str, Any]:
    """{"full", "candidates", "rating" (where scores are ratings), "intervals"} of one scorer."""
    means = {protocol: Means(sums, scorer, protocol) for protocol in PROTOCOLS}
    figures: dict[str, Any] = {protocol: of.points for protocol, of in means.items() if of}
    intervals = {protocol: of.intervals for protocol, of in means.items() if of and of.intervals}
    return {**figures, **({"intervals": intervals} if intervals else {})}


def comparisons(sums: Sums, others: list[str]) -> list[dict[str, Any]]:
    """The model minus each other scorer: the same users in every replicate, so the difference is paired."""
    compared = []
    for other in others:
        for protocol in PROTOCOLS:
            model, theirs = Means(sums, MODEL, protocol).values, Means(sums, other, protocol).values
            for metric in [name for name in model if name in theirs and _compared(name)]:
                difference: FloatArray = model[metric] - theirs[metric]
                row = {"with": other, "protocol": protocol, "metric": metric, "difference": float(difference[0])}
                compared.append({**row, "interval": interval(difference[1:]), "p": p_value(difference[1:])})
    return compared


def _compared(metric: str) -> bool:
    """One of each kind: recall, precision and MAP of one held-out item say what HR and NDCG say."""
    return metric.partition("@")[0] in ("hr", "ndcg", "recall", "mrr", "auc", "mse", "rmse", "mae")


def by_segment(sums: Sums, kinds: tuple[str, ...], deciles: PopularityDeciles) -> dict[str, list[dict[str, Any]]]:
    """Each kind's segments in order: name, users, HR and NDCG of the model and of popularity."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        prefix = f"{MODEL}/segment/{kind}/"
        codes = sorted({int(name.removeprefix(prefix).split("/")[0]) for name in sums if name.startswith(prefix)})
        by_kind[kind] = [_segment(sums, kind, code, deciles) for code in codes]
    return by_kind


def _segment(sums: Sums, kind: str, code: int, deciles: PopularityDeciles) -> dict[str, Any]:
    protocol = f"segment/{kind}/{code}"
    model, popularity, champion = (Means(sums, name, protocol) for name in (MODEL, POPULARITY, CHAMPION))
    row: dict[str, Any] = {
        "name": segments.name_of(kind, code, deciles),
        "users": int(sums[f"{MODEL}/{protocol}/n"][0]),
        "full": model.points,
    }
    if popularity:
        row["popularity"] = popularity.points
    if champion:
        row["champion"] = champion.points
    if model.intervals:
        row["intervals"] = {name: bounds for name, bounds in model.intervals.items() if name.startswith("ndcg")}
    return row


def not_better(model: dict[str, float], popularity: dict[str, float]) -> list[str]:
    """Full-catalogue metrics in which the model does not beat popularity."""
    kinds = ("mrr", "hr", "ndcg")
    return [name for name, value in model.items() if name.partition("@")[0] in kinds and value <= popularity[name]]


def flat_metrics(report: dict[str, Any]) -> dict[str, float]:
    """`full.hr@10`, …, `popularity.full.hr@10`: what the last line and the manifest say."""
    flat = {f"{p}.{name}": v for p in (*PROTOCOLS, "lists") for name, v in report.get(p, {}).items()}
    for baseline, values in report["baselines"].items():
        flat |= {f"{baseline}.{p}.{name}": v for p in PROTOCOLS for name, v in values.get(p, {}).items()}
    return flat


def check_users(sums: Sums) -> int:
    """How many users were judged. Raises ValueError without any (what `metrics.means` says)."""
    total = sums.get(f"{MODEL}/full/n", np.zeros(1))
    metrics.means({"n": float(total[0])})
    return int(total[0])


def log_comparison(report: dict[str, Any]) -> None:
    """The model beside its baselines, a line a metric."""
    baselines = report["baselines"]
    for protocol in ("full", "candidates"):
        for name, value in report[protocol].items():
            beside = "   ".join(f"{b} {v[protocol][name]:.4f}" for b, v in baselines.items() if protocol in v)
            log.info("%-10s %-12s %.4f   %s", protocol, name, value, beside)
    if "rating" in report:
        for name, value in report["rating"].items():
            beside = "   ".join(f"{b} {v['rating'][name]:.4f}" for b, v in baselines.items() if "rating" in v)
            log.info("%-10s %-12s %.4f   %s", "rating", name, value, beside)
    for row in report["comparisons"]:
        if row["protocol"] == "full" and row.get("p") is not None and row["with"] not in baselines:
            values = (row["metric"], row["difference"], row["with"], *row["interval"], row["p"])
            log.info("%s %+.4f against %s (95 %% interval %+.4f to %+.4f, p = %.4f)", *values)
    if "popularity" in baselines:
        worse = not_better(report["full"], baselines["popularity"]["full"])
        if worse:
            log.warning("THE MODEL DOES NOT BEAT POPULARITY over the full catalogue in %s", ", ".join(worse))
