"""Which rank takes which row in which step: arithmetic on the manifest's row counts, no file is opened.

- Every row is used once an epoch, except the last `rows mod ranks` of that epoch's order; the next epoch has another
  order, so these are other rows then.
- All ranks take the same number of steps.
- The order is a function of (seed, epoch, ranks, phase). Files are dealt anew every epoch, and the rows of
  `shuffle_files` files at a time are permuted together (the table itself is in hashed order).

How files are dealt: put one after another in the epoch's order, their rows are cut into equal intervals, one a rank.
Both neighbours read a file that a cut goes through, and each takes its own rows. So any number of files is shared
exactly by any number of ranks.

Phases: when an epoch is continued with another number of ranks, or another batch size, a new phase begins. What the
earlier phases used follows from their numbers alone, and the rows that are left are dealt as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from ncf_dist.sampling import Stream
from ncf_dist.train.steps import rows_per_rank
from ncf_dist.train.world import World

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Phase:
    """A stretch of an epoch: `steps` steps of `batch_size` rows on each of `ranks` ranks."""

    ranks: PositiveInt
    batch_size: PositiveInt
    shuffle_files: PositiveInt
    steps: NonNegativeInt = 0

    def same_deal(self, other: Phase) -> bool:
        """Whether the other phase, apart from its steps, gives every rank the same rows in the same order."""
        return (self.ranks, self.batch_size, self.shuffle_files) == (other.ranks, other.batch_size, other.shuffle_files)


@dataclass(frozen=True)
class RowRange:
    """Rows start to end - 1 of one file, counted over those that are left."""

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class Window:
    """Ranges whose rows are permuted together. `key` seeds the permutation."""

    ranges: tuple[RowRange, ...]
    key: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(part.end - part.start for part in self.ranges)

    def permutation(self) -> Rows:
        """(rows,) the order in which the rows of all ranges, one after another, are used."""
        return np.random.default_rng(self.key).permutation(self.rows)


def deal(file_rows: Sequence[int], seed: int, epoch: int, world: World) -> list[RowRange]:
    """What this rank reads in this epoch, in order: rows_per_rank rows in all.

    >>> deal([4, 4], seed=1, epoch=0, world=World(rank=1, size=2))
    [RowRange(file=1, start=0, end=4)]
    """
    order = np.random.default_rng([seed, int(Stream.FILES), epoch]).permutation(len(file_rows))
    each = rows_per_rank(sum(file_rows), world.size)
    low, high = world.rank * each, (world.rank + 1) * each
    ranges, position = [], 0
    for file in order.tolist():
        start, end = max(low - position, 0), min(high - position, file_rows[file])
        if start < end:
            ranges.append(RowRange(file, start, end))
        position += file_rows[file]
    return ranges


class EpochOrder:
    """The order of one epoch after the phases in `done`. `left[f]`: the rows of file f that no phase has used,
    ascending; None for all of them."""

    def __init__(self, file_rows: Sequence[int], seed: int, epoch: int, done: Sequence[Phase] = ()) -> None:
        self.seed, self.epoch, self.phase = seed, epoch, len(done)
        self.counts = list(file_rows)
        self.left: list[Rows | None] = [None] * len(self.counts)
        for number, phase in enumerate(done):
            self._take(number, phase)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def steps(self, ranks: int, batch_size: int) -> int:
        """Steps of every rank until the rows that are left are used; 0 when there are fewer rows than ranks."""
        return -(-rows_per_rank(self.rows, ranks) // batch_size)

    def windows(self, world: World, shuffle_files: int, phase: int | None = None) -> list[Window]:
        """What this rank reads, in order."""
        ranges = deal(self.counts, self.seed, self.epoch, world)
        number = self.phase if phase is None else phase
        key = (self.seed, int(Stream.ROWS), self.epoch, world.rank, world.size, number)
        return [
            Window(tuple(ranges[start : start + shuffle_files]), (*key, start))
            for start in range(0, len(ranges), shuffle_files)
        ]

    def rows_of(self, part: RowRange) -> slice | Rows:
        """The positions in its file of a range's rows."""
        left = self.left[part.file]
        return slice(part.start, part.end) if left is None else left[part.start : part.end]

    def _take(self, number: int, phase: Phase) -> None:
        """Leave out what `phase` used: the first rows in the order of each of its ranks."""
        used: dict[int, list[Rows]] = {}
        for rank in range(phase.ranks):
            count = min(phase.steps * phase.batch_size, rows_per_rank(self.rows, phase.ranks))
            for window in self.windows(World(rank, phase.ranks), phase.shuffle_files, number):
                if count <= 0:
                    break
                taken = np.zeros(window.rows, dtype=bool)
                taken[slice(None) if count >= window.rows else window.permutation()[:count]] = True
                count -= window.rows
                start = 0
                for part in window.ranges:
                    size = part.end - part.start
                    used.setdefault(part.file, []).append(
                        part.start + np.flatnonzero(taken[start : start + size]).astype(np.int64)
                    )
                    start += size
        for file, parts in used.items():
            left = self.left[file]
            rows = np.arange(self.counts[file], dtype=np.int64) if left is None else left
            self.left[file] = np.delete(rows, np.concatenate(parts))
            self.counts[file] = len(rows) - sum(len(part) for part in parts)
