"""One pass over the catalogue for a block of users: the K best, and the place of every held-out item, exact, with
nothing of U × I ever held.

Letters: U users of a block, I items, T items asked about, S held-out items, C candidates, K list length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist.scoring import Lists
from ncf_dist.scoring import blocks as kernel
from ncf_dist.scoring.topk import Best

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """A scorer's scores of a block of U users, a part of the catalogue at a time.

    of: (T,) item indexes → (U, T). blocks: (U, ITEMS) of items 0 to ITEMS - 1, then of the next ones, -inf where there
    are no more; each may be changed, and may be overwritten by the next. A score has the same bits in both."""

    n_items: int
    of: Callable[[Tensor], Tensor]
    blocks: Callable[[], Iterator[Tensor]]


def by_item(n_items: int, of: Callable[[Tensor], Tensor]) -> Scores:
    """Scores of what can score any items, ITEMS of them at most at once."""

    def blocks() -> Iterator[Tensor]:
        for first in range(0, n_items, kernel.ITEMS):
            part = of(torch.arange(first, min(first + kernel.ITEMS, n_items)))
            block = part.new_full((len(part), kernel.ITEMS), -torch.inf)
            block[:, : part.shape[1]] = part
            yield block

    return Scores(n_items, of, blocks)


def scores_of(scores: Scores, lists: Lists) -> FloatArray:
    """(S,) the scores of each user's own `lists`, (U, ITEMS) at most at once."""
    found = np.empty(len(lists.values), np.float32)
    distinct, place = np.unique(lists.values, return_inverse=True)
    for first in range(0, len(distinct), kernel.ITEMS):
        part = scores.of(torch.from_numpy(distinct[first : first + kernel.ITEMS])).numpy()
        here = (place >= first) & (place < first + kernel.ITEMS)
        found[here] = part[lists.row[here], place[here] - first]
    return found


@dataclass(frozen=True)
class Ranking:
    """Of a block of users: values, items (U, K) as `scoring.recommend` gives them; candidates (C,) their scores;
    before (S,) how many items come before each held-out one."""

    values: Tensor
    items: Tensor
    candidates: FloatArray
    before: IntArray


def rank(
    scores: Scores,
    seen: Lists,
    held: Lists,
    own: FloatArray,
    candidates: tuple[IntArray, IntArray],
    k: int,
    look: Callable[[FloatArray], None] = lambda block: None,
) -> Ranking:
    """One pass over `scores` with what is `seen` masked. own: (S,) scores of `held`. candidates: (C,) users of the
    block and items, scored whether seen or not. look: is shown every block, masked.

    Holds, besides what `scores` holds, a block (U, ITEMS), a few times as much while it is counted, and 20 bytes for
    each of 8 U K scores at most. Raises ValueError for scores that are not finite."""
    n_items, width = scores.n_items, kernel.ITEMS
    among, hidden = kernel.by_block(*candidates, n_items), kernel.by_block(seen.row, seen.values, n_items)
    theirs = np.empty(len(candidates[0]), np.float32)
    before = _Before(held, np.where(_in(held, seen, n_items), np.float32(-np.inf), own))
    best = Best(len(seen.offsets) - 1, min(k, n_items), width)
    for number, block in enumerate(scores.blocks()):
        values: FloatArray = block.numpy()
        which, places = among[number]
        theirs[which] = values.reshape(-1)[places]
        values.reshape(-1)[hidden[number][1]] = -np.inf
        look(values)
        best.add(number * width, block)
        before.add(number * width, values)
    return Ranking(*best.result(), theirs, before.count)


def _in(some: Lists, others: Lists, n_items: int) -> npt.NDArray[np.bool_]:
    """(S,) whether an entry of `some` is in the same user's `others`."""
    return np.isin(some.row * n_items + some.values, others.row * n_items + others.values)


class _Before:
    """Counts the items that come before held-out ones: higher scores, and equal ones of a lower index."""

    def __init__(self, held: Lists, own: FloatArray) -> None:
        self.count = np.zeros(len(own), np.int64)
        self.row, self.item, self.own = held.row, held.values, own[:, None]
        # As many at once as there are users: one with many held-out items has as many rows of scores.
        step = max(1, len(held.offsets) - 1)
        self.parts = [slice(first, first + step) for first in range(0, len(own), step)]

    def add(self, first: int, block: FloatArray) -> None:
        """Scores (U, ITEMS) of the items from `first` on, -inf for none."""
        index = first + np.arange(block.shape[1])
        for part in self.parts:
            rows, own, item = block[self.row[part]], self.own[part], self.item[part]
            self.count[part] += np.count_nonzero(rows > own, axis=1)
            later = item > first
            tied = (rows[later] == own[later]) & (index < item[later, None])
            self.count[part][later] += np.count_nonzero(tied, axis=1)
