"""Score a block of users on an executor and write their top K.

A task holds the item side of the model, the catalogue's ids, one block of users' scores and one output file's rows;
none of it grows with the number of users.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch

from ncf_dist import scoring
from ncf_dist.artifacts import read_table
from ncf_dist.bundle import load_model
from ncf_dist.score.spec import ScorePass
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.spark_io import FileSink, runs_of


def score_pass(spec: ScorePass) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """For mapInArrow: rows (_file, user_id, user_idx, item_idx list, test_item_idx list), ascending in _file;
    one row `stats` a task out."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        torch.set_num_threads(1)
        counts: Counter[str] = Counter()
        # A file holds whole users; it is cut only by the number of files, never by rows.
        sink = FileSink(spec.folder, spec.contract.schema, rows_per_file=2**31)
        scorer: ModelScorer | None = None
        for batch in batches:
            if scorer is None:
                scorer, item_ids = (
                    ModelScorer(load_model(spec.bundle), spec.bundle.n_items),
                    read_item_ids(spec.item_files),
                )
                # Spark's Python daemon collects garbage after every task: not in all that torch brings, each time.
                gc.freeze()
            for file, start, end in runs_of(batch.column("_file").to_numpy()):
                for first in range(start, end, spec.users_per_block):
                    block = batch.slice(first, min(spec.users_per_block, end - first))
                    table = recommend(scorer, block, item_ids, spec)
                    counts.update(
                        users=block.num_rows,
                        short_users=_short(table, block.num_rows, spec.k),
                        rows=table.num_rows,
                    )
                    sink.add(file, table)
        yield pa.RecordBatch.from_pydict(
            {"stats": [json.dumps({"counts": counts, "files": [vars(f) for f in sink.close()]})]}
        )

    return run


def read_item_ids(files: tuple[str, ...]) -> pa.Array:
    """(I,) the customer's item ids by item_idx."""
    table = pa.concat_tables([read_table(path) for path in files])
    order = np.argsort(table.column("item_idx").to_numpy())
    return table.column("item_id").combine_chunks().take(pa.array(order))


def seen_lists(batch: pa.RecordBatch, mask_test: bool) -> Lists:
    """What each user of the block must not be offered."""
    names = ("item_idx", "test_item_idx") if mask_test else ("item_idx",)
    rows, values = [], []
    for name in names:
        column = batch.column(name)
        sizes = column.value_lengths().to_numpy(zero_copy_only=False)
        rows.append(np.repeat(np.arange(len(sizes)), sizes))
        values.append(column.flatten().to_numpy().astype(np.int64))
    row, value = np.concatenate(rows), np.concatenate(values)
    order = np.argsort(row, kind="stable")
    return Lists(
        value[order],
        np.concatenate([[0], np.cumsum(np.bincount(row, minlength=batch.num_rows))]).astype(np.int64),
    )


def recommend(scorer: ModelScorer, batch: pa.RecordBatch, item_ids: pa.Array, spec: ScorePass) -> pa.Table:
    """The recommendations of one block of users, best first within each user."""
    users = torch.from_numpy(batch.column("user_idx").to_numpy().astype(np.int64))
    values, items = scoring.recommend(scorer, users, seen_lists(batch, spec.mask_test), spec.k)
    offered = torch.isfinite(values)
    rank = torch.arange(1, values.shape[1] + 1, dtype=torch.int32).expand_as(values)[offered]
    row = torch.arange(len(users))[:, None].expand_as(values)[offered]
    columns = [
        batch.column("user_id").take(pa.array(row.numpy())),
        pa.array(rank.numpy()),
        item_ids.take(pa.array(items[offered].numpy())),
        pa.array(values[offered].numpy()),
        pa.array([spec.bundle.model_version]).take(pa.array(np.zeros(len(row), dtype=np.int64))),
    ]
    return pa.table(columns, schema=spec.contract.schema)


def _short(table: pa.Table, users: int, k: int) -> int:
    """Users of the block with fewer than K rows."""
    return users - int((table.column("rank").to_numpy() == k).sum())
