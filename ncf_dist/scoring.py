"""The one scorer: evaluation and publication rank with this code, so the metric is about what ships.

A scorer gives the scores of a block of users for the whole catalogue; `recommend` gives the K best without ever holding
them. What a user has seen is masked from compact lists. Equal scores are ordered by item_idx, and every product is
taken in blocks of one shape, so a result depends on no block, batch or partition.

Letters: U users of a call, I items, E eligible items, K list length, T items asked about, F and H the widths of
`models.Parts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ncf_dist import products
from ncf_dist.errors import ConfigError
from ncf_dist.models import Parts, Recommender

USERS, ITEMS = 256, 1024
"""Shape of a block of scores: 1 MiB, which stays in a core's second-level cache. Always the same shape, filled up where
there are fewer: a matrix product rounds differently for 1, 3 or 17 rows, and a score must not depend on who else is in
the block."""
HIDDEN_NUMBERS = 131_072
"""What the widest layer of a block may hold: as many users at once as fit, two at least. In cache, likewise."""
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


class Scorer(Protocol):
    """Scores a block of users for all items."""

    n_items: int

    def scores(self, users: Tensor) -> Tensor:
        """(U,) int64 → (U, I) float32; a fresh tensor that the caller may change."""
        ...


class ModelScorer:
    """A trained model over a catalogue, one block of USERS × ITEMS at a time.

    eligible: (E,) ascending item indexes; all others score -inf. None: all items are eligible.
    precision: `bf16` rounds the factors of the dot product to bfloat16 and sums in float32; hidden layers stay float32,
    in which they are quicker. Where torch has no such product (fewer than some 32 factors, another processor) it is
    float32 after all.

    Memory, besides the model's own weights (of a local bundle memory-mapped, shared by all processes of a machine):
    4 (F + H) bytes an eligible item, e.g. 5.6 MiB for 20,000 × 64; and buffers of USERS × ITEMS scores and twice
    HIDDEN_NUMBERS hidden units, 2 MiB at most where no layer is wider than 64.

    Raises ValueError for `eligible` that is not ascending or not in the catalogue, ConfigError where this process's
    products depend on the position.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Recommender,
        n_items: int,
        *,
        eligible: Tensor | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model, self.n_items = model.eval(), n_items
        self.catalogue = torch.arange(n_items) if eligible is None else eligible
        inside = ((self.catalogue >= 0) & (self.catalogue < n_items)).all()
        if not (inside and (self.catalogue.diff() > 0).all()):
            raise ValueError(f"eligible items are {self.catalogue}; needed ascending indexes from 0 to {n_items - 1}")
        self.place: IntArray | None = None  # Of each item among the eligible ones, -1 for the others.
        if eligible is not None:
            self.place = np.full(n_items, -1)
            self.place[eligible.numpy()] = np.arange(len(eligible))
        parts = model.item_parts(torch.zeros(1, dtype=torch.int64))
        self.block: _Split | _Joined = _Joined(model) if parts is None else _Split(model, parts, len(self), precision)
        if len(self):
            products.check()
            self._check_positions()
        for first in range(0, len(self), ITEMS):
            self.block.add_items(first // ITEMS, _filled(self.catalogue[first : first + ITEMS], ITEMS))

    def _check_positions(self) -> None:
        """The canary with this model's own weights and shapes: a few users and items, repeated."""
        users = torch.arange(USERS) % products.ROWS * self.model.n_users // products.ROWS
        items = torch.arange(ITEMS) % products.COLUMNS * len(self) // products.COLUMNS
        self.block.add_items(0, self.catalogue[items])
        self.block.take_users(users, USERS)
        if not products.repeats(self.block.scores(0), products.COLUMNS):
            raise ConfigError(products.refusal("a score of this model"))

    def __len__(self) -> int:
        """E"""
        return len(self.catalogue)

    @torch.no_grad()
    def blocks(self, users: Tensor) -> Iterator[Tensor]:
        """(U,) int64, at most USERS of them → (U, ITEMS) scores of the eligible items 0 to ITEMS - 1, then of the
        next ones; -inf in the last block where there are no more. Each is one buffer that the next one overwrites."""
        self.block.take_users(_filled(users, USERS), len(users))
        for first in range(0, len(self), ITEMS):
            scores = self.block.scores(first // ITEMS)[: len(users)]
            scores[:, len(self) - first :] = -torch.inf
            yield scores

    def scores(self, users: Tensor) -> Tensor:
        scores = torch.full((len(users), self.n_items), -torch.inf)
        for start in range(0, len(users), USERS):
            rows = scores[start : start + USERS]
            for first, block in zip(range(0, len(self), ITEMS), self.blocks(users[start : start + USERS]), strict=True):
                items = self.catalogue[first : first + ITEMS]
                rows[:, slice(first, first + ITEMS) if self.place is None else items] = block[:, : len(items)]
        return scores

    def seen_by_block(self, seen: Lists) -> list[IntArray]:
        """For each block the places of `seen` in its scores as one line."""
        row, place = seen.row, seen.values
        if self.place is not None:
            place = self.place[place]
            row, place = row[place >= 0], place[place >= 0]
        number = place // ITEMS
        # A stable sort of 16 bits is a radix sort.
        order = np.argsort(number.astype(np.uint16) if len(self) < 2**16 * ITEMS else number, kind="stable")
        flat = (row * ITEMS + place % ITEMS)[order]
        ends = np.cumsum(np.bincount(number, minlength=-(-len(self) // ITEMS)))
        return np.split(flat, ends)[:-1]


class _Split:
    """Blocks of scores of a model that has `Parts`: dot_u · dot_i + f(hidden_u + hidden_i).

    The tower's activations are kept without what the user alone adds to them. With y_1 = hidden_i, c_1 = hidden_u and
    v_l = max(y_l, -c_l), ReLU(y_l + c_l) = c_l + v_l. So y_(l+1) = W_l v_l a pair, c_(l+1) = W_l c_l + b_l a user, and
    a layer costs one product and one maximum; what is left of c in the end is one more column of dot_u.
    Features come first, (H, pairs): the small products are then as quick as large ones.
    """

    def __init__(self, model: Recommender, parts: Parts, n_items: int, precision: str) -> None:
        self.model, self.precision = model, precision
        self.layers = model.joining_layers()
        number, width = -(-n_items // ITEMS), parts.dot.shape[1] + bool(self.layers)
        self.item_dot = torch.empty(number, width, ITEMS)
        self.item_hidden = torch.empty(number, parts.hidden.shape[1], 1, ITEMS)
        self.out = torch.empty(USERS, ITEMS)
        widths = [weight.shape[1] for weight, _ in self.layers]
        most = max(2, HIDDEN_NUMBERS // (ITEMS * max([1, *widths])))
        self.step = min(USERS, 1 << (most.bit_length() - 1))
        self.hidden = [torch.empty(width, self.step, ITEMS) for width in widths]
        # The same memory as the products see it: a feature's pairs in one line.
        self.pairs = [v.view(len(v), -1) for v in self.hidden]
        self.rows = [rows.view(1, -1) for rows in self.out.split(self.step)]

    def add_items(self, number: int, items: Tensor) -> None:
        parts = self.model.item_parts(items)
        assert parts is not None
        dot = functional.pad(parts.dot, (0, 1), value=1.0) if self.layers else parts.dot
        self.item_dot[number], self.item_hidden[number, :, 0] = dot.T, parts.hidden.T

    def take_users(self, users: Tensor, count: int) -> None:
        """users: USERS of them, of which the first `count` are asked for."""
        parts = self.model.user_parts(users)
        assert parts is not None
        self.user_dot, self.cuts = parts.dot, []
        if self.layers:
            cuts, c = [], parts.hidden
            for weight, bias in self.layers:
                cuts.append(c.T.neg().contiguous()[:, :, None].split(self.step, 1))
                c = functional.linear(c, weight, bias)
            self.user_dot = torch.cat([parts.dot, c], 1)
            self.cuts = list(zip(*cuts, strict=True))[: -(-count // self.step)]

    def scores(self, number: int) -> Tensor:
        """(USERS, ITEMS); rows of users that are not asked for are of no use."""
        with _products(self.precision):
            torch.mm(self.user_dot, self.item_dot[number], out=self.out)
        for rows, cuts in zip(self.rows, self.cuts, strict=False):
            self._add_tower(self.item_hidden[number], cuts, rows)
        return self.out if self.model.y_range is None else _into_range_(self.out, *self.model.y_range)

    def _add_tower(self, y: Tensor, cuts: tuple[Tensor, ...], rows: Tensor) -> None:
        """y (H, 1, ITEMS) and cuts (H, step, 1) of each layer: adds f to `rows` (1, step · ITEMS)."""
        last = len(cuts) - 1
        for number, cut in enumerate(cuts):
            torch.maximum(y, cut, out=self.hidden[number])
            weight, pairs = self.layers[number][0], self.pairs[number]
            if number < last:
                torch.mm(weight, pairs, out=self.pairs[number + 1])
                y = self.hidden[number + 1]
            else:
                rows.addmm_(weight, pairs)


class _Joined:
    """Blocks of scores of any other model, through its `score_block`."""

    STEP = 16

    def __init__(self, model: Recommender) -> None:
        self.model = model
        self.items: dict[int, tuple[Tensor, ...]] = {}
        self.out = torch.empty(USERS, ITEMS)

    def add_items(self, number: int, items: Tensor) -> None:
        self.items[number] = self.model.item_side(items)

    def take_users(self, users: Tensor, count: int) -> None:
        self.users, self.count = self.model.user_side(users), count

    def scores(self, number: int) -> Tensor:
        for start in range(0, self.count, self.STEP):
            users = tuple(side[start : start + self.STEP] for side in self.users)
            self.out[start : start + self.STEP] = self.model.score_block(users, self.items[number])
        return self.out


def _into_range_(score: Tensor, low: float, high: float) -> Tensor:
    """`models.into_range`, in place."""
    return score.sigmoid_().mul_(high - low).add_(low)


def _filled(index: Tensor, step: int) -> Tensor:
    """`index` and then its first entry until the length is a multiple of `step`."""
    return torch.cat([index, index[:1].expand(-len(index) % step)])


@contextlib.contextmanager
def _products(precision: str) -> Iterator[None]:
    """Matrix products of float32 tensors in `precision`."""
    if precision == "fp32":
        yield
        return
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision = before


class PopularityScorer:
    """Every user gets the items most interacted with in train: the baseline a model must beat."""

    def __init__(self, train_count: IntArray) -> None:
        self.n_items = len(train_count)
        # Counts past 2^24 are not exact in float32; their order is kept by ranking them first.
        self.places = torch.from_numpy(np.unique(train_count, return_inverse=True)[1].astype(np.float32))

    def scores(self, users: Tensor) -> Tensor:
        return self.places.expand(len(users), -1).clone()


def mask(scores: Tensor, seen: Lists) -> Tensor:
    """Set the scores (U, I) of seen items to -inf, in place. Returns `scores`."""
    scores[torch.from_numpy(seen.row), torch.from_numpy(seen.values)] = -torch.inf
    return scores


def recommend(scorer: Scorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    """users (U,) int64, masked: what each of them must not get → values (U, K') float32 and items (U, K') int64, K' the
    lesser of K and I: best first, equal scores by ascending item index. Where fewer than K' items are left, the last
    values are -inf and the last items -1.

    The same as `top_k(mask(scorer.scores(users), masked), k)`, but memory does not grow with U × I: a ModelScorer's
    blocks are looked through while they are in cache, and only what may be among the K best is kept.
    """
    k = min(k, scorer.n_items)
    values = torch.full((len(users), k), -torch.inf, device=users.device)
    items = torch.full((len(users), k), -1, device=users.device)
    for start in range(0, len(users), USERS):
        end = min(start + USERS, len(users))
        some, their = users[start:end], masked.part(start, end)
        if isinstance(scorer, ModelScorer) and users.device.type == "cpu":
            values[start:end], items[start:end] = _model_best(scorer, some, their, k)
        else:  # On a GPU the scores of a block are no further away than a threshold.
            values[start:end], items[start:end] = _best(scorer, some, their, k)
    return values, items


def _best(scorer: Scorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    values, items = top_k(mask(scorer.scores(users), masked), k)
    return values, items.masked_fill_(values == -torch.inf, -1)


def _model_best(scorer: ModelScorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    best = _Best(len(users), k)
    for number, (block, seen) in enumerate(zip(scorer.blocks(users), scorer.seen_by_block(masked), strict=True)):
        block.numpy().reshape(-1)[seen] = -np.inf
        best.add(number * ITEMS, block)
    values, items = best.result()
    found = items >= 0
    items[found] = scorer.catalogue[items[found]]
    return values, items


class _Best:
    """The K best of each user over blocks that come in ascending order of place.

    A score that is below K others can be left out. The K others are sought among the highest of each of G groups of
    places (those that are equal modulo G): the K-th highest of G maxima is a bound that costs one pass over a block.
    What reaches the bound of its time is found; once in a while, and in the end, the found are sorted.
    """

    def __init__(self, users: int, k: int) -> None:
        self.k, self.users = k, users
        # Of the first 1,024 scores some 12 reach the 10th highest of 32 maxima.
        self.groups = min(ITEMS, max(32, 1 << (2 * k).bit_length()))
        self.heads = np.full((users, self.groups), -np.inf, np.float32)
        self.bound = np.full(users, LOWEST)
        self.floor = np.full(users, LOWEST)
        """At least `bound`; above the K-th best where that is known, since a later place loses a tie."""
        self.found: list[tuple[IntArray, IntArray, FloatArray]] = []
        self.count = 0

    def add(self, first: int, block: Tensor) -> None:
        """Scores (U, ITEMS) of the places from `first` on; -inf is none."""
        grouped = block.view(self.users, -1, self.groups)
        heads = grouped.amax(1).numpy()
        np.maximum(self.heads, heads, out=self.heads)
        # Twice as many scores move the bound as much wherever they stand: it is looked at after 1, 2, 4, 8 … blocks.
        number = first // ITEMS + 1
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
    for row in torch.nonzero((scores >= last).sum(1) > k)[:, 0].tolist():
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
    ties_before = (scores == own) & (torch.arange(scores.shape[1])[None] < item[:, None])
    return 1 + (scores > own).sum(1) + ties_before.sum(1)
