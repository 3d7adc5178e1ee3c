"""The step users: one pass over users, which removes duplicates, holds rows out, draws negatives and candidates, and
writes the tables that are ordered by user.

A task holds one block of whole users at a time (user_blocks.py: `BLOCK_ROWS` rows, or one user with more) and works on
it with NumPy; nothing here depends on which task has which users.

- Which rows are held out: `splits.py`.
- Negatives of a train positive are drawn from the items its user has not interacted with in train; candidates of a
  held-out row are distinct items the user has not interacted with at all (`ncf_dist/sampling.py`), or those given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts, sampling
from ncf_dist.config import Config, Negatives, Sequences
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.prepare.bins import Bins
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.item_tables import item_weights, read_weights
from ncf_dist.prepare.sequences import PAIRS, WINDOWS, OrderSinks
from ncf_dist.prepare.splits import SplitRule
from ncf_dist.prepare.user_blocks import Block, deduplicate, whole_users
from ncf_dist.prepare.user_files import StagingSink, UserSink, lists, offsets_of
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import IntArray, Purpose, hash64
from ncf_dist.spark_files import files_of, table_info
from ncf_dist.spark_io import Pass, map_in_arrow, stats_batch, task_stats

ROWS_PER_FILE = 500_000
MIN_FILES = 8
BY_USER = (contracts.INTERACTIONS, contracts.HISTORY, contracts.VALIDATION, contracts.TEST)
TRAIN_ROWS = "staging"
"""The name of the staged train rows."""


@dataclass(frozen=True)
class UserPass:
    """What the pass needs to know; sent to the workers. weights: files of item_weights, none for uniform negatives.
    explicit: train rows have ratings in place of negatives. given: rows bring their candidates. staging: a folder whose
    name those of other staged rows begin with."""

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
    sequences: Sequences = field(default_factory=Sequences)


@dataclass(frozen=True)
class Staged:
    """Rows for a table in hashed order. files: their paths; buckets: (ORDER_BUCKETS,) how many rows each bucket of the
    order has."""

    files: Sequence[str]
    buckets: IntArray


@dataclass(frozen=True)
class UserTables:
    """tables: those of `BY_USER`, recent where it is made, and item_weights where negatives are weighted; train,
    windows: rows for the tables train and sequences (None where it is not made); pairs: files of pairs of items;
    counts: of rows and users, by name; bins: of the interactions."""

    tables: Mapping[str, TableInfo]
    train: Staged
    windows: Staged | None
    pairs: Sequence[str]
    counts: Counter[str]
    bins: Bins


def write_user_tables(
    space: Workspace, config: Config, indexes: Indexes, rows: DataFrame, rule: SplitRule, count: int, given: bool
) -> UserTables:
    """Run the pass over users. rows: user_idx, item_idx, rating, timestamp, part, and `candidates` where `given`;
    count: how many there are. Raises AssertionError where not every row reaches the pass."""
    n_users, n_items = indexes.sizes
    spec = UserPass(
        run=space.run,
        staging=space.staged("train"),
        n_items=n_items,
        users_per_file=-(-n_users // max(MIN_FILES, -(-count // ROWS_PER_FILE))),
        rule=rule,
        negatives=config.negatives,
        seed=config.seed,
        explicit=config.input.feedback == "explicit",
        given=given,
        sequences=config.sequences,
    )
    file = F.floor(F.col("user_idx") / F.lit(spec.users_per_file))
    grouped = (
        rows.withColumn("_file", file)
        .repartition(config.spark.shuffle_partitions, "_file")
        .drop("_file")
        .sortWithinPartitions("user_idx")
    )
    tables: dict[str, TableInfo] = {}
    if config.negatives.alpha > 0 and not spec.explicit:
        counts = map_in_arrow(grouped, count_pass(spec), "item_idx int, train_count bigint")
        weights = item_weights(space, indexes, counts, config.negatives.alpha)
        tables[weights.path] = weights
        spec = replace(spec, weights=tuple(space.files(weights)))
    tasks = task_stats(grouped, user_pass(spec))
    totals = Counter[str]()
    for task in tasks:
        totals.update(task["counts"])
    if totals["rows"] != count:
        raise AssertionError(f"{totals['rows']:,} rows reached the users of {count:,}: rows were lost")
    ordered = config.sequences.length > 0
    for contract in (*BY_USER, contracts.RECENT) if ordered else BY_USER:
        tables[contract.name] = table_info(contract, files_of(tasks, contract.name), space.run)
    train, windows, pairs = (_staged(tasks, spec.staging, name) for name in (TRAIN_ROWS, WINDOWS, PAIRS))
    bins = Bins.joined(task["bins"] for task in tasks)
    return UserTables(tables, train, windows if ordered else None, pairs.files, totals, bins)


def _staged(tasks: Sequence[Mapping[str, Any]], staging: str, name: str) -> Staged:
    folder = staging if name == TRAIN_ROWS else f"{staging}-{name}"
    files = [f"{folder}/{info.path}" for info in files_of(tasks, name)]
    return Staged(files, np.sum([task["buckets"].get(name, 0) for task in tasks], axis=0))


def train_contract(negatives: Negatives, explicit: bool) -> contracts.Contract:
    return contracts.train(negatives.per_positive, negatives.draws, explicit)


def staging_schema(negatives: Negatives, explicit: bool = False) -> pa.Schema:
    """Train rows on their way to the train table: the same columns and the hash that orders them."""
    return train_contract(negatives, explicit).schema.append(pa.field("order_hash", pa.int64(), nullable=False))


# ---- on the workers


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
            "buckets": writers.buckets,
            "bins": vars(writers.bins),
        }
        yield stats_batch(stats)

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


class _Writers:
    """The tables of the pass, each row in the file that its user decides."""

    def __init__(self, spec: UserPass) -> None:
        self.spec = spec
        share = spec.users_per_file
        self.order = OrderSinks(spec.sequences, spec.run, spec.staging, share, spec.n_items, spec.seed)
        self.sinks = {c.name: UserSink(f"{spec.run}/{c.name}", c.schema, share) for c in BY_USER}
        self.staged = StagingSink(spec.staging, staging_schema(spec.negatives, spec.explicit), share)
        self.weights = read_weights(spec.weights, spec.n_items) if spec.weights else None
        self.bins = Bins()

    def close(self) -> dict[str, list[FileInfo]]:
        """Files by the name of their table."""
        sinks = {**self.sinks, TRAIN_ROWS: self.staged}
        return {name: sink.close() for name, sink in sinks.items()} | self.order.close()

    @property
    def buckets(self) -> dict[str, list[int]]:
        staged = {TRAIN_ROWS: self.staged, WINDOWS: self.order.windows}
        return {name: sink.buckets.tolist() for name, sink in staged.items()}

    def write(self, block: Block, counts: Counter[str]) -> None:
        split, tied = block.split(self.spec.rule)
        row, users = block.row, len(block.offsets) - 1
        in_test = split == contracts.TEST_SPLIT
        counts.update(users=users, tied_users=tied, accepted=len(split))
        self.bins.add(block.item, block.rating, block.timestamp)

        columns = [block.user, block.item, block.rating, block.timestamp, split]
        self._add(contracts.INTERACTIONS, block.user, columns)
        seen = [lists(block.item[keep], offsets_of(row[keep], users)) for keep in (~in_test, in_test)]
        self._add(contracts.HISTORY, block.users, [block.users, *seen])
        for name, code in (("validation", contracts.VALIDATION_SPLIT), ("test", contracts.TEST_SPLIT)):
            self._held_out(name, block, split == code, row, counts)
        self._train(block, split == contracts.TRAIN_SPLIT, row, users, counts)
        self.order.write(block, split, self.spec.rule, counts)

    def _add(self, contract: contracts.Contract, user: IntArray, columns: Sequence[Any]) -> None:
        self.sinks[contract.name].add_rows(user, dict(zip(contract.columns, columns, strict=True)))

    def _held_out(
        self, name: str, block: Block, chosen: npt.NDArray[np.bool_], row: IntArray, counts: Counter[str]
    ) -> None:
        spec, wanted = self.spec, self.spec.negatives.candidates
        user, item = block.user[chosen], block.item[chosen]
        if spec.given and name == "test":
            assert block.candidates is not None
            chosen_from = [
                sorted(set(given or ()) - {own}) for given, own in zip(block.candidates[chosen], item, strict=True)
            ]
            offsets = np.concatenate([[0], np.cumsum([len(items) for items in chosen_from])]).astype(np.int64)
            values = np.array([value for items in chosen_from for value in items], dtype=np.int64)
        else:
            values, offsets = sampling.candidates(
                spec.seed, wanted, user, item, row[chosen], block.item, block.offsets, spec.n_items
            )
        counts[f"{name}_short_candidates"] += int((np.diff(offsets) < wanted).sum())
        counts[name] += len(user)
        columns = {"user_idx": user, "item_idx": item, "rating": block.rating[chosen]}
        self.sinks[name].add_rows(user, {**columns, "candidates": lists(values, offsets)})

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
        self.staged.add_rows(user, {**columns, "order_hash": order})

    def _contrasted(
        self, block: Block, in_train: npt.NDArray[np.bool_], row: IntArray, users: int, counts: Counter[str]
    ) -> dict[str, Any]:
        """Train positives with their negatives."""
        spec, weighted = self.spec, None
        seen, offsets = block.item[in_train], offsets_of(row[in_train], users)
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
