"""Which rank takes which row in which step: arithmetic on the manifest's row counts, nothing is opened.

- Every row is used once an epoch, but for the last `rows mod ranks` of that epoch's order;
  other rows are last in the next epoch.
- All ranks take the same number of steps.
- The order is a function of (seed, epoch, ranks, phase): files are dealt anew every epoch, and the rows of
  `shuffle_files` pieces at a time are permuted together (the table itself is in hashed order).

Deal: the files in the epoch's order are one line of rows, cut into equal intervals, one a rank. A file on a cut is read
by both neighbours, each taking its own rows, so any number of files serves any number of ranks exactly.

Phases: an epoch that is continued with another number of ranks, or another batch size, is in a new phase. What the
earlier phases used follows from their numbers alone; the rows that are left are one line again, dealt as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from ncf_dist.errors import ContractError
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
class Piece:
    """Rows start..end of those that are left of one file."""

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class Window:
    """Pieces whose rows are mixed. `key` seeds their permutation."""

    pieces: tuple[Piece, ...]
    key: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)

    def permutation(self) -> Rows:
        """(rows,) the order in which the rows of the pieces, one after another, are used."""
        return np.random.default_rng(self.key).permutation(self.rows)


def rows_per_rank(rows: int, ranks: int) -> int:
    return rows // ranks


def steps_per_epoch(rows: int, ranks: int, batch_size: int) -> int:
    """Steps of every rank; the last batch may be smaller, by as much on all ranks.
    Raises ContractError when a rank would have no row."""
    each = rows_per_rank(rows, ranks)
    if each == 0:
        raise ContractError(
            f"the train table has {rows} rows for {ranks} ranks; needed at least one a rank: "
            "lower train.ranks or give more data"
        )
    return -(-each // batch_size)


def deal(file_rows: Sequence[int], seed: int, epoch: int, world: World) -> list[Piece]:
    """The pieces that this rank reads in this epoch, in order: rows_per_rank rows in all."""
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(file_rows))
    each = rows_per_rank(sum(file_rows), world.size)
    low, high = world.rank * each, (world.rank + 1) * each
    pieces, position = [], 0
    for file in order.tolist():
        start, end = max(low - position, 0), min(high - position, file_rows[file])
        if start < end:
            pieces.append(Piece(file, start, end))
        position += file_rows[file]
    return pieces


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
        """Steps of every rank until the rows that are left are used; 0 when there are fewer than ranks."""
        return -(-rows_per_rank(self.rows, ranks) // batch_size)

    def windows(self, world: World, shuffle_files: int, phase: int | None = None) -> list[Window]:
        """What this rank reads, in order."""
        pieces = deal(self.counts, self.seed, self.epoch, world)
        number = self.phase if phase is None else phase
        key = (self.seed, 2, self.epoch, world.rank, world.size, number)
        return [
            Window(tuple(pieces[start : start + shuffle_files]), (*key, start))
            for start in range(0, len(pieces), shuffle_files)
        ]

    def rows_of(self, piece: Piece) -> slice | Rows:
        """Where in its file the rows of a piece are."""
        left = self.left[piece.file]
        return slice(piece.start, piece.end) if left is None else left[piece.start : piece.end]

    def _take(self, number: int, phase: Phase) -> None:
        """Leave out what `phase` used: of each of its ranks the first rows of that rank's order."""
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
                for piece in window.pieces:
                    size = piece.end - piece.start
                    used.setdefault(piece.file, []).append(
                        piece.start + np.flatnonzero(taken[start : start + size]).astype(np.int64)
                    )
                    start += size
        for file, parts in used.items():
            left = self.left[file]
            rows = np.arange(self.counts[file], dtype=np.int64) if left is None else left
            self.left[file] = np.delete(rows, np.concatenate(parts))
            self.counts[file] = len(rows) - sum(len(part) for part in parts)
