"""Whether a night is good enough to replace what readers see: pure functions from facts to verdicts.

A night without rows never is. The other checks are those of `publish.require`, each of which can be left out there. A
check that lacks what it compares with lets the night pass, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ncf_dist import metrics

LEAST_SHARE = 0.5
"""Of the users and interactions of the night that is published: below it, something has cut the night down."""


@dataclass(frozen=True)
class Published:
    """The night that readers see in place of this one, or else the last one before it. model_users: how many the model
    ranked for; None where nobody knows. interactions: how many its prepare run kept; None where that run is gone."""

    ds: str
    run_key: str | None
    model_users: int | None
    interactions: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The model minus another scorer in one metric, and the paired 95 % interval of that."""

    other: Annotated[str, Field(alias="with")]
    protocol: str
    metric: str
    difference: float
    interval: tuple[float, float] | None
    p: float | None = None


@dataclass(frozen=True)
class Segment:
    """A part of the users, or of the items, with metrics over the full catalogue by name; the champion's where there is
    one; and intervals of the model's."""

    name: str
    users: int
    full: Mapping[str, float] = field(default_factory=dict)
    champion: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What the gates use of metrics.json."""

    ks: Annotated[list[int], Field(min_length=1)]
    comparisons: list[Comparison]
    feedback: str = "implicit"
    full: Mapping[str, float] = field(default_factory=dict)
    segments: Mapping[str, list[Segment]] = field(default_factory=dict)
    scores: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """A finished run of evaluate that judged the model at hand. figures: None where nothing was held out."""

    run_key: str
    figures: Figures | None


@dataclass(frozen=True)
class Facts:
    """Of the night that wants to be published: the score run, the model's train run, what the audit counted, and what
    there is to compare with. held_out: whether the split holds rows out at all; interactions: how many prepare kept."""

    score_run: str
    train_run: str
    rows: int
    model_users: int
    published: Published | None
    evaluated: Evaluated | None
    held_out: bool
    interactions: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What a check has to say: a refusal, or else a warning."""

    check: str
    message: str
    refuses: bool


def judge(facts: Facts, require: Collection[str]) -> list[Verdict]:
    """Everything that speaks against the night, in the order of the checks; empty where nothing does."""
    checks = {
        "users": _users,
        "interactions": _interactions,
        "beats_popularity": _beats_popularity,
        "evaluated": _evaluated,
    }
    found = [_rows(facts), *(check(facts) for name, check in checks.items() if name in require)]
    return [verdict for verdict in found if verdict is not None]


def _rows(facts: Facts) -> Verdict | None:
    if facts.rows:
        return None
    return Verdict(
        "rows",
        f"score run {facts.score_run} has 0 rows; needed at least 1: look at score.active_since, score.allow_items and "
        "score.deny_items, and at how recent the log is",
        True,
    )


def _users(facts: Facts) -> Verdict | None:
    before = facts.published
    if before is None:
        return None
    if before.model_users is None:
        return Verdict(
            "users",
            f"ds {before.ds}, which is published, does not say how many users its model ranked for, so the "
            f"{facts.model_users:,} of score run {facts.score_run} are compared with nothing",
            False,
        )
    said = f"the model ranked for {facts.model_users:,} users in score run {facts.score_run}"
    return _shrunk("users", before, said, facts.model_users, before.model_users, "score.active_since")


def _interactions(facts: Facts) -> Verdict | None:
    """A log that lacks its end may still name nearly every user."""
    before = facts.published
    if before is None or before.interactions is None or facts.interactions is None:
        return None
    said = f"prepare kept {facts.interactions:,} interactions for score run {facts.score_run}"
    return _shrunk("interactions", before, said, facts.interactions, before.interactions, "the filters of input")


def _shrunk(check: str, before: Published, said: str, now: int, then: int, where: str) -> Verdict | None:
    """The refusal of a night that has less than LEAST_SHARE of what the published one has. said: how much that is;
    where: what else than the log may have cut it down."""
    least = math.ceil(LEAST_SHARE * then)
    if now >= least:
        return None
    return Verdict(
        check,
        f"{said}; needed {least:,}, half of the {then:,} of ds {before.ds} (run {before.run_key}), which is published: "
        f"look at whether the log is complete and at {where}",
        True,
    )


def _evaluated(facts: Facts) -> Verdict | None:
    if facts.evaluated is not None:
        return None
    what = f"no finished evaluate run of this ds judged train run {facts.train_run}, whose model score run "
    what += f"{facts.score_run} ranked by"
    if not facts.held_out:
        return Verdict("evaluated", f"{what}: nothing is held out (split.strategy none)", False)
    return Verdict("evaluated", f"{what}; needed one: run the job evaluate with this config", True)


def _beats_popularity(facts: Facts) -> Verdict | None:
    def unknown(why: str) -> Verdict:
        return Verdict("beats_popularity", f"the model is not compared with popularity: {why}", False)

    if facts.evaluated is None or facts.evaluated.figures is None:
        return unknown("it was not evaluated" if facts.held_out else "nothing is held out (split.strategy none)")
    run, figures = facts.evaluated.run_key, facts.evaluated.figures
    if worse := _worse_than_the_mean(facts.evaluated):
        return Verdict("beats_popularity", worse, False)
    protocol, metric = metrics.headline(figures.ks)
    rows = {(row.other, row.protocol, row.metric): row for row in figures.comparisons}
    row = rows.get(("popularity", protocol, metric))
    if row is None:
        return unknown(f"evaluate run {run} has no such baseline (evaluate.baselines)")
    if row.interval is None or not all(map(math.isfinite, row.interval)):
        return unknown(f"evaluate run {run} has no interval of the difference (evaluate.bootstrap)")
    low, high = row.interval
    if high >= 0:
        return None
    found = (
        f"{protocol}.{metric} is {row.difference:+.4f} beside popularity's, 95 % interval {low:+.4f} to {high:+.4f} "
        f"(evaluate run {run} of train run {facts.train_run})"
    )
    if figures.feedback == "explicit":
        # It learns to predict ratings, which popularity does not: what it ranks worse is no sign of a bad night.
        return Verdict("beats_popularity", f"{found}; a model of ratings is not held to it", False)
    return Verdict(
        "beats_popularity",
        f"{found}; needed an interval that does not lie wholly below 0: look at that run's report.html, train longer "
        "or with other settings, or look at the log",
        True,
    )


def _worse_than_the_mean(evaluated: Evaluated) -> str | None:
    """What is said of a model of ratings that predicts them worse than the simplest baseline does."""
    assert evaluated.figures is not None
    for row in evaluated.figures.comparisons:
        if (row.other, row.protocol, row.metric) == ("mean", "rating", "rmse") and row.interval and row.interval[0] > 0:
            low, high = row.interval
            return (
                f"the model predicts ratings worse than their mean does: rating.rmse is {row.difference:+.4f} beside "
                f"it, 95 % interval {low:+.4f} to {high:+.4f} (evaluate run {evaluated.run_key}): train longer, or "
                "with model.biases or model.y_range"
            )
    return None
