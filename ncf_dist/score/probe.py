"""The job's own pass over a few users, for a few seconds: a forecast is computed from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncf_dist.bundle import load_model
from ncf_dist.files import remove
from ncf_dist.models import Sequences
from ncf_dist.score.ranker import Ranker, score_pass
from ncf_dist.score.spec import ScorePass
from ncf_dist.spark_io import Pass, stats_batch


def probe_pass(spec: ScorePass, seconds: float) -> Pass:
    """`ranker.score_pass` over as many blocks as it scores in `seconds`, one at least. Adds to its row `reload_s`, how
    long a worker that has torch and the files in its cache loads the model for another task, and `flops` a pair."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        begun = time.perf_counter()
        try:
            (row,) = score_pass(spec)(_for_a_while(batches, spec.config.users_per_block, seconds))
        finally:
            remove(spec.folder)
        stats = json.loads(row.column("stats")[0].as_py())
        loading = time.perf_counter()
        Ranker(spec)
        stats["reload_s"] = time.perf_counter() - loading
        stats["flops"] = flops_a_pair(spec)
        stats["task_s"] = time.perf_counter() - begun
        yield stats_batch(stats)

    return run


def _for_a_while(batches: Iterable[pa.RecordBatch], rows: int, seconds: float) -> Iterator[pa.RecordBatch]:
    """Blocks of `rows` until the time is up, the first block's (which loads the model) not counted."""
    first = True
    end = 0.0
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            if not first and time.perf_counter() > end:
                continue  # Spark waits until all its rows are read, so the rest is read, too.
            yield batch.slice(start, rows)
            if first:
                first, end = False, time.perf_counter() + seconds


def flops_a_pair(spec: ScorePass, users: int = 16, items: int = 256) -> float:
    """Floating-point operations of the matrix products that score a pair, as torch counts them, without what is
    computed once a user or once an item."""
    model = load_model(spec.bundle)
    users, items = min(users, spec.bundle.n_users), min(items, spec.bundle.n_items)
    none = torch.zeros(users, 1, dtype=torch.int64)
    described: Any = Sequences(none, none, none[:, 0]) if model.sequential else torch.arange(users)
    with torch.no_grad():
        user, item = model.user_side(described), model.item_side(torch.arange(items))
        with FlopCounterMode(display=False) as counter:
            model.score_block(user, item)
    return float(counter.get_total_flops()) / (users * items)
