"""Whether a number of a night lies within its bounds: pure functions from a value and those of good nights to a check.

`learned` is robust: the median of the good nights ± spread × 1.4826 × MAD, which for normal noise are so many standard
deviations (Rousseeuw & Croux 1993), and one bad night among them moves neither. A log that hardly moves has a MAD near
0, so each measure also allows for a slack of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEAST_NIGHTS = 3
"""Good nights below which nothing is learned."""
NORMAL = 1.4826
"""Standard deviations of normal noise a MAD."""
Setting = float | tuple[float, float] | Literal["learned"] | None
Outcome = Literal["passed", "refused", "unknown", "off"]


@dataclass(frozen=True)
class Measure:
    """A number of a night. what: in a message, with its run. look: what to look at where it is out of bounds.
    share, slack: what `learned` allows for at least, of the median and beside it. low, high: the sides that are
    bounded. multiple: numbers are multiples of the median. percent, digits: how it is written."""

    what: str
    look: str
    share: float = 0.0
    slack: float = 0.0
    low: bool = False
    high: bool = False
    multiple: bool = False
    percent: bool = False
    digits: int = 0

    def said(self, value: float) -> str:
        return f"{value:.2%}" if self.percent else f"{value:,.{self.digits}f}"


MEASURES: Mapping[str, Measure] = {
    "volume": Measure(
        "interactions that prepare kept", "whether the log is complete, or is there twice", 0.25, low=True, high=True,
        multiple=True,
    ),
    "new_users": Measure(
        "new users a day", "whether the users' ids changed their form", 0.75, 20.0, low=True, high=True, multiple=True,
        digits=1,
    ),
    "quarantine": Measure(
        "of the log's rows in the quarantine", "the quarantine of that run", slack=0.01, high=True, percent=True
    ),
    "age": Measure(
        "days from the newest interaction to ds", "whether the log still grows, and input.time_unit",
        slack=2.0, high=True, digits=1,
    ),
    "rating_drift": Measure(
        "population stability index of the ratings", "whether their scale changed", slack=0.1, high=True, digits=3
    ),
    "item_drift": Measure(
        "population stability index of the items", "whether the items' ids changed, or one source is missing",
        slack=0.1, high=True, digits=3,
    ),
    "vanished": Measure(
        "of the last published night's interactions have lost their user or item",
        "whether the log is complete and ids keep their form, and how many people asked to be forgotten",
        slack=0.05, high=True, percent=True,
    ),
    "coverage": Measure(
        "of the items that may be offered are offered to anybody", "whether the model ranks everybody alike",
        0.3, low=True, percent=True,
    ),
    "filled": Measure(
        "of the places of all lists are filled", "score.allow_items, score.deny_items and score.k",
        slack=0.02, low=True, percent=True,
    ),
    "fallback": Measure(
        "of the users are ranked by popularity", "whether the log is complete, and users keep their ids",
        slack=0.1, high=True, percent=True,
    ),
    "churn": Measure(
        "of the items in the last published night's lists are gone tonight",
        "whether another model or other settings are meant, and whether anything was trained",
        slack=0.15, low=True, high=True, percent=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A gate that was judged. bound: least and most, each where there is one."""

    gate: str
    outcome: Outcome
    value: float | None = None
    bound: tuple[float | None, float | None] = (None, None)
    message: str = ""


def learned(measure: Measure, before: Sequence[float], spread: float) -> tuple[float, float]:
    """The least and the most that the values of good nights (three at least) allow."""
    median = float(np.median(before))
    mad = float(np.median(np.abs(np.asarray(before) - median)))
    width = max(spread * NORMAL * mad, measure.share * abs(median) + measure.slack)
    return median - width, median + width


def judge(gate: str, setting: Setting, value: float | None, before: Sequence[float], spread: float, run: str) -> Check:
    """value: of tonight, None where nobody knows; before: of good nights, the newest first; run: what was measured."""
    measure = MEASURES[gate]
    if setting is None:
        return Check(gate, "off", value)
    band = _band(measure, setting, before, spread)
    if value is None or band is None:
        return Check(gate, "unknown", value)
    bound = band[0] if measure.low else None, band[1] if measure.high else None
    low, high = bound
    if (low is None or value >= low) and (high is None or value <= high):
        return Check(gate, "passed", value, bound)
    return Check(gate, "refused", value, bound, _message(gate, measure, setting, value, bound, before, run))


def _band(measure: Measure, setting: Setting, before: Sequence[float], spread: float) -> tuple[float, float] | None:
    """None where there is nothing to learn from, or to take a multiple of."""
    if setting == "learned":
        return learned(measure, before, spread) if len(before) >= LEAST_NIGHTS else None
    if not isinstance(setting, tuple):
        assert isinstance(setting, float | int)
        return float(setting), float(setting)
    if not measure.multiple:
        return setting
    return (setting[0] * float(np.median(before)), setting[1] * float(np.median(before))) if before else None


def _message(
    gate: str,
    measure: Measure,
    setting: Setting,
    value: float,
    bound: tuple[float | None, float | None],
    before: Sequence[float],
    run: str,
) -> str:
    low, high = bound
    too_low = low is not None and value < low
    needed = f"at least {measure.said(low)}" if too_low and low is not None else f"at most {measure.said(high or 0.0)}"
    whence = f"gates.{gate} = {list(setting) if isinstance(setting, tuple) else setting}"
    if setting == "learned" or (isinstance(setting, tuple) and measure.multiple):
        whence += f", from {len(before)} good nights with a median of {measure.said(float(np.median(before)))}"
    return f"{measure.said(value)} {measure.what} ({run}); needed {needed} ({whence}): look at {measure.look}"


def psi(now: Mapping[str, int], then: Mapping[str, int]) -> float | None:
    """How far one distribution of counts is from another: the population stability index Σ (p − q) ln(p / q), half a
    row added to each bin so that an empty one counts, less what it is expected to be for samples of one distribution:
    (bins − 1) (1 / n + 1 / m). None where either has no row."""
    bins = sorted({*now, *then})
    n, m = sum(now.values()), sum(then.values())
    if not n or not m:
        return None
    p, q = (
        (np.array([of.get(name, 0) for name in bins]) + 0.5) / (sum(of.values()) + len(bins) / 2) for of in (now, then)
    )
    return max(0.0, float(((p - q) * np.log(p / q)).sum()) - (len(bins) - 1) * (1 / n + 1 / m))
