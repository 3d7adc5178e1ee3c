"""Ranks for blocks of users on an executor and writes their top K.

A task holds the item side of the model, the catalogue's ids, one block of users' scores and one output file's rows.
None of it grows with the number of users.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import torch
from pyspark import TaskContext

from ncf_dist import engines, products, scoring
from ncf_dist.bundle import load_model, load_parts
from ncf_dist.contracts import MODEL, POPULAR
from ncf_dist.models import Users
from ncf_dist.models.latest import latest
from ncf_dist.parquet import read_table
from ncf_dist.recent import COLUMN, recent_rows
from ncf_dist.score.popular import Popular
from ncf_dist.score.spec import ScorePass
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.spark_files import FileSink, runs_of
from ncf_dist.spark_io import Pass, stats_batch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def score_pass(spec: ScorePass) -> Pass:
    """For mapInArrow: rows (_file, user_id, user_idx, item_idx list, test_item_idx list, by_model, and `recent` where
    the model looks back), ascending in _file; one row `stats` a task out."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        torch.set_num_threads(1)
        counts: Counter[str] = Counter()
        clock = _Clock()
        # Never cut by rows: a file holds whole users, and the plan says how many files there are.
        sink = FileSink(spec.folder, spec.contract.schema, rows_per_file=2**31)
        ranker: Ranker | None = None
        for batch in batches:
            if ranker is None:
                clock.restart()
                ranker = Ranker(spec)
                clock.add("load")
            for file, start, end in runs_of(batch.column("_file").to_numpy()):
                for first in range(start, end, spec.config.users_per_block):
                    clock.restart()
                    table = ranker.recommend(batch.slice(first, min(spec.config.users_per_block, end - first)), counts)
                    counts["table_bytes"] += table.nbytes
                    clock.add("score")
                    sink.add(file, table)
                    clock.add("write")
        clock.restart()
        files = [vars(file) for file in sink.close()]
        clock.add("write")
        stats = {"counts": counts, "files": files, "seconds": clock.seconds, "memory": clock.memory}
        stats["bits"] = products.check() if ranker else None
        yield stats_batch(stats)

    return run


class _Clock:
    """How long each step of a task takes, and the most memory its process had after any of them."""

    def __init__(self) -> None:
        self.seconds = {"load": 0.0, "score": 0.0, "write": 0.0}
        self.memory = 0
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last step, in which Spark handed over rows."""
        self._since = time.perf_counter()

    def add(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] += now - self._since
        self._since = now
        self.memory = max(self.memory, psutil.Process().memory_info().rss)


class Ranker:
    """The model and the catalogue of one task."""

    def __init__(self, spec: ScorePass) -> None:
        self.spec, self.k, self.device = spec, spec.config.k, assigned_device()
        self.item_ids = read_item_ids(spec.item_files)
        eligible, n_items = spec.lists.eligible(self.item_ids, spec.bundle.n_items), len(self.item_ids)
        self.n_eligible = n_items if eligible is None else len(eligible)
        with self.device:
            self.scorer = ModelScorer(
                load_model(spec.bundle).to(self.device),
                n_items,
                eligible=None if eligible is None else torch.from_numpy(eligible).to(self.device),
                precision=spec.products.precision,
                engine=spec.products.engine,
                parts=load_parts(spec.bundle),
            )
        if spec.products.precision == "bf16":
            engines.must_round(engines.dot_width(spec.bundle))
        files = spec.popularity_files
        self.popular = Popular.read(files, n_items, eligible) if files else None

    def recommend(self, block: pa.RecordBatch, counts: Counter[str]) -> pa.Table:
        """The recommendations of one block of users, best first within each user."""
        by_model = block.column("by_model").to_numpy(zero_copy_only=False)
        values = np.full((block.num_rows, self.k), -np.inf, dtype=np.float32)
        items = np.zeros((block.num_rows, self.k), dtype=np.int64)
        for rows, ranked in ((by_model, self._by_model), (~by_model, self._by_popularity)):
            if rows.any():
                some = block if rows.all() else block.filter(pa.array(rows))
                best, index = ranked(some)
                values[rows, : best.shape[1]], items[rows, : best.shape[1]] = best, index
        # Not isfinite: the audit must see a score that is not a number.
        offered = values != -np.inf
        new = block.column("user_idx").to_numpy() >= self.spec.bundle.n_users
        counts.update(
            new_users=int(new.sum()),
            new_by_model=int((new & by_model).sum()),
            users=len(by_model),
            popular_users=int((~by_model).sum()),
            short_users=int((offered.sum(axis=1) < self.k).sum()),
            recommendations=int(offered.sum()),
            pairs=int(by_model.sum()) * self.n_eligible,
        )
        return self._table(block, by_model, values, items, offered)

    def _by_model(self, block: pa.RecordBatch) -> tuple[Floats, Ints]:
        users = users_of(block, self.spec).to(self.device)
        with self.device:
            values, items = scoring.recommend(self.scorer, users, seen_lists(block, self.spec.masked), self.k)
        return values.cpu().numpy(), items.cpu().numpy()

    def _by_popularity(self, block: pa.RecordBatch) -> tuple[Floats, Ints]:
        assert self.popular is not None
        return self.popular.top(seen_lists(block, self.spec.masked), self.k)

    def _table(self, block: pa.RecordBatch, by_model: Bools, values: Floats, items: Ints, offered: Bools) -> pa.Table:
        """The block's rows in the contract's form."""
        row, place = np.nonzero(offered)
        offers = {
            "rank": pa.array((place + 1).astype(np.int32)),
            "item_id": self.item_ids.take(pa.array(items[offered])),
            "score": pa.array(values[offered]),
            "reason": pa.array([POPULAR, MODEL]).take(pa.array(by_model[row].astype(np.int8))),
        }
        if self.spec.config.form == "lists":
            sizes = offered.sum(axis=1)
            row = np.flatnonzero(sizes)  # A user without any item has no row, in either form.
            fields = list(self.spec.contract.schema.field("items").type.value_type)
            structs = pa.StructArray.from_arrays([offers[field.name] for field in fields], fields=fields)
            ends = np.concatenate([[0], np.cumsum(sizes[row])]).astype(np.int32)
            offers = {"items": pa.ListArray.from_arrays(pa.array(ends), structs)}
        offers["user_id"] = block.column("user_id").take(pa.array(row))
        offers["model_version"] = pa.repeat(pa.scalar(self.spec.bundle.model_version), len(row))
        schema = self.spec.contract.schema
        return pa.table([offers[field.name].cast(field.type) for field in schema], schema=schema)


def assigned_device() -> torch.device:
    """The GPU that Spark assigned to this task, else the CPU."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    if gpu and torch.cuda.is_available():
        return torch.device("cuda", int(gpu.addresses[0]))
    return torch.device("cpu")


def read_item_ids(files: tuple[str, ...]) -> pa.Array:
    """(I,) the customer's item ids by item_idx."""
    table = pa.concat_tables([read_table(path) for path in files])
    order = np.argsort(table.column("item_idx").to_numpy())
    return table.column("item_id").combine_chunks().take(pa.array(order))


def users_of(batch: pa.RecordBatch, spec: ScorePass) -> Users:
    """The users of the block, with what they did last where the model looks back on it."""
    index, length = torch.from_numpy(batch.column("user_idx").to_numpy().astype(np.int64)), spec.bundle.looks_back
    recent = recent_rows(batch.column(COLUMN)) if length else None
    return Users(index, None if recent is None else latest(recent, spec.last_split, length, spec.bundle.n_items))


def seen_lists(batch: pa.RecordBatch, columns: tuple[str, ...]) -> Lists:
    """What each user of the block must not be offered: the lists of `columns` together."""
    return Lists.of(*(batch.column(name) for name in columns))
