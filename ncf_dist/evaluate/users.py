"""Metrics of a block of users, on an executor: one task's sums for the model and the popularity baseline.

Full catalogue: the held-out item is ranked among all items but those the user has in train and validation. Candidates:
among its own 1 + N (the NCF protocol), ties averaged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch

from ncf_dist import metrics
from ncf_dist.artifacts import read_table
from ncf_dist.bundle import load_model
from ncf_dist.evaluate.spec import EvaluationPass
from ncf_dist.scoring import Lists, ModelScorer, PopularityScorer, Scorer, catalogue_rank, mask

USERS_A_BLOCK = 512


def evaluation_pass(spec: EvaluationPass) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """For mapInArrow: rows (user_idx, seen list, item_idx, rating, candidates list) in,
    one row `stats` (JSON sums) a task out."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        torch.set_num_threads(1)
        total: Counter[str] = Counter()
        scorers: dict[str, Scorer] = {}
        for batch in batches:
            scorers = scorers or _scorers(spec)
            for start in range(0, batch.num_rows, USERS_A_BLOCK):
                for name, scorer in scorers.items():
                    rated = spec.explicit and name == "model"
                    for key, value in block_sums(scorer, batch.slice(start, USERS_A_BLOCK), spec.ks, rated).items():
                        total[f"{name}/{key}"] += value  # type: ignore[assignment]
        yield pa.RecordBatch.from_pydict({"stats": [json.dumps(total)]})

    return run


def _scorers(spec: EvaluationPass) -> dict[str, Scorer]:
    counts = pa.concat_tables([read_table(path) for path in spec.stats_files]).column("train_count").to_numpy()
    return {
        "model": ModelScorer(load_model(spec.bundle), spec.bundle.n_items),
        "popularity": PopularityScorer(counts),
    }


def lists(column: pa.Array) -> Lists:
    """An Arrow list column as values and offsets from 0."""
    sizes = column.value_lengths().to_numpy(zero_copy_only=False)
    return Lists(column.flatten().to_numpy().astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def block_sums(scorer: Scorer, batch: pa.RecordBatch, ks: tuple[int, ...], rated: bool = False) -> dict[str, float]:
    """Sums over the users of one block: "full/<metric>" and "candidates/<metric>", and where scores are ratings,
    "rating/<error>"."""
    users = torch.from_numpy(batch.column("user_idx").to_numpy().astype(np.int64))
    item = torch.from_numpy(batch.column("item_idx").to_numpy().astype(np.int64))
    scores = scorer.scores(users)
    among = lists(batch.column("candidates"))
    own = scores.gather(1, item[:, None])[:, 0].numpy()
    theirs = scores[torch.from_numpy(among.row), torch.from_numpy(among.values)].numpy()
    greater = np.bincount(among.row, weights=theirs > own[among.row], minlength=len(users))
    equal = np.bincount(among.row, weights=theirs == own[among.row], minlength=len(users))
    full = catalogue_rank(mask(scores, lists(batch.column("seen"))), item).numpy()
    by_protocol = {
        "full": metrics.sums(full, ks),
        "candidates": metrics.sums(metrics.mean_rank(greater, equal), ks),
    }
    if rated:
        by_protocol["rating"] = metrics.rating_sums(own, batch.column("rating").to_numpy())
    return {f"{protocol}/{name}": value for protocol, sums in by_protocol.items() for name, value in sums.items()}
