"""Nothing is published that was not read and counted first: the audit of a night's recommendations.

Every file is read once, one at a time, and must be the file of the manifest (sha256, rows, schema). Every
user has ranks 1..n without gaps; distinct items that exist and that the item lists permit; finite scores that do
not rise with rank; one reason; the one model version that score names. `unseen` then checks across files: exactly
the users that score promised, each once, with K items or all that are left for them, none of them masked, by the
model where it knows the user and by popularity where it does not.

Nothing here is score's own code: the table is held to its manifest's facts and to prepare's tables. Users must be
contiguous, in the manifest's order of files; a user may go on in the next file. Memory: one file, plus the item
index. The first violation raises ContractError; nothing is repaired here.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ncf_dist.contracts import (
    ITEM_INDEX,
    MODEL,
    POPULAR,
    USER_INDEX,
    Contract,
    Form,
    in_long_form,
    item_index,
    recommendations,
    user_index,
)
from ncf_dist.errors import ContractError, InputError
from ncf_dist.files import read_bytes
from ncf_dist.inputs import ids_digest, listed_ids
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, StoredPath, read_schema, read_table
from ncf_dist.publish.unseen import EarlierModel, Offers, Rules


@dataclass(frozen=True)
class ItemList:
    """What score read of a list of items. path: none where the config has the ids."""

    path: StoredPath | None
    sha256: str


@dataclass(frozen=True)
class ItemLists:
    allow_items: ItemList | None = None
    deny_items: ItemList | None = None


@dataclass(frozen=True)
class Promise:
    """What score said about the table it wrote. active_since: the first day of an active user's last interaction;
    fallback_days: None where users without a model history are not served."""

    k: int
    form: Form
    users: int
    short_users: int
    model_version: str
    seen: str
    prepare_run: str
    active_since: dt.date | None
    fallback_days: int | None
    items: ItemLists
    earlier_model: EarlierModel | None = None

    @property
    def fallback(self) -> bool:
        return self.fallback_days is not None

    @classmethod
    def of(cls, score: Manifest) -> Promise:
        """Raises ContractError where the manifest lacks a fact, or has another in its place."""
        return score.facts_as(cls)


@dataclass(frozen=True)
class Audited:
    """A file that passed, with the statistics that readers use to skip it."""

    info: FileInfo
    source: str
    least: dict[str, Any]
    most: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """A night that passed: its files in the manifest's order; how many users were ranked by the model, and how many at
    all; the recommendations; and the share of the items that may be offered that anybody is."""

    files: list[Audited]
    model_users: int
    users: int = 0
    rows: int = 0
    coverage: float = 0.0


def contract_of(prepare: Manifest, form: Form = "long") -> Contract:
    """The recommendations contract with the id types of this night's indexes."""
    types = []
    for table, name, contract in ((USER_INDEX, "user_id", user_index), (ITEM_INDEX, "item_id", item_index)):
        schema = read_schema(prepare.files(table)[0])
        contract(schema.field(name).type).check(schema)
        types.append(schema.field(name).type)
    return recommendations(types[0], types[1], form)


def audit(score: Manifest, prepare: Manifest, work: str) -> Audit:
    """Check the whole night. `work`: a local folder for the checks across files. Raises ContractError: a rule is broken
    or an item list is not what score read any more."""
    promise = Promise.of(score)
    contract = contract_of(prepare, promise.form)
    if promise.prepare_run != prepare.run_key:
        raise ContractError(
            f"score run {score.run_key} was made from prepare run {promise.prepare_run}, but the current one "
            f"of ds {score.ds} is {prepare.run_key}; rerun the job score"
        )
    table = score.table(contract)
    ids = pa.concat_tables([read_table(path) for path in prepare.files(ITEM_INDEX)]).sort_by("item_idx")
    if not np.array_equal(ids["item_idx"].to_numpy(), np.arange(len(ids))):
        raise ContractError(f"table item_index: item_idx is not 0..{len(ids) - 1}; rerun the job prepare")
    items = ids["item_id"].combine_chunks()
    permitted = _permitted(items, promise.items, score)
    if promise.earlier_model is not None:
        permitted[promise.earlier_model.items :] = False
    passed = []
    names = [info.path for info in table.files]
    rows = table.rows * (1 if promise.form == "long" else promise.k)
    needed = Rules(promise.k, promise.seen, permitted, promise.active_since, promise.fallback, promise.earlier_model)
    with Offers(work, prepare, items, contract.schema.field("user_id").type, needed, names, rows) as offers:
        rules = _Rules(promise, items, permitted, names, offers)
        for number, (info, path) in enumerate(zip(table.files, score.files(contract.name), strict=True)):
            stored = _read(path, info, contract)
            rules.add(number, _long(info.path, stored))
            passed.append(_statistics(info, path, stored))
        rules.close()
        users, short, by_model = offers.check()
    for found, said, what in (
        (users, promise.users, ""),
        (short, promise.short_users, f" with fewer than {promise.k} items"),
    ):
        if found != said:
            _refuse("*", f"{found} users{what}", f"the {said} that score counted")
    return Audit(passed, by_model, users, rules.rows, int(rules.offered.sum()) / max(1, int(permitted.sum())))


def _permitted(items: pa.Array, lists: ItemLists, score: Manifest) -> np.ndarray:
    """(I,) which items the lists permit."""
    texts, permitted = items.cast(pa.string()), np.ones(len(items), dtype=bool)
    for name, fact, wanted in (("allow_items", lists.allow_items, True), ("deny_items", lists.deny_items, False)):
        if fact is not None:
            listed = pc.is_in(texts, value_set=_list(score, name, fact)).to_numpy(zero_copy_only=False)
            permitted &= listed == wanted
    return permitted


def _list(score: Manifest, name: str, fact: ItemList) -> pa.Array:
    """The ids of one list: read again from its file, or as the run's config has them."""
    try:
        ids = listed_ids(fact.path or tuple(score.config["score"][name]))
    except InputError as error:
        raise ContractError(f"score.{name}: {error}; rerun the job score") from None
    if ids_digest(ids) != fact.sha256:
        raise ContractError(
            f"score.{name} ({fact.path}) has changed since score run {score.run_key}; needed the list that it "
            "ranked by: rerun the job score"
        )
    return pa.array(ids, pa.string())


def checked_bytes(path: str, info: FileInfo) -> bytes:
    """The file, after comparing it with its sha256 in the manifest. Raises ContractError."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise ContractError(
            f"table recommendations: file {path} of the manifest is gone; rerun the job score"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != info.sha256:
        raise ContractError(
            f"table recommendations, file {path}: sha256 is {found[:12]}…, needed {info.sha256[:12]}… as the "
            "manifest says: the file was changed or damaged after score wrote it; remove its run folder and "
            "rerun the job score"
        )
    return data


def _read(path: str, info: FileInfo, contract: Contract) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(checked_bytes(path, info)))
    contract.check(file.schema_arrow)
    rows = file.read()
    if rows.num_rows != info.rows:
        _refuse(info.path, f"{rows.num_rows} rows", f"{info.rows} as the manifest says")
    _no_nulls(info.path, rows)
    return rows


def _no_nulls(file: str, rows: pa.Table) -> None:
    for name in rows.column_names:
        if rows[name].null_count:
            _refuse(file, f"{rows[name].null_count} nulls in {name}", "none")


def _long(file: str, stored: pa.Table) -> pa.Table:
    """The rows in the long form."""
    if "items" not in stored.column_names:
        return stored
    empty = pc.equal(pc.list_value_length(stored["items"]), 0)
    if pc.any(empty).as_py():
        at = pc.index(empty, True).as_py()
        _refuse(file, f"row {at}: an empty list", "no row for a user without items")
    rows = in_long_form(stored)
    _no_nulls(file, rows)
    return rows


def _statistics(info: FileInfo, path: str, rows: pa.Table) -> Audited:
    names = [name for name in ("user_id", "rank") if name in rows.column_names and rows.num_rows]
    ranges = {name: pc.min_max(rows[name]).as_py() for name in names}
    return Audited(info, path, *({name: r[end] for name, r in ranges.items()} for end in ("min", "max")))


class _Rules:
    """The rules within a user, over whole users: the last one of a file waits for the next file. Messages say the place
    of a row, from 0, and never the user's id: they end in logs."""

    def __init__(
        self, promise: Promise, items: pa.Array, permitted: np.ndarray, names: list[str], offers: Offers
    ) -> None:
        self.promise, self.items, self.permitted, self.names, self.offers = promise, items, permitted, names, offers
        self.rows, self.offered = 0, np.zeros(len(items), dtype=bool)
        self._waiting: list[tuple[np.ndarray, np.ndarray, pa.Table]] = []
        """Of rows: the number of the file of each, its place there, and the rows."""

    def add(self, file: int, rows: pa.Table) -> None:
        """`file`: the number of the file that `rows` are, in the manifest's order."""
        self._waiting.append((np.full(rows.num_rows, file), np.arange(rows.num_rows), rows))
        whole = pa.concat_tables([table for _, _, table in self._waiting]).combine_chunks()
        files, places = (np.concatenate([part[of] for part in self._waiting]) for of in (0, 1))
        starts = _starts(whole["user_id"])
        last = int(starts[-1]) if len(starts) else 0
        self._check(whole.slice(0, last), files[:last], places[:last], starts[:-1])
        self._waiting = [(files[last:], places[last:], whole.slice(last))]
        if whole.num_rows - last > self.promise.k:
            self.close()

    def close(self) -> None:
        """Check the user that was still waiting."""
        for files, places, rows in self._waiting:
            self._check(rows, files, places, _starts(rows["user_id"]))
        self._waiting = []

    def _check(self, rows: pa.Table, files: np.ndarray, places: np.ndarray, starts: np.ndarray) -> None:
        if not rows.num_rows:
            return
        rows = rows.combine_chunks()
        counts = np.diff([*starts, rows.num_rows])
        run = np.repeat(np.arange(len(starts)), counts)
        due = np.arange(rows.num_rows) - starts[run] + 1
        item = pc.fill_null(pc.index_in(rows["item_id"], value_set=self.items), -1).to_numpy()
        score = rows["score"].to_numpy()
        rises = np.concatenate([[False], score[1:] > score[:-1]]) & (due > 1)

        word = "row" if self.promise.form == "long" else "offer"

        def none(bad: np.ndarray, found: str, needed: str) -> None:
            at = int(np.argmax(bad))
            if bad[at]:
                row = rows.slice(at, 1).to_pylist()[0]
                what = found.format(**row, count=counts[run[at]])
                _refuse(
                    self.names[files[at]],
                    f"{word} {places[at]}: {what}",
                    needed.format(due=due[at], k=self.promise.k),
                )

        none(counts[run] > self.promise.k, "{count} rows", "at most {k}")
        none(rows["rank"].to_numpy() != due, "rank {rank}", "rank {due} at that place: 1, 2, … without gaps")
        none(item < 0, "item {item_id!r}", "an item of item_index")
        none(~self.permitted[item], "item {item_id!r}", "an item that score.allow_items and score.deny_items permit")
        none(_repeats(run * len(self.items) + item), "item {item_id!r} twice", "distinct items")
        none(~np.isfinite(score), "score {score} at rank {rank}", "a finite number")
        none(rises, "score {score} at rank {rank} is above the one before it", "scores that do not rise")
        other = pc.not_equal(rows["model_version"], self.promise.model_version).to_numpy()
        none(other, "model_version {model_version!r}", f"{self.promise.model_version!r} in every row")
        by_model = pc.equal(rows["reason"], MODEL).to_numpy(zero_copy_only=False)
        unknown = ~by_model & pc.not_equal(rows["reason"], POPULAR).to_numpy(zero_copy_only=False)
        none(unknown, "reason {reason!r}", f"{MODEL!r} or {POPULAR!r}")
        none(by_model != by_model[starts][run], "reason {reason!r} at rank {rank}", "the user's first reason")
        self.rows, self.offered[item] = self.rows + rows.num_rows, True
        self.offers.add(files, rows["user_id"], item, due == 1, by_model)


def _starts(users: pa.ChunkedArray) -> np.ndarray:
    """Positions at which another user begins."""
    if not len(users):
        return np.zeros(0, dtype=np.int64)
    change = pc.not_equal(users.slice(1), users.slice(0, len(users) - 1)).to_numpy()
    return np.concatenate([[0], np.flatnonzero(change) + 1])


def _repeats(keys: np.ndarray) -> np.ndarray:
    """Which keys occurred at an earlier place."""
    repeated = np.ones(len(keys), dtype=bool)
    repeated[np.unique(keys, return_index=True)[1]] = False
    return repeated


def _refuse(file: str, found: str, needed: str) -> NoReturn:
    raise ContractError(f"table recommendations, file {file}: {found}; needed {needed}: rerun the job score")
