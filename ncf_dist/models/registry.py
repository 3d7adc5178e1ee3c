"""The models by the name that `model.name` gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ncf_dist import config as settings
from ncf_dist import no_compiler
from ncf_dist.models.base import Recommender
from ncf_dist.models.factorisation import GMF, MF
from ncf_dist.models.history import History
from ncf_dist.models.item_to_item import ItemToItem
from ncf_dist.models.towers import MLP, EmbeddingNN, NeuMF

MODELS: dict[str, Callable[[settings.Model, int, int], Recommender]] = {
    "gmf": lambda c, users, items: GMF(users, items, c.factors, c.init_std),
    "mlp": lambda c, users, items: MLP(users, items, c.layers, c.dropout, c.init_std),
    "neumf": lambda c, users, items: NeuMF(users, items, c.factors, c.layers, c.dropout, c.init_std),
    "mf": lambda c, users, items: MF(users, items, c.factors, c.biases, c.y_range, c.init_std),
    "embedding_nn": lambda c, users, items: EmbeddingNN(
        users, items, c.layers, c.embedding_sizes, c.dropout, c.batch_norm, c.y_range, c.init_std
    ),
    "history": lambda c, users, items: History(
        users,
        items,
        c.factors,
        c.history,
        block=c.block,
        blocks=c.blocks,
        heads=c.heads,
        gaps=c.gaps,
        dropout=c.dropout,
        std=c.init_std,
    ),
    "item_to_item": lambda c, users, items: ItemToItem(users, items),
}


def build_model(config: settings.Model, n_users: int, n_items: int) -> Recommender:
    """The model that `config.name` names, freshly initialised from torch's global generator."""
    return MODELS[config.name](config, n_users, n_items)


def outline(config: settings.Model, n_users: int, n_items: int) -> Recommender:
    """The model with its shapes and no memory for its weights: on the device `meta`, whose operations would load
    torch's compiler."""
    with no_compiler.left_out(), torch.device("meta"):
        return build_model(config, n_users, n_items)


def parameter_count(config: settings.Model, n_users: int, n_items: int) -> int:
    """Parameters of the model, counted without allocating them."""
    return sum(p.numel() for p in outline(config, n_users, n_items).parameters())
