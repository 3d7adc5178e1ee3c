"""The verdict: which of the others the model beats, and which not, by the paired intervals of the headline metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncf_dist import metrics
from ncf_dist.charts.text import in_prose

PROTOCOLS = {"full": "the full catalogue", "rating": "the held-out ratings"}


@dataclass(frozen=True)
class Standing:
    """The model against one other scorer. value: theirs, where it is known; difference: the model's minus theirs; side:
    `beaten`, `level` (the interval holds 0) or `ahead` (of the model); behind: metrics of the protocol in which the
    model is not ahead."""

    name: str
    value: float | None
    difference: float
    interval: Sequence[float] | None
    p: float | None
    side: str
    behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """By one metric of one protocol, whose value for the model is `model`. claim: what the model does, every other
    named once; state: `ahead` where anybody is beaten, `level`, `behind`, or `alone` without others."""

    protocol: str
    metric: str
    model: float
    standings: tuple[Standing, ...]
    claim: str
    state: str

    @property
    def where(self) -> str:
        return PROTOCOLS[self.protocol]

    @property
    def title(self) -> str:
        return f"The model {self.claim}" if self.claim else "How the model did"


def verdicts(data: Mapping[str, Any], folded: Mapping[str, Any]) -> list[Verdict]:
    """By RMSE, where the model predicts ratings; then by NDCG over the full catalogue. The first with others heads the
    page. folded: metrics that are not named, since another one of their protocol says the same."""
    wanted = [("rating", "rmse")] if "rmse" in data["rating"] else []
    found = [_verdict(data, *one, folded) for one in (*wanted, metrics.headline(data["ks"]))]
    return sorted(found, key=lambda verdict: not verdict.standings)


def _verdict(data: Mapping[str, Any], protocol: str, metric: str, folded: Mapping[str, Any]) -> Verdict:
    ours = {name: value for name, value in data[protocol].items() if name not in folded[protocol]}
    theirs = {name: values.get(protocol, {}) for name, values in data["baselines"].items()}
    compared = {c["with"]: c for c in data["comparisons"] if (c["protocol"], c["metric"]) == (protocol, metric)}
    names = [name for name, values in theirs.items() if metric in values]
    standings = [
        _standing(name, protocol, metric, ours, theirs.get(name, {}), compared.get(name))
        for name in (*names, *(name for name in compared if name not in names))
    ]
    return Verdict(protocol, metric, data[protocol][metric], tuple(standings), *_claim(standings))


def _standing(
    name: str,
    protocol: str,
    metric: str,
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    compared: Mapping[str, Any] | None,
) -> Standing:
    """Without an interval (evaluate.bootstrap 0) the difference itself decides."""
    sign = -1 if protocol == "rating" else 1
    difference = compared["difference"] if compared else ours[metric] - theirs[metric]
    interval = compared.get("interval") if compared else None
    gains = sorted(sign * end for end in interval or (difference,))
    side = "beaten" if gains[0] > 0 else "ahead" if gains[-1] < 0 else "level"
    behind = [other for other in ours if other in theirs and sign * (ours[other] - theirs[other]) <= 0]
    behind.sort(key=lambda other: int(other.partition("@")[2] or 0))
    p = compared.get("p") if compared else None
    return Standing(name, theirs.get(metric), difference, interval, p, side, tuple(behind))


def _claim(standings: Sequence[Standing]) -> tuple[str, str]:
    """(claim, state) of a verdict."""
    names: dict[str, list[str]] = {"beaten": [], "level": [], "ahead": []}
    for one in standings:
        names[one.side].append(in_prose(one.name))
    beaten, level, ahead = names.values()
    unbeaten = [in_prose(one.name) for one in standings if one.side != "beaten"]
    if not standings:
        return "", "alone"
    if beaten and unbeaten:
        return f"beats {_listed(beaten, 'and')}; not {_listed(unbeaten, 'or')}", "ahead"
    if beaten:
        not_in_all = ", but not in every metric" if any(one.behind for one in standings) else ""
        return f"beats {_listed(beaten, 'and')}{not_in_all}", "ahead"
    if level and ahead:
        return f"does not beat {_listed(unbeaten, 'or')}", "behind"
    if level:
        return f"is not clearly better than {_listed(level, 'or')}", "level"
    return f"is worse than {_listed(ahead, 'and')}", "behind"


def _listed(names: Sequence[str], word: str) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {word} ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
