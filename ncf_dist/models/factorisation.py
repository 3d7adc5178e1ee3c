"""Models that are a dot product of factors.

- GMF: h · (p_u ⊙ q_i) + b                                    He et al. 2017, eq. 9
- MF: p_u · q_i (+ b_u + b_i)                                 Koren et al. 2009; fastai's EmbeddingDotBias

With `y_range` (low, high) MF scores low + (high - low) · σ(score), a rating. Other scores are logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from ncf_dist.models.base import Embedding, Recommender, YRange


class Product:
    """dot_u = h ⊙ p_u and dot_i = q_i, h being the weights of `output`; dot_u = p_u without it."""

    def __init__(self, user: Embedding, item: Embedding, output: nn.Linear | None = None) -> None:
        self.user, self.item, self.output = user, item, output

    def user_side(self, user: Tensor | None) -> Tensor:
        factors: Tensor = self.user(user)
        return factors if self.output is None else factors * self.output.weight[0]

    def item_side(self, item: Tensor | None) -> Tensor:
        factors: Tensor = self.item(item)
        return factors


class GMF(Recommender):
    """Generalised matrix factorisation."""

    def __init__(self, n_users: int, n_items: int, factors: int, std: float = 0.01) -> None:
        super().__init__()
        self.user = Embedding(n_users, factors, std)
        self.item = Embedding(n_items, factors, std)
        self.output = nn.Linear(factors, 1)
        self.dot_sides = Product(self.user, self.item, self.output)

    @property
    def bias(self) -> Tensor:
        return self.output.bias


class MF(Recommender):
    """Matrix factorisation: a dot product, with biases where asked."""

    def __init__(
        self, n_users: int, n_items: int, factors: int, biases: bool, y_range: YRange = None, std: float = 0.01
    ) -> None:
        super().__init__()
        self.user = Embedding(n_users, factors, std)
        self.item = Embedding(n_items, factors, std)
        self.dot_sides = Product(self.user, self.item)
        if biases:
            self.user_bias = Embedding(n_users, 1, std)
            self.item_bias = Embedding(n_items, 1, std)
        self.y_range = y_range
