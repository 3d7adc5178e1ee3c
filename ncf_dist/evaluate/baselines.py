"""Baselines on an executor: scores of a block of users, and the fit of those that stand on the Gram matrix.

- popularity: train interactions of the item.
- EASE and item k-nearest-neighbours (ncf_dist/item_item/gram.py), of who has what in train and validation.
- ALS for implicit feedback (Hu, Koren & Volinsky, ICDM 2008), fitted by Spark: user factors · item factors.

Letters: U users, I items, D factors.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from ncf_dist.errors import ContractError
from ncf_dist.evaluate.spec import GramFit
from ncf_dist.files import is_local, make_dirs, read_bytes, write_atomic
from ncf_dist.item_item.gram import ease, gram, item_knn
from ncf_dist.parquet import read_table
from ncf_dist.scoring import Lists
from ncf_dist.scoring import blocks as kernel
from ncf_dist.spark_io import Pass
from ncf_dist.stored import map_tensors, parse_tensors


class ItemItemScorer:
    """Sum of the rows of an item-item matrix over a user's history."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (I, I) float32; row i is what having item i adds to every item's score."""
        self.weights = weights

    def scores(self, history: Lists) -> Tensor:
        """History of U users → (U, I)."""
        values, offsets = torch.from_numpy(history.values), torch.from_numpy(history.offsets)
        return torch.nn.functional.embedding_bag(values, self.weights, offsets[:-1], mode="sum")


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
    try:
        tensors = map_tensors(path) if is_local(path) else parse_tensors(read_bytes(path))
        return ItemItemScorer(tensors["weights"])
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(f"{path} cannot be read ({error}); this job wrote it: rerun the job evaluate") from None


# ---- fitting -----------------------------------------------------------------------------------------------------


def fit(spec: GramFit) -> Pass:
    """For mapInArrow over one row: reads the history a file at a time and writes each output as safetensors."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if sum(batch.num_rows for batch in batches):
            histories = (Lists.of(read_table(path).column("item_idx").combine_chunks()) for path in spec.history_files)
            g = gram(((lists.values, lists.offsets) for lists in histories), spec.n_items)
            if path := spec.files.get("item_knn"):
                _save(path, item_knn(g, spec.config.knn_neighbours, spec.config.knn_shrink))
            if path := spec.files.get("ease"):  # Last: it changes the matrix.
                _save(path, ease(g, spec.config.ease_lambda))
        yield pa.RecordBatch.from_pydict({"stats": [json.dumps({})]})

    return run


def _save(path: str, weights: Tensor) -> None:
    make_dirs(posixpath.dirname(path))
    write_atomic(path, safetensors.torch.save({"weights": weights.contiguous()}))
