"""The published Delta table: one commit a night, and nothing between.

    <table>/ds=D/<model_version>-<part>-<run_key>-<sha256>.parquet   named by content: never rewritten
    <table>/_delta_log/N.json                                        the commit, what Delta readers go by
    <table>/latest.json                                              the newest night, for other readers

A commit is a compare-and-swap: it succeeds only as the successor of the very version that the fence was
checked against (delta-rs' own rebase would let an older night pass a newer one, so its retries are off).
latest.json is derived from the log, after the commit, by whoever comes last; where a run died in between,
the next one writes it.

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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, create_table_with_add_actions

from ncf_dist.contracts import PARTITION, Contract
from ncf_dist.errors import BusyRun, ContractError, StaleRun
from ncf_dist.files import exists, is_local, make_dirs, read_bytes, sync, write_atomic
from ncf_dist.publish import leftovers
from ncf_dist.publish.audit import Audited, checked_bytes
from ncf_dist.publish.log import LATEST, DeltaLog, Entry, digest

_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)

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

        Raises StaleRun where a later ds is published, ContractError where the table has other columns.
        """
        table = self.log.open()
        return table is not None and self._fence(table, night, set(files))

    def newest(self) -> tuple[str, Entry | None] | None:
        """(ds, its commit, where that is ours) of the newest night that readers see; None where there is none."""
        table = self.log.open()
        nights = self.log.nights(table) if table is not None else {}
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
        leftovers.sweep(folder)
        for file in files:
            target = posixpath.join(self.root, self.path_of(night, file.info.path, file.info.sha256))
            write_atomic(target, checked_bytes(file.source, file.info))
        if is_local(self.root):
            for path in (folder, self.root, posixpath.dirname(self.root)):
                sync(path)

    def commit(self, night: Publication, files: Iterable[Audited]) -> None:
        """Replace this ds by `files` for every reader at once. Raises BusyRun where somebody else committed,
        StaleRun, ContractError.
        """
        files = list(files)
        actions = [self._action(night, file) for file in files]
        table = self.log.open()
        if table is not None and self._fence(table, night, {action.path for action in actions}):
            return
        facts: dict[str, Any] = {
            "ncf.ds": night.ds,
            "ncf.run_key": night.run_key,
            "ncf.model_version": night.model_version,
            "ncf.k": str(night.k),
            # In the commit: delta-rs leaves the tags of a file empty, whatever it is given.
            "ncf.files": {action.path: _checksum(file) for action, file in zip(actions, files, strict=True)},
            **({} if night.model_users is None else {"ncf.model_users": str(night.model_users)}),
        }
        facts["ncf.digest"] = digest(facts)
        properties = CommitProperties(custom_metadata=facts, max_commit_retries=0)
        with self.log.understood():
            try:
                self._write(table, night.ds, actions, properties)
            except DeltaError as error:
                now = self.log.open()
                if (table.version() if table else -1) == (now.version() if now else -1):
                    raise
                raise BusyRun(
                    f"another publication to {self.root} came first ({' '.join(str(error).split())[:200]}); this "
                    "one changed nothing: run it again"
                ) from None

    def _write(self, table: DeltaTable | None, ds: str, actions: list[AddAction], properties: CommitProperties) -> None:
        """The commit itself, as the successor of `table`."""
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
                partition_filters=[(PARTITION, "=", ds)],
                commit_properties=properties,
                post_commithook_properties=_HOOKS,
            )

    def settle(self, night: Publication) -> int:
        """Make the log durable and latest.json true, also after a run that died; returns its version."""
        while True:
            table = self.log.opened()
            self.log.sync(table.version())
            newest = self._describe(table, max(self.log.nights(table)))
            body = json.dumps(newest, indent=1).encode()
            path = posixpath.join(self.root, LATEST)
            if newest is not None and (not exists(path) or read_bytes(path) != body):
                write_atomic(path, body)
            # Whoever committed meanwhile may have written latest.json before us: then ours is the older one.
            if self.log.opened().version() == table.version():
                break
        mine = newest if newest is not None and newest["ds"] == night.ds else self._describe(table, night.ds)
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
            latest, version = self.log.latest(), table.version()
            if latest is not None and latest.version == version:
                return f"version {version} is committed, and Delta readers and {LATEST} name it"
            old = f"still names version {latest.version}" if latest is not None else "is not written yet"
            return f"version {version} is committed and Delta readers see it, while {LATEST} {old}"
        except (OSError, ContractError) as error:
            return f"whether it was committed cannot be told ({' '.join(str(error).split())[:200]})"

    def check_ahead(self, ds: str, contracts: Iterable[Contract]) -> None:
        """Raise StaleRun or ContractError where no files of any of the `contracts` could be published for `ds`."""
        table = self.log.open()
        if table is None:
            return
        schemas = [PublishedTable(self.root, contract).schema for contract in contracts]
        if table.schema() not in schemas or table.metadata().partition_columns != [PARTITION]:
            self._refuse_columns(table)
        nights = self.log.nights(table)
        if ds not in nights:
            self._refuse_older(nights, ds, "this night")

    def _fence(self, table: DeltaTable, night: Publication, files: set[str]) -> bool:
        if table.schema() != self.schema or table.metadata().partition_columns != [PARTITION]:
            self._refuse_columns(table)
        nights = self.log.nights(table)
        if {path for path, _ in nights.get(night.ds, [])} == files:
            return True
        self._refuse_older(nights, night.ds, f"run {night.run_key}")
        return False

    def _refuse_columns(self, table: DeltaTable) -> NoReturn:
        raise ContractError(
            f"the published table {self.root} has columns {_columns(table.schema())}; needed "
            f"{_columns(self.schema)}, partitioned by ds: readers rely on them, so set publish.table to a new "
            "name, or score.form to the form that is published; nothing was changed"
        )

    def _refuse_older(self, nights: Iterable[str], ds: str, who: str) -> None:
        """Raise StaleRun where a later ds is published."""
        later = [other for other in nights if other > ds]
        if later:
            raise StaleRun(
                f"ds {max(later)} is already published in {self.root}; needed a ds not before it, got "
                f"{ds} ({who}): an older night never replaces a newer one, so publish a later "
                "ds; nothing was changed"
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

    def _describe(self, table: DeltaTable, ds: str) -> dict[str, Any] | None:
        """latest.json for `ds`: its files in this snapshot and the facts of their commit; None if not ours."""
        found = self.log.explain(table, ds)
        if found is None:
            log.warning(
                "%s: no commit of ours explains the files of ds %s, so %s stays as it is", self.root, ds, LATEST
            )
            return None
        version, entry = found
        files = self.log.nights(table)[ds]
        return {
            "ds": ds,
            "version": version,
            "model_version": entry.facts["ncf.model_version"],
            "run_key": entry.run_key,
            "files": sorted(path for path, _ in files),
            "rows": sum(rows for _, rows in files),
            "k": int(entry.facts["ncf.k"]),
            "model_users": entry.model_users,
            "checksums": {path: entry.checksums[path] for path in sorted(entry.checksums)},
        }


def _checksum(file: Audited) -> dict[str, Any]:
    return {"bytes": file.info.bytes, "sha256": file.info.sha256}


def _columns(schema: Schema) -> str:
    return ", ".join(f"{field.name} {getattr(field.type, 'type', field.type)}" for field in schema.fields)
