"""How many interactions are in each bin of ratings and of items, and when the newest one was: counted in the pass over
users, in a size that does not depend on the rows, for the gates of publish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ncf_dist.sampling import IntArray

ITEM_BUCKETS = 64
"""An item keeps its number for ever, so it stays in its bucket."""
BINS_AN_OCTAVE = 7
"""Of ratings: enough that half stars from 0.5 to 5 are all told apart."""
SMALLEST, LARGEST = -14, 112
"""Bins of the ratings 0.25 and 65,536; what is smaller or larger is in these."""


def rating_bins(rating: npt.NDArray[np.floating[Any]]) -> IntArray:
    """(R,) a bin by the logarithm, so that it is a function of the rating alone, whatever the scale, with the rating's
    sign; 0 has its own."""
    size = np.abs(rating.astype(np.float64))
    octave = np.floor(np.log2(np.where(size == 0, 1, size)) * BINS_AN_OCTAVE)
    place = np.clip(octave, SMALLEST, LARGEST) + (1 - SMALLEST)
    return np.where(size == 0, 0, place * np.sign(rating)).astype(np.int64)


class Bins:
    """ratings, items: interactions by bin; newest: in microseconds since 1970, 0 where there is none."""

    def __init__(self) -> None:
        self.ratings, self.items, self.newest = Counter[str](), Counter[str](), 0

    def add(self, item: IntArray, rating: npt.NDArray[np.floating[Any]], timestamp: IntArray) -> None:
        """(R,) of each."""
        furthest = LARGEST + 1 - SMALLEST  # From 0, in both directions.
        for counter, bins, lowest in (
            (self.ratings, rating_bins(rating), -furthest),
            (self.items, item % ITEM_BUCKETS, 0),
        ):
            rows = np.bincount(bins - lowest)
            counter.update({str(place + lowest): int(rows[place]) for place in np.flatnonzero(rows)})
        self.newest = max(self.newest, int(timestamp.max(initial=0)))

    @classmethod
    def joined(cls, parts: Iterable[Mapping[str, Any]]) -> Bins:
        """Of all parts, each the `vars` of one."""
        whole = cls()
        for part in parts:
            whole.ratings.update(part["ratings"])
            whole.items.update(part["items"])
            whole.newest = max(whole.newest, part["newest"])
        return whole
