"""A histogram of scores of unknown range. Its size is bounded, and it is the same in whatever order values are added
and histograms merged.

Bins are [i · 2^e, (i + 1) · 2^e). When values no longer fit, neighbours are merged in pairs (e grows by one). So any
two histograms can be brought to the same bins exactly, and the result is a function of all the values alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

BINS = 512
"""Most bins that are kept."""


@dataclass
class Histogram:
    """counts[i] values lie in [i · 2^exponent, (i + 1) · 2^exponent)."""

    exponent: int = 0
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count finite values; others are left out."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        exponent = _exponent(low, high)
        first = int(np.floor(np.ldexp(low, -exponent)))
        place = np.floor(np.ldexp(values.astype(np.float64), -exponent)).astype(np.int64) - first
        counted = np.bincount(place)
        self.merge(Histogram(exponent, Counter({first + int(i): int(counted[i]) for i in np.flatnonzero(counted)})))

    def merge(self, other: Histogram) -> None:
        if not other.counts:
            return
        if not self.counts:
            self.exponent = other.exponent
        exponent = max(self.exponent, other.exponent)
        self.counts = self._at(exponent) + other._at(exponent)
        self.exponent = exponent
        self.fit(BINS)

    def fit(self, bins: int) -> None:
        """Merge neighbours until at most `bins` bins are spanned."""
        while self.counts and max(self.counts) - min(self.counts) >= bins:
            self.counts = self._at(self.exponent + 1)
            self.exponent += 1

    def _at(self, exponent: int) -> Counter[int]:
        shift = exponent - self.exponent
        if not shift:
            return self.counts
        coarse: Counter[int] = Counter()
        for place, count in self.counts.items():
            coarse[place >> shift] += count
        return coarse

    def as_json(self) -> dict[str, object]:
        return {"exponent": self.exponent, "counts": sorted(self.counts.items())}

    @classmethod
    def from_json(cls, body: dict[str, object]) -> Histogram:
        return cls(body["exponent"], Counter(dict(body["counts"])))  # type: ignore[arg-type, call-overload]


def _exponent(low: float, high: float) -> int:
    """The finest bins that float32 tells apart here and that span [low, high] with at most BINS."""
    _, magnitude = np.frexp(max(abs(low), abs(high), 2.0**-100))
    exponent = int(magnitude) - 24
    while np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


def on_common_bins(histograms: dict[str, Histogram], bins: int) -> dict[str, list[float]]:
    """{"edges": (at most bins + 1), name: counts, …}, all over the same, equally wide bins; empty without values."""
    together = Histogram()
    for histogram in histograms.values():
        if histogram.counts:
            together.merge(histogram)
    if not together.counts:
        return {}
    together.fit(bins)
    low, high = min(together.counts), max(together.counts)
    width = 2.0**together.exponent
    common: dict[str, list[float]] = {"edges": [place * width for place in range(low, high + 2)]}
    for name, histogram in histograms.items():
        at = histogram._at(together.exponent) if histogram.counts else Counter()
        common[name] = [at[place] for place in range(low, high + 1)]
    return common
