"""The inference bundle: weights.safetensors and bundle.json. Tensors and JSON only, no code is ever loaded from data.

`model_version` names the weights: the model's name and the start of their SHA-256. The same training gives the same version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from ncf_dist import config as settings
from ncf_dist.artifacts import is_local, make_dirs, read_bytes, write_atomic
from ncf_dist.errors import ContractError
from ncf_dist.models import Recommender, build_model

WEIGHTS, CARD = "weights.safetensors", "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """What a scorer must know of a trained model; `path` is its folder."""

    path: str
    model: settings.Model
    model_version: str
    n_users: int
    n_items: int
    sha256: str
    facts: Mapping[str, Any]


def save_bundle(path: str, model: Recommender, config: settings.Model, n_users: int, n_items: int, facts: Mapping[str, Any]) -> Bundle:
    """Write weights first and the card last; returns the bundle."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    bundle = Bundle(path, config, f"{config.name}-{digest[:12]}", n_users, n_items, digest, facts)
    make_dirs(path)
    write_atomic(posixpath.join(path, WEIGHTS), data)
    card = {**{f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle) if f.name != "path"}, "model": config.model_dump(mode="json")}
    write_atomic(posixpath.join(path, CARD), json.dumps(card, indent=1, sort_keys=True).encode())
    return bundle


def read_bundle(path: str) -> Bundle:
    """The card of the bundle at `path`. Raises ContractError where there is none or it cannot be read."""
    try:
        card = json.loads(read_bytes(posixpath.join(path, CARD)))
        return Bundle(**{**card, "model": settings.Model.model_validate(card["model"]), "path": path})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ContractError(f"bundle {path} cannot be read ({error}); needed {WEIGHTS} and {CARD}: rerun the job train") from None


def load_model(bundle: Bundle, verify: bool = True) -> Recommender:
    """The trained model in evaluation mode on the CPU; weights of a local bundle are memory-mapped while they are copied in.

    Raises ContractError when the weights are not the ones that the card names.
    """
    weights = posixpath.join(bundle.path, WEIGHTS)
    if verify:
        found = hashlib.sha256(read_bytes(weights)).hexdigest()
        if found != bundle.sha256:
            raise ContractError(f"{weights} has SHA-256 {found[:12]}…, its card says {bundle.sha256[:12]}…: the file is damaged, rerun the job train")
    tensors = safetensors.torch.load_file(weights) if is_local(weights) else safetensors.torch.load(read_bytes(weights))
    with torch.device("meta"):
        model = build_model(bundle.model, bundle.n_users, bundle.n_items)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()
