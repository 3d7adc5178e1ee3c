"""One pass over users: deduplicate, hold out, draw negatives and candidates, and write what is ordered by user.

Rows arrive grouped by user and ascending in user_idx. A task holds a block of whole users at a time (`BLOCK_ROWS`, or
one user if that user is larger) and works on it with NumPy; nothing here depends on how users were dealt to tasks.

- Duplicate (user, item): the latest row wins, among equal times the highest rating (rows equal in both are the same
  row); a row of the test file wins over one of the train file.
- Which rows are held out: `splits.py`.
- Negatives of a train positive are drawn from the items its user has not interacted with in train; candidates of a
  held-out row are distinct items the user has not interacted with at all (`ncf_dist/sampling.py`), or those given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist import contracts, sampling
from ncf_dist.config import Negatives
from ncf_dist.parquet import read_table
from ncf_dist.prepare.splits import SplitRule
from ncf_dist.sampling import IntArray, Purpose, hash64
from ncf_dist.spark_io import FileSink, Pass

BLOCK_ROWS = 262_144
ORDER_BUCKETS = 4096
"""Train rows are counted by the top bits of their order hash, to cut them into equal files."""


@dataclass(frozen=True)
class UserPass:
    """What the pass needs to know; travels to the workers. weights: files of item_weights, none for uniform
    negatives. explicit: ratings in place of negatives. given: candidates come with the rows."""

    run: str
    staging: str
    n_items: int
    users_per_file: int
    rule: SplitRule
    negatives: Negatives
    seed: int
    explicit: bool = False
    given: bool = False
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Whole users, rows ascending by (user, item), each pair once. R rows, U users.
    candidates: (R,) object, the given list of a test row or None."""

    user: IntArray
    item: IntArray
    rating: npt.NDArray[np.float32]
    timestamp: IntArray
    part: npt.NDArray[np.int8]
    offsets: IntArray
    candidates: npt.NDArray[np.object_] | None = None

    @property
    def users(self) -> IntArray:
        return self.user[self.offsets[:-1]]

    @property
    def row(self) -> IntArray:
        """(R,) position of each row's user in the block."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def split(self, rule: SplitRule) -> tuple[npt.NDArray[np.int8], int]:
        return rule(self.user, self.item, self.timestamp, self.part, self.offsets)


def train_contract(negatives: Negatives, explicit: bool) -> contracts.Contract:
    return contracts.train(negatives.per_positive, negatives.draws, explicit)


def staging_schema(negatives: Negatives, explicit: bool = False) -> pa.Schema:
    """Train rows on their way to the train table: the same columns and the hash that orders them."""
    return train_contract(negatives, explicit).schema.append(pa.field("order_hash", pa.int64(), nullable=False))


def user_pass(spec: UserPass) -> Pass:
    """A function for mapInArrow: rows (user_idx, item_idx, rating, timestamp, part) in, and `candidates` where they are
    given; one row `stats` (JSON) a task out."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        writers = _Writers(spec)
        counts: Counter[str] = Counter()
        for columns in whole_users(batches):
            raw_rows = len(columns["user_idx"])
            block = deduplicate(columns, spec.n_items)
            counts["rows"] += raw_rows
            counts["duplicates"] += raw_rows - len(block.user)
            writers.write(block, counts)
        stats = {
            "counts": counts,
            "files": {n: [vars(f) for f in files] for n, files in writers.close().items()},
            "buckets": writers.buckets.tolist(),
        }
        yield pa.RecordBatch.from_pydict({"stats": [json.dumps(stats)]})

    return run


def count_pass(spec: UserPass) -> Pass:
    """For mapInArrow over the same rows: (item_idx, train_count) of each block's train rows."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for columns in whole_users(batches):
            block = deduplicate(columns, spec.n_items)
            split, _ = block.split(spec.rule)
            item, count = np.unique(block.item[split == contracts.TRAIN_SPLIT], return_counts=True)
            yield pa.RecordBatch.from_pydict(
                {"item_idx": pa.array(item.astype(np.int32)), "train_count": pa.array(count.astype(np.int64))}
            )

    return run


def whole_users(
    batches: Iterable[pa.RecordBatch], block_rows: int = BLOCK_ROWS
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Regroup batches so that no user is cut: at least `block_rows` rows at a time except at the end."""
    held: list[pa.Table] = []
    rows = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        held.append(pa.Table.from_batches([batch]))
        rows += batch.num_rows
        if rows < block_rows:
            continue
        table = pa.concat_tables(held)
        users = table.column("user_idx").to_numpy()
        cut = int(np.searchsorted(users, users[-1]))
        if cut:
            yield _arrays(table.slice(0, cut))
        held, rows = [table.slice(cut)], rows - cut
    if rows:
        yield _arrays(pa.concat_tables(held))


def _arrays(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    return {
        name: np.fromiter(table.column(name).to_pylist(), dtype=object, count=table.num_rows)
        if pa.types.is_list(table.column(name).type)
        else table.column(name).to_numpy()
        for name in table.column_names
    }


def deduplicate(columns: dict[str, npt.NDArray[Any]], n_items: int) -> Block:
    """Rows of whole users to a block: sorted by (user, item), each pair once."""
    user, item = columns["user_idx"].astype(np.int64), columns["item_idx"].astype(np.int64)
    rating, timestamp, part = columns["rating"], columns["timestamp"], columns["part"]
    pair = user * n_items + item
    order = np.argsort(pair)
    repeated = np.diff(pair[order]) == 0
    if repeated.any():
        order = np.lexsort((-rating, -timestamp, -part, pair))
        order = order[np.concatenate([[True], np.diff(pair[order]) != 0])]
    user = user[order]
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]]).astype(np.int64)
    given = columns["candidates"][order] if "candidates" in columns else None
    return Block(user, item[order], rating[order], timestamp[order], part[order], offsets, given)


def _lists(values: IntArray, offsets: IntArray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values.astype(np.int32)))


def _offsets(row: IntArray, users: int) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.bincount(row, minlength=users))]).astype(np.int64)


class _Writers:
    """The tables of the pass, each row in the file that its user decides."""

    def __init__(self, spec: UserPass) -> None:
        self.spec = spec
        by_user = (contracts.INTERACTIONS, contracts.HISTORY, contracts.VALIDATION, contracts.TEST)
        self.sinks = {c.name: FileSink(f"{spec.run}/{c.name}", c.schema) for c in by_user}
        self.sinks["staging"] = FileSink(spec.staging, staging_schema(spec.negatives, spec.explicit))
        self.buckets: IntArray = np.zeros(ORDER_BUCKETS, dtype=np.int64)
        self.weights = _weights(spec.weights, spec.n_items) if spec.weights else None

    def close(self) -> dict[str, Any]:
        return {name: sink.close() for name, sink in self.sinks.items()}

    def write(self, block: Block, counts: Counter[str]) -> None:
        split, tied = block.split(self.spec.rule)
        row, users = block.row, len(block.offsets) - 1
        in_test = split == contracts.TEST_SPLIT
        counts.update(users=users, tied_users=tied, accepted=len(split))

        columns = [block.user, block.item, block.rating, block.timestamp, split]
        self._add("interactions", block.user, dict(zip(contracts.INTERACTIONS.columns, columns, strict=True)))
        lists = [_lists(block.item[keep], _offsets(row[keep], users)) for keep in (~in_test, in_test)]
        self._add("history", block.users, dict(zip(contracts.HISTORY.columns, [block.users, *lists], strict=True)))
        for name, code in (("validation", contracts.VALIDATION_SPLIT), ("test", contracts.TEST_SPLIT)):
            self._held_out(name, block, split == code, row, counts)
        self._train(block, split == contracts.TRAIN_SPLIT, row, users, counts)

    def _held_out(
        self, name: str, block: Block, chosen: npt.NDArray[np.bool_], row: IntArray, counts: Counter[str]
    ) -> None:
        spec, wanted = self.spec, self.spec.negatives.candidates
        user, item = block.user[chosen], block.item[chosen]
        if spec.given and name == "test":
            assert block.candidates is not None
            lists = [
                sorted(set(given or ()) - {own}) for given, own in zip(block.candidates[chosen], item, strict=True)
            ]
            offsets = np.concatenate([[0], np.cumsum([len(found) for found in lists])]).astype(np.int64)
            values = np.array([value for found in lists for value in found], dtype=np.int64)
        else:
            values, offsets = sampling.candidates(
                spec.seed, wanted, user, item, row[chosen], block.item, block.offsets, spec.n_items
            )
        counts[f"{name}_short_candidates"] += int((np.diff(offsets) < wanted).sum())
        counts[name] += len(user)
        columns = {"user_idx": user, "item_idx": item, "rating": block.rating[chosen]}
        self._add(name, user, {**columns, "candidates": _lists(values, offsets)})

    def _train(
        self, block: Block, in_train: npt.NDArray[np.bool_], row: IntArray, users: int, counts: Counter[str]
    ) -> None:
        spec = self.spec
        if spec.explicit:
            user, item = block.user[in_train], block.item[in_train]
            columns: dict[str, Any] = {"user_idx": user, "item_idx": item, "rating": block.rating[in_train]}
        else:
            columns = self._contrasted(block, in_train, row, users, counts)
            user, item = columns["user_idx"], columns["item_idx"]
        counts["train"] += len(user)
        order = hash64(spec.seed, int(Purpose.TRAIN_ORDER), user, item)
        self.buckets += np.bincount(order_bucket(order), minlength=ORDER_BUCKETS)
        self._add("staging", user, {**columns, "order_hash": order})

    def _contrasted(
        self, block: Block, in_train: npt.NDArray[np.bool_], row: IntArray, users: int, counts: Counter[str]
    ) -> dict[str, Any]:
        """Train positives with their negatives."""
        spec, weighted = self.spec, None
        seen, offsets = block.item[in_train], _offsets(row[in_train], users)
        # A user who has seen the whole catalogue has nothing to contrast with: no train rows, and counted.
        usable = in_train & (np.diff(offsets) < spec.n_items)[row]
        counts["users_without_negatives"] += int((np.diff(offsets) >= spec.n_items).sum())
        user, item, row = block.user[usable], block.item[usable], row[usable]
        columns: dict[str, Any] = {"user_idx": user, "item_idx": item}
        if not spec.negatives.draws * spec.negatives.per_positive:
            return columns
        if self.weights is None:
            gaps = sampling.seen_gaps(seen, offsets, spec.n_items + 1)
        else:
            gaps, weighted = sampling.weighted_gaps(seen, offsets, self.weights)
        key = sampling.prefix(spec.seed, user, item)
        for draw in range(spec.negatives.draws):
            for slot in range(spec.negatives.per_positive):
                drawn = sampling.negatives_of(key, draw, slot, row, gaps, offsets, spec.n_items, weighted=weighted)
                columns[contracts.negative_column(draw, slot)] = drawn.astype(np.int32)
        return columns

    def _add(self, name: str, user: IntArray, columns: dict[str, Any]) -> None:
        sink = self.sinks[name]
        table = pa.table(
            [pa.array(c).cast(f.type) for c, f in zip(columns.values(), sink.schema, strict=True)],
            schema=sink.schema,
        )
        file = user // self.spec.users_per_file
        for number in np.unique(file):
            start, end = np.searchsorted(file, [number, number + 1])
            sink.add(int(number), table.slice(int(start), int(end - start)))


def order_bucket(order: Any) -> Any:
    """Bucket of an order hash: ascending with the (signed) hash, equal width."""
    return (order >> 52) + ORDER_BUCKETS // 2


def _weights(files: tuple[str, ...], n_items: int) -> IntArray:
    """(I,) weight of each item as a negative."""
    weights = np.ones(n_items, dtype=np.int64)
    for path in files:
        table = read_table(path)
        weights[table.column("item_idx").to_numpy()] = table.column("weight").to_numpy()
    return weights
