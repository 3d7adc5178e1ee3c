"""What `start.py` has chosen, in the weights of a fresh model."""

from __future__ import annotations

import torch
from torch import Tensor

from ncf_dist import config as settings
from ncf_dist.ancestry import INDEXES, index_sizes
from ncf_dist.bundle import Bundle, load_model, read_bundle, verify_weights
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF, MLP, Embedding, NeuMF, Recommender, build_model
from ncf_dist.parquet import read_table
from ncf_dist.train.start import check_start

USER_INDEX = INDEXES["users"]


@torch.no_grad()
def warm_start(model: Recommender, bundle: Bundle, users: Tensor | None = None) -> None:
    """Give `model`, freshly initialised, the weights of an earlier one. users: (n_users,) bool, which numbers still
    have a user; the rows of the others stay fresh and count for no mean. None where all have."""
    verify_weights(bundle)
    old = load_model(bundle).state_dict()
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Embedding)}
    for name, value in model.state_dict().items():
        if name not in tables:
            value.copy_(old[name])
            continue
        known, rows = len(old[name]), old[name]
        if users is not None and _of_users(name):
            kept = users[:known]
            rows = rows[kept]
            value[:known][kept] = rows
        else:
            value[:known] = rows
        if len(rows):
            value[known:] += rows.mean(dim=0)


def _of_users(table: str) -> bool:
    """Whether an embedding table has a row a user, by the name of its weights."""
    return table.split(".")[-2].startswith("user")


def users_there(prepare: Manifest) -> Tensor | None:
    """(n_users,) bool: which numbers have a user tonight, the others being forgotten; None where all have."""
    size = index_sizes(prepare).users
    if USER_INDEX not in prepare.tables or prepare.tables[USER_INDEX].rows == size:
        return None
    there = torch.zeros(size, dtype=torch.bool)
    for path in prepare.files(USER_INDEX):
        numbers = read_table(path, ["user_idx"])["user_idx"].to_numpy()
        there[torch.from_numpy(numbers.astype("int64"))] = True
    return there


def pretrained_start(
    model: NeuMF,
    start: settings.Pretrained,
    config: settings.Model,
    n_users: int,
    n_items: int,
    users: Tensor | None = None,
) -> None:
    """Give `model` the weights of the two bundles, whose users and items may be fewer. users: as for `warm_start`.
    Raises ContractError where they do not fit."""
    gmf, mlp = (
        _part(read_bundle(path), config.model_copy(update={"name": name}), (n_users, n_items), users, {"name", size})
        for name, path, size in (("gmf", start.gmf, "factors"), ("mlp", start.mlp, "layers"))
    )
    assert isinstance(gmf, GMF)
    assert isinstance(mlp, MLP)
    model.start_from(gmf, mlp, start.alpha)


def _part(
    bundle: Bundle, config: settings.Model, sizes: tuple[int, int], users: Tensor | None, same: set[str]
) -> Recommender:
    check_start(bundle, config, *sizes, same)
    part = build_model(config, *sizes)
    warm_start(part, bundle, users)
    return part
