"""The Delta log of the published table, read so that damage is told apart from everything else.

Every entry that is looked at must be whole: lines of JSON, and the very files that the commit says it added. What
they add up to must be what delta-rs reads out of them, and no entry may be gone that latest.json knows of. So a log
that lost or changed something ends in a ContractError that names the entry and the remedy, not in rows that are wrong.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from ncf_dist.contracts import PARTITION
from ncf_dist.errors import ContractError
from ncf_dist.files import delta_options, exists, is_local, list_names, read_bytes, read_json, sync

LATEST = "latest.json"
LOOK_BACK = 1_000
"""The newest entries are looked at: years of nights."""
_ENTRY = re.compile(r"(\d{20})\.json")
_UNREADABLE = (DeltaError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What damaged text makes delta-rs and our own reading raise."""


@dataclass(frozen=True)
class Latest:
    """What we use of latest.json ourselves."""

    version: int
    files: list[str]
    ds: str = ""
    run_key: str = ""


@dataclass(frozen=True)
class Entry:
    """One commit: what it says about itself, and the actions that added files, by path."""

    facts: Mapping[str, Any]
    adds: Mapping[str, Mapping[str, Any]]

    @property
    def ds(self) -> str | None:
        """The night it published, replaced or took back; None where the commit is somebody else's."""
        return self.facts.get("ncf.ds")

    @property
    def added(self) -> dict[str, int]:
        """The files that it added, with their bytes."""
        return {path: int(add["size"]) for path, add in self.adds.items()}

    @property
    def files(self) -> dict[str, int]:
        """All files of its ds once it was made, with their bytes: those that it kept, too."""
        return {path: int(info["bytes"]) for path, info in self.checksums.items()} or self.added

    @property
    def undoes(self) -> list[dict[str, Any]]:
        """What a rollback took back, [{"version", "run_key"}], the newest first."""
        return list(self.facts.get("ncf.undoes", ()))

    @property
    def undone_keys(self) -> set[str]:
        """The run keys among them."""
        return {str(one["run_key"]) for one in self.undoes}

    @property
    def restores(self) -> int | None:
        """The version whose files a rollback put back; None where there was none, and for other commits."""
        version = self.facts.get("ncf.restores")
        return None if version is None else int(version)

    @property
    def run_key(self) -> str | None:
        return self.facts.get("ncf.run_key")

    @property
    def checksums(self) -> dict[str, dict[str, Any]]:
        """{path: {"bytes", "sha256"}}; empty for nights that were published before there were any."""
        return dict(self.facts.get("ncf.files", {}))

    @property
    def model_users(self) -> int | None:
        """Users that were ranked by the model, where the commit says so."""
        count = self.facts.get("ncf.model_users")
        return None if count is None else int(count)


def parse_entry(data: bytes) -> Entry:
    """A commit. Raises one of _UNREADABLE, saying what is wrong with it."""
    facts: dict[str, Any] = {}
    adds: dict[str, dict[str, Any]] = {}
    actions = [json.loads(line) for line in data.splitlines() if line.strip()]
    if not any(actions):
        raise ValueError("it holds no action")
    for action in actions:
        facts = action.get("commitInfo") or facts
        if add := action.get("add"):
            adds[add["path"]] = {**add, "size": int(add["size"])}
            if "ncf.ds" in facts:
                _check_added(add, facts["ncf.ds"])
    if "ncf.digest" in facts and facts["ncf.digest"] != digest(facts):
        raise ValueError("what it says about itself is not what was written")
    entry = Entry(facts, adds)
    if "ncf.ds" in facts:
        dt.date.fromisoformat(facts["ncf.ds"])
        [(int(undone["version"]), str(undone["run_key"])) for undone in entry.undoes]
        if entry.files or "ncf.files" not in facts:  # Else its commit took the night out of the table.
            int(facts["ncf.k"]), str(facts["ncf.run_key"]), str(facts["ncf.model_version"]), entry.model_users
    kept = set(facts.get("ncf.kept", ()))
    if "ncf.files" in facts and {path: size for path, size in entry.files.items() if path not in kept} != entry.added:
        raise ValueError("the files that it adds are not the ones that it says it adds")
    return entry


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what a commit of ours says about itself: it is read again nights later."""
    ours = {name: value for name, value in facts.items() if name.startswith("ncf.") and name != "ncf.digest"}
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()


def _check_added(add: Mapping[str, Any], ds: str) -> None:
    rows = json.loads(add["stats"])["numRecords"]
    if add["partitionValues"] != {PARTITION: ds} or not isinstance(rows, int):
        raise ValueError(f"file {add['path']} has ds {add['partitionValues']} and {rows} rows; needed ds {ds}")


class DeltaLog:
    """The log of the table at `root`. Entries never change, so each is read once."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._entries: dict[int, Entry] = {}
        self._newest: DeltaTable | None = None

    def open(self) -> DeltaTable | None:
        """The newest version, or None where there is no table. Raises ContractError where the log is damaged."""
        if self._newest is not None and self._is_newest(self._newest.version()):
            return self._newest
        latest = self.latest()  # Before the log is read: it only grows.
        known = latest.version if latest is not None else None
        with self.understood():
            try:
                table = self.at()
            except TableNotFoundError:
                if known is not None:
                    self._refuse(known, f"it is gone: {LATEST} names version {known}, and there is no log")
                if not self._versions():
                    return None
                table = self.at()  # Somebody's first commit came in between.
            self._check_end(table, known)
            for version in self._back_from(table.version()):
                self.entry(version)
            self._check_snapshot(table)
        self._newest = table
        return table

    def at(self, version: int | None = None) -> DeltaTable:
        """A version (default: the newest) as delta-rs reads it, and raises what it raises."""
        return DeltaTable(self.root, version=version, storage_options=delta_options(self.root))

    def _is_newest(self, version: int) -> bool:
        """Whether nothing was committed since this version was read: reading a log takes longer than asking that."""
        return exists(self.path(version)) and not exists(self.path(version + 1))

    def opened(self) -> DeltaTable:
        """The newest version of a table that is there."""
        table = self.open()
        if table is None:
            raise ContractError(f"{self.root} has no Delta log any more; run the job publish again")
        return table

    def nights(self, table: DeltaTable) -> dict[str, list[tuple[str, int]]]:
        """ds to its (path, rows) in this snapshot."""
        with self.understood():
            actions = table.get_add_actions(flatten=True)
            columns = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", "path", "num_records"))
            nights: dict[str, list[tuple[str, int]]] = {}
            for ds, path, rows in zip(*columns, strict=True):
                nights.setdefault(ds, []).append((path, rows or 0))
        return nights

    def entry(self, version: int) -> Entry | None:
        """A commit, or None where the log begins after it. Raises ContractError where it is damaged."""
        if version not in self._entries:
            try:
                self._entries[version] = parse_entry(read_bytes(self.path(version)))
            except FileNotFoundError:
                return None
            except _UNREADABLE as error:
                self._refuse(version, f"{type(error).__name__}: {error}")
        return self._entries[version]

    def live(self, version: int | None = None) -> frozenset[str]:
        """The files that readers of a version (default: the newest) need, relative to the table. Raises ContractError
        where that version cannot be read any more."""
        if version is None:
            table = self.open()
        else:
            with self.understood():
                table = self.at(version)
        nights = self.nights(table) if table is not None else {}
        return frozenset(path for files in nights.values() for path, _ in files)

    def history(self, ds: str, until: int | None = None) -> list[tuple[int, Entry]]:
        """(version, commit) of our commits of `ds` that the log still has, the oldest first; until: the last version
        that is looked at."""
        last = self.opened().version() if until is None else until
        entries = ((version, self.entry(version)) for version in reversed(self._back_from(last)))
        return [(version, entry) for version, entry in entries if entry is not None and entry.ds == ds]

    def undone(self, until: int | None = None) -> frozenset[tuple[str, str]]:
        """(ds, run key) of all runs that a rollback took back and nobody has published again since."""
        entry = self._last_of_ours(until)
        return frozenset((ds, key) for ds, key in entry.facts.get("ncf.undone", ())) if entry else frozenset()

    def _last_of_ours(self, until: int | None) -> Entry | None:
        """Our newest commit: what is to outlive the log's older entries is in each of them."""
        table = self.open() if until is None else None
        last = until if until is not None else table.version() if table is not None else -1
        for version in self._back_from(last):
            entry = self.entry(version)
            if entry is not None and entry.ds is not None:
                return entry
        return None

    def explain(self, table: DeltaTable, ds: str) -> tuple[int, Entry] | None:
        """(version, commit) that published the files of `ds` in this snapshot; None where that was not ours."""
        files = {path for path, _ in self.nights(table).get(ds, [])}
        for version in self._back_from(table.version()):
            entry = self.entry(version)
            if entry is not None and entry.ds == ds and files and all(f"-{entry.run_key}-" in path for path in files):
                return version, entry
        return None

    def path(self, version: int) -> str:
        return posixpath.join(self.root, "_delta_log", f"{version:020d}.json")

    def sync(self, version: int) -> None:
        """Make a commit survive a power cut."""
        if is_local(self.root):
            entry = self.path(version)
            for path in (entry, posixpath.dirname(entry), self.root):
                sync(path)

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Whatever delta-rs says of a log that it cannot read becomes a ContractError."""
        try:
            yield
        except BaseException as error:
            # A panic of delta-rs derives from BaseException and has no class that could be imported.
            if not (isinstance(error, _UNREADABLE) or type(error).__name__ == "PanicException"):
                raise
            for version in self._versions()[-LOOK_BACK:]:
                self.entry(version)  # Raises with the name of the entry, where it is one that we see to be damaged.
            said = " ".join(str(error).split("0: <unknown>")[0].split())[:300]
            raise ContractError(
                f"the Delta log {self.root}/_delta_log cannot be read ({type(error).__name__}: {said}), though each "
                f"entry by itself looks whole; nothing was changed: {_remedy(self.root)}"
            ) from error

    def _check_end(self, table: DeltaTable, known: int | None) -> None:
        """Raise ContractError where the log ends before the version that latest.json names."""
        if known is not None and known > table.version():
            self._refuse(known, f"it is gone: {LATEST} names version {known}, the log ends at {table.version()}")

    def _check_snapshot(self, table: DeltaTable) -> None:
        """Raise ContractError unless each night has the files that our last commit of it added."""
        last: dict[str, int] = {}
        for version, entry in sorted(self._entries.items()):
            if version > table.version():
                break
            if entry.ds is None:
                last = {}  # Somebody else's maintenance; what it did is its own matter.
            else:
                last[entry.ds] = version
        # A table without a commit of ours may have other columns: whoever opened it sees to that.
        nights = self.nights(table) if last else {}
        for ds, version in last.items():
            if {path for path, _ in nights.get(ds, ())} != self._entries[version].files.keys():
                self._refuse(version, f"the log as a whole shows other files for ds {ds} than this commit added")

    def _back_from(self, version: int) -> list[int]:
        """The entries up to a version that are looked at, the newest first; where the log was cleaned, few are left."""
        there = set(self._versions()) | self._entries.keys()
        return sorted((at for at in there if version - LOOK_BACK < at <= version), reverse=True)

    def _versions(self) -> list[int]:
        names = list_names(posixpath.join(self.root, "_delta_log"))
        return [int(found[1]) for found in map(_ENTRY.fullmatch, names) if found]

    def latest(self) -> Latest | None:
        """latest.json; None where there is none, or it is damaged (it is derived, and written anew)."""
        path = posixpath.join(self.root, LATEST)
        try:
            return read_json(Latest, path, more_keys=True) if exists(path) else None
        except ValueError:
            return None
        except IsADirectoryError:
            raise ContractError(f"{path} is a folder; needed a file, or nothing: remove it") from None

    def _refuse(self, version: int, what: str) -> NoReturn:
        newest = version >= max(self._versions(), default=-1)
        raise ContractError(
            f"entry {self.path(version)} of the Delta log is damaged ({what}); nothing was changed: "
            f"{_remedy(self.root, newest)}"
        )


def _remedy(root: str, newest: bool = False) -> str:
    remove = f"or, as it is the newest one, remove it and {LATEST} and publish its night again, " if newest else ""
    return (
        f"put the entry back from a backup, {remove}or move {root} away (or set publish.table to a new name) and "
        "publish the nights that readers need again"
    )
