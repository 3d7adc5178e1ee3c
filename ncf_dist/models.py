"""The models, as modules whose score splits into a user side, an item side and what joins them.

    score(u, i) = join(user_side(u), item_side(i))

Training joins (B, 1, ·) with (B, 1 + N, ·): a user's part is computed once for its positive and N negatives.
Scoring joins every user of a block with the whole catalogue through `score_block`: the part that depends on one
side only is computed once a user and once an item. Both use the same weights and the same mathematics (equal
within float rounding, by test).

- GMF: h · (p_u ⊙ q_i)                                       He et al. 2017, eq. 9
- MLP: h · ReLU(W_L … ReLU(W_1 [p_u; q_i] + b_1) … + b_L)     eq. 10
- NeuMF: h · [p_u ⊙ q_i ; MLP tower], embeddings of their own  eq. 12

Scores are logits. Letters: B batch, N negatives, U users, I items, D embedding, H first hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ncf_dist import config as settings

Side = tuple[Tensor, ...]


class Recommender(nn.Module):
    """Base of all models: `forward` scores pairs, `score_block` scores users × items."""

    def user_side(self, user: Tensor) -> Side:
        """(…,) int64 user indexes → tensors (…, ·) that depend on the user alone."""
        raise NotImplementedError

    def item_side(self, item: Tensor) -> Side:
        """(…,) int64 item indexes → tensors (…, ·) that depend on the item alone."""
        raise NotImplementedError

    def join(self, user: Side, item: Side) -> Tensor:
        """Sides that broadcast against each other → logits (…,)."""
        raise NotImplementedError

    def score_block(self, user: Side, item: Side) -> Tensor:
        """Sides of U users and I items → logits (U, I)."""
        return self.join(tuple(t[:, None] for t in user), tuple(t[None] for t in item))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """user, item: int64 index tensors that broadcast, e.g. (B, 1) and (B, 1 + N).
        Returns logits of the broadcast shape."""
        return self.join(self.user_side(user), self.item_side(item))


def _embedding(rows: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, dim)
    nn.init.normal_(embedding.weight, std=0.01)
    return embedding


class GMF(Recommender):
    """Generalised matrix factorisation."""

    def __init__(self, n_users: int, n_items: int, factors: int) -> None:
        super().__init__()
        self.user = _embedding(n_users, factors)
        self.item = _embedding(n_items, factors)
        self.output = nn.Linear(factors, 1)

    def user_side(self, user: Tensor) -> Side:
        return (self.user(user) * self.output.weight[0],)

    def item_side(self, item: Tensor) -> Side:
        return (self.item(item),)

    def join(self, user: Side, item: Side) -> Tensor:
        return (user[0] * item[0]).sum(-1) + self.output.bias

    def score_block(self, user: Side, item: Side) -> Tensor:
        return user[0] @ item[0].T + self.output.bias


class Tower(nn.Module):
    """The MLP part: `layers[0]` is the width of [p_u; q_i], the rest are its hidden layers."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        # Not `half`: that is a method of nn.Module.
        self.dim, self.width = layers[0] // 2, layers[-1]
        self.user = _embedding(n_users, self.dim)
        self.item = _embedding(n_items, self.dim)
        hidden = [nn.Linear(a, b) for a, b in pairwise(layers)]
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        self.dropout = nn.Dropout(dropout)

    def user_side(self, user: Tensor) -> Tensor:
        """W_1's user half applied to p_u, and the bias: (…, H). Without hidden layers p_u, zero in the item's place."""
        p = self.dropout(self.user(user))
        if not self.hidden:
            return nn.functional.pad(p, (0, self.dim))
        first = cast(nn.Linear, self.hidden[0])
        return nn.functional.linear(p, first.weight[:, : self.dim], first.bias)

    def item_side(self, item: Tensor) -> Tensor:
        """W_1's item half applied to q_i: (…, H)."""
        q = self.dropout(self.item(item))
        if not self.hidden:
            return nn.functional.pad(q, (self.dim, 0))
        first = cast(nn.Linear, self.hidden[0])
        return nn.functional.linear(q, first.weight[:, self.dim :])

    def join(self, user: Tensor, item: Tensor) -> Tensor:
        """(…, H) and (…, H) that broadcast → (…, last width)."""
        x = user + item
        if not self.hidden:
            return x
        x = torch.relu(x)
        for layer in list(self.hidden)[1:]:
            x = torch.relu(layer(self.dropout(x)))
        return x


class MLP(Recommender):
    """A multi-layer perceptron over concatenated embeddings."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.tower = Tower(n_users, n_items, layers, dropout)
        self.output = nn.Linear(self.tower.width, 1)

    def user_side(self, user: Tensor) -> Side:
        return (self.tower.user_side(user),)

    def item_side(self, item: Tensor) -> Side:
        return (self.tower.item_side(item),)

    def join(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[0], item[0]))
        return logits[..., 0]


class NeuMF(Recommender):
    """GMF and MLP with embeddings of their own, joined by one output layer."""

    def __init__(self, n_users: int, n_items: int, factors: int, layers: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.gmf = GMF(n_users, n_items, factors)
        self.tower = Tower(n_users, n_items, layers, dropout)
        self.output = nn.Linear(self.tower.width, 1, bias=False)

    def user_side(self, user: Tensor) -> Side:
        return (*self.gmf.user_side(user), self.tower.user_side(user))

    def item_side(self, item: Tensor) -> Side:
        return (*self.gmf.item_side(item), self.tower.item_side(item))

    def join(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[1], item[1]))
        return self.gmf.join(user[:1], item[:1]) + logits[..., 0]

    def score_block(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[1][:, None], item[1][None]))
        return self.gmf.score_block(user[:1], item[:1]) + logits[..., 0]


MODELS: dict[str, Callable[[settings.Model, int, int], Recommender]] = {
    "gmf": lambda c, users, items: GMF(users, items, c.factors),
    "mlp": lambda c, users, items: MLP(users, items, c.layers, c.dropout),
    "neumf": lambda c, users, items: NeuMF(users, items, c.factors, c.layers, c.dropout),
}


def build_model(config: settings.Model, n_users: int, n_items: int) -> Recommender:
    """The model that `config.name` names, freshly initialised from torch's global generator."""
    return MODELS[config.name](config, n_users, n_items)


def parameter_count(config: settings.Model, n_users: int, n_items: int) -> int:
    """Parameters of the model, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, n_users, n_items).parameters())
