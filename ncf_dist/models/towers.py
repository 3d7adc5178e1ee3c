"""Models with hidden layers over a user's and an item's embedding.

- MLP: h · ReLU(W_L … ReLU(W_1 [p_u; q_i] + b_1) … + b_L) + b   He et al. 2017, eq. 10
- NeuMF: h · [p_u ⊙ q_i ; MLP tower] + b, embeddings of their own  eq. 12
- EmbeddingNN: w · φ_L(… φ_1([p_u; q_i])) + b, φ(x) = dropout(BN(ReLU(W x))), sizes of p and q apart
                                                               fastai's EmbeddingNN

With `y_range` (low, high) EmbeddingNN scores low + (high - low) · σ(score), a rating. Other scores are logits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ncf_dist import config as settings
from ncf_dist.models.base import Embedding, Recommender, YRange
from ncf_dist.models.factorisation import GMF
from ncf_dist.models.head import BatchNorm, Head

Dropped = Callable[[Tensor], Tensor]


class FirstLayer:
    """hidden_u = W_u p_u + b and hidden_i = W_i q_i, the halves of a layer over [p_u; q_i]: in a sum of the two, each
    is computed once a user and once an item."""

    def __init__(self, user: Embedding, item: Embedding, layer: nn.Linear, dropped: Dropped) -> None:
        """dropped: dropout of an embedding, or the embedding as it is."""
        self.user, self.item, self.layer, self.dropped = user, item, layer, dropped

    def user_side(self, user: Tensor | None) -> Tensor:
        return linear(self.dropped(self.user(user)), self.layer.weight[:, : self.user.embedding_dim], self.layer.bias)

    def item_side(self, item: Tensor | None) -> Tensor:
        return linear(self.dropped(self.item(item)), self.layer.weight[:, self.user.embedding_dim :])


class Concatenation:
    """hidden_u = [p_u; 0] and hidden_i = [0; q_i], whose sum is [p_u; q_i]: a tower without hidden layers."""

    def __init__(self, user: Embedding, item: Embedding, dropped: Dropped) -> None:
        self.user, self.item, self.dropped = user, item, dropped

    def user_side(self, user: Tensor | None) -> Tensor:
        return pad(self.dropped(self.user(user)), (0, self.item.embedding_dim))

    def item_side(self, item: Tensor | None) -> Tensor:
        return pad(self.dropped(self.item(item)), (self.user.embedding_dim, 0))


class Tower(nn.Module):
    """The MLP part: `layers[0]` is the width of [p_u; q_i], the rest are its hidden layers."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float, std: float = 0.01) -> None:
        super().__init__()
        self.width = layers[-1]
        self.user = Embedding(n_users, layers[0] // 2, std)
        self.item = Embedding(n_items, layers[0] // 2, std)
        hidden = [nn.Linear(a, b) for a, b in pairwise(layers)]
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        self.dropout = nn.Dropout(dropout)
        self.sides: FirstLayer | Concatenation = (
            FirstLayer(self.user, self.item, hidden[0], self.dropout)
            if hidden
            else Concatenation(self.user, self.item, self.dropout)
        )

    def head(self, output: nn.Linear) -> Head:
        """The other hidden layers, then `output`, which has one unit."""
        following = list(self.hidden)[1:]
        return Head((*following, output), affine=not self.hidden, dropout=self.dropout, dropped=len(following))


class MLP(Recommender):
    """A multi-layer perceptron over concatenated embeddings."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float, std: float = 0.01) -> None:
        super().__init__()
        self.tower = Tower(n_users, n_items, layers, dropout, std)
        self.output = nn.Linear(self.tower.width, 1)
        self.hidden_sides, self.head = self.tower.sides, self.tower.head(self.output)


class NeuMF(Recommender):
    """GMF and MLP with embeddings of their own, joined by one output layer."""

    def __init__(
        self, n_users: int, n_items: int, factors: int, layers: tuple[int, ...], dropout: float, std: float = 0.01
    ) -> None:
        super().__init__()
        self.gmf = GMF(n_users, n_items, factors, std)
        self.tower = Tower(n_users, n_items, layers, dropout, std)
        self.output = nn.Linear(self.tower.width, 1, bias=False)
        self.dot_sides = self.gmf.dot_sides
        self.hidden_sides, self.head = self.tower.sides, self.tower.head(self.output)

    @property
    def bias(self) -> Tensor:
        return self.gmf.bias

    @torch.no_grad()
    def start_from(self, gmf: GMF, mlp: MLP, alpha: float) -> None:
        """He et al. 2017, section 3.4.1: embeddings and hidden layers of the two trained models; the output layer is
        [alpha · h_GMF ; (1 - alpha) · h_MLP], and the bias is weighted alike (eq. 13)."""
        self.gmf.load_state_dict(gmf.state_dict())
        self.tower.load_state_dict(mlp.tower.state_dict())
        self.gmf.output.weight.mul_(alpha)
        self.gmf.output.bias.copy_(alpha * gmf.output.bias + (1 - alpha) * mlp.output.bias)
        self.output.weight.copy_((1 - alpha) * mlp.output.weight)


class EmbeddingNN(Recommender):
    """Hidden layers over a user's and an item's embedding, each of a size of its own."""

    def __init__(
        self,
        n_users: int,
        n_items: int,
        layers: tuple[int, ...],
        sizes: tuple[int, int] | None,
        dropout: float,
        batch_norm: bool,
        y_range: YRange = None,
        std: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = sizes or (settings.embedding_size(n_users), settings.embedding_size(n_items))
        self.user, self.item = Embedding(n_users, sizes[0], std), Embedding(n_items, sizes[1], std)
        widths = (sum(sizes), *layers)
        # Batch norm has a shift of its own, so the layer before it needs no bias.
        self.hidden = nn.ModuleList([nn.Linear(a, b, bias=not batch_norm) for a, b in pairwise(widths)])
        self.norms = nn.ModuleList([BatchNorm(width) for width in layers] if batch_norm else [])
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(widths[-1], 1)
        self.y_range = y_range
        first, *following = cast("list[nn.Linear]", [*self.hidden, self.output])
        self.hidden_sides = FirstLayer(self.user, self.item, first, nn.Identity())
        self.head = Head(
            following, affine=not layers, dropout=self.dropout, dropped=len(following), norms=list(self.norms)
        )
