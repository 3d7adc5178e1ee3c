"""Scores of a model or of popularity, a block of users and items at a time.

Every matrix product has the same shape, so a score does not depend on the block, the batch or the partition.

Letters: U users of a call, I items, E eligible items, T items asked about, F and H the widths of `models.RankingSide`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ncf_dist import products
from ncf_dist.errors import ConfigError
from ncf_dist.item_item.part import Part
from ncf_dist.models import RankingSide, Recommender, Sequences, Users
from ncf_dist.scoring.sparse import Expansion, moved
from ncf_dist.scoring.topk import IntArray, Lists

USERS, ITEMS = 256, 1024
"""Shape of a block of scores: 1 MiB, which stays in a core's second-level cache. Smaller blocks are padded to it: a
matrix product rounds differently for 1, 3 or 17 rows, and a score must not depend on who else is in the block."""
HIDDEN_NUMBERS = 131_072
"""How many numbers the widest hidden layer holds at once, so that it stays in the cache, too. Hidden layers are
computed for as many users at a time as fit, but for two at least."""


class Scorer(Protocol):
    """Scores a block of users for all items."""

    n_items: int

    def scores(self, users: Users) -> Tensor:
        """U users → (U, I) float32; a fresh tensor that the caller may change."""
        ...


class ModelScorer:
    """A trained model over a catalogue, one block of USERS × ITEMS at a time, on the model's device.

    eligible: (E,) ascending item indexes; all others score -inf. None: all items are eligible.
    precision: `bf16` rounds the factors of the dot product to bfloat16 and adds up in float32. Hidden layers stay
    float32, which is faster for them. Where torch has no bf16 product (`engines.rounds`) everything is float32.
    engine: the library that computes float32 dot products on a CPU; the bits are the same.
    parts: what is added to the model's scores for a user's latest items, in this order.

    Users need `latest` where the model is sequential or there are parts.

    Memory, besides the model's weights (those of a local bundle are memory-mapped and shared by all processes of a
    machine): 4 (F + H) bytes an eligible item, e.g. 5.6 MiB for 20,000 × 64, and 8 for its index; buffers of USERS ×
    ITEMS scores and twice HIDDEN_NUMBERS hidden units, 2 MiB at most where no layer is wider than 64.

    Raises ValueError for `eligible` that is not ascending or not in the catalogue, and for parts of a model whose
    scores have a range; ConfigError where the products of
    this process depend on a row's position in its block, or on the engine.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Recommender,
        n_items: int,
        *,
        eligible: Tensor | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        engine: Literal["mkl", "onednn"] = "mkl",
        parts: Sequence[Part] = (),
    ) -> None:
        if parts and model.y_range is not None:
            raise ValueError(f"parts are added to scores of the range {model.y_range}; needed a model without a range")
        self.model, self.n_items = model.eval(), n_items
        self.device = next(model.parameters()).device
        every = torch.arange(n_items, device=self.device)
        self.catalogue = every if eligible is None else eligible.to(self.device)
        inside = ((self.catalogue >= 0) & (self.catalogue < n_items)).all()
        if not (inside and (self.catalogue.diff() > 0).all()):
            raise ValueError(f"eligible items are {self.catalogue}; needed ascending indexes from 0 to {n_items - 1}")
        # The position of each item among the eligible ones, -1 for the others; None where all are eligible.
        self.place: IntArray | None = None
        if eligible is not None:
            self.place = np.full(n_items, -1)
            self.place[eligible.cpu().numpy()] = np.arange(len(eligible))
        self.given = [moved(part, self.device) for part in parts]
        places = None if self.place is None else torch.from_numpy(self.place).int().to(self.device)
        self.parts = [Expansion(part, places) for part in self.given]
        on_cpu = self.device.type == "cpu"
        number = -(-len(self) // ITEMS)
        self.block = _Split(model, self.device, number + 1, precision, engine if on_cpu else "mkl", self.parts)
        self.taken: Users | None = None
        self.other = number
        """The number of a spare block, for items in any order."""
        if on_cpu and len(self):
            products.check()
            self._check_positions()
        for first in range(0, len(self), ITEMS):
            self.block.add_items(first // ITEMS, _filled(self.catalogue[first : first + ITEMS], ITEMS))

    def _check_positions(self) -> None:
        """Raise ConfigError where a score depends on its position: with this model's weights and shapes, a block of a
        few users and items, repeated, must repeat to the bit."""
        items = torch.arange(ITEMS) % products.COLUMNS * len(self) // products.COLUMNS
        self.block.add_items(self.other, self.catalogue[items])
        self.block.take_users(self._few_users())
        scores = self.block.scores(self.other).clone()
        if not products.repeats(scores, products.COLUMNS):
            raise ConfigError(products.refusal("a score of this model"))
        if self.block.engine == "onednn":
            self.block.engine = "mkl"
            if not torch.equal(self.block.scores(self.other), scores):
                raise ConfigError(products.other_engine())
            self.block.engine = "onednn"

    def _few_users(self) -> Users:
        """USERS of them, `products.ROWS` repeated, with histories of several lengths."""
        row, most = torch.arange(USERS, device=self.device) % products.ROWS, products.ROWS
        index = torch.zeros_like(row) if self.model.sequential else row * self.model.n_users // most
        slot = torch.arange(most, device=self.device)
        there = slot <= row[:, None]
        items = torch.where(there, (row[:, None] * most + slot) % self.n_items, 0)
        return Users(index, Sequences(items, torch.zeros_like(items), there.sum(1)))

    def __len__(self) -> int:
        """E"""
        return len(self.catalogue)

    @torch.no_grad()
    def blocks(self, users: Users) -> Iterator[Tensor]:
        """U users, at most USERS → (U, ITEMS) scores of the eligible items 0 to ITEMS - 1, then of the
        next ones; -inf in the last block where there are no more. The next block may overwrite the memory of one."""
        users = self._take(users)
        for part in self.parts:
            part.take(_latest(users))
        for first in range(0, len(self), ITEMS):
            scores = self.block.scores(first // ITEMS)[: len(users)]
            for part in self.parts:
                part.add(first, scores)
            scores[:, len(self) - first :] = -torch.inf
            yield scores

    @torch.no_grad()
    def of(self, users: Users, items: Tensor) -> Tensor:
        """U users, at most USERS, (T,) item indexes in any order → (U, T), the same bits as in `blocks`. Items that
        are not eligible are scored, too."""
        users = self._take(users)
        scores = torch.empty(len(users), len(items), device=self.device)
        for first in range(0, len(items), ITEMS):
            some, place = items[first : first + ITEMS].unique(return_inverse=True)
            some, place = some.to(self.device), place.to(self.device)
            self.block.add_items(self.other, _filled(some, ITEMS))
            block = self.block.scores(self.other)[: len(users)]
            self._add_parts(users, some, block)
            scores[:, first : first + ITEMS] = block[:, place]
        return scores

    def _take(self, given: Users) -> Users:
        """The users on the scorer's device. Asked about again, they are not computed again: a tower takes time."""
        if given is not self.taken:
            self.block.take_users(given.to(self.device))
            self.taken = given
        return given.to(self.device)

    def _add_parts(self, users: Users, items: Tensor, scores: Tensor) -> None:
        """Add the parts of items (T,), ascending, to their scores (U, ITEMS)."""
        if self.given:
            places = items.new_full((self.n_items,), -1, dtype=torch.int32)
            places[items] = torch.arange(len(items), dtype=torch.int32, device=self.device)
        for part in self.given:
            expansion = Expansion(part, places)
            expansion.take(_latest(users))
            expansion.add(0, scores)

    def scores(self, users: Users) -> Tensor:
        scores = torch.full((len(users), self.n_items), -torch.inf, device=self.device)
        for start in range(0, len(users), USERS):
            rows, some = scores[start : start + USERS], users.rows(slice(start, start + USERS))
            for first, block in zip(range(0, len(self), ITEMS), self.blocks(some), strict=True):
                items = self.catalogue[first : first + ITEMS]
                rows[:, slice(first, first + ITEMS) if self.place is None else items] = block[:, : len(items)]
        return scores

    def seen_by_block(self, seen: Lists) -> list[IntArray]:
        """For each block the positions of `seen` in its flattened scores."""
        row, place = seen.row, seen.values
        if self.place is not None:
            place = self.place[place]
            row, place = row[place >= 0], place[place >= 0]
        return [flat for _, flat in by_block(row, place, len(self))]


def by_block(row: IntArray, place: IntArray, n_items: int) -> list[tuple[IntArray, IntArray]]:
    """Pairs (row, place) → for each block of ITEMS places: (which of the pairs are in it, their positions in its
    flattened scores).

    >>> [(which.tolist(), flat.tolist()) for which, flat in by_block(np.array([0, 1]), np.array([1030, 2]), 2000)]
    [([1], [1026]), ([0], [6])]
    """
    number = place // ITEMS
    # NumPy's stable sort of 16-bit integers is a radix sort.
    order = np.argsort(number.astype(np.uint16) if n_items < 2**16 * ITEMS else number, kind="stable")
    flat = (row * ITEMS + place % ITEMS)[order]
    ends = np.cumsum(np.bincount(number, minlength=-(-n_items // ITEMS)))[:-1]
    return list(zip(np.split(order, ends), np.split(flat, ends), strict=True)) if n_items else []


class _Split:
    """Blocks of scores in a model's ranking form: dot_u · dot_i + f(hidden_u + hidden_i).

    Of a tower's activations only the share that depends on the pair is computed for every pair. With y_1 = hidden_i,
    c_1 = hidden_u and v_l = max(y_l, -c_l), ReLU(y_l + c_l) = c_l + v_l. So y_(l+1) = W_l v_l for each pair and
    c_(l+1) = W_l c_l + b_l once a user: a layer costs one product and one maximum, and the last c, one number a user,
    becomes another column of dot_u.

    Hidden units are (H, pairs): with the pairs last, the small products are as fast as large ones.
    """

    def __init__(
        self,
        model: Recommender,
        device: torch.device,
        number: int,
        precision: str,
        engine: str,
        parts: Sequence[Expansion] = (),
    ) -> None:
        """number: of blocks. parts: what they add to every item is columns of the product."""
        self.model, self.precision, self.engine = model, precision, engine
        self.parts = [part for part in parts if part.rows.column is not None]
        self.layers = model.ranking_layers()
        side = model.ranking_items(torch.zeros(1, dtype=torch.int64, device=device))
        empty = side.dot.new_empty
        self.item_dot = empty(number, side.dot.shape[1] + bool(self.layers) + len(self.parts), ITEMS)
        self.item_hidden = empty(number, side.hidden.shape[1], 1, ITEMS)
        self.out = empty(USERS, ITEMS)
        widths = [weight.shape[1] for weight, _ in self.layers]
        most = max(2, HIDDEN_NUMBERS // (ITEMS * max([1, *widths])))
        self.step = min(USERS, 1 << (most.bit_length() - 1))
        """Users whose hidden layers are computed at a time."""
        self.hidden = [empty(width, self.step, ITEMS) for width in widths]
        # The same memory as (H, pairs), for the products.
        self.pairs = [v.view(len(v), -1) for v in self.hidden]

    def add_items(self, number: int, items: Tensor) -> None:
        """Keep the side of ITEMS items as block `number`."""
        side = self.model.ranking_items(items)
        dot = functional.pad(side.dot, (0, 1), value=1.0) if self.layers else side.dot
        columns = [part.column(items) for part in self.parts]
        self.item_dot[number], self.item_hidden[number, :, 0] = torch.cat([dot, *columns], 1).T, side.hidden.T

    def take_users(self, users: Users) -> None:
        """The users of the next blocks, USERS at most."""
        side = self._user_side(users)
        self.user_dot, self.cuts = side.dot, []
        if self.layers:
            cuts, c = [], side.hidden
            for weight, bias in self.layers:
                cuts.append(c.T.neg().contiguous()[:, :, None].split(self.step, 1))
                c = functional.linear(c, weight, bias)
            self.user_dot = torch.cat([side.dot, c], 1)
            self.cuts = list(zip(*cuts, strict=True))[: -(-len(users) // self.step)]

    def _user_side(self, users: Users) -> RankingSide:
        """Of the users and then of the first one again, USERS rows. A model of histories pads on its own."""
        if self.model.sequential:
            side = self.model.ranking_users(_latest(users).last(self.model.history))
            dot, hidden = _filled(side.dot, USERS), _filled(side.hidden, USERS)
        else:
            dot, hidden = self.model.ranking_users(_filled(users.index, USERS))
        for part in self.parts:
            dot = torch.cat([dot, _filled(part.worth(_latest(users)), USERS)], 1)
        return RankingSide(dot, hidden)

    def scores(self, number: int) -> Tensor:
        """(USERS, ITEMS) of block `number`; the rows of users that were not asked for mean nothing."""
        out = multiply(self.user_dot, self.item_dot[number], self.out, self.precision, self.engine)
        for rows, cuts in zip(out.split(self.step), self.cuts, strict=False):
            self._add_tower(self.item_hidden[number], cuts, rows.view(1, -1))
        return out if self.model.y_range is None else _into_range_(out, *self.model.y_range)

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


def _into_range_(score: Tensor, low: float, high: float) -> Tensor:
    """`models.into_range`, in place."""
    return score.sigmoid_().mul_(high - low).add_(low)


def _filled(rows: Tensor, step: int) -> Tensor:
    """`rows` and then its first one until the length is a multiple of `step`."""
    return torch.cat([rows, rows[:1].expand(-len(rows) % step, *rows.shape[1:])])


def _latest(users: Users) -> Sequences:
    """What they did last. Raises ValueError where they come without."""
    if users.latest is None:
        raise ValueError("users come without their latest items; needed these for a model of histories and for parts")
    return users.latest


def multiply(a: Tensor, b: Tensor, out: Tensor, precision: str, engine: str) -> Tensor:
    """(R, K) × (K, C) float32 → (R, C): `out`, or a fresh tensor of the same layout."""
    if precision == "bf16":
        with _rounded():
            return torch.mm(a, b, out=out)
    if engine == "onednn":
        # torch's only way to oneDNN's float32 products that never rounds the factors, whatever the processor.
        fresh: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return fresh
    return torch.mm(a, b, out=out)


@contextlib.contextmanager
def _rounded() -> Iterator[None]:
    """Inside, matrix products of float32 tensors round their factors to bfloat16, where the processor can do that."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class PopularityScorer:
    """Every user gets the items most interacted with in train: the baseline a model must beat."""

    def __init__(self, train_count: IntArray) -> None:
        self.n_items = len(train_count)
        # float32 does not tell counts above 2^24 apart, so an item's score is the rank of its count.
        self.places = torch.from_numpy(np.unique(train_count, return_inverse=True)[1].astype(np.float32))

    def scores(self, users: Users) -> Tensor:
        return self.places.to(users.index.device).expand(len(users), -1).clone()
