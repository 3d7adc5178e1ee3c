"""What the gates measured of the nights that readers see: it is in the commits, so it outlives their runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ncf_dist.publish.log import DeltaLog, Entry
from ncf_dist.published import nights_before
from ncf_dist.stored import typed

VALUES, OVERRIDES = "ncf.values", "ncf.overrides"


@dataclass(frozen=True)
class Measured:
    """Of one night. numbers: by gate; ratings, items: how many interactions are in each bin of prepare's profile."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    ratings: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """As the commit keeps it. Numbers are text: delta-rs reads a float back with another last digit."""
        return {**asdict(self), "numbers": {gate: repr(value) for gate, value in self.numbers.items()}}


@dataclass(frozen=True)
class _Stored:
    numbers: Mapping[str, str]
    ratings: Mapping[str, int]
    items: Mapping[str, int]


@dataclass(frozen=True)
class Night:
    """A good night: one that is published. overrides: the gates that it was published in spite of."""

    ds: str
    measured: Measured
    overrides: Mapping[str, Any] = field(default_factory=dict)


def good_nights(log: DeltaLog, ds: str, most: int) -> list[Night]:
    """The published nights before `ds` whose commits say what was measured, the newest first."""
    table = log.open()
    nights = log.nights(table) if table is not None else {}
    found: list[Night] = []
    for night in nights_before(nights, ds)[:most]:
        assert table is not None
        explained = log.explain(table, night)
        if explained is not None and (measured := measured_of(explained[1])) is not None:
            found.append(Night(night, measured, explained[1].facts.get(OVERRIDES) or {}))
    return found


def measured_of(entry: Entry) -> Measured | None:
    """None where an earlier version of ours wrote the commit, or somebody else did."""
    body = entry.facts.get(VALUES)
    try:
        found = typed(_Stored, body, more_keys=True) if isinstance(body, dict) else None
        numbers = {gate: float(text) for gate, text in found.numbers.items()} if found else {}
    except ValueError:
        return None
    return Measured(numbers, found.ratings, found.items) if found else None


def before(nights: list[Night], gate: str) -> list[float]:
    """The values of a gate, the newest first, back to the night that was published in spite of it: what was said to be
    right then is the measure from then on."""
    values: list[float] = []
    for night in nights:
        if gate in night.measured.numbers:
            values.append(night.measured.numbers[gate])
        if gate in night.overrides:
            break
    return values
