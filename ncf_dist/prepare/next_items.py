"""What follows what: for each item the items that users took soon after it, counted in whole numbers.

Every pair of train items of a user that are d ≤ sequences.steps apart in order of time weighs STEP_UNIT // d. Tasks of
the pass over users add up what they can hold; Spark sends all pairs of an item to one task, which adds them up and
keeps the heaviest. Sums of integers have no order, so the weights follow from the log alone.

Spark carries slices of many pairs, as bytes: with a row a pair this took more than twice as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.config import Sequences
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import IntArray
from ncf_dist.spark_files import ROWS_PER_FILE, FileSink, files_of, runs_of, table_info, written_by
from ncf_dist.spark_io import Pass, arrow_batches, stats_batch, task_stats

HELD_PAIRS = 2**22
"""Pairs that a task holds, some 64 MB; more where more follow a single item."""
SLICE_PAIRS = 2**14
SLICES_A_FILE = 64
"""What Spark decodes of a staged file at a time: all of it, 16 MB."""
MIN_FILES = 8
PAIR = contracts.NEXT_ITEMS.schema
TOTAL = pa.schema([contracts.NEXT_TOTALS.schema.field(name) for name in ("item_idx", "weight")])
KEPT, TOTALS = "kept", "totals"
"""What a task writes: pairs, and what all pairs of an item weigh together."""
SLICE = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (("item_idx", pa.int32()), ("pairs", pa.binary()), ("weights", pa.binary()))
    ]
)
"""Pairs of neighbouring items, ascending: how far each is from the one before it, which packs well, and its weight,
as many int64 each. item_idx: of the first."""


class Pairs:
    """Weights of pairs, added up. A pair is one number: item × n_items + the item that follows it."""

    def __init__(self, limit: int = HELD_PAIRS) -> None:
        self.limit = limit
        self._held: list[tuple[IntArray, IntArray]] = []
        self.rows = 0

    def add(self, pair: IntArray, weight: IntArray) -> bool:
        """Add (N,) weights; returns whether too many pairs are held, even when they are added up."""
        self._held.append((pair, weight))
        self.rows += len(pair)
        return self.rows > self.limit and len(self.sum()[0]) > self.limit // 2

    def sum(self) -> tuple[IntArray, IntArray]:
        """(the pairs, ascending, each once; the weight of each)."""
        pair = np.concatenate([np.empty(0, dtype=np.int64), *(pairs for pairs, _ in self._held)])
        weight = np.concatenate([np.empty(0, dtype=np.int64), *(weights for _, weights in self._held)])
        order = np.argsort(pair, kind="stable")  # Which merges what was sorted before.
        pair, weight = pair[order], weight[order]
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        summed = pair[first], np.add.reduceat(weight, first) if len(first) else weight
        self._held, self.rows = [summed], len(first)
        return summed

    def take(self) -> tuple[IntArray, IntArray]:
        """`sum`, and hold nothing any more."""
        summed = self.sum()
        self._held, self.rows = [], 0
        return summed


def following(item: IntArray, row: IntArray, steps: int, n_items: int) -> Iterator[tuple[IntArray, IntArray]]:
    """(pairs, weights) of rows that are 1, 2, … `steps` apart. item, row: (R,) items in order of time, and the position
    of each one's user, ascending."""
    for distance in range(1, min(steps, len(item) - 1) + 1):
        same = row[:-distance] == row[distance:]
        pair = item[:-distance][same] * n_items + item[distance:][same]
        yield pair, np.full(len(pair), contracts.STEP_UNIT // distance, dtype=np.int64)


class PairSink:
    """Writes a task's pairs to the staging folder, as many as it can hold added up."""

    def __init__(self, folder: str, config: Sequences, n_items: int) -> None:
        self.config, self.n_items = config, n_items
        self._sink, self._pairs, self._file = FileSink(folder, SLICE, SLICES_A_FILE), Pairs(), 0

    def write(self, item: IntArray, row: IntArray, file: int) -> None:
        """item, row: as of `following`; file: the number of the file that the last user decides."""
        self._file = file
        for pairs in following(item, row, self.config.steps, self.n_items):
            if self._pairs.add(*pairs):
                self._flush()

    def close(self) -> list[FileInfo]:
        self._flush()
        return self._sink.close()

    def _flush(self) -> None:
        pair, weight = self._pairs.take()
        if len(pair):
            self._sink.add(self._file, slices(pair, weight, self.n_items, items_per_file(self.config, self.n_items)))


def items_per_file(config: Sequences, n_items: int) -> int:
    """Items of a file of next_items."""
    return max(1, min(ROWS_PER_FILE // max(1, config.next_items), -(-n_items // MIN_FILES)))


def slices(pair: IntArray, weight: IntArray, n_items: int, items_per_file: int) -> pa.Table:
    """Rows of SLICE, each of items of one file. pair: (N,) ascending."""
    item = pair // n_items
    starts = np.union1d(
        np.flatnonzero(np.diff(item // items_per_file, prepend=-1)), np.arange(0, len(pair), SLICE_PAIRS)
    )
    ends = np.append(starts, len(pair)) * pair.itemsize
    offsets = pa.py_buffer(ends.astype(np.int32).tobytes())
    apart = np.diff(pair, prepend=0)
    apart[starts] = pair[starts]
    numbers = (pa.py_buffer(values.astype("<i8").tobytes()) for values in (apart, weight))
    columns = [pa.BinaryArray.from_buffers(pa.binary(), len(starts), [None, offsets, data]) for data in numbers]
    return pa.table([pa.array(item[starts]).cast(pa.int32()), *columns], schema=SLICE)


def _table(pair: IntArray, weight: IntArray, n_items: int) -> pa.Table:
    columns = pair // n_items, pair % n_items, weight
    return pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, PAIR, strict=True)], schema=PAIR)


def write_next_items(
    space: Workspace, config: Sequences, n_items: int, staged: Sequence[str]
) -> tuple[TableInfo, DataFrame]:
    """(the table next_items, (item_idx, weight) of all pairs that begin with an item), from the pairs that the pass
    over users staged."""
    share = items_per_file(config, n_items)
    of_file = space.read(staged, SLICE).repartition(F.floor(F.col("item_idx") / F.lit(share)))
    totals = space.staged("next_totals")
    work = next_pass(space.run, totals, n_items, config.next_items, share)
    with arrow_batches(space.spark, SLICES_A_FILE):
        tasks = task_stats(of_file.sortWithinPartitions("item_idx"), work)
    kept = table_info(contracts.NEXT_ITEMS, files_of(tasks, KEPT), space.run)
    return kept, space.read([f"{totals}/{info.path}" for info in files_of(tasks, TOTALS)], TOTAL)


# ---- on the workers


def next_pass(run: str, totals: str, n_items: int, keep: int, items_per_file: int) -> Pass:
    """For mapInArrow over slices, ascending in item_idx, all of an item in one task: writes the `keep` heaviest pairs
    of each item, and its total."""

    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        kept, summed = FileSink(f"{run}/{contracts.NEXT_ITEMS.name}", PAIR), FileSink(totals, TOTAL)
        for pair, weight in whole_items(batches, n_items):
            item = pair // n_items
            first = np.flatnonzero(np.diff(item, prepend=-1))
            total = pa.table([pa.array(item[first]).cast(pa.int32()), np.add.reduceat(weight, first)], schema=TOTAL)
            chosen = heaviest(item, weight, keep)
            for sink, table in ((kept, _table(pair[chosen], weight[chosen], n_items)), (summed, total)):
                for file, start, end in runs_of(table.column("item_idx").to_numpy() // items_per_file):
                    sink.add(file, table.slice(start, end - start))
        yield stats_batch({"files": written_by({KEPT: kept, TOTALS: summed})})

    return work


def whole_items(
    batches: Iterable[pa.RecordBatch], n_items: int, limit: int = HELD_PAIRS
) -> Iterator[tuple[IntArray, IntArray]]:
    """(pairs, ascending, each once, all of each item; the weight of each) of slices that ascend in item_idx."""
    held = Pairs(limit)
    for batch in batches:
        for first, *numbers in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            apart, weights = (np.frombuffer(data, "<i8") for data in numbers)
            if not held.add(np.cumsum(apart), weights):
                continue
            pair, weight = held.take()
            # This slice and those to come hold nothing of the items before its first.
            whole = int(np.searchsorted(pair, first * n_items))
            held.limit = max(limit, 4 * (len(pair) - whole))
            held.add(pair[whole:], weight[whole:])
            if whole:
                yield pair[:whole], weight[:whole]
    pair, weight = held.take()
    if len(pair):
        yield pair, weight


def heaviest(item: IntArray, weight: IntArray, keep: int) -> npt.NDArray[np.int64]:
    """Where each item's `keep` heaviest pairs are, heaviest first, of equal ones the first. item: (N,) ascending."""
    order = np.lexsort((-weight, item))
    first = np.flatnonzero(np.diff(item, prepend=-1))
    rank = np.arange(len(item)) - np.repeat(first, np.diff(first, append=len(item)))
    return order[rank < keep]
