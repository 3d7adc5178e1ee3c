"""Baselines on an executor: scores of a block of users, and the fit of those that stand on the Gram matrix.

- popularity: train interactions of the item.
- EASE (Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019): P = (XᵀX + λ I)⁻¹ and
  B = I - P · diag(1 / diag P), so that diag B = 0; a user's scores are the sum of the rows of B of the user's items.
- item k-nearest-neighbours (Sarwar et al., WWW 2001): cosine of item columns, shrunk; each item keeps its nearest.
- ALS for implicit feedback (Hu, Koren & Volinsky, ICDM 2008), fitted by Spark: user factors · item factors.

X is the binary user-item matrix of train and validation. Letters: U users, I items, D factors.
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
from ncf_dist.parquet import read_table
from ncf_dist.scoring import Lists
from ncf_dist.scoring import blocks as kernel
from ncf_dist.spark_io import Pass
from ncf_dist.stored import map_tensors, parse_tensors

USERS_A_BLOCK = 512


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
            histories = (read_table(path).column("item_idx").combine_chunks() for path in spec.history_files)
            g = gram(histories, spec.n_items)
            if path := spec.files.get("item_knn"):
                _save(path, item_knn(g, spec.config.knn_neighbours, spec.config.knn_shrink))
            if path := spec.files.get("ease"):  # Last: it changes the matrix.
                _save(path, ease(g, spec.config.ease_lambda))
        yield pa.RecordBatch.from_pydict({"stats": [json.dumps({})]})

    return run


def _save(path: str, weights: Tensor) -> None:
    make_dirs(posixpath.dirname(path))
    write_atomic(path, safetensors.torch.save({"weights": weights.contiguous()}))


def gram(histories: Iterable[pa.Array], n_items: int) -> Tensor:
    """XᵀX, (I, I) float64, from list columns of item indexes, a block of users at a time."""
    total = torch.zeros(n_items, n_items, dtype=torch.float64)
    for column in histories:
        for start in range(0, len(column), USERS_A_BLOCK):
            history = Lists.of(column.slice(start, USERS_A_BLOCK))
            x = torch.zeros(len(history.offsets) - 1, n_items)
            x[torch.from_numpy(history.row), torch.from_numpy(history.values)] = 1
            total += x.T @ x  # Whole numbers up to the block's users: exact in float32.
    return total


def ease(g: Tensor, ridge: float) -> Tensor:
    """(I, I) float32 weights B of EASE. g is changed."""
    g.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g))
    weights = inverse.div_(-inverse.diagonal().clone()[None, :])
    weights.fill_diagonal_(0)
    return weights.float()


def item_knn(g: Tensor, neighbours: int, shrink: float) -> Tensor:
    """(I, I) float32: cosine of items i and j, g_ij / (√(g_ii g_jj) + shrink), among the `neighbours` nearest of j."""
    norms = g.diagonal().sqrt()
    product = norms[:, None] * norms[None]
    similar = torch.div(g, product.add_(shrink).clamp_min_(torch.finfo(g.dtype).tiny), out=product).float()
    similar.fill_diagonal_(0)
    if neighbours < len(similar):
        least = similar.topk(neighbours, dim=0).values[-1]
        similar.masked_fill_(similar < least[None], 0)
    return similar
