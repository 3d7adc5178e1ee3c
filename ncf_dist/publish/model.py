"""The gates of the model: what evaluate says of it, beside the champion and the baselines, on the same held-out rows.

The champion is the model of the last published night. A challenger is refused where it is worse by more than the margin
and not by chance: one-sided p of the paired bootstrap below 0.05, which is a two-sided p below 0.10. So an equal one is
refused in about one night of twenty however few users there are, and one that is worse by 3.3 standard errors passes
in one of twenty (1.645 for either error). docs/operations.md draws the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ncf_dist import metrics
from ncf_dist.champion import CHAMPION
from ncf_dist.config import Config, Gates
from ncf_dist.config.gates import MODEL_GATES
from ncf_dist.errors import GateRefused
from ncf_dist.files import exists
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish import gates as rules
from ncf_dist.publish.decision import Decision
from ncf_dist.publish.gates import Comparison, Evaluated, Figures, Verdict
from ncf_dist.publish.runs import evaluated

P_BY_CHANCE = 0.10
"""Two-sided, of a difference of which only one side counts."""
LEAST_USERS = 200
"""Of a segment that is judged by itself."""
REMEDY = "look at that run's report.html, train longer or with other settings, or look at the log"


def judge(config: Gates, found: Evaluated | None) -> list[Verdict]:
    """What speaks against the model; nothing where it was not evaluated, which is another gate's matter."""
    if found is None or found.figures is None:
        return []
    run = f"evaluate run {found.run_key}"
    verdicts = (GATES[name](config, found.figures, run) for name in MODEL_GATES)
    return [Verdict(name, said, True) for name, said in zip(MODEL_GATES, verdicts, strict=True) if said]


def check(config: Config, ds: str, prepare: Manifest, evaluate: Manifest) -> None:
    """Raise GateRefused where the model of this night may not be published: nightly asks before anybody is ranked by
    it."""
    found = evaluated(evaluate)
    require = [gate for gate in config.publish.require if gate == "beats_popularity"]
    train = str(evaluate.inputs.get("train"))
    held_out = prepare.config.get("split", {}).get("strategy") != "none"
    facts = rules.Facts("", train, 1, 0, None, found, held_out)
    verdicts = [verdict for verdict in rules.judge(facts, require) if verdict.refuses] + judge(config.gates, found)
    decision = Decision(ds, train, [], verdicts, config.gates.overrides, (*require, *active(config.gates)), train)
    lake = Lake(config.paths.lake)
    # What was kept of a refusal that no longer holds would keep later nights from building on this model.
    if decision.refused or exists(decision.record(lake)):
        decision.enforce(lake)


def refused(config: Config, ds: str, train: str, why: str) -> GateRefused:
    """The refusal of a model that evaluate could not rank by, which is kept as any other is. No override helps."""
    verdict = Verdict("scores", f"{why} (train run {train})", True)
    try:
        Decision(ds, train, [], [verdict], {}, active(config.gates), train).enforce(Lake(config.paths.lake))
    except GateRefused as error:
        return error
    raise AssertionError("nothing overrides it")


def active(config: Gates) -> list[str]:
    """The gates that are not off."""
    return [name for name in MODEL_GATES if getattr(config, name) not in (None, (), {}, False)]


def _headline(figures: Figures, other: str) -> Comparison | None:
    protocol, metric = metrics.headline(figures.ks)
    wanted = (other, protocol, metric)
    return next((row for row in figures.comparisons if (row.other, row.protocol, row.metric) == wanted), None)


def _beats(config: Gates, figures: Figures, run: str) -> str:
    said = []
    for name in config.beats:
        row = _headline(figures, name)
        if row is not None and row.interval is not None and row.interval[1] < 0:
            low, high = row.interval
            said.append(
                f"{row.protocol}.{row.metric} is {row.difference:+.4f} beside {name}'s, 95 % interval {low:+.4f} to "
                f"{high:+.4f} ({run}); needed an interval that does not lie wholly below 0: {REMEDY}"
            )
    return "; ".join(said)


def _champion(config: Gates, figures: Figures, run: str) -> str:
    row = _headline(figures, CHAMPION)
    if config.champion is None or row is None or row.p is None:
        return ""
    value = figures.full.get(row.metric, math.nan)
    theirs = value - row.difference
    least = theirs * (1 - config.champion)
    if not (value < least and row.p < P_BY_CHANCE):
        return ""
    return (
        f"{row.protocol}.{row.metric} is {value:.4f}, the champion's {theirs:.4f} ({row.difference / theirs:+.1%}), "
        f"one-sided p = {row.p / 2:.4f} ({run}); needed at least {least:.4f} (gates.champion = {config.champion}), or "
        f"a difference that may be chance: {REMEDY}"
    )


def _slices(config: Gates, figures: Figures, run: str) -> str:
    _, metric = metrics.headline(figures.ks)
    said = []
    for kind, margin in config.slices.items():
        for segment in figures.segments.get(kind, ()):
            theirs, interval = segment.champion.get(metric), segment.intervals.get(metric)
            if theirs is None or interval is None or segment.users < LEAST_USERS:
                continue
            least = theirs * (1 - margin)
            if interval[1] < least:
                said.append(
                    f"{metric} of the {segment.users:,} users of {kind} {segment.name} is "
                    f"{segment.full.get(metric, math.nan):.4f}, 95 % interval up to {interval[1]:.4f} ({run}); needed "
                    f"{least:.4f}, the champion's {theirs:.4f} less {margin:.0%} (gates.slices): {REMEDY}"
                )
    return "; ".join(said)


def _scores(config: Gates, figures: Figures, run: str) -> str:
    """A histogram's bins are as fine as its values are apart, so only equal scores share one."""
    counts = figures.scores.get("all", ())
    if not config.scores or sum(count > 0 for count in counts) != 1:
        return ""
    return f"the model gives all {sum(counts):,.0f} pairs the same score ({run}); needed others: train again"


GATES: Mapping[str, Callable[[Gates, Figures, str], str]] = {
    "beats": _beats,
    "champion": _champion,
    "slices": _slices,
    "scores": _scores,
}
