"""The rules that need tables joined: no user twice, none forgotten, nobody is offered what the config masks.

A hash join by hand, so that memory does not grow with users: rows are dealt to buckets on local disk by their
user, and equal users meet again in one bucket. Offers and user_index meet by user_id, which gives user_idx;
then offers and history meet by user_idx.

Cost: offers, user_index and history are each read once and spilled once (before LZ4: about 28 bytes an offer
with integer ids, 8 an interaction); memory is one bucket plus the item ids. Linear in rows, without Spark.
"""

from __future__ import annotations

import math
import posixpath
import tempfile
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ncf_dist.artifacts import Manifest, filesystem, make_dirs, read_table
from ncf_dist.contracts import HISTORY
from ncf_dist.errors import ContractError
from ncf_dist.sampling import hash64

ROWS_PER_BUCKET = 2_000_000
"""Offers that are in memory at once."""
HISTORY_BYTES_PER_BUCKET = 16_000_000
"""Compressed bytes of history that are in memory at once."""
MAX_BUCKETS = 400
"""Bound of open files; tables beyond 400 times the two figures above make larger buckets."""
MASKED = {"all": ("item_idx", "test_item_idx"), "train": ("item_idx",)}
"""The columns of history that score masks."""
HISTORY_BATCH = 8_192
"""Users of history unpacked at once."""


class Buckets:
    """Rows dealt to `count` files by number; each file can be read back alone."""

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


class Offers:
    """Collects (user, item) of every row while the files are read; `check` then judges them together."""

    def __init__(
        self,
        work: str,
        prepare: Manifest,
        items: pa.Array,
        user_id: pa.DataType,
        seen: str,
        names: list[str],
        rows: int,
    ) -> None:
        if seen not in MASKED:
            raise ContractError(f"score says seen={seen!r}; needed one of {', '.join(MASKED)}: rerun the job score")
        self.prepare, self.items, self.masked = prepare, items, MASKED[seen]
        info = prepare.table(HISTORY)
        size = max(rows / ROWS_PER_BUCKET, sum(file.bytes for file in info.files) / HISTORY_BYTES_PER_BUCKET)
        self.count = min(MAX_BUCKETS, max(1, math.ceil(size)))
        self.names = names
        self._work, self._user_id = work, user_id

    def __enter__(self) -> Offers:
        make_dirs(self._work)
        self._folder = tempfile.TemporaryDirectory(prefix="publish-", dir=self._work)
        self._offers = self._buckets(
            "offers", user_id=self._user_id, item_idx=pa.int32(), file=pa.int32(), first=pa.bool_()
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._offers.close()
        self._folder.cleanup()

    def add(self, files: np.ndarray, users: pa.ChunkedArray, items: np.ndarray, first: np.ndarray) -> None:
        """`files`: the number of each row's file; `first`: whether a user begins at that row."""
        rows = pa.table({"user_id": users, "item_idx": items, "file": files, "first": first})
        self._offers.add(rows, bucket_of(users, self.count))

    def check(self, users: int) -> int:
        """Raise ContractError unless all `users` users have offers, each in one place, and none was seen.

        Returns how many users have no offers because they have seen the whole catalogue.
        """
        offers = self._by_index()
        seen = self._seen()
        found, without, forgotten = 0, 0, None
        for number in range(self.count):
            rows, history = offers.read(number), seen.read(number)
            past = np.unique(_pairs(history, len(self.items)))
            again = _contains(past, _pairs(rows, len(self.items)))
            if again.any():
                row = rows.slice(int(np.argmax(again)), 1).to_pylist()[0]
                user_id, item_id = self._name_of(row["user_idx"]), self.items[row["item_idx"]].as_py()
                what = f"user {user_id!r} is offered item {item_id!r}, seen by {' or '.join(self.masked)} of history"
                self._refuse(row["file"], f"{what}; needed only unseen items")
            known, spent = np.unique(past // len(self.items), return_counts=True)
            user = np.unique(rows["user_idx"].to_numpy())
            absent = ~_contains(user, known)
            missing = known[absent & (spent < len(self.items))]
            forgotten = int(missing[0]) if forgotten is None and len(missing) else forgotten
            without += int(absent.sum()) - len(missing)
            found += len(user)
        if forgotten is not None:
            name = self._name_of(forgotten)
            self._refuse(
                None,
                f"{found} users; user {name!r} of history has no row; needed every user with unseen items",
            )
        if found + without != users:
            self._refuse(None, f"{found + without} users; needed the {users} that score counted")
        return without

    def _by_index(self) -> Buckets:
        """Offers with user_idx in place of user_id, dealt by it."""
        index = self._buckets("index", user_id=self._user_id, user_idx=pa.int32())
        for path in self.prepare.files("user_index"):
            part = read_table(path)
            index.add(part, bucket_of(part["user_id"], self.count))
        dealt = self._buckets("dealt", user_idx=pa.int32(), item_idx=pa.int32(), file=pa.int32())
        for number in range(self.count):
            rows, known = self._offers.read(number), index.read(number)
            begins = rows.filter(rows["first"])
            counts = pc.value_counts(begins["user_id"]).flatten()
            twice = pc.greater(counts[1], 1)
            if pc.any(twice).as_py():
                user = counts[0].filter(twice)[0]
                last = begins.filter(pc.equal(begins["user_id"], user))["file"].to_pylist()
                places = ", ".join(self.names[file] for file in last)
                what = f"user {user.as_py()!r} begins {len(last)} times (files {places})"
                self._refuse(last[-1], f"{what}; needed once, with all rows together")
            at = pc.index_in(rows["user_id"], value_set=known["user_id"])
            if at.null_count:
                row = rows.filter(pc.is_null(at)).slice(0, 1).to_pylist()[0]
                self._refuse(row["file"], f"user {row['user_id']!r} is unknown; needed a user of user_index")
            user_idx = known["user_idx"].take(at)
            offered = pa.table({"user_idx": user_idx, "item_idx": rows["item_idx"], "file": rows["file"]})
            dealt.add(offered, user_idx.to_numpy() % self.count)
        index.close()
        return dealt

    def _seen(self) -> Buckets:
        """History as (user_idx, item_idx) rows, dealt by user_idx."""
        seen = self._buckets("seen", user_idx=pa.int32(), item_idx=pa.int32())
        for path in self.prepare.files(HISTORY.name):
            fs, inner = filesystem(path)
            with fs.open(inner, "rb") as source:
                columns = ["user_idx", *self.masked]
                for batch in pq.ParquetFile(source).iter_batches(HISTORY_BATCH, columns=columns):
                    for column in self.masked:
                        lists = batch.column(column)
                        user = batch.column("user_idx").take(pc.list_parent_indices(lists))
                        rows = pa.table({"user_idx": user, "item_idx": pc.list_flatten(lists)})
                        seen.add(rows, user.to_numpy() % self.count)
        return seen

    def _buckets(self, name: str, **columns: pa.DataType) -> Buckets:
        return Buckets(self._folder.name, name, pa.schema(columns), self.count)

    def _name_of(self, user_idx: int) -> Any:
        """The customer's id of a user: only looked up to say what is wrong."""
        for path in self.prepare.files("user_index"):
            table = read_table(path)
            hit = table.filter(pc.equal(table["user_idx"], user_idx))
            if hit.num_rows:
                return hit["user_id"][0].as_py()
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
