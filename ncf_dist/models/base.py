"""What every model is: one formula, of which a model declares the parts that it has.

    score(u, i) = into_range(dot_u · dot_i + bias_u + bias_i + b + head(hidden_u + hidden_i))

A model declares `dot_sides` (what computes dot_u and dot_i), `hidden_sides` and the `head` that reads their sum, a
table of biases for either side, and a bias b of its own. Everything else follows from these, with the same weights and,
within float rounding, the same scores (by test):

- `forward` and `join` score pairs, as in training: (B, 1) users with (B, 1 + N) items;
- `score_block` scores every user of a block with every item of it;
- `ranking_users`, `ranking_items` and `ranking_layers` give the form in which `scoring.ModelScorer` ranks a catalogue:
  all that is added, too, is columns of one matrix product.

A side is a function of whatever describes a user or an item: of an index, or, in a model of histories, of what the user
did last. A model with features would add those of an index to its embedding.

Letters: B batch, N negatives, U users, I items, D embedding, F width of `dot`, H width of `hidden`, R rows of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ncf_dist.models.head import Head, Layers

YRange = tuple[float, float] | None


class Embedding(nn.Embedding):
    """An embedding table. `forward(None)` is all of it."""

    def __init__(self, rows: int, dim: int, std: float = 0.01) -> None:
        super().__init__(rows, dim)
        nn.init.normal_(self.weight, std=std)

    def forward(self, index: Tensor | None) -> Tensor:
        return self.weight if index is None else rows_of(self.weight, index)


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """values (R, ·), index (…,) → (…, ·).

    On a CPU the gradient of index_select is computed twice as fast as that of embedding. On a GPU it would add in no
    fixed order, and that of embedding is deterministic.

    >>> rows_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0, 1])).tolist()
    [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    """
    if values.device.type == "cpu":
        return values.index_select(0, index.reshape(-1)).view(*index.shape, values.shape[-1])
    return nn.functional.embedding(index, values)


def into_range(score: Tensor, y_range: YRange) -> Tensor:
    """low + (high - low) · σ(score), or the score itself where there is no range."""
    return score if y_range is None else y_range[0] + (y_range[1] - y_range[0]) * torch.sigmoid(score)


class Sides(Protocol):
    """One kind of part of the formula: what is computed from users alone, and what from items alone."""

    def user_side(self, user: Any) -> Tensor:
        """(…,) int64 user indexes, None for all users → (…, ·)."""
        ...

    def item_side(self, item: Tensor | None) -> Tensor:
        """(…,) int64 item indexes, None for all items → (…, ·)."""
        ...


class Side(NamedTuple):
    """What the formula takes from users alone, or from items alone; None for a part that the model does not have."""

    dot: Tensor | None = None
    """(…, F)"""
    bias: Tensor | None = None
    """(…, 1)"""
    hidden: Tensor | None = None
    """(…, H)"""

    def each(self, change: Callable[[Tensor], Tensor]) -> Side:
        """The same side with every part changed."""
        return Side(*(None if part is None else change(part) for part in self))


class RankingSide(NamedTuple):
    """One side of into_range(dot_u · dot_i + f(hidden_u + hidden_i)), f being `ranking_layers`: what is added in the
    formula are columns of `dot` that meet a one on the other side."""

    dot: Tensor
    """(R, F)"""
    hidden: Tensor
    """(R, H); H is 0 where there are no hidden layers."""


class Recommender(nn.Module):
    """Base of all models. A model sets in its constructor what it has of the formula above."""

    sequential: ClassVar[bool] = False
    """Whether a user is described by what they did last (`models.Sequences`), in place of an index."""
    history: int = 0
    """Of a sequential model: the latest items that it looks at, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.dot_sides: Sides | None = None
        self.hidden_sides: Sides | None = None
        self.head: Head | None = None
        self.user_bias: Embedding | None = None
        self.item_bias: Embedding | None = None
        self.y_range: YRange = None

    @property
    def bias(self) -> Tensor | None:
        """(1,) b of the formula."""
        return None

    def user_side(self, user: Any) -> Side:
        """(…,) int64 user indexes, None for all users → what depends on the user alone. Where the model is sequential,
        `Sequences` of R users → (R, ·)."""
        return Side(
            None if self.dot_sides is None else self.dot_sides.user_side(user),
            None if self.user_bias is None else self.user_bias(user),
            None if self.hidden_sides is None else self.hidden_sides.user_side(user),
        )

    def item_side(self, item: Tensor | None) -> Side:
        """(…,) int64 item indexes, None for all items → what depends on the item alone."""
        return Side(
            None if self.dot_sides is None else self.dot_sides.item_side(item),
            None if self.item_bias is None else self.item_bias(item),
            None if self.hidden_sides is None else self.hidden_sides.item_side(item),
        )

    # ---- pairs and blocks: in training --------------------------------------------------------------------------

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """user, item: int64 index tensors that broadcast, e.g. (B, 1) and (B, 1 + N).
        Returns scores of the broadcast shape."""
        return self.join(self.users(user), self.items(item))

    def users(self, user: Any) -> Side:
        """`user_side`; where a batch has more users than there are, computed once for all and looked up."""
        return self._looked_up(self.user_side, user, self.n_users)

    def items(self, item: Tensor) -> Side:
        """`item_side`, likewise."""
        return self._looked_up(self.item_side, item, self.n_items)

    def _looked_up(self, side: Callable[[Tensor | None], Side], index: Tensor, count: int) -> Side:
        if index.numel() < count or (self.training and self.draws_random):
            return side(index)
        return side(None).each(lambda part: rows_of(part, index))

    def join(self, user: Side, item: Side) -> Tensor:
        """Sides that broadcast against each other → scores (…,)."""
        dot = None if user.dot is None or item.dot is None else (user.dot * item.dot).sum(-1)
        return self._add_up(dot, user, item)

    def score_block(self, user: Side, item: Side) -> Tensor:
        """Sides of U users and I items → scores (U, I)."""
        dot = None if user.dot is None or item.dot is None else user.dot @ item.dot.T
        return self._add_up(dot, user.each(lambda part: part[:, None]), item.each(lambda part: part[None]))

    def _add_up(self, dot: Tensor | None, user: Side, item: Side) -> Tensor:
        """The formula from dot_u · dot_i (…,) on."""
        terms = [dot, self.bias, *(None if side.bias is None else side.bias[..., 0] for side in (user, item))]
        if self.head is not None:
            assert user.hidden is not None
            assert item.hidden is not None
            terms.append(self.head(user.hidden + item.hidden))
        score, *more = [term for term in terms if term is not None]
        for term in more:
            score = score + term
        return into_range(score, self.y_range)

    # ---- the form that ranks --------------------------------------------------------------------------------------

    def ranking_users(self, user: Any) -> RankingSide:
        """(R,) int64, or `Sequences` of R users → the users' side in the form that ranks fast."""
        side = self.user_side(user)
        share = self._share(side.hidden, with_bias=True)
        met = self.item_bias is not None
        return _ranking_side(side, share, [side.dot, side.bias, met, self.bias, share, share is not None])

    def ranking_items(self, item: Tensor) -> RankingSide:
        """(R,) int64 → the items' side, likewise."""
        side = self.item_side(item)
        share = self._share(side.hidden, with_bias=False)
        met, meets_bias = self.user_bias is not None, self.bias is not None
        return _ranking_side(side, share, [side.dot, met, side.bias, meets_bias, share is not None, share])

    def _share(self, hidden: Tensor | None, with_bias: bool) -> Tensor | None:
        return None if self.head is None or hidden is None else self.head.share(hidden, with_bias)

    def ranking_layers(self) -> Layers:
        """f; its last layer has one output. Nothing where H is 0."""
        return [] if self.head is None else self.head.ranking_layers()

    # ---- what it is made of ---------------------------------------------------------------------------------------

    @property
    def n_users(self) -> int:
        return next(self.tables("user")).num_embeddings

    @property
    def n_items(self) -> int:
        return next(self.tables("item")).num_embeddings

    def tables(self, kind: str) -> Iterator[Embedding]:
        """The embedding tables whose rows are users (`user`) or items (`item`): by their name, as `tower.user`."""
        for name, module in self.named_modules():
            if isinstance(module, Embedding) and name.rpartition(".")[2].startswith(kind):
                yield module

    @property
    def draws_random(self) -> bool:
        """Whether training draws random numbers: with dropout each pair has a mask of its own."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())


def _ranking_side(side: Side, share: Tensor | None, columns: list[Tensor | bool | None]) -> RankingSide:
    """columns: (R, ·) each; (1,), or True for a one, is the same number in every row; False and None are left out.
    share: the side's share of an affine head, which stands for its hidden part."""
    part = next(part for part in side if part is not None)
    ones, none = part.new_ones(1), part.new_empty(len(part), 0)
    given = [ones if column is True else column for column in columns]
    dot = torch.cat([none, *(column.expand(len(part), -1) for column in given if isinstance(column, Tensor))], 1)
    return RankingSide(dot, none if side.hidden is None or share is not None else side.hidden)
