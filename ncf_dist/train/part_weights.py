"""What the item-to-item parts weigh beside a model's own scores: the combination of the config's weights that ranks the
validation rows best, by NDCG@10.

Each validation item is ranked as a list is made: among the whole catalogue but the user's train items, with what the
user did last in train. Where users x items are too many, the users are a sample by a hash. Of combinations that are as
good the first counts, in the config's order; without validation rows it is the first of all.

Letters: U users of a block, I items, P validation rows of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ncf_dist import contracts, metrics
from ncf_dist.errors import ContractError, TrainingFailed
from ncf_dist.item_item.part import Part, product_scores
from ncf_dist.manifests import Manifest
from ncf_dist.models import Recommender, Users, latest
from ncf_dist.parquet import read_table
from ncf_dist.sampling import IntArray, Stream, hash64
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.train.validation import rows_of_users

K = 10
PAIRS = 5 * 10**8
"""Users x items that are looked at, about; each costs some nanoseconds a combination."""
BLOCK_SCORES, BLOCK_USERS = 2**22, 256
"""Scores and users that are held at a time, at most."""


@dataclass(frozen=True)
class Candidate:
    """A part of weight 1, and what it may weigh."""

    part: Part
    weights: tuple[float, ...]

    def weighing(self, weight: float) -> Part:
        return replace(self.part, weight=weight)


@dataclass(frozen=True)
class Choice:
    """weights: what was chosen, by part; figures: NDCG@10 and HR@10 of every combination; rows: validation rows that
    they are means over."""

    weights: dict[str, float]
    figures: list[dict[str, float]]
    rows: int

    @property
    def chosen_by(self) -> str:
        rows = f"the best of {len(self.figures)} by ndcg@{K} of {self.rows:,} validation rows"
        return rows if self.rows else "the first of each, as there are no validation rows"

    def as_json(self) -> dict[str, Any]:
        return {"weights": self.weights, "chosen_by": self.chosen_by, "figures": self.figures}


def choose(
    model: Recommender, candidates: Sequence[Candidate], prepare: Manifest, seed: int, may_be_nothing: bool = True
) -> Choice:
    """may_be_nothing: whether all weights may be 0. Raises TrainingFailed for scores that are not finite."""
    names = [candidate.part.name for candidate in candidates]
    combinations = [
        weights
        for weights in itertools.product(*(candidate.weights for candidate in candidates))
        if may_be_nothing or any(weights)
    ]
    sums: list[dict[str, float]] = [{} for _ in combinations]
    scorer = ModelScorer(model, model.n_items)
    for block in held_out_blocks(prepare, model.n_items, seed):
        own = block.masked(scorer.scores(block.users).cpu())
        assert block.users.latest is not None
        parts = [product_scores(c.part, block.users.latest.items, block.users.latest.length) for c in candidates]
        for number, weights in enumerate(combinations):
            ranks = block.ranks(own, parts, weights)
            for name, value in metrics.sums(ranks, (K,)).items():
                sums[number][name] = sums[number].get(name, 0.0) + value
    rows = int(sums[0].get("n", 0))
    if not rows:
        return Choice(dict(zip(names, combinations[0], strict=True)), [], 0)
    figures = [metrics.means(total) for total in sums]
    best = max(range(len(figures)), key=lambda number: figures[number][f"ndcg@{K}"])
    record = [
        {**dict(zip(names, weights, strict=True)), **{name: found[name] for name in (f"ndcg@{K}", f"hr@{K}")}}
        for weights, found in zip(combinations, figures, strict=True)
    ]
    return Choice(dict(zip(names, combinations[best], strict=True)), record, rows)


@dataclass(frozen=True)
class HeldOut:
    """U users with validation rows. seen: their train items; row, item: (P,) the rows, by user of the block."""

    users: Users
    seen: Lists
    row: Tensor
    item: Tensor

    def masked(self, own: Tensor) -> Tensor:
        """own (U, I), -inf for what the users have seen: and so it stays, whatever is added."""
        own[torch.from_numpy(self.seen.row), torch.from_numpy(self.seen.values)] = -torch.inf
        return own

    def ranks(self, own: Tensor, parts: Sequence[Tensor], weights: Sequence[float]) -> metrics.FloatArray:
        """(P,) places among the user's unseen items, ties averaged, by own (U, I), masked, + Σ weight · part (U, I)."""
        scores = own.clone()
        for part, weight in zip(parts, weights, strict=True):
            if weight:
                scores.add_(part, alpha=weight)
        positive = scores[self.row, self.item][:, None]
        if not positive.isfinite().all():
            raise TrainingFailed(
                "the model gives scores that are not finite to validation rows; needed finite ones: lower train.lr"
            )
        one_each = len(self.row) == len(scores) and bool((self.row.diff() == 1).all())
        every = scores if one_each else scores[self.row]
        return metrics.mean_rank((every > positive).sum(1).numpy(), (every == positive).sum(1).numpy() - 1)


# ---- the validation rows ---------------------------------------------------------------------------------------------


def held_out_blocks(prepare: Manifest, n_items: int, seed: int) -> Iterator[HeldOut]:
    """Users with validation rows, ascending, a sample of them where they are many."""
    rows = prepare.table(contracts.VALIDATION).rows
    share = min(1.0, PAIRS / max(1, rows * n_items))
    files = prepare.files(contracts.VALIDATION.name)
    chosen = pa.concat_tables([read_table(path, ["user_idx", "item_idx"]) for path in files])
    drawn = hash64(seed, int(Stream.PART_WEIGHTS), chosen["user_idx"].to_numpy().astype(np.int64)) & (2**32 - 1)
    chosen = chosen.filter(pa.array(drawn < share * 2**32)).sort_by("user_idx")
    users = chosen["user_idx"].unique()
    if not len(users):
        return
    history = rows_of_users(prepare, contracts.HISTORY, users.to_numpy(), ["user_idx", "item_idx"])
    recent = rows_of_users(prepare, contracts.RECENT, users.to_numpy())
    for contract, table in ((contracts.HISTORY, history), (contracts.RECENT, recent)):
        if not table["user_idx"].combine_chunks().equals(users):
            raise ContractError(
                f"table {contract.name} has {table.num_rows:,} rows of the {len(users):,} users with validation rows; "
                "needed one of each: rerun the job prepare"
            )
    size = max(1, min(BLOCK_USERS, BLOCK_SCORES // n_items))
    number, item = (
        column.to_numpy().astype(np.int64) for column in (pc.index_in(chosen["user_idx"], users), chosen["item_idx"])
    )
    length = int(prepare.config["sequences"]["length"])
    for start in range(0, len(users), size):
        ends = np.searchsorted(number, [start, start + size])
        row, held = number[slice(*ends)] - start, item[slice(*ends)]
        seen = Lists.of(history["item_idx"].slice(start, size).combine_chunks())
        yield HeldOut(
            Users(
                torch.from_numpy(users.slice(start, size).to_numpy().astype(np.int64)),
                latest(recent.slice(start, size), contracts.TRAIN_SPLIT, length),
            ),
            _without(seen, row, held, n_items),
            torch.from_numpy(row),
            torch.from_numpy(held),
        )


def _without(seen: Lists, row: IntArray, item: IntArray, n_items: int) -> Lists:
    """`seen` but for the items (P,) of the users (P,)."""
    left = ~np.isin(seen.row * n_items + seen.values, row * n_items + item)
    sizes = np.bincount(seen.row[left], minlength=len(seen.offsets) - 1)
    return Lists(seen.values[left], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
