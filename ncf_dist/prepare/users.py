"""One pass over users: deduplicate, hold out, draw negatives and candidates, and write what is ordered by user.

Rows arrive grouped by user and ascending in user_idx. A task holds a block of whole users at a time (`BLOCK_ROWS`, or
one user if that user is larger) and works on it with NumPy; nothing here depends on how users were dealt to tasks.

- Duplicate (user, item): the latest row wins, among equal times the highest rating
  (rows equal in both are the same row).
- leave-one-out (He et al. 2017, section 4.1): a user's latest item is the test positive, the one before it the
  validation positive. Equal times are ordered by a hash of (seed, user, item). Users with fewer than
  `split.min_interactions` items keep all of them in train.
- Negatives of a train positive are uniform over the items its user has not interacted with in train; candidates of a
  held-out positive are distinct items the user has not interacted with at all (`ncf_dist/sampling.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist import contracts, sampling
from ncf_dist.config import Negatives
from ncf_dist.sampling import IntArray, Purpose, hash64
from ncf_dist.spark_io import FileSink

BLOCK_ROWS = 262_144
ORDER_BUCKETS = 4096
"""Train rows are counted by the top bits of their order hash, to cut them into equal files."""

Batches = Iterable[pa.RecordBatch]


@dataclass(frozen=True)
class UserPass:
    """What the pass needs to know; travels to the workers."""

    run: str
    staging: str
    n_items: int
    users_per_file: int
    min_interactions: int
    negatives: Negatives
    seed: int


@dataclass(frozen=True)
class Block:
    """Whole users, rows ascending by (user, item), each pair once. R rows, U users."""

    user: IntArray
    item: IntArray
    rating: npt.NDArray[np.float32]
    timestamp: IntArray
    offsets: IntArray

    @property
    def users(self) -> IntArray:
        return self.user[self.offsets[:-1]]

    @property
    def row(self) -> IntArray:
        """(R,) position of each row's user in the block."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def staging_schema(negatives: Negatives) -> pa.Schema:
    """Train rows on their way to the train table: the same columns and the hash that orders them."""
    return contracts.train(negatives.per_positive, negatives.draws).schema.append(
        pa.field("order_hash", pa.int64(), nullable=False)
    )


def user_pass(spec: UserPass) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    """A function for mapInArrow: rows (user_idx, item_idx, rating, timestamp) in, one row `stats` (JSON) a task out."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
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


def whole_users(batches: Batches, block_rows: int = BLOCK_ROWS) -> Iterator[dict[str, npt.NDArray[Any]]]:
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
    return {name: table.column(name).to_numpy() for name in table.column_names}


def deduplicate(columns: dict[str, npt.NDArray[Any]], n_items: int) -> Block:
    """Rows of whole users to a block: sorted by (user, item), each pair once."""
    user, item = columns["user_idx"].astype(np.int64), columns["item_idx"].astype(np.int64)
    rating, timestamp = columns["rating"], columns["timestamp"]
    pair = user * n_items + item
    order = np.argsort(pair)
    repeated = np.diff(pair[order]) == 0
    if repeated.any():
        order = np.lexsort((-rating, -timestamp, pair))
        order = order[np.concatenate([[True], np.diff(pair[order]) != 0])]
    user = user[order]
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]]).astype(np.int64)
    return Block(user, item[order], rating[order], timestamp[order], offsets)


def leave_one_out(block: Block, min_interactions: int, seed: int) -> tuple[npt.NDArray[np.int8], int]:
    """((R,) split codes of `contracts`, number of users whose held-out choice a tie in time decided)."""
    split = np.full(len(block.user), contracts.TRAIN_SPLIT, dtype=np.int8)
    tie = hash64(seed, int(Purpose.TIME_TIE), block.user, block.item)
    starts, row = block.offsets[:-1], block.row
    eligible = (np.diff(block.offsets) >= min_interactions)[row]
    tied = np.zeros(len(starts), dtype=bool)
    for held_out in (contracts.TEST_SPLIT, contracts.VALIDATION_SPLIT):
        open_rows = eligible & (split == contracts.TRAIN_SPLIT)
        time = np.where(open_rows, block.timestamp, np.iinfo(np.int64).min)
        latest = open_rows & (time == np.maximum.reduceat(time, starts)[row])
        tied |= np.add.reduceat(latest, starts, dtype=np.int64) > 1
        key = np.where(latest, tie, np.iinfo(np.int64).min)
        split[latest & (key == np.maximum.reduceat(key, starts)[row])] = held_out
    return split, int(tied.sum())


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
        self.sinks["staging"] = FileSink(spec.staging, staging_schema(spec.negatives))
        self.buckets: IntArray = np.zeros(ORDER_BUCKETS, dtype=np.int64)

    def close(self) -> dict[str, Any]:
        return {name: sink.close() for name, sink in self.sinks.items()}

    def write(self, block: Block, counts: Counter[str]) -> None:
        spec = self.spec
        split, tied = leave_one_out(block, spec.min_interactions, spec.seed)
        row, users = block.row, len(block.offsets) - 1
        in_train, in_test = split == contracts.TRAIN_SPLIT, split == contracts.TEST_SPLIT
        counts.update(users=users, tied_users=tied, accepted=len(split))

        columns = [block.user, block.item, block.rating, block.timestamp, split]
        self._add("interactions", block.user, dict(zip(contracts.INTERACTIONS.columns, columns, strict=True)))
        seen, held = ~in_test, in_test
        lists = [_lists(block.item[keep], _offsets(row[keep], users)) for keep in (seen, held)]
        self._add("history", block.users, dict(zip(contracts.HISTORY.columns, [block.users, *lists], strict=True)))

        for name, chosen in (("validation", split == contracts.VALIDATION_SPLIT), ("test", in_test)):
            user, item = block.user[chosen], block.item[chosen]
            values, offsets = sampling.candidates(
                spec.seed,
                spec.negatives.candidates,
                user,
                item,
                row[chosen],
                block.item,
                block.offsets,
                spec.n_items,
            )
            counts[f"{name}_short_candidates"] += int((np.diff(offsets) < spec.negatives.candidates).sum())
            counts[name] += len(user)
            columns = [user, item, block.rating[chosen], _lists(values, offsets)]
            self._add(name, user, dict(zip(contracts.held_out(name).columns, columns, strict=True)))
        self._train(block, in_train, row, users, counts)

    def _train(
        self, block: Block, in_train: npt.NDArray[np.bool_], row: IntArray, users: int, counts: Counter[str]
    ) -> None:
        spec = self.spec
        seen, offsets = block.item[in_train], _offsets(row[in_train], users)
        gaps = sampling.seen_gaps(seen, offsets, spec.n_items + 1)
        # A user who has seen the whole catalogue has nothing to contrast with: no train rows, and counted.
        usable = in_train & (np.diff(offsets) < spec.n_items)[row]
        counts["users_without_negatives"] += int((np.diff(offsets) >= spec.n_items).sum())
        user, item, row = block.user[usable], block.item[usable], row[usable]
        counts["train"] += len(user)
        key = sampling.prefix(spec.seed, user, item)
        columns = {"user_idx": user, "item_idx": item}
        for draw in range(spec.negatives.draws):
            for slot in range(spec.negatives.per_positive):
                columns[contracts.negative_column(draw, slot)] = sampling.negatives_of(
                    key, draw, slot, row, gaps, offsets, spec.n_items
                )
        order = hash64(spec.seed, int(Purpose.TRAIN_ORDER), user, item)
        self.buckets += np.bincount(order_bucket(order), minlength=ORDER_BUCKETS)
        self._add("staging", user, {**columns, "order_hash": order})

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
