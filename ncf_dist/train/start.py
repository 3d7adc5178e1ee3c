"""Where weights start when not afresh: NeuMF from a GMF and an MLP, or a model from an earlier one of its own kind.

Warm start: indexes are append-only, so the rows of an earlier table are the first rows of today's, and are kept. A new
row starts at the mean of the old ones plus its fresh initial value: an average user or item, yet unlike any other.
Everything else is kept.
"""

from __future__ import annotations

import torch

from ncf_dist import config as settings
from ncf_dist.bundle import Bundle, load_model, read_bundle, verify_weights
from ncf_dist.errors import ContractError
from ncf_dist.models import GMF, MLP, NeuMF, Recommender, Table, build_model

SAME = {"name", "factors", "layers", "biases", "embedding_sizes", "batch_norm", "y_range"}
"""What of `model` must be equal for one model's weights to fit another."""


def check_start(bundle: Bundle, model: settings.Model, n_users: int, n_items: int, same: set[str] = SAME) -> None:
    """Raise ContractError unless `bundle` is a model of this kind whose users and items are the first of today's."""
    found, wanted = (m.model_dump(mode="json", include=same) for m in (bundle.model, model))
    if found != wanted:
        raise ContractError(
            f"bundle {bundle.path} is of {found}, needed {wanted}: set `model` to what the bundle was trained with, "
            "or start afresh"
        )
    if bundle.n_users > n_users or bundle.n_items > n_items:
        raise ContractError(
            f"bundle {bundle.path} has {bundle.n_users:,} users and {bundle.n_items:,} items, the tables have "
            f"{n_users:,} and {n_items:,}; needed at least as many, the earlier ones first: "
            "take a bundle of this lake, or start afresh"
        )
    if (
        model.name == "embedding_nn"
        and model.embedding_sizes is None
        and (bundle.n_users, bundle.n_items)
        != (
            n_users,
            n_items,
        )
    ):
        raise ContractError(
            f"bundle {bundle.path} is for fewer users or items, and embedding_nn's sizes follow their number; "
            "needed fixed ones: train with model.embedding_sizes set from the first night on"
        )


@torch.no_grad()
def warm_start(model: Recommender, bundle: Bundle) -> None:
    """Give `model`, freshly initialised, the weights of an earlier one."""
    verify_weights(bundle)
    old = load_model(bundle).state_dict()
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Table)}
    for name, value in model.state_dict().items():
        if name in tables:
            known = len(old[name])
            value[known:] += old[name].mean(dim=0)
            value[:known] = old[name]
        else:
            value.copy_(old[name])


def pretrained_start(
    model: NeuMF, start: settings.Pretrained, config: settings.Model, n_users: int, n_items: int
) -> None:
    """Give `model` the weights of the two bundles, whose users and items may be fewer.
    Raises ContractError where they do not fit."""
    gmf, mlp = (
        _part(read_bundle(path), config.model_copy(update={"name": name}), n_users, n_items, {"name", size})
        for name, path, size in (("gmf", start.gmf, "factors"), ("mlp", start.mlp, "layers"))
    )
    assert isinstance(gmf, GMF)
    assert isinstance(mlp, MLP)
    model.start_from(gmf, mlp, start.alpha)


def _part(bundle: Bundle, config: settings.Model, n_users: int, n_items: int, same: set[str]) -> Recommender:
    check_start(bundle, config, n_users, n_items, same)
    part = build_model(config, n_users, n_items)
    warm_start(part, bundle)
    return part
