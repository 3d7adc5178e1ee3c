"""A model of which nothing is trained: all that orders a catalogue are the item-to-item parts of its bundle
(ncf_dist/item_item/part.py), added to a score that is 0 for everybody."""

from __future__ import annotations

from torch import Tensor

from ncf_dist.models.base import Embedding, Recommender


class Nothing:
    """dot_u = 1 and dot_i = 0."""

    def __init__(self, users: int, item: Embedding) -> None:
        self.users, self.item = users, item

    def user_side(self, user: Tensor | None) -> Tensor:
        sizes = (self.users,) if user is None else user.shape
        return self.item.weight.new_ones(*sizes, 1)

    def item_side(self, item: Tensor | None) -> Tensor:
        zeros: Tensor = self.item(item)
        return zeros


class ItemToItem(Recommender):
    """Scores 0."""

    def __init__(self, n_users: int, n_items: int) -> None:
        super().__init__()
        self.users_known = n_users
        self.item = Embedding(n_items, 1, 0.0)
        self.dot_sides = Nothing(n_users, self.item)

    @property
    def n_users(self) -> int:
        return self.users_known
