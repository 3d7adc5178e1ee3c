"""The published Delta table: one commit a night, and nothing between.

    <table>/ds=D/<model_version>-<part>-<run_key>-<sha256>.parquet   named by content: never rewritten
    <table>/_delta_log/N.json                                        the commit, what Delta readers go by
    <table>/latest.json                                              the newest night, for other readers

A commit is a compare-and-swap: it succeeds only as the successor of the very version that the fence was
checked against (delta-rs' own rebase would let an older night pass a newer one, so its retries are off).
latest.json is derived from the log, after the commit, by whoever comes last; a run that died in between is
mended by the next one.

delta-rs does not fsync: on a local lake the files are synced before the commit and the log entry after it. It
writes no checkpoints here, because a torn checkpoint would cost readers the table; a night is one small log
entry.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, create_table_with_add_actions

from ncf_dist.artifacts import exists, is_local, list_names, make_dirs, read_bytes, remove, sync, write_atomic
from ncf_dist.contracts import PARTITION, Contract
from ncf_dist.errors import BusyRun, ContractError, StaleRun
from ncf_dist.publish.audit import Audited, checked_bytes

LATEST = "latest.json"
STALE_SECONDS = 3_600
"""Age at which a half-written file of a run that died is swept up."""
_HALF_WRITTEN = re.compile(r"\.tmp$|\.json#\d+$")
_LOOK_BACK = 1_000
_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Night:
    """What is to be published for one ds."""

    ds: str
    run_key: str
    model_version: str
    k: int


class PublishedTable:
    """The table at `root` (a folder or a URL), as it is or as it will be."""

    def __init__(self, root: str, contract: Contract) -> None:
        self.root, self.contract = root, contract
        self.schema = Schema.from_arrow(contract.schema.insert(0, pa.field(PARTITION, pa.string(), nullable=False)))

    def path_of(self, night: Night, part: str, sha256: str) -> str:
        """Where a file of the score run is published, relative to the table."""
        stem = part.removesuffix(".parquet")
        name = "-".join(
            re.sub(r"[^A-Za-z0-9._-]", "_", text)[:64]
            for text in (night.model_version, stem, night.run_key, sha256[:16])
        )
        return f"{PARTITION}={night.ds}/{name}.parquet"

    def holds(self, night: Night, files: Iterable[str]) -> bool:
        """Whether the log already has exactly these files for this ds.

        Raises StaleRun where a later ds is published, ContractError where the table has other columns.
        """
        table = self._open()
        return table is not None and self._fence(table, night, set(files))

    def copy(self, night: Night, files: Iterable[Audited]) -> None:
        """Put audited files in place. Nobody reads them before the commit. Raises ContractError if one has
        changed meanwhile.
        """
        folder = posixpath.join(self.root, f"{PARTITION}={night.ds}")
        make_dirs(folder)
        self._sweep(folder)
        for file in files:
            target = posixpath.join(self.root, self.path_of(night, file.info.path, file.info.sha256))
            write_atomic(target, checked_bytes(file.source, file.info))
        if is_local(self.root):
            for path in (folder, self.root, posixpath.dirname(self.root)):
                sync(path)

    def commit(self, night: Night, files: Iterable[Audited]) -> None:
        """Replace this ds by `files` for every reader at once. Raises BusyRun where somebody else committed,
        StaleRun, ContractError.
        """
        actions = [self._action(night, file) for file in files]
        table = self._open()
        if table is not None and self._fence(table, night, {action.path for action in actions}):
            return
        facts = {
            "ncf.ds": night.ds,
            "ncf.run_key": night.run_key,
            "ncf.model_version": night.model_version,
            "ncf.k": str(night.k),
        }
        properties = CommitProperties(custom_metadata=facts, max_commit_retries=0)
        try:
            if table is None:
                create_table_with_add_actions(
                    self.root,
                    self.schema,
                    actions,
                    mode="error",
                    partition_by=[PARTITION],
                    name=self.contract.name,
                    description=self.contract.meaning,
                    commit_properties=properties,
                    post_commithook_properties=_HOOKS,
                )
            else:
                table.create_write_transaction(
                    [*actions],
                    mode="overwrite",
                    schema=self.schema,
                    partition_by=[PARTITION],
                    partition_filters=[(PARTITION, "=", night.ds)],
                    commit_properties=properties,
                    post_commithook_properties=_HOOKS,
                )
        except DeltaError as error:
            if not isinstance(error, CommitFailedError) and (table is not None or self._open() is None):
                raise
            raise BusyRun(
                f"another publication to {self.root} came first ({' '.join(str(error).split())[:200]}); this "
                "one changed nothing: run it again"
            ) from None

    def settle(self, night: Night) -> int:
        """Make the log durable and latest.json true, also after a run that died; returns its version."""
        while True:
            table = self._opened()
            self._sync_log(table.version())
            newest = self._describe(table, max(_nights(table)))
            body = json.dumps(newest, indent=1).encode()
            path = posixpath.join(self.root, LATEST)
            if newest is not None and (not exists(path) or read_bytes(path) != body):
                write_atomic(path, body)
            # Whoever committed meanwhile may have written latest.json before us: then ours is the older one.
            if self._opened().version() == table.version():
                break
        self._sweep(self.root)
        self._sweep(posixpath.join(self.root, "_delta_log"))
        mine = newest if newest is not None and newest["ds"] == night.ds else self._describe(table, night.ds)
        version = int(mine["version"]) if mine is not None else int(table.version())
        self._sync_log(version)
        return version

    def rows(self, ds: str) -> int:
        return sum(rows for _, rows in _nights(self._opened()).get(ds, []))

    def _open(self) -> DeltaTable | None:
        try:
            return DeltaTable(self.root)
        except TableNotFoundError:
            return None

    def _opened(self) -> DeltaTable:
        return DeltaTable(self.root)

    def _fence(self, table: DeltaTable, night: Night, files: set[str]) -> bool:
        if table.schema() != self.schema or table.metadata().partition_columns != [PARTITION]:
            raise ContractError(
                f"the published table {self.root} has columns {_columns(table.schema())}; needed "
                f"{_columns(self.schema)}, partitioned by ds: readers rely on them, so set publish.table to a new "
                "name, or score.form to the form that is published; nothing was changed"
            )
        nights = _nights(table)
        if {path for path, _ in nights.get(night.ds, [])} == files:
            return True
        later = [ds for ds in nights if ds > night.ds]
        if later:
            raise StaleRun(
                f"ds {max(later)} is already published in {self.root}; needed a ds not before it, got "
                f"{night.ds} (run {night.run_key}): an older night never replaces a newer one, so publish a later "
                "ds; nothing was changed"
            )
        return False

    def _action(self, night: Night, file: Audited) -> AddAction:
        stats = {
            "numRecords": file.info.rows,
            "minValues": file.least,
            "maxValues": file.most,
            "nullCount": {f.name: 0 for f in self.contract.schema if not pa.types.is_nested(f.type)},
        }
        path = self.path_of(night, file.info.path, file.info.sha256)
        return AddAction(path, file.info.bytes, {PARTITION: night.ds}, int(time.time() * 1000), True, json.dumps(stats))

    def _describe(self, table: DeltaTable, ds: str) -> dict[str, Any] | None:
        """latest.json for `ds`: its files in this snapshot and the facts of their commit; None if not ours."""
        files = _nights(table).get(ds, [])
        for version in range(table.version(), max(-1, table.version() - _LOOK_BACK), -1):
            facts = self._commit_facts(version)
            key = facts.get("ncf.run_key")
            if facts.get("ncf.ds") == ds and files and all(f"-{key}-" in path for path, _ in files):
                return {
                    "ds": ds,
                    "version": version,
                    "model_version": facts["ncf.model_version"],
                    "run_key": key,
                    "files": sorted(path for path, _ in files),
                    "rows": sum(rows for _, rows in files),
                    "k": int(facts["ncf.k"]),
                }
        log.warning("%s: no commit of ours explains the files of ds %s, so %s stays as it is", self.root, ds, LATEST)
        return None

    def _commit_facts(self, version: int) -> dict[str, Any]:
        """What commit `version` says about itself. (history() is empty where the path holds a space.)"""
        path = self._log_entry(version)
        if not exists(path):
            return {}
        lines = (line for line in read_bytes(path).splitlines() if line.startswith(b'{"commitInfo"'))
        return next((dict(json.loads(line)["commitInfo"]) for line in lines), {})

    def _log_entry(self, version: int) -> str:
        return posixpath.join(self.root, "_delta_log", f"{version:020d}.json")

    def _sync_log(self, version: int) -> None:
        if is_local(self.root):
            entry = self._log_entry(version)
            for path in (entry, posixpath.dirname(entry), self.root):
                sync(path)

    def _sweep(self, folder: str) -> None:
        """Remove what killed writers left half-written, which readers ignore; object stores have none."""
        if not is_local(self.root):
            return
        for name in list_names(folder):
            path = posixpath.join(folder, name)
            if _HALF_WRITTEN.search(name) and time.time() - os.stat(path).st_mtime > STALE_SECONDS:
                remove(path)


def _columns(schema: Schema) -> str:
    return ", ".join(f"{field.name} {getattr(field.type, 'type', field.type)}" for field in schema.fields)


def _nights(table: DeltaTable) -> dict[str, list[tuple[str, int]]]:
    """ds to its (path, rows) in this snapshot."""
    actions = table.get_add_actions(flatten=True)
    columns = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", "path", "num_records"))
    nights: dict[str, list[tuple[str, int]]] = {}
    for ds, path, rows in zip(*columns, strict=True):
        nights.setdefault(ds, []).append((path, rows))
    return nights
