"""One pass over the catalogue for a block of users. It feeds a list of the K best, and counters that give the exact
place of every held-out item. Nothing of the size users × items is ever held.

Letters: U users of a block, I items, T items asked about, S held-out items, C candidates, K list length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ncf_dist.models import Users
from ncf_dist.scoring import blocks as kernel
from ncf_dist.scoring.blocks import ModelScorer, Scorer, by_block
from ncf_dist.scoring.topk import Before, Best, FloatArray, IntArray, Lists, mask, top_k

Look = Callable[[int, FloatArray], None]
"""What else looks at a block: given its number and its scores (U, ITEMS)."""


def look_through(
    blocks: Iterable[Tensor], seen: Sequence[IntArray], best: Best, unmasked: Sequence[Look], masked: Sequence[Look]
) -> None:
    """The pass. blocks: (U, ITEMS) each, which are changed; seen: for each block the positions in its flattened scores
    that are masked; unmasked, masked: who looks at a block before and after that.
    Raises ValueError for scores that are not finite."""
    for number, (block, hidden) in enumerate(zip(blocks, seen, strict=True)):
        values: FloatArray = block.numpy()
        for look in unmasked:
            look(number, values)
        values.reshape(-1)[hidden] = -np.inf
        best.add(number * kernel.ITEMS, block)
        for look in masked:
            look(number, values)


# ---- the K best ------------------------------------------------------------------------------------------------------


def recommend(scorer: Scorer, users: Users, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    """U users, masked: what each of them must not get → values (U, K') float32 and items (U, K') int64, K' the
    lesser of K and I: best first, equal scores by ascending item index. Where fewer than K' items are left, the last
    values are -inf and the last items -1. They are on the users' device.

    The same as `top_k(mask(scorer.scores(users), masked), k)`, but memory does not grow with U × I: a ModelScorer's
    blocks are looked through while they are in the cache, and only what may be among the K best is kept.
    Raises ValueError for a model's scores that are not finite.
    """
    k = min(k, scorer.n_items)
    device = users.index.device
    values = torch.full((len(users), k), -torch.inf, device=device)
    items = torch.full((len(users), k), -1, device=device)
    for start in range(0, len(users), kernel.USERS):
        end = min(start + kernel.USERS, len(users))
        some, their = users.rows(slice(start, end)), masked.part(start, end)
        if isinstance(scorer, ModelScorer) and scorer.device.type == "cpu":
            values[start:end], items[start:end] = _best_by_block(scorer, some, their, k)
        else:  # `Best` is made for a CPU and its cache; on a GPU all scores are in its memory, and torch sorts there.
            values[start:end], items[start:end] = _best_at_once(scorer, some, their, k)
    return values, items


def _best_at_once(scorer: Scorer, users: Users, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    values, items = top_k(mask(scorer.scores(users), masked), k)
    return values, items.masked_fill_(values == -torch.inf, -1)


def _best_by_block(scorer: ModelScorer, users: Users, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    best = Best(len(users), k, kernel.ITEMS)
    look_through(scorer.blocks(users), scorer.seen_by_block(masked), best, (), ())
    values, items = best.result()
    there = items >= 0
    items[there] = scorer.catalogue[items[there]]
    return values, items


# ---- and the places of held-out items --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """A scorer's scores of a block of U users, a part of the catalogue at a time.

    of: (T,) item indexes → (U, T). blocks: (U, ITEMS) of items 0 to ITEMS - 1, then of the next ones, -inf where there
    are no more; each may be changed, and the next may overwrite it. A score has the same bits in both."""

    n_items: int
    of: Callable[[Tensor], Tensor]
    blocks: Callable[[], Iterator[Tensor]]
    n_known: int | None = None
    """Items from this one on have no score: -inf, in the last place. None: all have one."""


def by_item(n_items: int, of: Callable[[Tensor], Tensor]) -> Scores:
    """Scores from a function that scores any items, ITEMS of them at most at once."""

    def blocks() -> Iterator[Tensor]:
        for first in range(0, n_items, kernel.ITEMS):
            part = of(torch.arange(first, min(first + kernel.ITEMS, n_items)))
            block = part.new_full((len(part), kernel.ITEMS), -torch.inf)
            block[:, : part.shape[1]] = part
            yield block

    return Scores(n_items, of, blocks)


def scores_of(scores: Scores, lists: Lists) -> FloatArray:
    """(S,) the scores of each user's own `lists`, (U, ITEMS) at most at once."""
    own = np.empty(len(lists.values), np.float32)
    distinct, place = np.unique(lists.values, return_inverse=True)
    for first in range(0, len(distinct), kernel.ITEMS):
        part = scores.of(torch.from_numpy(distinct[first : first + kernel.ITEMS])).numpy()
        here = (place >= first) & (place < first + kernel.ITEMS)
        own[here] = part[lists.row[here], place[here] - first]
    return own


@dataclass(frozen=True)
class Ranking:
    """Of a block of users: values, items (U, K) as `recommend` gives them; candidates (C,) their scores; before (S,)
    how many items come before each held-out one."""

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
    block and items, scored whether seen or not. look: is given every block, masked.

    Holds, besides what `scores` holds, a block (U, ITEMS), a few times as much while it is counted, and 20 bytes for
    each of 8 U K scores at most. Raises ValueError for scores that are not finite."""
    n_items = scores.n_items
    among, theirs = by_block(*candidates, n_items), np.empty(len(candidates[0]), np.float32)
    before = Before(held, np.where(held.are_in(seen, n_items), np.float32(-np.inf), own))
    best = Best(len(seen.offsets) - 1, min(k, n_items), kernel.ITEMS)

    def note_candidates(number: int, values: FloatArray) -> None:
        which, places = among[number]
        theirs[which] = values.reshape(-1)[places]

    def count(number: int, values: FloatArray) -> None:
        look(values)
        before.add(number * kernel.ITEMS, values)

    hidden = [places for _, places in by_block(seen.row, seen.values, n_items)]
    look_through(scores.blocks(), hidden, best, [note_candidates], [count])
    if scores.n_known is not None:
        before.count[held.values >= scores.n_known] = n_items - 1
    return Ranking(*best.result(), theirs, before.count)
