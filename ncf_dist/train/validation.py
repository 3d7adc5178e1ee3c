"""Model selection: rank each validation positive among its candidates, or compare predicted ratings with given ones.
Test rows are never read here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ncf_dist import metrics
from ncf_dist.contracts import RECENT, TRAIN_SPLIT, VALIDATION, Contract
from ncf_dist.errors import ContractError, TrainingFailed
from ncf_dist.manifests import Manifest
from ncf_dist.models import Recommender, Users
from ncf_dist.models.latest import latest
from ncf_dist.parquet import read_table
from ncf_dist.train.world import World

ROWS_A_BLOCK = 4_096
K = 10
"""The length of the lists that validation judges."""
SELECT_BY = {f"ndcg@{K}": 1.0, "mse": -1.0}
"""The figures that choose the epoch to keep, and whether a higher or a lower one is better."""


@dataclass(frozen=True)
class HeldOut:
    """V validation rows of one file. user, item, rating: (V,); candidates: (V, C) padded with the positive;
    real: (V, C) bool."""

    user: Tensor
    item: Tensor
    rating: Tensor
    candidates: Tensor
    real: Tensor


def read_held_out(path: str) -> HeldOut:
    """One file of a held-out table as tensors; lists shorter than the longest are padded."""
    table = read_table(path)
    user, item = (torch.from_numpy(table.column(name).to_numpy().astype(np.int64)) for name in ("user_idx", "item_idx"))
    lists = table.column("candidates").combine_chunks()
    sizes = torch.from_numpy(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
    width = int(sizes.max()) if len(sizes) else 0
    real = torch.arange(width)[None] < sizes[:, None]
    candidates = item[:, None].expand(-1, width).clone()
    candidates[real] = torch.from_numpy(lists.flatten().to_numpy().astype(np.int64))
    rating = torch.from_numpy(table.column("rating").to_numpy().astype(np.float64))
    return HeldOut(user, item, rating, candidates, real)


def rows_of_users(
    prepare: Manifest, contract: Contract, users: npt.NDArray[np.integer[Any]], columns: list[str] | None = None
) -> pa.Table:
    """The rows of a table that are of some `users`, by user; a file in memory at a time. Raises ContractError where the
    table is not there."""
    prepare.table(contract)
    kept = [contract.schema.empty_table().select(columns or contract.columns)]
    for path in prepare.files(contract.name):
        table = read_table(path, columns)
        kept.append(table.filter(pa.array(np.isin(table["user_idx"].to_numpy(), users))))
    return pa.concat_tables(kept).sort_by("user_idx")


def read_users(prepare: Manifest, index: Tensor, length: int) -> Users:
    """What the users in `index` did last in train, at most `length` items of each."""
    wanted = index.unique()
    rows = rows_of_users(prepare, RECENT, wanted.numpy())
    if not np.array_equal(found := rows["user_idx"].to_numpy(), wanted.numpy()):
        raise ContractError(
            f"table {RECENT.name} of {prepare.root} has {len(found)} of the {len(wanted)} users with validation rows; "
            "needed each once: rerun the job prepare"
        )
    return Users(wanted, latest(rows, TRAIN_SPLIT, length))


@torch.inference_mode()
def candidate_ranks(model: Recommender, held_out: HeldOut, device: str, users: Users | None = None) -> Tensor:
    """(V,) rank of each positive among its candidates, ties averaged. users: of a model of histories, each user of
    `held_out` once, by index."""
    ranks, side = [], None
    if users is not None:
        assert users.latest is not None
        side = model.users(users.latest.to(device))
    for block in _blocks(held_out):
        items = torch.cat([block.item[:, None], block.candidates], dim=1).to(device)
        if users is None or side is None:
            scores = model(block.user.to(device)[:, None], items)
        else:
            place = torch.searchsorted(users.index, block.user).to(device)
            scores = model.join(side.each(lambda part: part[place][:, None]), model.items(items))  # noqa: B023
        scores = _finite(scores.cpu())
        positive, others = scores[:, :1], scores[:, 1:]
        greater = ((others > positive) & block.real).sum(1).numpy()
        equal = ((others == positive) & block.real).sum(1).numpy()
        ranks.append(torch.from_numpy(metrics.mean_rank(greater, equal)))
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.float64)


@torch.inference_mode()
def rating_errors(model: Recommender, held_out: HeldOut, device: str) -> Tensor:
    """(V,) prediction minus rating, float64."""
    blocks = [
        _finite(model(block.user.to(device), block.item.to(device)).cpu()).double() - block.rating
        for block in _blocks(held_out)
    ]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.float64)


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        # Nothing beats a score that is not a number: such a model would rank every positive first.
        raise TrainingFailed(
            "the model gives scores that are not finite to validation rows; needed finite ones: lower train.lr"
        )
    return scores


def _blocks(held_out: HeldOut) -> Iterator[HeldOut]:
    for start in range(0, len(held_out.user), ROWS_A_BLOCK):
        part = slice(start, start + ROWS_A_BLOCK)
        yield HeldOut(*(getattr(held_out, field.name)[part] for field in dataclasses.fields(held_out)))


class Validator:
    """Validation metrics over all ranks; each rank reads its share of the files once and keeps it."""

    def __init__(self, manifest: Manifest, world: World, explicit: bool = False, history: int = 0) -> None:
        """history: how many latest items a model of histories reads, 0 for another model."""
        manifest.table(VALIDATION)
        self.parts = [read_held_out(path) for path in manifest.files(VALIDATION.name)[world.rank :: world.size]]
        self.users: Users | None = None
        if history:
            every = torch.cat([torch.empty(0, dtype=torch.int64), *(part.user for part in self.parts)])
            self.users = read_users(manifest, every, history)
        self.world, self.explicit = world, explicit

    def __call__(self, model: Recommender) -> dict[str, float]:
        """{"hr@10", "ndcg@10", "mrr"} over all validation rows, of explicit feedback {"mse", "mae"};
        empty when nothing is held out. The same on every rank."""
        model.eval()
        total = self._rating_sums(model) if self.explicit else self._ranking_sums(model)
        summed = self.world.sum(torch.tensor(list(total.values()), dtype=torch.float64)).tolist()
        total = dict(zip(total, summed, strict=True))
        return metrics.means(total) if total["n"] else {}

    def _ranking_sums(self, model: Recommender) -> dict[str, float]:
        ranks = [candidate_ranks(model, part, self.world.device, self.users).numpy() for part in self.parts]
        return metrics.sums(np.concatenate(ranks) if ranks else np.empty(0), (K,))

    def _rating_sums(self, model: Recommender) -> dict[str, float]:
        errors = torch.cat([torch.empty(0), *(rating_errors(model, part, self.world.device) for part in self.parts)])
        return {"n": float(len(errors)), "mse": float((errors**2).sum()), "mae": float(errors.abs().sum())}
