"""The models, as modules whose score splits into a user side, an item side and what joins them.

    score(u, i) = join(user_side(u), item_side(i))

Training joins (B, 1, ·) with (B, 1 + N, ·): a user's part is computed once for its positive and N negatives, and where
a batch looks up more items than the catalogue has, every item's part is computed once too and then looked up.
Scoring joins every user of a block with the whole catalogue through `score_block`: the part that depends on one
side only is computed once a user and once an item. All use the same weights and the same mathematics (equal
within float rounding, by test).

- GMF: h · (p_u ⊙ q_i) + b                                    He et al. 2017, eq. 9
- MLP: h · ReLU(W_L … ReLU(W_1 [p_u; q_i] + b_1) … + b_L) + b  eq. 10
- NeuMF: h · [p_u ⊙ q_i ; MLP tower] + b, embeddings of their own  eq. 12
- MF: p_u · q_i (+ b_u + b_i)                                 Koren et al. 2009; fastai's EmbeddingDotBias
- EmbeddingNN: w · φ_L(… φ_1([p_u; q_i])) + b, φ(x) = dropout(BN(ReLU(W x))), sizes of p and q apart
                                                              fastai's EmbeddingNN
With `y_range` (low, high) MF and EmbeddingNN score low + (high - low) · σ(score), a rating. Other scores are logits.

What ranks a catalogue (`scoring.ModelScorer`) wants more than sides: it wants the join as one matrix product and a few
small layers. `user_parts`, `item_parts` and `joining_layers` put every model above into the form

    score(u, i) = into_range(dot_u · dot_i + f(hidden_u + hidden_i)),  f(x) = W_n ReLU(… W_1 ReLU(x) + b_1 …) + b_n

in which biases are columns of `dot` that meet a one on the other side, and batch norm, which only shifts and scales
once it is trained, is part of the layer that follows it.

Letters: B batch, N negatives, U users, I items, D embedding, H first hidden width, F width of `dot`, R rows of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ncf_dist import config as settings

Side = tuple[Tensor, ...]
Layers = list[tuple[Tensor, Tensor]]
"""Weight (out, in) and bias (out,) of linear layers, first to last."""


class Parts(NamedTuple):
    """One side of score = into_range(dot_u · dot_i + f(hidden_u + hidden_i))."""

    dot: Tensor
    """(R, F)"""
    hidden: Tensor
    """(R, H); H is 0 where there are no hidden layers."""


class Table(nn.Embedding):
    """An embedding table. `forward(None)` is all of it."""

    def __init__(self, rows: int, dim: int, std: float = 0.01) -> None:
        super().__init__(rows, dim)
        nn.init.normal_(self.weight, std=std)

    def forward(self, index: Tensor | None) -> Tensor:
        return self.weight if index is None else rows_of(self.weight, index)


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """values (R, ·), index (…,) → (…, ·). The gradient of index_select is twice as quick as that of embedding on a CPU;
    on a GPU it adds in no fixed order, where that of embedding is deterministic."""
    if values.device.type == "cpu":
        return values.index_select(0, index.reshape(-1)).view(*index.shape, values.shape[-1])
    return nn.functional.embedding(index, values)


class Recommender(nn.Module):
    """Base of all models: `forward` scores pairs, `score_block` scores users × items."""

    def user_side(self, user: Tensor | None) -> Side:
        """(…,) int64 user indexes, None for all → tensors (…, ·) that depend on the user alone."""
        raise NotImplementedError

    def item_side(self, item: Tensor | None) -> Side:
        """(…,) int64 item indexes, None for all → tensors (…, ·) that depend on the item alone."""
        raise NotImplementedError

    def join(self, user: Side, item: Side) -> Tensor:
        """Sides that broadcast against each other → scores (…,)."""
        raise NotImplementedError

    def score_block(self, user: Side, item: Side) -> Tensor:
        """Sides of U users and I items → scores (U, I)."""
        return self.join(tuple(t[:, None] for t in user), tuple(t[None] for t in item))

    y_range: tuple[float, float] | None = None

    def user_parts(self, user: Tensor) -> Parts | None:
        """(U,) int64 → the users' side in the form that ranks fast; None for a model that has no such form, which is
        then ranked through `score_block`."""
        return None

    def item_parts(self, item: Tensor) -> Parts | None:
        """(I,) int64 → the items' side, likewise."""
        return None

    def joining_layers(self) -> Layers:
        """f of the form above; its last layer has one output. Nothing where H is 0."""
        return []

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """user, item: int64 index tensors that broadcast, e.g. (B, 1) and (B, 1 + N).
        Returns scores of the broadcast shape."""
        return self.join(self.users(user), self.items(item))

    def users(self, user: Tensor) -> Side:
        """`user_side`, computed for all users and looked up where that is less work and gives the same."""
        return self._looked_up(self.user_side, user, self.n_users)

    def items(self, item: Tensor) -> Side:
        """`item_side`, likewise."""
        return self._looked_up(self.item_side, item, self.n_items)

    def _looked_up(self, side: Callable[[Tensor | None], Side], index: Tensor, count: int) -> Side:
        if index.numel() < count or (self.training and self.draws_random):
            return side(index)
        return tuple(rows_of(t, index) for t in side(None))

    @property
    def n_users(self) -> int:
        return next(self.tables("user")).num_embeddings

    @property
    def n_items(self) -> int:
        return next(self.tables("item")).num_embeddings

    def tables(self, kind: str) -> Iterator[Table]:
        """The embedding tables whose rows are users (`user`) or items (`item`): by their name, as `tower.user`."""
        for name, module in self.named_modules():
            if isinstance(module, Table) and name.rpartition(".")[2].startswith(kind):
                yield module

    @property
    def draws_random(self) -> bool:
        """Whether training draws random numbers: with dropout each pair has a mask of its own."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())


def dot_only(dot: Tensor) -> Parts:
    return Parts(dot, dot.new_empty(len(dot), 0))


def hidden_only(hidden: Tensor) -> Parts:
    return Parts(hidden.new_empty(len(hidden), 0), hidden)


def one_before(column: Tensor) -> Tensor:
    """(R, 1) → (R, 2), which meets `one_after` of the other side: their product is the sum of the two columns."""
    return nn.functional.pad(column, (1, 0), value=1.0)


def one_after(columns: Tensor) -> Tensor:
    """(R, F) → (R, F + 1)"""
    return nn.functional.pad(columns, (0, 1), value=1.0)


class GMF(Recommender):
    """Generalised matrix factorisation."""

    def __init__(self, n_users: int, n_items: int, factors: int, std: float = 0.01) -> None:
        super().__init__()
        self.user = Table(n_users, factors, std)
        self.item = Table(n_items, factors, std)
        self.output = nn.Linear(factors, 1)

    def user_side(self, user: Tensor | None) -> Side:
        return (self.user(user) * self.output.weight[0],)

    def item_side(self, item: Tensor | None) -> Side:
        return (self.item(item),)

    def join(self, user: Side, item: Side) -> Tensor:
        return (user[0] * item[0]).sum(-1) + self.output.bias

    def score_block(self, user: Side, item: Side) -> Tensor:
        return user[0] @ item[0].T + self.output.bias

    def user_parts(self, user: Tensor) -> Parts:
        return dot_only(torch.cat([*self.user_side(user), self.output.bias.expand(len(user), 1)], 1))

    def item_parts(self, item: Tensor) -> Parts:
        return dot_only(one_after(self.item(item)))


class Tower(nn.Module):
    """The MLP part: `layers[0]` is the width of [p_u; q_i], the rest are its hidden layers."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float, std: float = 0.01) -> None:
        super().__init__()
        # Not `half`: that is a method of nn.Module.
        self.dim, self.width = layers[0] // 2, layers[-1]
        self.user = Table(n_users, self.dim, std)
        self.item = Table(n_items, self.dim, std)
        hidden = [nn.Linear(a, b) for a, b in pairwise(layers)]
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        self.dropout = nn.Dropout(dropout)

    def user_side(self, user: Tensor | None) -> Tensor:
        """W_1's user half applied to p_u, and the bias: (…, H). Without hidden layers p_u, zero in the item's place."""
        p = self.dropout(self.user(user))
        if not self.hidden:
            return nn.functional.pad(p, (0, self.dim))
        first = cast(nn.Linear, self.hidden[0])
        return nn.functional.linear(p, first.weight[:, : self.dim], first.bias)

    def item_side(self, item: Tensor | None) -> Tensor:
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

    def user_parts(self, user: Tensor, output: nn.Linear) -> Parts:
        """The tower with the `output` layer (one unit, with or without bias) that follows it."""
        side = self.user_side(user)
        return hidden_only(side) if self.hidden else dot_only(one_after(output(side)))

    def item_parts(self, item: Tensor, output: nn.Linear) -> Parts:
        side = self.item_side(item)
        return hidden_only(side) if self.hidden else dot_only(one_before(nn.functional.linear(side, output.weight)))

    def joining_layers(self, output: nn.Linear) -> Layers:
        if not self.hidden:
            return []
        hidden = cast("list[nn.Linear]", list(self.hidden)[1:])
        last = output.weight.new_zeros(1) if output.bias is None else output.bias
        return [*((layer.weight, layer.bias) for layer in hidden), (output.weight, last)]


class MLP(Recommender):
    """A multi-layer perceptron over concatenated embeddings."""

    def __init__(self, n_users: int, n_items: int, layers: tuple[int, ...], dropout: float, std: float = 0.01) -> None:
        super().__init__()
        self.tower = Tower(n_users, n_items, layers, dropout, std)
        self.output = nn.Linear(self.tower.width, 1)

    def user_side(self, user: Tensor | None) -> Side:
        return (self.tower.user_side(user),)

    def item_side(self, item: Tensor | None) -> Side:
        return (self.tower.item_side(item),)

    def join(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[0], item[0]))
        return logits[..., 0]

    def user_parts(self, user: Tensor) -> Parts:
        return self.tower.user_parts(user, self.output)

    def item_parts(self, item: Tensor) -> Parts:
        return self.tower.item_parts(item, self.output)

    def joining_layers(self) -> Layers:
        return self.tower.joining_layers(self.output)


class NeuMF(Recommender):
    """GMF and MLP with embeddings of their own, joined by one output layer."""

    def __init__(
        self, n_users: int, n_items: int, factors: int, layers: tuple[int, ...], dropout: float, std: float = 0.01
    ) -> None:
        super().__init__()
        self.gmf = GMF(n_users, n_items, factors, std)
        self.tower = Tower(n_users, n_items, layers, dropout, std)
        self.output = nn.Linear(self.tower.width, 1, bias=False)

    def user_side(self, user: Tensor | None) -> Side:
        return (*self.gmf.user_side(user), self.tower.user_side(user))

    def item_side(self, item: Tensor | None) -> Side:
        return (*self.gmf.item_side(item), self.tower.item_side(item))

    def join(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[1], item[1]))
        return self.gmf.join(user[:1], item[:1]) + logits[..., 0]

    def score_block(self, user: Side, item: Side) -> Tensor:
        logits: Tensor = self.output(self.tower.join(user[1][:, None], item[1][None]))
        return self.gmf.score_block(user[:1], item[:1]) + logits[..., 0]

    def user_parts(self, user: Tensor) -> Parts:
        gmf, tower = self.gmf.user_parts(user), self.tower.user_parts(user, self.output)
        return Parts(torch.cat([gmf.dot, tower.dot], 1), tower.hidden)

    def item_parts(self, item: Tensor) -> Parts:
        gmf, tower = self.gmf.item_parts(item), self.tower.item_parts(item, self.output)
        return Parts(torch.cat([gmf.dot, tower.dot], 1), tower.hidden)

    def joining_layers(self) -> Layers:
        return self.tower.joining_layers(self.output)

    @torch.no_grad()
    def start_from(self, gmf: GMF, mlp: MLP, alpha: float) -> None:
        """He et al. 2017, section 3.4.1: embeddings and hidden layers of the two trained models; the output layer is
        [alpha · h_GMF ; (1 - alpha) · h_MLP], and the bias is weighted alike (eq. 13)."""
        self.gmf.load_state_dict(gmf.state_dict())
        self.tower.load_state_dict(mlp.tower.state_dict())
        self.gmf.output.weight.mul_(alpha)
        self.gmf.output.bias.copy_(alpha * gmf.output.bias + (1 - alpha) * mlp.output.bias)
        self.output.weight.copy_((1 - alpha) * mlp.output.weight)


YRange = tuple[float, float] | None


def into_range(score: Tensor, y_range: YRange) -> Tensor:
    """low + (high - low) · σ(score), or the score itself where there is no range."""
    return score if y_range is None else y_range[0] + (y_range[1] - y_range[0]) * torch.sigmoid(score)


class MF(Recommender):
    """Matrix factorisation: a dot product, with biases where asked."""

    def __init__(
        self, n_users: int, n_items: int, factors: int, biases: bool, y_range: YRange = None, std: float = 0.01
    ) -> None:
        super().__init__()
        self.user = Table(n_users, factors, std)
        self.item = Table(n_items, factors, std)
        self.user_bias = Table(n_users, 1, std) if biases else None
        self.item_bias = Table(n_items, 1, std) if biases else None
        self.y_range = y_range

    def user_side(self, user: Tensor | None) -> Side:
        return (self.user(user),) if self.user_bias is None else (self.user(user), self.user_bias(user))

    def item_side(self, item: Tensor | None) -> Side:
        return (self.item(item),) if self.item_bias is None else (self.item(item), self.item_bias(item))

    def join(self, user: Side, item: Side) -> Tensor:
        score = (user[0] * item[0]).sum(-1)
        if self.user_bias is not None:
            score = score + user[1][..., 0] + item[1][..., 0]
        return into_range(score, self.y_range)

    def score_block(self, user: Side, item: Side) -> Tensor:
        score = user[0] @ item[0].T
        if self.user_bias is not None:
            score = score + user[1] + item[1].T
        return into_range(score, self.y_range)

    def user_parts(self, user: Tensor) -> Parts:
        side = torch.cat(self.user_side(user), 1)
        return dot_only(side if self.user_bias is None else one_after(side))

    def item_parts(self, item: Tensor) -> Parts:
        if self.item_bias is None:
            return dot_only(self.item(item))
        return dot_only(torch.cat([self.item(item), one_before(self.item_bias(item))], 1))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm for steps of one row, too: it has no variance, so it is shifted and scaled as in ranking, by the
    running mean and variance, and leaves them as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().forward(x)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


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
        self.user, self.item = Table(n_users, sizes[0], std), Table(n_items, sizes[1], std)
        widths = (sum(sizes), *layers)
        # Batch norm has a shift of its own, so the layer before it needs no bias.
        self.hidden = nn.ModuleList([nn.Linear(a, b, bias=not batch_norm) for a, b in pairwise(widths)])
        self.norms = nn.ModuleList([BatchNorm(width) for width in layers] if batch_norm else [])
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(widths[-1], 1)
        self.y_range = y_range

    @property
    def first(self) -> nn.Linear:
        """The layer that sees [p_u; q_i]: the output layer where there is no hidden one."""
        return cast(nn.Linear, self.hidden[0]) if self.hidden else self.output

    def user_side(self, user: Tensor | None) -> Side:
        p = self.user(user)
        return (nn.functional.linear(p, self.first.weight[:, : p.shape[-1]], self.first.bias),)

    def item_side(self, item: Tensor | None) -> Side:
        return (nn.functional.linear(self.item(item), self.first.weight[:, self.user.embedding_dim :]),)

    def join(self, user: Side, item: Side) -> Tensor:
        x = user[0] + item[0]
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        if self.hidden:
            x = self._after(0, x)
            for number, layer in enumerate(list(self.hidden)[1:], start=1):
                x = self._after(number, layer(x))
            x = self.output(x)
        return into_range(x.view(shape), self.y_range)

    def user_parts(self, user: Tensor) -> Parts:
        [side] = self.user_side(user)
        return hidden_only(side) if self.hidden else dot_only(one_after(side))

    def item_parts(self, item: Tensor) -> Parts:
        [side] = self.item_side(item)
        return hidden_only(side) if self.hidden else dot_only(one_before(side))

    def joining_layers(self) -> Layers:
        if not self.hidden:
            return []
        following = cast("list[nn.Linear]", [*list(self.hidden)[1:], self.output])
        return [self._after_norm(number, layer) for number, layer in enumerate(following)]

    def _after_norm(self, number: int, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of `layer` on the input of batch norm `number`: W (s x + t) + b = (W s) x + (W t + b)."""
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        if not self.norms:
            return layer.weight, bias
        norm = cast(BatchNorm, self.norms[number])
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        return layer.weight * scale, layer.weight @ (norm.bias - mean * scale) + bias

    def _after(self, number: int, x: Tensor) -> Tensor:
        x = torch.relu(x)
        if self.norms:
            x = self.norms[number](x)
        return cast(Tensor, self.dropout(x))


MODELS: dict[str, Callable[[settings.Model, int, int], Recommender]] = {
    "gmf": lambda c, users, items: GMF(users, items, c.factors, c.init_std),
    "mlp": lambda c, users, items: MLP(users, items, c.layers, c.dropout, c.init_std),
    "neumf": lambda c, users, items: NeuMF(users, items, c.factors, c.layers, c.dropout, c.init_std),
    "mf": lambda c, users, items: MF(users, items, c.factors, c.biases, c.y_range, c.init_std),
    "embedding_nn": lambda c, users, items: EmbeddingNN(
        users, items, c.layers, c.embedding_sizes, c.dropout, c.batch_norm, c.y_range, c.init_std
    ),
}


def build_model(config: settings.Model, n_users: int, n_items: int) -> Recommender:
    """The model that `config.name` names, freshly initialised from torch's global generator."""
    return MODELS[config.name](config, n_users, n_items)


def parameter_count(config: settings.Model, n_users: int, n_items: int) -> int:
    """Parameters of the model, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, n_users, n_items).parameters())
