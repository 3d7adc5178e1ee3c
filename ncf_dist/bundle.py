"""The inference bundle: weights.safetensors and bundle.json. Tensors and JSON only, no code is ever loaded from data.

Reading the card needs no torch: a Spark driver does that. `model_version` names the weights:
the model's name and the start of their SHA-256. The same training gives the same version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ncf_dist import config as settings
from ncf_dist.errors import ContractError, TrainingFailed
from ncf_dist.files import is_local, make_dirs, read_bytes, read_json, write_atomic
from ncf_dist.stored import map_tensors, misfit, not_finite, parse_tensors

if TYPE_CHECKING:
    from ncf_dist.models import Recommender

BUNDLE, WEIGHTS, CARD = "bundle", "weights.safetensors", "bundle.json"
"""A train run's folder of a bundle, and the files in it."""


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


def save_bundle(
    path: str,
    model: Recommender,
    config: settings.Model,
    n_users: int,
    n_items: int,
    facts: Mapping[str, Any],
) -> Bundle:
    """Write weights first and the card last; returns the bundle.
    Raises TrainingFailed for weights that are not finite."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingFailed(
            f"the trained weights {', '.join(broken)} are not all finite; needed finite ones: lower train.lr"
        )
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    bundle = Bundle(path, config, version_of(config, digest), n_users, n_items, digest, facts)
    make_dirs(path)
    write_atomic(posixpath.join(path, WEIGHTS), data)
    card = {
        **{f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle) if f.name != "path"},
        "model": config.model_dump(mode="json"),
    }
    write_atomic(posixpath.join(path, CARD), json.dumps(card, indent=1, sort_keys=True).encode())
    return bundle


def version_of(config: settings.Model, sha256: str) -> str:
    return f"{config.name}-{sha256[:12]}"


def read_bundle(path: str) -> Bundle:
    """The card of the bundle at `path`. Raises ContractError where there is none or it cannot be read."""
    try:
        bundle = read_json(Bundle, posixpath.join(path, CARD), path=path)
        if bundle.model_version != (wanted := version_of(bundle.model, bundle.sha256)):
            raise ValueError(f"model_version is {bundle.model_version!r}, its model and weights say {wanted!r}")
        return bundle
    except (OSError, ValueError) as error:
        raise ContractError(
            f"bundle {path} cannot be read ({error}); needed {WEIGHTS} and {CARD}: rerun the job train"
        ) from None


def verify_weights(bundle: Bundle) -> None:
    """Raise ContractError when the weights are not the ones that the card names, or not all finite."""
    weights = posixpath.join(bundle.path, WEIGHTS)
    with _reading(weights):
        data = read_bytes(weights)
    found = hashlib.sha256(data).hexdigest()
    if found != bundle.sha256:
        raise ContractError(
            f"{weights} has SHA-256 {found[:12]}…, its card says {bundle.sha256[:12]}…: "
            "the file is damaged, rerun the job train"
        )
    with _reading(weights):
        broken = not_finite(weights if is_local(weights) else data)
    if broken:
        raise ContractError(
            f"{weights}: {', '.join(broken)} are not all finite; needed finite ones: rerun the job train"
        )


def load_model(bundle: Bundle) -> Recommender:
    """The trained model in evaluation mode on the CPU; weights of a local bundle are memory-mapped.
    Raises ContractError for a file that is not of the card's model.

    Trusts the numbers: `verify_weights` once a job, not once a worker.
    """
    weights = posixpath.join(bundle.path, WEIGHTS)
    with _reading(weights):
        tensors = map_tensors(weights) if is_local(weights) else parse_tensors(read_bytes(weights))
    model = _outline(bundle)
    if problem := misfit(model.state_dict(), tensors):
        raise ContractError(f"{weights} is not of the model in {CARD}: {problem}: rerun the job train")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _outline(bundle: Bundle) -> Recommender:
    """The model that the card describes, without memory for its weights."""
    import torch

    from ncf_dist.models import build_model

    try:
        with torch.device("meta"):
            return build_model(bundle.model, bundle.n_users, bundle.n_items)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:  # Sizes that no tensor can have.
        raise ContractError(
            f"{posixpath.join(bundle.path, CARD)} describes a model that cannot be built "
            f"({' '.join(str(error).split())[:200]}); needed the sizes that it was trained with: rerun the job train"
        ) from None


@contextlib.contextmanager
def _reading(weights: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ContractError(f"{weights} cannot be read ({error}); its card names it: rerun the job train") from None
