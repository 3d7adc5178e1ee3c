"""Rollback: an earlier version's files of one ds become its files again, in a new commit that says what it undoes.

The files were never rewritten, so nothing is copied: each is read and compared with its SHA-256, then named by the new
commit. Where there was no earlier version the partition goes. A run that is undone stays so: publish refuses it, and no
rollback goes back to it. Versions go as far back as `clean` has left entries and files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import posixpath
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from ncf_dist.contracts import PARTITION
from ncf_dist.errors import ContractError, InputError, StaleRun
from ncf_dist.files import read_bytes
from ncf_dist.publish import commits, latest, steps
from ncf_dist.publish.log import DeltaLog, Entry

log = logging.getLogger(__name__)

To = int | Literal["PREVIOUS"]
Listed = Callable[[pa.Array], "np.ndarray[Any, np.dtype[np.bool_]]"]
"""(R,) which of these user ids are on the list of input.forget."""
_OF_ITS_OWN = {"ncf.ds", "ncf.commit", "ncf.files", "ncf.kept", "ncf.undone", "ncf.digest"} | {
    *("ncf.undoes", "ncf.restores")
}
"""What a commit says about itself alone, and not about the run that it publishes."""


@dataclass(frozen=True)
class Undone:
    """What a rollback did. version: of its commit; run_key: of the run that readers see now, None where the night is
    gone; keys: of the runs that were undone."""

    status: str
    version: int
    run_key: str | None
    keys: list[str]


def roll_back(root: str, ds: str, to: To, listed: Listed | None) -> Undone:
    """Make what `ds` was before its last publication, or at the version `to`, what readers see of it.

    Raises InputError where there is nothing to undo, StaleRun where that run was itself undone or somebody else was
    faster, ContractError where a file is not whole any more, or names a person of input.forget, or `clean` has removed
    what is needed.
    """
    delta = DeltaLog(root)
    steps.reached("begun")
    table = delta.open()
    if table is None:
        raise InputError(f"{root} has no published night; needed ds {ds} to undo: look at paths.lake and publish.table")
    history = delta.history(ds, table.version())
    live = {path for path, _ in delta.nights(table).get(ds, [])}
    head = history[-1][1] if history else None
    if head is not None and to == "PREVIOUS" and _is_rolled_back(head, live):
        log.info("ds %s is rolled back already, by version %d; --to VERSION goes further", ds, history[-1][0])
        return _settled(delta, "already-done", history[-1][0], head)
    target = _at(delta, table, history, ds, to) if to != "PREVIOUS" else _previous(delta, table, history, live, ds)
    if live == (target[1].files.keys() if target else set()):
        return _settled(delta, "already-done", history[-1][0] if history else table.version(), target and target[1])
    steps.reached("checked")
    facts, actions = _undoing(history, target), list[AddAction]()
    if target is not None:
        _check(delta, history, target, ds, listed)
        actions = [_again(history, root, path) for path in target[1].files]
        facts |= {name: value for name, value in target[1].facts.items() if of_the_run(name)}
    steps.reached("verified")
    commits.swap(delta, table, ds, actions, facts)
    return _settled(delta, "done", table.version() + 1, target and target[1], facts["ncf.undoes"])


def _settled(
    delta: DeltaLog, status: str, version: int, entry: Entry | None, undoes: list[dict[str, Any]] | None = None
) -> Undone:
    latest.settle(delta)
    keys = entry.undone_keys if undoes is None and entry is not None else {one["run_key"] for one in undoes or ()}
    return Undone(status, version, entry.run_key if entry is not None and entry.files else None, sorted(keys))


def _is_rolled_back(head: Entry, live: set[str]) -> bool:
    """Whether what readers see is what a rollback has made: the same command again must not go a step further."""
    return "ncf.undoes" in head.facts and live == head.files.keys()


def _at(
    delta: DeltaLog, table: DeltaTable, history: list[tuple[int, Entry]], ds: str, version: int
) -> tuple[int, Entry] | None:
    """The commit whose files `ds` had at a version; None where it had none."""
    if not 0 <= version < table.version():
        raise InputError(
            f"--to is version {version}; needed one before the newest of {delta.root}, which is {table.version()}: "
            f"those of ds {ds} are {_shown(history)}"
        )
    found = [(number, entry) for number, entry in history if number <= version]
    if not found and not _had_none(delta, ds, version):
        raise ContractError(
            f"the log of {delta.root} does not reach back to version {version} any more (clean); needed one of "
            f"{_shown(history)}: choose one, or run the line again for ds {ds}"
        )
    if not found or not found[-1][1].files:
        return None
    if (ds, str(found[-1][1].run_key)) in delta.undone(table.version()):
        _refuse_redo(found[-1], ds)
    return found[-1]


def _refuse_redo(target: tuple[int, Entry], ds: str) -> NoReturn:
    raise StaleRun(
        f"run {target[1].run_key} of ds {ds}, which version {target[0]} has, was itself undone; needed another: choose "
        f'one, or publish that run with --override {commits.UNDONE} --why "TEXT"'
    )


def _previous(
    delta: DeltaLog, table: DeltaTable, history: list[tuple[int, Entry]], live: set[str], ds: str
) -> tuple[int, Entry] | None:
    """The commit of the run before the one that is published now; None where there was none that still stands."""
    if not live:
        raise InputError(
            f"ds {ds} is not published in {delta.root}; needed a night that is: its versions are {_shown(history)}"
        )
    if not history or live != history[-1][1].files.keys():
        raise ContractError(
            f"the files of ds {ds} in {delta.root} are of no commit of ours (somebody compacted or restored them?); "
            f"needed to know what is undone: name the version with --to; those of this ds are {_shown(history)}"
        )
    gone = {key for night, key in delta.undone(table.version()) if night == ds} | {history[-1][1].run_key}
    found = next((each for each in reversed(history) if each[1].files and each[1].run_key not in gone), None)
    if found is None:
        _check_beginning(delta, history, ds)
    return found


def _check_beginning(delta: DeltaLog, history: list[tuple[int, Entry]], ds: str) -> None:
    """Raise ContractError unless `ds` had no files before the first commit of it that the log still has."""
    first = history[0][0]
    if first and not _had_none(delta, ds, first - 1):
        raise ContractError(
            f"what ds {ds} was before version {first} is not known any more, as clean has shortened the log of "
            f"{delta.root}; needed an earlier run that still stands, or to know that there was none: name a version "
            f"with --to (those of this ds are {_shown(history)}), or run the line again; nothing was changed"
        )


def _had_none(delta: DeltaLog, ds: str, version: int) -> bool:
    """Whether a version, which can still be read, has no file of `ds`. That our log has no commit of `ds` up to it says
    nothing: clean removes such a commit, and leaves later ones that explain other nights."""
    try:
        return not any(path.startswith(f"{PARTITION}={ds}/") for path in delta.live(version))
    except ContractError:
        return False


def of_the_run(fact: str) -> bool:
    """Whether a commit says this about the run that it publishes."""
    return fact.startswith("ncf.") and fact not in _OF_ITS_OWN


def _shown(history: list[tuple[int, Entry]]) -> str:
    return ", ".join(f"{number} (run {entry.run_key})" for number, entry in history if entry.files) or "none"


def _undoing(history: list[tuple[int, Entry]], target: tuple[int, Entry] | None) -> dict[str, Any]:
    """What the commit says about itself."""
    since, key = (target[0], target[1].run_key) if target else (-1, None)
    undoes = [
        {"version": number, "run_key": entry.run_key}
        for number, entry in reversed(history)
        if number > since and entry.files and entry.run_key != key
    ]
    origin = None if target is None else target[1].restores if target[1].restores is not None else target[0]
    return {
        "ncf.files": target[1].checksums if target else {},
        "ncf.undoes": undoes,
        **({} if origin is None else {"ncf.restores": origin}),
    }


def _check(
    delta: DeltaLog, history: list[tuple[int, Entry]], target: tuple[int, Entry], ds: str, listed: Listed | None
) -> None:
    """Raise ContractError unless every file is what was published, and names nobody who is to be forgotten."""
    version, entry = target
    if listed is None and (digest := _forgotten_since(history, version)) not in (None, entry.facts.get("ncf.forget")):
        raise ContractError(
            f"people were forgotten in ds {ds} since version {version} (list {digest[:12]}…); needed their list, so "
            "that they do not come back: set input.forget"
        )
    for path, size in entry.files.items():
        data = _whole(delta, path, size, entry.checksums.get(path, {}).get("sha256"), version)
        if listed is None:
            continue
        column = pq.ParquetFile(io.BytesIO(data)).read(columns=["user_id"])["user_id"]
        if any(listed(chunk).any() for chunk in column.chunks):
            raise ContractError(
                f"version {version} of ds {ds} (run {entry.run_key}) has rows of people on the list of input.forget, "
                "who must not come back; needed a version without them: go back to one that clean --forget has made "
                "since, or run the line again for this ds; nothing was changed"
            )


def _forgotten_since(history: list[tuple[int, Entry]], version: int) -> Any:
    """Digest of the list that the last commit after `version` knew of; None where none knew any."""
    known = (entry.facts.get("ncf.forget") for number, entry in reversed(history) if number > version)
    return next((digest for digest in known if digest), None)


def _whole(delta: DeltaLog, path: str, size: int, sha256: str | None, version: int) -> bytes:
    """A published file. sha256: None for nights that were published before there was any."""
    full = posixpath.join(delta.root, path)
    try:
        data = read_bytes(full)
        digest = hashlib.sha256(data).hexdigest()
        what = None if len(data) == size else f"it has {len(data):,} bytes, needed {size:,}"
        if what is None and sha256 not in (None, digest):
            what = f"its SHA-256 is {digest[:12]}…, needed {str(sha256)[:12]}…"
    except FileNotFoundError:
        what = "it is gone"
    if what is not None:
        raise ContractError(
            f"{full} of version {version} is damaged ({what}); needed it as it was published: put it back from a "
            "backup, choose another version with --to, or run the line again; nothing was changed"
        )
    return data


def _again(history: list[tuple[int, Entry]], root: str, path: str) -> AddAction:
    """The action that adds a file which was added before."""
    add: Mapping[str, Any] | None = next((e.adds[path] for _, e in reversed(history) if path in e.adds), None)
    if add is None:
        raise ContractError(
            f"no entry of the log says how {posixpath.join(root, path)} was added; needed that of the version which "
            "first had it: choose another version with --to, or run the line again; nothing was changed"
        )
    values = {PARTITION: str(add["partitionValues"][PARTITION])}
    return AddAction(path, add["size"], values, int(time.time() * 1000), True, add.get("stats") or json.dumps({}))
