"""The K best of each user, and the places of single items: equal scores are ordered by item index.

Letters: U users, I items, K list length, S entries of ragged lists, T items asked about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FOUND_AT_MOST = 8
"""Candidates kept, in multiples of U × K and beside those of one block, before they are cut down to the K best."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class Lists:
    """Ragged lists, one a user: values (S,), offsets (U+1,)."""

    values: IntArray
    offsets: IntArray

    @property
    def row(self) -> IntArray:
        """(S,) the user each value belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def part(self, start: int, end: int) -> Lists:
        """The lists of users [start, end)."""
        offsets = self.offsets[start : end + 1]
        return Lists(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def mask(scores: Tensor, seen: Lists) -> Tensor:
    """Set the scores (U, I) of seen items to -inf, in place. Returns `scores`."""
    row, item = (torch.from_numpy(places).to(scores.device) for places in (seen.row, seen.values))
    scores[row, item] = -torch.inf
    return scores


class Best:
    """The K best of each user over blocks that come in ascending order of place.

    A score that is below K others can be left out. The K others are sought among the highest of each of G groups of
    places (those that are equal modulo G): the K-th highest of G maxima is a bound that costs one pass over a block.
    What reaches the bound of its time is found; once in a while, and in the end, the found are sorted.
    """

    def __init__(self, users: int, k: int, width: int) -> None:
        """width: places of a block."""
        self.k, self.users, self.width = k, users, width
        # Of the first 1,024 scores some 12 reach the 10th highest of 32 maxima.
        self.groups = min(width, max(32, 1 << (2 * k).bit_length()))
        self.heads = np.full((users, self.groups), -np.inf, np.float32)
        self.bound = np.full(users, LOWEST)
        self.floor = np.full(users, LOWEST)
        """At least `bound`; above the K-th best where that is known, since a later place loses a tie."""
        self.found: list[tuple[IntArray, IntArray, FloatArray]] = []
        self.count = 0

    def add(self, first: int, block: Tensor) -> None:
        """Scores (U, width) of the places from `first` on; -inf is none. Raises ValueError for one that is not a number
        or infinite."""
        grouped = block.view(self.users, -1, self.groups)
        heads = grouped.amax(1).numpy()
        if not (heads < np.inf).all():
            raise ValueError("the model gives scores that are not finite; needed finite ones: train again")
        np.maximum(self.heads, heads, out=self.heads)
        # Twice as many scores move the bound as much wherever they stand: it is looked at after 1, 2, 4, 8 … blocks.
        number = first // self.width + 1
        if self.k <= self.groups and number & (number - 1) == 0:
            np.maximum(self.bound, np.sort(self.heads, axis=1)[:, -self.k], out=self.bound)
            np.maximum(self.floor, self.bound, out=self.floor)
        row, group = np.divmod(np.flatnonzero(heads >= self.floor[:, None]), self.groups)
        members = grouped.numpy()[row, :, group]
        which, step = np.divmod(np.flatnonzero(members >= self.floor[row][:, None]), members.shape[1])
        self.found.append((row[which], first + step * self.groups + group[which], members[which, step]))
        self.count += len(which)
        if self.count > FOUND_AT_MOST * self.users * self.k:
            self._cut()

    def _cut(self) -> IntArray:
        """Keep the K best of each user, in order; returns each one's rank from 0."""
        row, place, value = (np.concatenate(parts) for parts in zip(*self.found, strict=True))
        reach = value >= self.bound[row]
        row, place, value = row[reach], place[reach], value[reach]
        order = _order(row, place, value)
        row, place, value = row[order], place[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < self.k
        row, place, value = row[kept], place[kept], value[kept]
        ranks: IntArray = rank[kept]
        last = ranks == self.k - 1
        self.floor[row[last]] = np.nextafter(value[last], np.float32(np.inf))
        self.found, self.count = [(row, place, value)], len(row)
        return ranks

    def result(self) -> tuple[Tensor, Tensor]:
        """values (U, K), -inf where there are no more; places (U, K), -1 there."""
        values, places = np.full((self.users, self.k), -np.inf, np.float32), np.full((self.users, self.k), -1)
        if self.found:
            rank = self._cut()
            [(row, place, value)] = self.found
            values[row, rank], places[row, rank] = value, place
        return torch.from_numpy(values), torch.from_numpy(places)


def _order(row: IntArray, place: IntArray, value: FloatArray) -> IntArray:
    """What sorts by row, then by falling value, then by place."""
    # The bits of a float, those below its sign inverted where it is negative, are an integer of the same order.
    # -0.0 is made 0.0: the two are equal.
    bits = (np.float32(0) - value).view(np.int32)
    key = (row << 32) + (bits ^ ((bits >> 31) & 0x7FFFFFFF))
    order: IntArray = np.argsort(key)
    if not (np.diff(key[order]) == 0).any():
        return order
    by_place: IntArray = np.lexsort((place, key))
    return by_place


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(U, I) → the K best (values, item indexes), each (U, min(K, I)), best first, equal scores by ascending index.

    Masked items (-inf) come last; a user with fewer than K unmasked items has them at the end.
    """
    k = min(k, scores.shape[1])
    values, index = torch.topk(scores, k, dim=1)
    last = values[:, -1:]
    # topk picks freely among items that tie with the last place:
    # where there are more of them than places, choose again by index.
    for row in torch.nonzero((scores >= last).sum(1) > k)[:, 0].cpu().tolist():
        better = torch.nonzero(scores[row] > last[row])[:, 0]
        tied = torch.nonzero(scores[row] == last[row])[:, 0][: k - len(better)]
        index[row] = torch.cat([better, tied])
    index = index.sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def catalogue_rank(scores: Tensor, item: Tensor) -> Tensor:
    """Rank (from 1) of item[u] among the items of row u, ordered as `top_k` orders them.

    scores (U, I), item (U,) → (U,) int64; item (U, T), several a user → (U, T) int64, each ranked as if asked alone.
    """
    if item.ndim == 2:
        ranks = [catalogue_rank(scores, column) for column in item.unbind(1)]
        return torch.stack(ranks, 1) if ranks else item.clone()
    own = scores.gather(1, item[:, None])
    place = torch.arange(scores.shape[1], device=scores.device)
    ties_before = (scores == own) & (place[None] < item[:, None])
    return 1 + (scores > own).sum(1) + ties_before.sum(1)
