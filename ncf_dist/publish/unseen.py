"""The rules of the audit that need a join: every user who is due has offers, in one place and as many as are due;
nobody else has any; no offer is an item that the config masks; every reason is the right one.

The join is a hash join on local disk, so that memory does not grow with the number of users. Rows are written to
buckets by a hash of their user, so all rows of a user are in one bucket, and one bucket at a time is read into memory.
Offers are first joined with user_index on user_id, which gives their user_idx, then with history on user_idx. Users
of the side table who have no index get numbers after the last one, for this audit only.

Cost: offers, user_index and history are each read once and written to disk once (before LZ4: about 28 bytes an offer
with integer ids, 8 an interaction). Memory is one bucket and the item ids. Time grows linearly with the rows. No Spark.
"""

from __future__ import annotations

import datetime as dt
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.ancestry import index_sizes
from ncf_dist.contracts import HISTORY, INTERACTIONS, UNSEEN_USERS, USER_INDEX, day_start
from ncf_dist.errors import ContractError
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import open_parquet, read_table
from ncf_dist.sampling import hash64
from ncf_dist.scratch import scratch_folder

ROWS_PER_BUCKET = 2_000_000
"""Offers that are in memory at once."""
HISTORY_BYTES_PER_BUCKET = 16_000_000
"""Compressed bytes of history that are in memory at once."""
MAX_BUCKETS = 400
"""Bound of open files. Tables of more than 400 buckets of the sizes above get larger buckets instead."""
MASKED = {"all": ("item_idx", "test_item_idx"), "train": ("item_idx",)}
"""The columns of history that score masks."""
HISTORY_BATCH = 8_192
"""Users of history unpacked at once."""
INTERACTIONS_BATCH = 262_144
SCRATCH = "publish"
"""What the names of the scratch folders begin with."""
OFFER = {"item_idx": pa.int32(), "file": pa.int32(), "by_model": pa.bool_()}


class Buckets:
    """Rows in `count` files on disk, each row in the file whose number it was given. A file can be read back alone."""

    def __init__(self, folder: str, name: str, schema: pa.Schema, count: int) -> None:
        self.count, self.schema = count, schema
        self._path = posixpath.join(folder, name)
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}

    def add(self, rows: pa.Table, bucket: np.ndarray) -> None:
        bucket = bucket.astype(np.int16)  # NumPy has a radix sort for 16 bits
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(edges)):
            part = rows.take(order[edges[number] : edges[number + 1]]).cast(self.schema).combine_chunks()
            self._writer(int(number)).write_table(part)

    def read(self, number: int) -> pa.Table:
        self._writer(number).close()
        with pa.OSFile(f"{self._path}-{number}.arrow") as source:
            return pa.ipc.open_stream(source).read_all().combine_chunks()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, number: int) -> pa.RecordBatchStreamWriter:
        if number not in self._writers:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[number] = pa.ipc.new_stream(f"{self._path}-{number}.arrow", self.schema, options=options)
        return self._writers[number]


@dataclass(frozen=True)
class EarlierModel:
    """How many users and items a model of an earlier night knows; by_history: it ranks whoever did something with an
    item that it knows."""

    users: int
    items: int
    by_history: bool


@dataclass(frozen=True)
class Rules:
    """What the table as a whole must be. permitted: (I,) which items the lists permit."""

    k: int
    seen: str
    permitted: np.ndarray
    active_since: dt.date | None
    fallback: bool
    earlier: EarlierModel | None = None
    """None for a model of this night."""


class Offers:
    """Collects (user, item) of every row while the files are read; `check` then judges them together."""

    def __init__(
        self,
        work: str,
        prepare: Manifest,
        items: pa.Array,
        user_id: pa.DataType,
        rules: Rules,
        names: list[str],
        rows: int,
    ) -> None:
        if rules.seen not in MASKED:
            raise ContractError(
                f"score says seen={rules.seen!r}; needed one of {', '.join(MASKED)}: rerun the job score"
            )
        self.prepare, self.items, self.rules, self.masked = prepare, items, rules, MASKED[rules.seen]
        info = prepare.table(HISTORY)
        size = max(rows / ROWS_PER_BUCKET, sum(file.bytes for file in info.files) / HISTORY_BYTES_PER_BUCKET)
        self.count = min(MAX_BUCKETS, max(1, math.ceil(size)))
        self.names = names
        self._work, self._user_id = work, user_id
        self._indexed = index_sizes(prepare).users
        # Users without an index are served where there is a fallback and where being active is not asked of them.
        serves_unseen = rules.fallback and rules.active_since is None and UNSEEN_USERS in prepare.tables
        self._unseen = prepare.files(UNSEEN_USERS) if serves_unseen else []
        self._total = self._indexed + (prepare.tables[UNSEEN_USERS].rows if serves_unseen else 0)

    def __enter__(self) -> Offers:
        self._scratch = scratch_folder(self._work, SCRATCH)
        self._folder = self._scratch.__enter__()
        self._offers = self._buckets("offers", user_id=self._user_id, **OFFER, first=pa.bool_())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._offers.close()
        finally:
            self._scratch.__exit__(kind, error, trace)

    def add(
        self, files: np.ndarray, users: pa.ChunkedArray, items: np.ndarray, first: np.ndarray, by_model: np.ndarray
    ) -> None:
        """`files`: the number of each row's file; `first`: whether a user begins at that row."""
        rows = pa.table({"user_id": users, "item_idx": items, "file": files, "by_model": by_model, "first": first})
        self._offers.add(rows, bucket_of(users, self.count))

    def check(self) -> tuple[int, int, int]:
        """Raise ContractError unless exactly the users that are due have offers, each in one place and as many as are
        due, none of what is masked, with the reason that is due. (users that are due, how many of them have fewer
        than K items left, how many have offers by the model)"""
        known, active = self._buckets("known", user_idx=pa.int32()), self._active()
        offers, seen = self._by_index(known), self._seen()
        users = short = by_model = 0
        for number in range(self.count):
            recent = None if active is None else active.read(number)["user_idx"].to_numpy()
            there = known.read(number)["user_idx"].to_numpy()
            due, few, ranked = self._check_bucket(number, offers.read(number), seen.read(number), there, recent)
            users, short, by_model = users + due, short + few, by_model + ranked
        return users, short, by_model

    def _check_bucket(
        self, number: int, rows: pa.Table, history: pa.Table, there: np.ndarray, recent: np.ndarray | None
    ) -> tuple[int, int, int]:
        """Check the users whose user_idx is `number` modulo the count of buckets: place p stands for user_idx
        number + p · count. there: those of these numbers that have a user."""
        n = len(range(number, self._total, self.count))
        past = np.unique(_pairs(history, len(self.items)))
        again = _contains(past, _pairs(rows, len(self.items)))
        if again.any():
            row = rows.slice(int(np.argmax(again)), 1).to_pylist()[0]
            name, item_id = self._name_of(row["user_idx"]), self.items[row["item_idx"]].as_py()
            what = f"{name} is offered item {item_id!r}, seen by {' or '.join(self.masked)} of history"
            self._refuse(row["file"], f"{what}; needed only unseen items")
        permitted = past[self.rules.permitted[past % len(self.items)]]
        left = int(self.rules.permitted.sum()) - np.bincount(self._place(permitted // len(self.items)), minlength=n)
        due = np.minimum(self.rules.k, left)
        known = self._marks(n, self._known(history))
        wanted = self._marks(n, there) if self.rules.fallback else known
        if recent is not None:
            wanted = wanted & self._marks(n, recent)
        user = self._place(rows["user_idx"].to_numpy())
        found = np.bincount(user, minlength=n)
        by_model = self._marks(n, rows.filter(rows["by_model"])["user_idx"].to_numpy())

        def none(bad: np.ndarray, what: str, needed: str) -> None:
            at = int(np.argmax(bad)) if n else 0
            if n and bad[at]:
                file = rows["file"][int(np.argmax(user == at))].as_py() if found[at] else None
                words = {"found": found[at], "due": due[at]}
                name = self._name_of(number + at * self.count)
                self._refuse(file, f"{name} {what.format(**words)}; needed {needed.format(**words)}")

        active = f"with an interaction since {self.rules.active_since}" if recent is not None else "of history"
        none((found > 0) & ~wanted, "has rows", f"none but for users {active}, with train rows or with a fallback")
        none(wanted & (due > 0) & (found == 0), "has no row", "every user that is due, while items are left")
        none(wanted & (found != due), "has {found} rows", "{due}: K, or all that are left")
        none((found > 0) & by_model & ~known, "has reason 'model'", "'popular': no row of theirs was trained on")
        none((found > 0) & ~by_model & known, "has reason 'popular'", "'model': they have train rows")
        return int(wanted.sum()), int((wanted & (due < self.rules.k)).sum()), int(by_model.sum())

    def _known(self, history: pa.Table) -> np.ndarray:
        """user_idx of those who are to be ranked by the model, some of them several times."""
        rows, earlier = history.filter(history["trained"]), self.rules.earlier
        if earlier is not None:
            column, size = ("item_idx", earlier.items) if earlier.by_history else ("user_idx", earlier.users)
            rows = rows.filter(pc.less(rows[column], size))
        found: np.ndarray = rows["user_idx"].to_numpy()
        return found

    def _place(self, user_idx: np.ndarray) -> np.ndarray:
        if len(user_idx) and int(user_idx.max()) >= self._total:
            raise ContractError(
                f"the tables of prepare run {self.prepare.run_key} have user_idx {int(user_idx.max())}, and its "
                f"manifest says that there are {self._total:,} users; needed less: rerun the job prepare"
            )
        return user_idx // self.count

    def _marks(self, n: int, user_idx: np.ndarray) -> np.ndarray:
        marks = np.zeros(n, dtype=bool)
        marks[self._place(user_idx)] = True
        return marks

    def _active(self) -> Buckets | None:
        """Users with an interaction since the day that is asked for, in buckets by user_idx."""
        if self.rules.active_since is None:
            return None
        since = day_start(self.rules.active_since)
        active = self._buckets("active", user_idx=pa.int32())
        for batch in self._batches(INTERACTIONS.name, ["user_idx", "timestamp"], INTERACTIONS_BATCH):
            users = batch.filter(pc.greater_equal(batch["timestamp"], pa.scalar(since)))["user_idx"].unique()
            active.add(pa.table({"user_idx": users}), users.to_numpy() % self.count)
        return active

    def _by_index(self, known_users: Buckets) -> Buckets:
        """Offers with user_idx in place of user_id, in buckets by it. known_users: gets every user_idx there is."""
        index = self._buckets("index", user_id=self._user_id, user_idx=pa.int32())
        for path in self.prepare.files(USER_INDEX):
            part = read_table(path)
            index.add(part, bucket_of(part["user_id"], self.count))
            known_users.add(part.select(["user_idx"]), part["user_idx"].to_numpy() % self.count)
        following = self._indexed
        for path in self._unseen:
            part = read_table(path)
            part = part.append_column("user_idx", pa.array(np.arange(len(part), dtype=np.int32) + following))
            index.add(part, bucket_of(part["user_id"], self.count))
            known_users.add(part.select(["user_idx"]), part["user_idx"].to_numpy() % self.count)
            following += len(part)
        dealt = self._buckets("dealt", user_idx=pa.int32(), **OFFER)
        for number in range(self.count):
            rows, known = self._offers.read(number), index.read(number)
            begins = rows.filter(rows["first"])
            counts = pc.value_counts(begins["user_id"]).flatten()
            twice = pc.greater(counts[1], 1)
            if pc.any(twice).as_py():
                user = counts[0].filter(twice)[0]
                last = begins.filter(pc.equal(begins["user_id"], user))["file"].to_pylist()
                places = ", ".join(self.names[file] for file in last)
                of = known["user_idx"].filter(pc.equal(known["user_id"], user)).to_pylist()
                name = self._name_of(of[0]) if of else "a user whom prepare does not know"
                what = f"{name} begins {len(last)} times (files {places})"
                self._refuse(last[-1], f"{what}; needed once, with all rows together")
            at = pc.index_in(rows["user_id"], value_set=known["user_id"])
            if at.null_count:
                row = rows.filter(pc.is_null(at)).slice(0, 1).to_pylist()[0]
                self._refuse(row["file"], "a user is unknown to prepare; needed one who is due")
            user_idx = known["user_idx"].take(at)
            offered = pa.table({"user_idx": user_idx, **{name: rows[name] for name in OFFER}})
            dealt.add(offered, user_idx.to_numpy() % self.count)
        index.close()
        return dealt

    def _seen(self) -> Buckets:
        """History as (user_idx, item_idx, whether it is a train or validation row), in buckets by user_idx."""
        seen = self._buckets("seen", user_idx=pa.int32(), item_idx=pa.int32(), trained=pa.bool_())
        for batch in self._batches(HISTORY.name, ["user_idx", *self.masked], HISTORY_BATCH):
            for column in self.masked:
                lists = batch.column(column)
                user = batch.column("user_idx").take(pc.list_parent_indices(lists))
                trained = np.full(len(user), column == "item_idx")
                rows = pa.table({"user_idx": user, "item_idx": pc.list_flatten(lists), "trained": trained})
                seen.add(rows, user.to_numpy() % self.count)
        return seen

    def _batches(self, table: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        for path in self.prepare.files(table):
            with open_parquet(path) as file:
                yield from file.iter_batches(rows, columns=columns)

    def _buckets(self, name: str, **columns: pa.DataType) -> Buckets:
        return Buckets(self._folder, name, pa.schema(columns), self.count)

    def _name_of(self, user_idx: int) -> str:
        """What a user is called in messages, which end in logs: never the customer's id."""
        if user_idx >= self._indexed:
            return f"row {user_idx - self._indexed} of {UNSEEN_USERS}"
        return f"user_idx {user_idx}"

    def _refuse(self, file: int | None, what: str) -> NoReturn:
        where = "" if file is None else f", file {self.names[file]}"
        raise ContractError(f"table recommendations{where}: {what}: rerun the job score")


def bucket_of(ids: pa.ChunkedArray, count: int) -> np.ndarray:
    """(M,) the bucket of each customer's id; equal ids give equal buckets."""
    values = ids.to_numpy()
    hashed = hash64(values) if values.dtype == np.int64 else pd.util.hash_array(values, categorize=False)
    return np.asarray(hashed % count, dtype=np.int64)


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values)


def _pairs(rows: pa.Table, n_items: int) -> np.ndarray:
    return rows["user_idx"].to_numpy().astype(np.int64) * n_items + rows["item_idx"].to_numpy()
