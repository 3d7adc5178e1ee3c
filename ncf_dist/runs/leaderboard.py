"""Every model of a night with what it was judged by, and in which settings it differs from production's."""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ncf_dist import metrics
from ncf_dist.charts.text import NONE, aligned, called, interval_text, metric_text, seconds_text, signed_text, visible
from ncf_dist.files import read_json
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.refits import judged_of
from ncf_dist.stage import decisive, flat_settings

Interval = tuple[float, float]
LAST = "differs in"
UNJUDGED = "ndcg@10"
"""The metric of validation rows that is shown of a model that was not judged."""


@dataclass(frozen=True)
class Entry:
    """A model. name: of the experiment, None for production; refit_of: the run of train that it is the refit of, which
    was judged in its place; value: of the headline metric; above_popularity: the
    difference, with its paired interval; validation: the same metric of validation rows, as the training saw it;
    comparable: judged on the rows that the first one was judged on; seconds: of the stages that made and judged it;
    settings: those that differ from production's newest, with their values here.
    """

    name: str | None
    refit_of: str | None
    model_version: str
    train: str
    evaluate: str | None
    metric: str | None
    value: float | None
    interval: Interval | None
    above_popularity: float | None
    above_interval: Interval | None
    hit_rate: float | None
    validation: float | None
    comparable: bool
    seconds: dict[str, float]
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Judged:
    """What we use of metrics.json."""

    ks: list[int]
    comparisons: list[dict[str, Any]]
    intervals: dict[str, dict[str, Interval]] | None = None


def leaderboard(lake: Lake, ds: str) -> list[Entry]:
    """Best first; those that were not judged come last, by their validation rows."""
    runs = {stage: lake.stage(ds, stage).finished() for stage in ("prepare", "train", "evaluate")}
    prepared = {run.run_key: run for run in runs["prepare"]}
    judged = {str(run.inputs.get("train")): run for run in reversed(runs["evaluate"]) if run.tables}
    production = next((run for run in runs["train"] if run.name is None), None)
    usual = _settings(production, prepared) if production is not None else {}
    found = [
        _entry(run, judged.get(run.run_key), judged_of(run, runs["train"]), prepared, usual) for run in runs["train"]
    ]
    found.sort(key=lambda entry: (entry.value is None, -(entry.value or entry.validation or 0.0)))
    first = _rows_of(judged.get(found[0].train)) if found else None
    return [replace(entry, comparable=_rows_of(judged.get(entry.train)) == first) for entry in found]


def _rows_of(run: Manifest | None) -> Any:
    """Digests of the tables that decide who is judged on what."""
    return run.facts.get("judged_on") if run is not None else None


def _entry(
    train: Manifest,
    evaluate: Manifest | None,
    refitted: Manifest | None,
    prepared: Mapping[str, Manifest],
    usual: Mapping[str, Any],
) -> Entry:
    said = _judged(evaluate)
    protocol, metric = metrics.headline(said.ks) if said is not None else ("full", None)
    name = f"{protocol}.{metric}" if metric else None
    values = evaluate.metrics if evaluate is not None else {}
    popular = next((row for row in said.comparisons if _is(row, protocol, metric)), {}) if said is not None else {}
    prepare = prepared.get(str(train.inputs.get("prepare")))
    runs = (("prepare", prepare), ("train", train), ("evaluate", evaluate))
    mine = _settings(train, prepared)
    return Entry(
        name=train.name,
        refit_of=refitted.run_key if refitted is not None else None,
        model_version=str(train.facts.get("model_version", NONE)),
        train=train.run_key,
        evaluate=evaluate.run_key if evaluate is not None else None,
        metric=name,
        value=values.get(name) if name else None,
        interval=((said.intervals or {}).get(protocol) or {}).get(metric or "") if said is not None else None,
        above_popularity=popular.get("difference"),
        above_interval=tuple(popular["interval"]) if popular.get("interval") else None,
        hit_rate=values.get(f"{protocol}.hr@{metrics.headline_k(said.ks)}") if said is not None else None,
        validation=train.metrics.get(f"validation.{metric or UNJUDGED}"),
        comparable=True,
        seconds={stage: run.seconds for stage, run in runs if run is not None},
        settings={key: mine.get(key) for key in sorted(mine.keys() | usual.keys()) if mine.get(key) != usual.get(key)},
    )


def _is(row: Mapping[str, Any], protocol: str, metric: str | None) -> bool:
    """Whether a comparison is the one with popularity in the headline metric."""
    return (row.get("with"), row.get("protocol"), row.get("metric")) == ("popularity", protocol, metric)


def _judged(evaluate: Manifest | None) -> _Judged | None:
    """None where nothing was judged, or its figures are damaged: others are shown all the same."""
    if evaluate is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        found = read_json(_Judged, posixpath.join(evaluate.root, metrics.STORED), more_keys=True)
        return found if found.ks else None
    return None


def _settings(train: Manifest, prepared: Mapping[str, Manifest]) -> dict[str, Any]:
    """The settings of a model that are not at their default, by their whole names."""
    prepare = prepared.get(str(train.inputs.get("prepare")))
    runs = (run for run in (prepare, train) if run is not None)
    return {key: value for run in runs for key, value in flat_settings(decisive(run.stage, run.config)).items()}


def text_table(entries: Sequence[Entry]) -> str:
    metric = next((entry.metric for entry in entries if entry.metric), "full.metric").partition(".")[2]
    head = [
        "run",
        "model",
        called(metric),
        "interval",
        "− popular",
        "interval ",
        "HR",
        "validation",
        "time",
        "differs in",
    ]
    versions = {entry.train: entry.model_version for entry in entries}
    rows = [
        [
            f"refit of {versions[entry.refit_of]}" if entry.refit_of in versions else entry.name or "production",
            entry.model_version,
            ("" if entry.comparable or entry.value is None else "~") + metric_text(entry.value),
            interval_text(entry.interval),
            signed_text(entry.above_popularity),
            interval_text(entry.above_interval),
            metric_text(entry.hit_rate),
            metric_text(entry.validation),
            seconds_text(sum(entry.seconds.values())),
            visible(", ".join(f"{key}={_value(value)}" for key, value in entry.settings.items())),
        ]
        for entry in entries
    ]
    table = aligned(head, rows, {"run", "model", LAST})
    other = any(not entry.comparable and entry.value is not None for entry in entries)
    return table + ("\n~ judged on other rows than the first: not to be compared with it" if other else "")


def _value(value: Any) -> str:
    """As `--set` takes it; a setting that is at its default here."""
    return "its default" if value is None else value if isinstance(value, str) else json.dumps(value)
