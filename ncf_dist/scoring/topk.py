"""The K best of each user, and the places of single items. Equal scores are ordered by item index.

Letters: U users, I items, K list length, S entries of ragged lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

KEPT_AT_MOST = 8
"""Scores that are kept, in multiples of U × K and beside those of one block, before they are cut down to the K best."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class Lists:
    """Ragged lists, one a user: values (S,), offsets (U+1,).

    >>> lists = Lists(np.array([7, 3, 5]), np.array([0, 2, 2, 3]))  # [7, 3], [] and [5]
    >>> lists.row.tolist(), lists.part(1, 3).values.tolist()
    ([0, 0, 2], [5])
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def of(cls, *columns: pa.Array) -> Lists:
        """From Arrow columns of lists: a user's lists of all columns, one after another."""
        sizes = [column.value_lengths().to_numpy(zero_copy_only=False) for column in columns]
        values = [column.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for column in columns]
        row = np.concatenate([np.repeat(np.arange(len(size)), size) for size in sizes])
        return cls(
            np.concatenate(values)[np.argsort(row, kind="stable")],
            np.concatenate([[0], np.cumsum(sum(sizes))]).astype(np.int64),
        )

    @property
    def row(self) -> IntArray:
        """(S,) the user each value belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def part(self, start: int, end: int) -> Lists:
        """The lists of users [start, end)."""
        offsets = self.offsets[start : end + 1]
        return Lists(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def are_in(self, others: Lists, n_items: int) -> npt.NDArray[np.bool_]:
        """(S,) whether each value is in the same user's list of `others`, too. Values are below `n_items`."""
        return np.isin(self.row * n_items + self.values, others.row * n_items + others.values)


def mask(scores: Tensor, seen: Lists) -> Tensor:
    """Set the scores (U, I) of seen items to -inf, in place. Returns `scores`."""
    row, item = (torch.from_numpy(places).to(scores.device) for places in (seen.row, seen.values))
    scores[row, item] = -torch.inf
    return scores


class Best:
    """The K best of each user over blocks that come in ascending order of place.

    A score that is lower than K others can be left out. A bound that costs only one pass over a block: places are put
    into G groups (those that are equal modulo G), and the K-th highest of the G groups' maxima is no higher than the
    K-th best score. Scores that reach the bound are kept; now and then, and at the end, they are sorted and all but the
    K best of each user are dropped.
    """

    def __init__(self, users: int, k: int, width: int) -> None:
        """width: places of a block."""
        self.k, self.users, self.width = k, users, width
        # Of the first 1,024 scores some 12 reach the 10th highest of 32 maxima.
        self.groups = min(width, max(32, 1 << (2 * k).bit_length()))
        self.heads = np.full((users, self.groups), -np.inf, np.float32)
        """The maximum of each group so far."""
        self.bound = np.full(users, LOWEST)
        self.floor = np.full(users, LOWEST)
        """What a score must reach to be kept: `bound`, or just above the K-th best where that is known, since a later
        place loses a tie."""
        self.kept: list[tuple[IntArray, IntArray, FloatArray]] = []
        """(user, place, score) of the scores that are kept."""
        self.count = 0

    def add(self, first: int, block: Tensor) -> None:
        """Scores (U, width) of the places from `first` on; -inf is none. Raises ValueError for a score that is not a
        number or is infinite."""
        grouped = block.view(self.users, -1, self.groups)
        heads = grouped.amax(1).numpy()
        if not (heads < np.inf).all():
            raise ValueError("the model gives scores that are not finite; needed finite ones: train again")
        np.maximum(self.heads, heads, out=self.heads)
        # The bound moves as much with every doubling of the scores, so it is computed after 1, 2, 4, 8 … blocks.
        number = first // self.width + 1
        if self.k <= self.groups and number & (number - 1) == 0:
            np.maximum(self.bound, np.sort(self.heads, axis=1)[:, -self.k], out=self.bound)
            np.maximum(self.floor, self.bound, out=self.floor)
        row, group = np.divmod(np.flatnonzero(heads >= self.floor[:, None]), self.groups)
        members = grouped.numpy()[row, :, group]
        which, step = np.divmod(np.flatnonzero(members >= self.floor[row][:, None]), members.shape[1])
        self.kept.append((row[which], first + step * self.groups + group[which], members[which, step]))
        self.count += len(which)
        if self.count > KEPT_AT_MOST * self.users * self.k:
            self._cut()

    def _cut(self) -> IntArray:
        """Keep the K best of each user, in order; returns each one's rank from 0."""
        row, place, value = (np.concatenate(parts) for parts in zip(*self.kept, strict=True))
        reach = value >= self.bound[row]
        row, place, value = row[reach], place[reach], value[reach]
        order = _order(row, place, value)
        row, place, value = row[order], place[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        best = rank < self.k
        row, place, value = row[best], place[best], value[best]
        ranks: IntArray = rank[best]
        last = ranks == self.k - 1
        self.floor[row[last]] = np.nextafter(value[last], np.float32(np.inf))
        self.kept, self.count = [(row, place, value)], len(row)
        return ranks

    def result(self) -> tuple[Tensor, Tensor]:
        """values (U, K), -inf where there are no more; places (U, K), -1 there."""
        values, places = np.full((self.users, self.k), -np.inf, np.float32), np.full((self.users, self.k), -1)
        if self.kept:
            rank = self._cut()
            [(row, place, value)] = self.kept
            values[row, rank], places[row, rank] = value, place
        return torch.from_numpy(values), torch.from_numpy(places)


class Before:
    """How many items come before each held-out one, over blocks of scores: those of a higher score, and those of the
    same score and a lower index."""

    def __init__(self, held: Lists, own: FloatArray) -> None:
        """own: (S,) scores of `held`."""
        self.count = np.zeros(len(own), np.int64)
        self.row, self.item, self.own = held.row, held.values, own[:, None]
        # As many held-out items at once as there are users: each takes a row of scores, and a user may have many.
        step = max(1, len(held.offsets) - 1)
        self.parts = [slice(first, first + step) for first in range(0, len(own), step)]

    def add(self, first: int, block: FloatArray) -> None:
        """Scores (U, width) of the items from `first` on, -inf for none."""
        index = first + np.arange(block.shape[1])
        for part in self.parts:
            rows, own, item = block[self.row[part]], self.own[part], self.item[part]
            self.count[part] += np.count_nonzero(rows > own, axis=1)
            later = item > first
            tied = (rows[later] == own[later]) & (index < item[later, None])
            self.count[part][later] += np.count_nonzero(tied, axis=1)


def _order(row: IntArray, place: IntArray, value: FloatArray) -> IntArray:
    """The order by row, then by descending value, then by place.

    >>> _order(np.array([1, 0, 0]), np.array([4, 9, 2]), np.array([5, 1, 1], np.float32)).tolist()
    [2, 1, 0]
    """
    # One integer key sorts faster than three columns. The bits of a float are an integer of the same order once those
    # of a negative one, its sign apart, are inverted. -0.0 becomes 0.0, its equal.
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

    >>> [found.tolist() for found in top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)]
    [[[3.0, 3.0]], [[1, 2]]]
    """
    k = min(k, scores.shape[1])
    values, index = torch.topk(scores, k, dim=1)
    last = values[:, -1:]
    # torch.topk chooses freely among items that tie with the last place. Where more of them tie than fit, choose again.
    for row in torch.nonzero((scores >= last).sum(1) > k)[:, 0].cpu().tolist():
        better = torch.nonzero(scores[row] > last[row])[:, 0]
        tied = torch.nonzero(scores[row] == last[row])[:, 0][: k - len(better)]
        index[row] = torch.cat([better, tied])
    index = index.sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)
