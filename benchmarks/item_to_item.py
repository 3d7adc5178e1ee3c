"""How much of an item-to-item matrix must be kept: counts of what follows what, and EASE, on the NCF paper's files.

    .venv/bin/python -m benchmarks.item_to_item [--seeds 1 2 3]

Each user's latest item is held out, as the files say, and ranked among the whole catalogue but the train items, and
among the paper's 99 others. Nothing is trained, and no setting is chosen here: a matrix, whole or cut, times the user's
history, each item worth half of the item `half-life` items later (ncf_dist/item_item/). A user's rows of equal time
are in the order that the seed draws. Pairs a→b within 10 rows count 1 / distance. "By count" keeps the heaviest pairs
of an item, as prepare does; "by log-lift" those that are the likeliest beside b's popularity.

Prints one table, the mean over seeds, and writes benchmarks/results/item_to_item.json. CPU seconds: of making the
matrix, and of ranking all users. The files come from NCF_DATA_DIR/ncf-ml-1m.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.ncf import papers_files
from ncf_dist import metrics
from ncf_dist.contracts import STEP_UNIT
from ncf_dist.item_item.counts import follow_rows
from ncf_dist.item_item.gram import ease, gram
from ncf_dist.item_item.part import Part, decay, dense_scores
from ncf_dist.item_item.rows import ItemRows, largest
from ncf_dist.machine import cores, processor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/item_to_item.json"
STEPS, HALF_LIFE, EASE_HALF_LIFE, RIDGE, EASE_WEIGHT, USERS_A_BLOCK = 10, 2.0, 30.0, 1000.0, 15.0, 256
FIGURES = ("full.hr@10", "full.ndcg@10", "candidates.hr@10", "candidates.ndcg@10")
IntArray = npt.NDArray[np.int64]
Score = Callable[[int, int], Tensor]
"""Users first to last → (U, I)"""


@dataclass(frozen=True)
class Log:
    """Train rows by user, oldest first. user, item (R,); ends (U+1,); test (U,) items; others (U, 99), -1 where one is
    the test item itself."""

    user: IntArray
    item: IntArray
    ends: IntArray
    test: IntArray
    others: IntArray
    n_items: int

    @classmethod
    def read(cls, files: Path, seed: int) -> Log:
        train, test = (np.loadtxt(files / f"ml-1m.{part}.rating", np.int64) for part in ("train", "test"))
        lines = (files / "ml-1m.test.negative").read_text().splitlines()
        others = np.array([line.split("\t")[1:] for line in lines], np.int64)
        tie = np.random.default_rng(seed).permutation(len(train))
        user, item = train[np.lexsort((tie, train[:, 3], train[:, 0])), :2].T
        held = test[np.argsort(test[:, 0]), 1]
        ends = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(held)))])
        others = np.where(others == held[:, None], -1, others)
        return cls(user, item, ends, held, others, int(max(item.max(), held.max())) + 1)

    def latest(self, first: int, last: int, count: int) -> tuple[Tensor, Tensor]:
        """(items (U, count), oldest first and filled up on the right; length (U,)) of some users."""
        length = np.minimum(np.diff(self.ends)[first:last], count)
        places = (self.ends[first + 1 : last + 1] - length)[:, None] + np.arange(count)
        items = self.item[np.minimum(places, len(self.item) - 1)]
        return torch.from_numpy(items), torch.from_numpy(length)

    def pairs(self) -> pa.Table:
        """All pairs a→b within STEPS rows of a user's, as prepare counts them, the heaviest of each a first."""
        keys = [self.item[:-d] * self.n_items + self.item[d:] for d in range(1, STEPS + 1)]
        same = [self.user[:-d] == self.user[d:] for d in range(1, STEPS + 1)]
        worth = [np.full(int(ok.sum()), STEP_UNIT // d) for d, ok in enumerate(same, 1)]
        key, place = np.unique(np.concatenate([k[ok] for k, ok in zip(keys, same, strict=True)]), return_inverse=True)
        weight = np.bincount(place, np.concatenate(worth)).astype(np.int64)
        item, following = np.divmod(key, self.n_items)
        order = np.lexsort((following, -weight, item))
        columns = {"item_idx": item, "next_item_idx": following, "weight": weight}
        return pa.table({name: values[order] for name, values in columns.items()})


def first_of_each(pairs: pa.Table, kept: int) -> pa.Table:
    """The first `kept` pairs of each item."""
    item = pairs["item_idx"].to_numpy()
    return pairs.filter(pa.array(np.arange(len(item)) - np.searchsorted(item, item) < kept))


def likeliest(rows: ItemRows, kept: int) -> ItemRows:
    """The `kept` entries of each row that are the highest."""
    row = np.repeat(np.arange(rows.n_items), rows.offsets.diff().numpy())
    order = np.lexsort((-rows.values.numpy(), row))
    best = np.sort(order[np.arange(len(row)) - np.searchsorted(row, row) < kept])
    sizes = np.bincount(row[best], minlength=rows.n_items)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
    return dataclasses.replace(rows, offsets=offsets, items=rows.items[best], values=rows.values[best])


def by_rows(log: Log, rows: ItemRows, half_life: float, last: int, weight: float = 1.0) -> Score:
    part = Part("", weight, half_life, last, rows)
    return lambda first, end: dense_scores(part, *log.latest(first, end, last))


def by_matrix(log: Log, matrix: Tensor, half_life: float, weight: float = 1.0) -> Score:
    """A whole matrix, over the user's whole history."""

    def scores(first: int, end: int) -> Tensor:
        rows = slice(log.ends[first], log.ends[end])
        age = log.ends[log.user[rows] + 1] - 1 - np.arange(log.ends[first], log.ends[end])
        history = torch.zeros(end - first, log.n_items)
        worth = decay(half_life, int(age.max()) + 1, weight)
        history[torch.from_numpy(log.user[rows] - first), torch.from_numpy(log.item[rows])] = worth[age]
        return history @ matrix

    return scores


def judge(log: Log, parts: list[Score]) -> dict[str, float]:
    full, among = np.empty(len(log.test)), np.empty(len(log.test))
    start = time.process_time()
    for first in range(0, len(log.test), USERS_A_BLOCK):
        end = min(first + USERS_A_BLOCK, len(log.test))
        scores = sum((part(first, end) for part in parts), start=torch.zeros(end - first, log.n_items)).numpy()
        own = scores[np.arange(end - first), log.test[first:end]][:, None]
        others = np.take_along_axis(scores, np.maximum(log.others[first:end], 0), axis=1)
        others[log.others[first:end] < 0] = -np.inf
        rows = slice(log.ends[first], log.ends[end])
        scores[log.user[rows] - first, log.item[rows]] = -np.inf
        among[first:end] = metrics.mean_rank((others > own).sum(1), (others == own).sum(1))
        full[first:end] = metrics.mean_rank((scores > own).sum(1), (scores == own).sum(1) - 1)
    found = {"ranking s": time.process_time() - start}
    for protocol, ranks in (("full", full), ("candidates", among)):
        means = metrics.means(metrics.sums(ranks, (10,)))
        found |= {f"{protocol}.{name}": means[name] for name in ("hr@10", "ndcg@10")}
    return found


def systems(log: Log) -> Iterator[tuple[str, list[Score], float]]:
    """(name, what adds up, CPU seconds of making it)"""
    start = time.process_time()
    pairs, train_rows = log.pairs(), np.bincount(log.item, minlength=log.n_items)
    counted = time.process_time() - start
    whole = follow_rows([pairs], train_rows)
    dense = [by_rows(log, whole, HALF_LIFE, 20)]
    yield "counts, whole", dense, counted
    for kept in (200, 400, 800):
        rows = follow_rows([first_of_each(pairs, kept)], train_rows)
        yield f"counts, {kept} by count", [by_rows(log, rows, HALF_LIFE, 20)], counted
    yield "counts, 200 by log-lift", [by_rows(log, likeliest(whole, 200), HALF_LIFE, 20)], counted
    start = time.process_time()
    matrix = ease(gram([(log.item, log.ends)], log.n_items), RIDGE)
    fitted = time.process_time() - start
    yield "EASE", [by_matrix(log, matrix, 1e9)], fitted
    yield "EASE, half-life 5", [by_matrix(log, matrix, 5.0)], fitted
    cut = by_rows(log, largest(matrix, 200), EASE_HALF_LIFE, 200, EASE_WEIGHT)
    both = counted + fitted
    yield "counts + 15 EASE", [*dense, by_matrix(log, matrix, EASE_HALF_LIFE, EASE_WEIGHT)], both
    yield "counts + 15 EASE, 200 kept", [*dense, cut], both
    kept_400 = by_rows(log, follow_rows([first_of_each(pairs, 400)], train_rows), HALF_LIFE, 20)
    yield "counts, 400 + 15 EASE, 200 kept", [kept_400, cut], both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    files = papers_files()
    runs: list[dict[str, dict[str, float]]] = []
    for seed in args.seeds:
        log = Log.read(files, seed)
        runs.append({name: {**judge(log, parts), "making s": made} for name, parts, made in systems(log)})
    machine = f"{cores()} cores, {processor()}"
    print(f"The NCF paper's MovieLens-1M, equal times in drawn order, seeds {args.seeds}, {machine}")
    columns = (*FIGURES, "making s", "ranking s")
    print(f"{'':34}" + "".join(f"{name:>20}" for name in columns))
    for name in runs[0]:
        cells = []
        for figure in columns:
            mean = statistics.mean(run[name][figure] for run in runs)
            cells.append(f"{mean:.1f}" if figure.endswith(" s") else f"{mean:.4f}")
        print(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells))
    RESULTS.write_text(json.dumps({"seeds": args.seeds, "machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
