"""The inference bundle: weights.safetensors, parts.safetensors where the model's scores have item-to-item parts, and
bundle.json. Tensors and JSON only, no code is ever loaded from data.

Reading the card needs no torch: a Spark driver does that. `model_version` names the weights and the parts: the model's
name and the start of the SHA-256 of the weights, and of what the card says of the parts, where there are any. The same
training gives the same version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ncf_dist import config as settings
from ncf_dist.errors import ContractError, TrainingFailed
from ncf_dist.files import is_local, make_dirs, read_bytes, read_json, write_atomic, write_verified
from ncf_dist.stored import map_tensors, misfit, not_finite, parse_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ncf_dist.item_item.part import Part
    from ncf_dist.models import Recommender

BUNDLE, WEIGHTS, PARTS, CARD = "bundle", "weights.safetensors", "parts.safetensors", "bundle.json"
"""A train run's folder of a bundle, and the files in it."""


@dataclass(frozen=True)
class PartCard:
    """A part as `item_item.part.Part` has it, without its rows, which are the file's tensors of that name."""

    name: str
    weight: float
    half_life: float
    last: int
    column: bool = False
    """Whether its rows have a column."""


@dataclass(frozen=True)
class PartsCard:
    """The item-to-item parts of the scores, in order, and the SHA-256 of their file."""

    sha256: str
    parts: tuple[PartCard, ...]


@dataclass(frozen=True)
class Bundle:
    """What a scorer must know of a trained model; `path` is its folder. parts: None where the weights are all."""

    path: str
    model: settings.Model
    model_version: str
    n_users: int
    n_items: int
    sha256: str
    facts: Mapping[str, Any]
    parts: PartsCard | None = None

    @property
    def by_history(self) -> bool:
        """Whether users are ranked by what they did alone, so that they need not have been there in training."""
        return self.model.name in ("history", "item_to_item")

    @property
    def looks_back(self) -> int:
        """How many of a user's latest items the scores are made from; 0 where they are made from none."""
        of_model = self.model.history if self.model.name == "history" else 0
        return max([of_model, *(part.last for part in self.parts.parts)] if self.parts else [of_model])


def save_bundle(
    path: str,
    model: Recommender,
    config: settings.Model,
    n_users: int,
    n_items: int,
    facts: Mapping[str, Any],
    parts: Sequence[Part] = (),
) -> Bundle:
    """Write the tensors first and the card last; returns the bundle.
    Raises TrainingFailed for tensors that are not finite."""
    files = {WEIGHTS: {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}}
    if parts:
        files[PARTS] = {name: tensor for part in parts for name, tensor in part.rows.tensors(part.name).items()}
    broken = [name for tensors in files.values() for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingFailed(
            f"the trained weights {', '.join(broken)} are not all finite; needed finite ones: lower train.lr"
        )
    make_dirs(path)
    digests = {name: _save_tensors(posixpath.join(path, name), tensors) for name, tensors in files.items()}
    of_parts = tuple(PartCard(p.name, p.weight, p.half_life, p.last, p.rows.column is not None) for p in parts)
    card = PartsCard(digests[PARTS], of_parts) if parts else None
    version = version_of(config, digests[WEIGHTS], card)
    bundle = Bundle(path, config, version, n_users, n_items, digests[WEIGHTS], facts, card)
    stored = {**dataclasses.asdict(bundle), "model": config.model_dump(mode="json")}
    # A card without parts is what earlier versions read and wrote.
    for name in ("path", *(() if parts else ("parts",))):
        del stored[name]
    write_atomic(posixpath.join(path, CARD), json.dumps(stored, indent=1, sort_keys=True).encode())
    return bundle


def _save_tensors(path: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the file."""
    import safetensors.torch

    data = safetensors.torch.save(dict(tensors))
    write_verified(path, data)
    return hashlib.sha256(data).hexdigest()


def version_of(config: settings.Model, sha256: str, parts: PartsCard | None = None) -> str:
    """The same weights with other parts, or other weights of the parts, are another model."""
    if parts is not None:
        text = json.dumps([sha256, dataclasses.asdict(parts)], sort_keys=True)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
    return f"{config.name}-{sha256[:12]}"


def read_bundle(path: str) -> Bundle:
    """The card of the bundle at `path`. Raises ContractError where there is none or it cannot be read."""
    try:
        bundle = read_json(Bundle, posixpath.join(path, CARD), path=path)
        if bundle.model_version != (wanted := version_of(bundle.model, bundle.sha256, bundle.parts)):
            raise ValueError(f"model_version is {bundle.model_version!r}, its model and weights say {wanted!r}")
        return bundle
    except (OSError, ValueError) as error:
        raise ContractError(
            f"bundle {path} cannot be read ({error}); needed {WEIGHTS} and {CARD}: rerun the job train"
        ) from None


def verify_weights(bundle: Bundle) -> None:
    """Raise ContractError when the tensors are not the ones that the card names, or not all finite."""
    _verify(posixpath.join(bundle.path, WEIGHTS), bundle.sha256)
    if bundle.parts is not None:
        _verify(posixpath.join(bundle.path, PARTS), bundle.parts.sha256)


def _verify(file: str, sha256: str) -> None:
    with _reading(file):
        data = read_bytes(file)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ContractError(
            f"{file} has SHA-256 {found[:12]}…, its card says {sha256[:12]}…: the file is damaged, rerun the job train"
        )
    with _reading(file):
        broken = not_finite(file if is_local(file) else data)
    if broken:
        raise ContractError(f"{file}: {', '.join(broken)} are not all finite; needed finite ones: rerun the job train")


def load_model(bundle: Bundle) -> Recommender:
    """The trained model in evaluation mode on the CPU; weights of a local bundle are memory-mapped.
    Raises ContractError for a file that is not of the card's model.

    Trusts the numbers: `verify_weights` once a job, not once a worker.
    """
    weights = posixpath.join(bundle.path, WEIGHTS)
    tensors = _tensors(weights, bundle.sha256)
    model = _outline(bundle)
    if problem := misfit(model.state_dict(), tensors):
        raise ContractError(f"{weights} is not of the model in {CARD}: {problem}: rerun the job train")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def load_parts(bundle: Bundle) -> tuple[Part, ...]:
    """The item-to-item parts of the scores, in the card's order; tensors of a local bundle are memory-mapped.
    Raises ContractError for a file that does not hold them. Trusts the numbers, as `load_model` does."""
    from ncf_dist.item_item.part import Part
    from ncf_dist.item_item.rows import ItemRows

    if bundle.parts is None:
        return ()
    file = posixpath.join(bundle.path, PARTS)
    tensors = _tensors(file, bundle.parts.sha256)
    try:
        found = [(card, ItemRows.of_tensors(card.name, tensors, bundle.n_items)) for card in bundle.parts.parts]
        if unknown := sorted({name.partition(".")[0] for name in tensors} - {card.name for card, _ in found}):
            raise ValueError(f"{unknown[0]} is not part of it")
    except ValueError as error:
        raise ContractError(f"{file} is not what {CARD} says of it: {error}: rerun the job train") from None
    return tuple(Part(card.name, card.weight, card.half_life, card.last, rows) for card, rows in found)


def _tensors(file: str, sha256: str) -> dict[str, Tensor]:
    """What was read over a network is compared with the card's SHA-256; a local file was, by `verify_weights`."""
    with _reading(file):
        if is_local(file):
            return map_tensors(file)
        data = read_bytes(file)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its SHA-256 is not the card's")
        return parse_tensors(data)


def _outline(bundle: Bundle) -> Recommender:
    """The model that the card describes, without memory for its weights."""
    from ncf_dist.models import outline

    try:
        return outline(bundle.model, bundle.n_users, bundle.n_items)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:  # Sizes that no tensor can have.
        raise ContractError(
            f"{posixpath.join(bundle.path, CARD)} describes a model that cannot be built "
            f"({' '.join(str(error).split())[:200]}); needed the sizes that it was trained with: rerun the job train"
        ) from None


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ContractError(f"{file} cannot be read ({error}); its card names it: rerun the job train") from None
