"""Scores of a block of users and items, of a model or of popularity, and the K best of them.

Every product is taken in blocks of one shape, so a score depends on no block, batch or partition.

Letters: U users of a call, I items, E eligible items, K list length, T items asked about, F and H the widths of
`models.Parts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ncf_dist import products
from ncf_dist.errors import ConfigError
from ncf_dist.models import Parts, Recommender
from ncf_dist.scoring.topk import Best, IntArray, Lists, mask, top_k

USERS, ITEMS = 256, 1024
"""Shape of a block of scores: 1 MiB, which stays in a core's second-level cache. Always the same shape, filled up where
there are fewer: a matrix product rounds differently for 1, 3 or 17 rows, and a score must not depend on who else is in
the block."""
HIDDEN_NUMBERS = 131_072
"""What the widest layer of a block may hold: as many users at once as fit, two at least. In cache, likewise."""


class Scorer(Protocol):
    """Scores a block of users for all items."""

    n_items: int

    def scores(self, users: Tensor) -> Tensor:
        """(U,) int64 → (U, I) float32; a fresh tensor that the caller may change."""
        ...


class ModelScorer:
    """A trained model over a catalogue, one block of USERS × ITEMS at a time, on the device that the model is on.

    eligible: (E,) ascending item indexes; all others score -inf. None: all items are eligible.
    precision: `bf16` rounds the factors of the dot product to bfloat16 and sums in float32; hidden layers stay float32,
    in which they are quicker. Where torch has no such product (`engines.rounds`) it is float32 after all.
    engine: the library that makes float32 dot products on a CPU; the bits are the same.

    Memory, besides the model's own weights (of a local bundle memory-mapped, shared by all processes of a machine):
    4 (F + H) bytes an eligible item, e.g. 5.6 MiB for 20,000 × 64, and 8 for its index; and buffers of USERS × ITEMS
    scores and twice HIDDEN_NUMBERS hidden units, 2 MiB at most where no layer is wider than 64.

    Raises ValueError for `eligible` that is not ascending or not in the catalogue, ConfigError where this process's
    products depend on the position, or on the engine.
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
    ) -> None:
        self.model, self.n_items = model.eval(), n_items
        self.device = next(model.parameters()).device
        every = torch.arange(n_items, device=self.device)
        self.catalogue = every if eligible is None else eligible.to(self.device)
        inside = ((self.catalogue >= 0) & (self.catalogue < n_items)).all()
        if not (inside and (self.catalogue.diff() > 0).all()):
            raise ValueError(f"eligible items are {self.catalogue}; needed ascending indexes from 0 to {n_items - 1}")
        self.place: IntArray | None = None  # Of each item among the eligible ones, -1 for the others.
        if eligible is not None:
            self.place = np.full(n_items, -1)
            self.place[eligible.cpu().numpy()] = np.arange(len(eligible))
        on_cpu = self.device.type == "cpu"
        parts = model.item_parts(torch.zeros(1, dtype=torch.int64, device=self.device))
        number = -(-len(self) // ITEMS)
        self.block: _Split | _Joined = (
            _Joined(model, self.device)
            if parts is None
            else _Split(model, parts, number + 1, precision, engine if on_cpu else "mkl")
        )
        self.other = number
        """The block that is of no part of the catalogue."""
        if on_cpu and len(self):
            products.check()
            self._check_positions()
        for first in range(0, len(self), ITEMS):
            self.block.add_items(first // ITEMS, _filled(self.catalogue[first : first + ITEMS], ITEMS))

    def _check_positions(self) -> None:
        """The canary with this model's own weights and shapes: a few users and items, repeated."""
        users = torch.arange(USERS) % products.ROWS * self.model.n_users // products.ROWS
        items = torch.arange(ITEMS) % products.COLUMNS * len(self) // products.COLUMNS
        self.block.add_items(self.other, self.catalogue[items])
        self.block.take_users(users, USERS)
        scores = self.block.scores(self.other).clone()
        if not products.repeats(scores, products.COLUMNS):
            raise ConfigError(products.refusal("a score of this model"))
        if isinstance(self.block, _Split) and self.block.engine == "onednn":
            self.block.engine = "mkl"
            if not torch.equal(self.block.scores(self.other), scores):
                raise ConfigError(products.other_engine())
            self.block.engine = "onednn"

    def __len__(self) -> int:
        """E"""
        return len(self.catalogue)

    @torch.no_grad()
    def blocks(self, users: Tensor) -> Iterator[Tensor]:
        """(U,) int64, at most USERS of them → (U, ITEMS) scores of the eligible items 0 to ITEMS - 1, then of the
        next ones; -inf in the last block where there are no more. Each is a buffer that the next one may overwrite."""
        self._take(users)
        for first in range(0, len(self), ITEMS):
            scores = self.block.scores(first // ITEMS)[: len(users)]
            scores[:, len(self) - first :] = -torch.inf
            yield scores

    @torch.no_grad()
    def of(self, users: Tensor, items: Tensor) -> Tensor:
        """(U,) at most USERS of them, (T,) item indexes in any order → (U, T), the same bits as in `blocks`; items that
        are not eligible are scored too."""
        self._take(users)
        found = torch.empty(len(users), len(items), device=self.device)
        for first in range(0, len(items), ITEMS):
            some = items[first : first + ITEMS].to(self.device)
            self.block.add_items(self.other, _filled(some, ITEMS))
            found[:, first : first + ITEMS] = self.block.scores(self.other)[: len(users), : len(some)]
        return found

    def _take(self, users: Tensor) -> None:
        self.block.take_users(_filled(users.to(self.device), USERS), len(users))

    def scores(self, users: Tensor) -> Tensor:
        scores = torch.full((len(users), self.n_items), -torch.inf, device=self.device)
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
        return [flat for _, flat in by_block(row, place, len(self))]


def by_block(row: IntArray, place: IntArray, n_items: int) -> list[tuple[IntArray, IntArray]]:
    """Pairs (row, place) → for each block of ITEMS places (which of the pairs are in it, where in its scores as one
    line)."""
    number = place // ITEMS
    # A stable sort of 16 bits is a radix sort.
    order = np.argsort(number.astype(np.uint16) if n_items < 2**16 * ITEMS else number, kind="stable")
    flat = (row * ITEMS + place % ITEMS)[order]
    ends = np.cumsum(np.bincount(number, minlength=-(-n_items // ITEMS)))[:-1]
    return list(zip(np.split(order, ends), np.split(flat, ends), strict=True)) if n_items else []


class _Split:
    """Blocks of scores of a model that has `Parts`: dot_u · dot_i + f(hidden_u + hidden_i).

    The tower's activations are kept without what the user alone adds to them. With y_1 = hidden_i, c_1 = hidden_u and
    v_l = max(y_l, -c_l), ReLU(y_l + c_l) = c_l + v_l. So y_(l+1) = W_l v_l a pair, c_(l+1) = W_l c_l + b_l a user, and
    a layer costs one product and one maximum; what is left of c in the end is one more column of dot_u.
    Features come first, (H, pairs): the small products are then as quick as large ones.
    """

    def __init__(self, model: Recommender, parts: Parts, number: int, precision: str, engine: str) -> None:
        """parts: of an item. number: of blocks."""
        self.model, self.precision, self.engine = model, precision, engine
        self.layers = model.joining_layers()
        empty = parts.dot.new_empty
        self.item_dot = empty(number, parts.dot.shape[1] + bool(self.layers), ITEMS)
        self.item_hidden = empty(number, parts.hidden.shape[1], 1, ITEMS)
        self.out = empty(USERS, ITEMS)
        widths = [weight.shape[1] for weight, _ in self.layers]
        most = max(2, HIDDEN_NUMBERS // (ITEMS * max([1, *widths])))
        self.step = min(USERS, 1 << (most.bit_length() - 1))
        self.hidden = [empty(width, self.step, ITEMS) for width in widths]
        # The same memory as the products see it: a feature's pairs in one line.
        self.pairs = [v.view(len(v), -1) for v in self.hidden]

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


class _Joined:
    """Blocks of scores of any other model, through its `score_block`."""

    STEP = 16

    def __init__(self, model: Recommender, device: torch.device) -> None:
        self.model = model
        self.items: dict[int, tuple[Tensor, ...]] = {}
        self.out = torch.empty(USERS, ITEMS, device=device)

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


def multiply(a: Tensor, b: Tensor, out: Tensor, precision: str, engine: str) -> Tensor:
    """(R, K) × (K, C) float32 → (R, C): `out`, or a fresh tensor of the same layout."""
    if precision == "bf16":
        with _rounded():
            return torch.mm(a, b, out=out)
    if engine == "onednn":
        # The one entry to oneDNN's float32 products that rounds nothing, on any processor.
        fresh: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return fresh
    return torch.mm(a, b, out=out)


@contextlib.contextmanager
def _rounded() -> Iterator[None]:
    """Matrix products of float32 tensors are of bfloat16 factors, where the processor has such products."""
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
        # Counts past 2^24 are not exact in float32; their order is kept by ranking them first.
        self.places = torch.from_numpy(np.unique(train_count, return_inverse=True)[1].astype(np.float32))

    def scores(self, users: Tensor) -> Tensor:
        return self.places.to(users.device).expand(len(users), -1).clone()


def recommend(scorer: Scorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    """users (U,) int64, masked: what each of them must not get → values (U, K') float32 and items (U, K') int64, K' the
    lesser of K and I: best first, equal scores by ascending item index. Where fewer than K' items are left, the last
    values are -inf and the last items -1. They are on the users' device.

    The same as `top_k(mask(scorer.scores(users), masked), k)`, but memory does not grow with U × I: a ModelScorer's
    blocks are looked through while they are in cache, and only what may be among the K best is kept.
    Raises ValueError for a model's scores that are not finite.
    """
    k = min(k, scorer.n_items)
    values = torch.full((len(users), k), -torch.inf, device=users.device)
    items = torch.full((len(users), k), -1, device=users.device)
    for start in range(0, len(users), USERS):
        end = min(start + USERS, len(users))
        some, their = users[start:end], masked.part(start, end)
        if isinstance(scorer, ModelScorer) and scorer.device.type == "cpu":
            values[start:end], items[start:end] = _model_best(scorer, some, their, k)
        else:  # On a GPU the scores of a block are no further away than a threshold.
            values[start:end], items[start:end] = _best(scorer, some, their, k)
    return values, items


def _best(scorer: Scorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    values, items = top_k(mask(scorer.scores(users), masked), k)
    return values, items.masked_fill_(values == -torch.inf, -1)


def _model_best(scorer: ModelScorer, users: Tensor, masked: Lists, k: int) -> tuple[Tensor, Tensor]:
    best = Best(len(users), k, ITEMS)
    for number, (block, seen) in enumerate(zip(scorer.blocks(users), scorer.seen_by_block(masked), strict=True)):
        block.numpy().reshape(-1)[seen] = -np.inf
        best.add(number * ITEMS, block)
    values, items = best.result()
    found = items >= 0
    items[found] = scorer.catalogue[items[found]]
    return values, items
