"""The published Delta table: one commit a night, and nothing between.

    <table>/ds=D/<model_version>-<part>-<run_key>-<sha256>.parquet   named by content: never rewritten
    <table>/_delta_log/N.json                                        the commit, what Delta readers go by
    <table>/latest.json                                              the newest night, for other readers

A commit is a compare-and-swap (`commits`), as the successor of the very version that the fence was checked
against. Any ds may be published or replaced, in any order: its own partition changes, and no other.
latest.json is derived from the log, after the commit, by whoever comes last; where a run died in between,
the next one writes it. It names the newest ds, so an older one that is published moves nothing back.

delta-rs does not fsync: on a local lake the files are synced before the commit and the log entry after it. It
writes no checkpoints here, because a torn checkpoint would cost readers the table; a night is one small log
entry.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction

from ncf_dist.contracts import PARTITION, Contract
from ncf_dist.errors import ContractError, StaleRun
from ncf_dist.files import is_local, make_dirs, sync, write_atomic
from ncf_dist.publish import commits, latest, leftovers, steps
from ncf_dist.publish.audit import Audited, checked_bytes
from ncf_dist.publish.log import DeltaLog, Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What is to be published for one ds."""

    ds: str
    run_key: str
    model_version: str
    k: int
    model_users: int | None = None
    """Users ranked by the model, once they were counted."""
    forget: str | None = None
    """Digest of the list of input.forget that its run knew of."""
    listed: str | None = None
    """Digest of that list as it is now."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the gates measured."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Why it is published all the same, by what speaks against it."""
    refit: Mapping[str, str] | None = None
    """Where a refit ranked: `of`, the version of the model that was judged, and the runs of train of both."""

    @property
    def facts(self) -> dict[str, Any]:
        """What its commit says about it."""
        optional = {
            "ncf.model_users": None if self.model_users is None else str(self.model_users),
            "ncf.forget": self.forget,
            "ncf.values": dict(self.values) or None,
            "ncf.overrides": dict(self.overrides) or None,
            "ncf.refit": None if self.refit is None else dict(self.refit),
        }
        return {
            "ncf.run_key": self.run_key,
            "ncf.model_version": self.model_version,
            "ncf.k": str(self.k),
            **{name: value for name, value in optional.items() if value is not None},
        }


class PublishedTable:
    """The table at `root` (a folder or a URL), as it is or as it will be."""

    def __init__(self, root: str, contract: Contract) -> None:
        self.root, self.contract = root, contract
        self.schema = Schema.from_arrow(contract.schema.insert(0, pa.field(PARTITION, pa.string(), nullable=False)))
        self.log = DeltaLog(root)

    def path_of(self, night: Publication, part: str, sha256: str) -> str:
        """Where a file of the score run is published, relative to the table."""
        stem = part.removesuffix(".parquet")
        name = "-".join(
            re.sub(r"[^A-Za-z0-9._-]", "_", text)[:64]
            for text in (night.model_version, stem, night.run_key, sha256[:16])
        )
        return f"{PARTITION}={night.ds}/{name}.parquet"

    def holds(self, night: Publication, files: Iterable[str]) -> bool:
        """Whether the log already has exactly these files for this ds.

        Raises StaleRun where a rollback took this run back, ContractError where the table has other columns.
        """
        table = self.log.open()
        return table is not None and self._fence(table, night, set(files))

    def before(self, ds: str) -> tuple[str, Entry | None] | None:
        """(ds, its commit, where that is ours) of the night that a publication of `ds` is compared with: the one that
        it replaces, or else the last one before it; None where there is none."""
        table = self.log.open()
        nights = [night for night in self.log.nights(table) if night <= ds] if table is not None else []
        if table is None or not nights:
            return None
        found = self.log.explain(table, max(nights))
        return max(nights), found[1] if found else None

    def copy(self, night: Publication, files: Iterable[Audited]) -> None:
        """Put audited files in place. Nobody reads them before the commit. Raises ContractError if one has
        changed meanwhile.
        """
        folder = posixpath.join(self.root, f"{PARTITION}={night.ds}")
        make_dirs(folder)
        steps.reached("folder")
        leftovers.sweep(folder)
        for file in files:
            target = posixpath.join(self.root, self.path_of(night, file.info.path, file.info.sha256))
            write_atomic(target, checked_bytes(file.source, file.info))
            steps.reached("staged")
        if is_local(self.root):
            for path in (folder, self.root, posixpath.dirname(self.root)):
                sync(path)
        steps.reached("durable")

    def commit(self, night: Publication, files: Iterable[Audited]) -> None:
        """Replace this ds by `files` for every reader at once. Raises BusyRun where somebody else committed,
        StaleRun, ContractError.
        """
        files = list(files)
        actions = [self._action(night, file) for file in files]
        table = self.log.open()
        if table is not None and self._fence(table, night, {action.path for action in actions}):
            return
        # In the commit: delta-rs leaves the tags of a file empty, whatever it is given.
        checksums = {action.path: _checksum(file) for action, file in zip(actions, files, strict=True)}
        self._write(table, night.ds, actions, {**night.facts, "ncf.files": checksums})

    def _write(self, table: DeltaTable | None, ds: str, actions: list[AddAction], facts: dict[str, Any]) -> None:
        """The commit itself, as the successor of `table`."""
        if table is None:
            commits.create(self.log, self.contract, self.schema, ds, actions, facts)
        else:
            commits.swap(self.log, table, ds, actions, facts)

    def settle(self, night: Publication) -> int:
        """Make the log durable and latest.json true, also after a run that died; the version that published `night`."""
        table = latest.settle(self.log)
        mine = latest.describe(self.log, table, night.ds)
        version = int(mine["version"]) if mine is not None else int(table.version())
        self.log.sync(version)
        return version

    def rows(self, ds: str) -> int:
        return sum(rows for _, rows in self.log.nights(self.log.opened()).get(ds, []))

    def state(self, night: Publication, files: Iterable[str]) -> str:
        """What readers see of `night`, after a run that was stopped."""
        try:
            table = self.log.open()
            seen = {path for path, _ in self.log.nights(table).get(night.ds, [])} if table is not None else set()
            if table is None or seen != set(files):
                return "nothing was committed, so readers see what they saw before"
            said = f"version {table.version()} is committed and Delta readers see it"
            return f"{said}, {latest.standing(self.log, table)}"
        except (OSError, ContractError) as error:
            return f"whether it was committed cannot be told ({' '.join(str(error).split())[:200]})"

    def check_ahead(self, contracts: Iterable[Contract]) -> None:
        """Raise ContractError where no files of any of the `contracts` could be published."""
        table = self.log.open()
        if table is None:
            return
        schemas = [PublishedTable(self.root, contract).schema for contract in contracts]
        if table.schema() not in schemas or table.metadata().partition_columns != [PARTITION]:
            self._refuse_columns(table)

    def _fence(self, table: DeltaTable, night: Publication, files: set[str]) -> bool:
        if table.schema() != self.schema or table.metadata().partition_columns != [PARTITION]:
            self._refuse_columns(table)
        nights = self.log.nights(table)
        if {path for path, _ in nights.get(night.ds, [])} == files:
            return True
        if (night.ds, night.run_key) in self.log.undone(table.version()) and commits.UNDONE not in night.overrides:
            self._refuse_undone(night)
        self._refuse_forgotten(night)
        return False

    def _refuse_forgotten(self, night: Publication) -> None:
        """Raise ContractError where the run may bring people back who were forgotten in this ds."""
        digests = (entry.facts.get("ncf.forget") for _, entry in reversed(self.log.history(night.ds)))
        known = next((digest for digest in digests if digest), None)
        if known not in (None, night.forget) and (night.forget is None or night.forget != night.listed):
            raise ContractError(
                f"run {night.run_key} of ds {night.ds} does not know of the list of people to be forgotten (digest "
                f"{str(known)[:12]}…) that was applied to this ds in {self.root}; needed a run made with input.forget "
                "as it is now: run the line again from the job prepare on; nothing was changed"
            )

    def _refuse_columns(self, table: DeltaTable) -> NoReturn:
        raise ContractError(
            f"the published table {self.root} has columns {_columns(table.schema())}; needed "
            f"{_columns(self.schema)}, partitioned by ds: readers rely on them, so set publish.table to a new "
            "name, or score.form to the form that is published; nothing was changed"
        )

    def _refuse_undone(self, night: Publication) -> NoReturn:
        who = next(
            (version for version, entry in reversed(self.log.history(night.ds)) if night.run_key in entry.undone_keys),
            None,
        )
        by = "a rollback" if who is None else f"the rollback of version {who}"
        raise StaleRun(
            f"run {night.run_key} of ds {night.ds} was taken back by {by}; needed another run: change what made it "
            f'wrong and run the line again, or publish it all the same with --override {commits.UNDONE} --why "TEXT"; '
            "nothing was changed"
        )

    def _action(self, night: Publication, file: Audited) -> AddAction:
        stats = {
            "numRecords": file.info.rows,
            "minValues": file.least,
            "maxValues": file.most,
            "nullCount": {f.name: 0 for f in self.contract.schema if not pa.types.is_nested(f.type)},
        }
        path = self.path_of(night, file.info.path, file.info.sha256)
        return AddAction(path, file.info.bytes, {PARTITION: night.ds}, int(time.time() * 1000), True, json.dumps(stats))


def _checksum(file: Audited) -> dict[str, Any]:
    return {"bytes": file.info.bytes, "sha256": file.info.sha256}


def _columns(schema: Schema) -> str:
    return ", ".join(f"{field.name} {getattr(field.type, 'type', field.type)}" for field in schema.fields)
