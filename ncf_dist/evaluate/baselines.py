"""Baselines on an executor: scores of a block of users, and the fit of those that stand on a matrix of items.

- popularity: train and validation interactions of the item; recent popularity: those of the last days.
- item to item (ncf_dist/item_item/counts.py): what follows what, ranked by the scorer of a model of nothing else.
- EASE and item k-nearest-neighbours (ncf_dist/item_item/gram.py), of who has what in train and validation.
- ALS for implicit feedback (Hu, Koren & Volinsky, ICDM 2008), fitted by Spark: user factors · item factors.

Letters: U users, I items, D factors.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from ncf_dist.config import Evaluate
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.spec import GRAM, Fit
from ncf_dist.files import is_local, make_dirs, read_bytes, write_atomic
from ncf_dist.item_item.counts import follow_rows, train_rows_of
from ncf_dist.item_item.gram import ease, gram, item_knn
from ncf_dist.item_item.part import Part, decay
from ncf_dist.item_item.rows import ItemRows
from ncf_dist.models import ItemToItem, Sequences
from ncf_dist.parquet import read_table
from ncf_dist.sampling import IntArray
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.scoring import blocks as kernel
from ncf_dist.spark_io import Pass, stats_batch
from ncf_dist.stored import map_tensors, parse_tensors

COUNTS, LATEST = "counts", 20
"""item_to_item: the name of its tensors, and how many of a user's latest items count; with a half-life of 2 items the
next one is worth a thousandth."""


class ItemItemScorer:
    """Sum of the rows of an item-item matrix over a user's history."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (I, I) float32; row i is what having item i adds to every item's score."""
        self.weights = weights

    def scores(self, history: Lists) -> Tensor:
        """History of U users → (U, I)."""
        values, offsets = torch.from_numpy(history.values), torch.from_numpy(history.offsets)
        return torch.nn.functional.embedding_bag(values, self.weights, offsets[:-1], mode="sum")

    def by_age(self, latest: Sequences, half_life: float) -> Tensor:
        """What U users did last → (U, I): each item is worth half of the one `half_life` items later."""
        age = latest.length[:, None] - 1 - torch.arange(latest.items.shape[1])
        worth = decay(half_life, latest.items.shape[1])[age[age >= 0]]
        offsets = latest.length.cumsum(0) - latest.length
        rows = latest.items[age >= 0]
        return torch.nn.functional.embedding_bag(rows, self.weights, offsets, mode="sum", per_sample_weights=worth)


class DotScorer:
    """Dot products with the users' factors, which are given."""

    def __init__(self, items: Tensor) -> None:
        """items: (I, D) float32."""
        self.items = items

    def of(self, users: Tensor, items: Tensor) -> Tensor:
        """(U, D), (T,) item indexes → (U, T), at most USERS and ITEMS of a block. The product is always of one shape,
        filled up with zeros, so that a score depends on no block."""
        rows, columns = kernel.USERS - len(users), kernel.ITEMS - len(items)
        user, item = pad(users, (0, 0, 0, rows)), pad(self.items[items], (0, 0, 0, columns))
        return (user @ item.T)[: len(users), : len(items)]


def item_factors(files: tuple[str, ...], n_items: int) -> DotScorer:
    """Spark's item factors; an item without any has zeros."""
    table = pa.concat_tables([read_table(path) for path in files])
    factors = table.column("factors").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    items = np.zeros((n_items, factors.shape[1]), dtype=np.float32)
    items[table.column("item_idx").to_numpy()] = factors
    return DotScorer(torch.from_numpy(items))


def item_weights(path: str) -> ItemItemScorer:
    with _reading(path):
        return ItemItemScorer(_tensors(path)["weights"])


def item_to_item(path: str, n_items: int, config: Evaluate) -> ModelScorer:
    """What follows what, over a user's `LATEST` items."""
    with _reading(path):
        rows = ItemRows.of_tensors(COUNTS, _tensors(path), n_items)
    part = Part(COUNTS, 1.0, config.item_to_item_half_life, LATEST, rows)
    return ModelScorer(ItemToItem(1, n_items), n_items, parts=(part,))


def recent_counts(recent_files: tuple[str, ...], totals: IntArray) -> IntArray:
    """(I,) numbers in the order of recent popularity: first by what is recent, then by all. totals: (I,)"""
    recent = np.zeros(len(totals), np.int64)
    for path in recent_files:
        table = read_table(path)
        recent[table["item_idx"].to_numpy()] = table["recent"].to_numpy()
    return recent * (totals.max(initial=0) + 1) + totals


def _tensors(path: str) -> dict[str, Tensor]:
    return map_tensors(path) if is_local(path) else parse_tensors(read_bytes(path))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(f"{path} cannot be read ({error}); this job wrote it: rerun the job evaluate") from None


# ---- fitting -----------------------------------------------------------------------------------------------------


def fit(spec: Fit) -> Pass:
    """For mapInArrow over one row: reads the tables a file at a time and writes each output as safetensors."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if sum(batch.num_rows for batch in batches):
            if path := spec.files.get("item_to_item"):
                train_rows = train_rows_of((read_table(file) for file in spec.totals_files), spec.n_items)
                rows = follow_rows((read_table(file) for file in spec.next_files), train_rows)
                _save(path, rows.tensors(COUNTS))
            if spec.files.keys() & GRAM:
                _fit_gram(spec)
        yield stats_batch({})

    return run


def _fit_gram(spec: Fit) -> None:
    histories = (Lists.of(read_table(path).column("item_idx").combine_chunks()) for path in spec.history_files)
    g = gram(((lists.values, lists.offsets) for lists in histories), spec.n_items)
    if path := spec.files.get("item_knn"):
        _save(path, {"weights": item_knn(g, spec.config.knn_neighbours, spec.config.knn_shrink)})
    if path := spec.files.get("ease"):  # Last: it changes the matrix.
        _save(path, {"weights": ease(g, spec.config.ease_lambda)})


def _save(path: str, tensors: dict[str, Tensor]) -> None:
    make_dirs(posixpath.dirname(path))
    write_atomic(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
