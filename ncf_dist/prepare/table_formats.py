"""Folders that a table format keeps. Their Parquet files also hold rows that were deleted or updated since: only the
table's own log says which files are live.

Delta tables are read by their log (delta-rs). Apache Iceberg and Hudi are refused by name, and so are Delta's deletion
vectors and column mapping, with which the rows of a file are not those that it holds. A link to a file or folder inside
a table leads to a file of the table.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NoReturn
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from ncf_dist.errors import InputError
from ncf_dist.files import delta_options, exists, filesystem, is_local, list_names
from ncf_dist.inputs import Listing

READER_FEATURES = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "deletionVectors", "columnMapping"}
"""Delta's reader features with which a file is read as it is written; and the two that a table may permit without using
them, which are checked."""
_MARK = re.compile(r"(.*?)/(?:_delta_log|\.hoodie|metadata/[^/]*\.metadata\.json(?:\.gz)?)(?:/|$)")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A Delta table at one version. values: path of each live file → partition column → its value."""

    root: str
    version: int
    values: Mapping[str, Mapping[str, pa.Scalar]]


def live_files(listed: Listing, chosen: Sequence[str], key: str) -> tuple[list[str], list[Table]]:
    """(of the chosen Parquet files those that are in no table, and the live files of the Delta tables that the others
    belong to; these tables). Raises InputError for other tables, for a live file that is not there, and for a file that
    is given by its name and is not live."""
    keeper = _keeper(listed)
    kept = dict(_owned(path, keeper) for path in chosen)
    roots = {root for root in kept.values() if root is not None}
    top, above = _owned(listed.path, keeper, folder=True) if listed.kind == "folder" else (listed.path, None)
    if above is not None:
        roots.add(above)
    tables = {root: _opened(root, key) for root in sorted(roots)}
    live = [path for path, root in kept.items() if root is None or path in tables[root].values]
    if listed.kind == "file" and not live:
        [root] = roots
        raise InputError(
            f"{key} {listed.path} is not a live file of the Delta table {root} (version {tables[root].version}): its "
            f"rows were deleted or rewritten; needed the table: set {key}={root}"
        )
    for table in tables.values():
        if listed.kind == "folder":  # By the log, not by the folder: a partition column may have a hidden name.
            live += _there(table, [path for path in table.values if path.startswith(top.rstrip("/") + "/")], live)
        log.info("%s is read as a Delta table, version %d, %d live files", table.root, table.version, len(table.values))
    return sorted(set(live)), list(tables.values())


def _owned(path: str, keeper: Callable[[str], str | None], folder: bool = False) -> tuple[str, str | None]:
    """(the path, the root of the table that it belongs to). Where no folder by which the path is named is in a table,
    but the file or folder that links lead to is: that one, by the name that the table has for it."""
    root = keeper(path if folder else posixpath.dirname(path))
    if root is not None or not is_local(path):
        return path, root
    real = os.path.realpath(path)
    if real == path or (root := keeper(real if folder else posixpath.dirname(real))) is None:
        return path, None
    return real, root


def _there(table: Table, files: Sequence[str], found: Sequence[str]) -> Sequence[str]:
    """The files. found: those that are known to be there. Raises InputError where one is not."""
    for path in sorted(set(files) - set(found)):
        if not exists(path):
            raise InputError(
                f"{path}: No such file, and version {table.version} of the Delta table {table.root} has it as a live "
                "one; needed every file that the table's log names: restore it, or repair the table (FSCK REPAIR TABLE "
                "takes it out of the log)"
            )
    return files


def _keeper(listed: Listing) -> Callable[[str], str | None]:
    """A function from a folder to the root of the table that it belongs to (itself or a folder above), or None. Folders
    below the listed one are looked up in its listing and not opened: there may be ten thousand partitions."""
    below = {match[1] for path in (*listed.hidden, *listed.files) if (match := _MARK.match(path))}

    @cache
    def keeper(folder: str) -> str | None:
        inside = listed.kind == "folder" and folder.startswith(listed.path.rstrip("/") + "/")
        if (folder in below or not inside) and _kind(folder) is not None:
            return folder
        top = folder == "/" or re.fullmatch(r"[^/]+://[^/]*/?", folder)
        return None if top else keeper(posixpath.dirname(folder))

    return keeper


def _kind(folder: str) -> str | None:
    """The table format that this folder is the root of, or None. A Delta log without an entry is a damaged table."""
    local_log = posixpath.join(folder, "_delta_log")
    if _names(folder, "_delta_log") or (is_local(folder) and os.path.isdir(local_log)):
        return "Delta"
    if any(name.endswith((".metadata.json", ".metadata.json.gz")) for name in _names(folder, "metadata")):
        return "Iceberg"
    return "Hudi" if _names(folder, ".hoodie") else None


def _names(folder: str, name: str) -> list[str]:
    path = posixpath.join(folder, name)
    try:
        return list_names(path) if not is_local(path) or os.path.isdir(path) else []
    except OSError as error:
        if is_local(path) and name == "_delta_log":
            raise InputError(
                f"{path} cannot be listed ({error.strerror}); needed the log of this Delta table: fix its permissions"
            ) from None
        return []  # A folder above the input that may not be listed is nobody's table.


def _opened(root: str, key: str) -> Table:
    """Raises InputError."""
    kind = _kind(root)
    if kind != "Delta":
        raise InputError(
            f"{key}: {root} is a table of Apache {kind}, whose files hold deleted rows too; needed plain Parquet files "
            f"or a Delta table: let {kind}'s own reader write tonight's rows as Parquet, and set {key} to that"
        )
    try:
        table = DeltaTable(root, storage_options=delta_options(root))
        _check_readable(table, root, key)
        actions = table.get_add_actions(flatten=True)
        columns = {name: actions.column(name).to_pylist() for name in actions.column_names}
    except (DeltaError, OSError, ValueError) as error:
        raise InputError(
            f"the Delta table {root} cannot be read by its log ({str(error).splitlines()[0]}); needed a table that "
            f"delta-rs opens: repair it, or write tonight's rows as plain Parquet and set {key} to that"
        ) from None
    partition = {name.removeprefix("partition."): v for name, v in columns.items() if name.startswith("partition.")}
    files = [_path(root, path) for path in columns["path"]]
    values = {file: {name: _scalar(v[row]) for name, v in partition.items()} for row, file in enumerate(files)}
    return Table(root, table.version(), values)


def _check_readable(table: DeltaTable, root: str, key: str) -> None:
    def refuse(what: str, cure: str) -> NoReturn:
        raise InputError(
            f"{key}: the Delta table {root} (version {table.version()}) uses {what}: its files are not to be read as "
            f"they are; needed a table without: {cure}, or write tonight's rows as plain Parquet and set {key} to that"
        )

    protocol = table.protocol()
    features = set(protocol.reader_features or ())
    if unknown := sorted(features - READER_FEATURES):
        refuse(f"the reader feature {', '.join(unknown)}", "drop the feature")
    if "deletionVectors" in features and next(_deleted(table), None) is not None:
        refuse("deletion vectors", "run REORG TABLE … APPLY (PURGE)")
    mode = table.metadata().configuration.get("delta.columnMapping.mode") or "none"
    if mode != "none":
        refuse(f"column mapping ({mode})", "rewrite it with delta.columnMapping.mode=none")


def _deleted(table: DeltaTable) -> Iterator[object]:
    for batch in table.deletion_vectors():
        if batch.num_rows:
            yield batch


def _scalar(value: object) -> pa.Scalar:
    return pa.scalar(None, pa.string()) if value is None else pa.scalar(value)


def _path(root: str, path: str) -> str:
    """Full path of a live file; the log writes it as a URL, relative to the table or (of a clone) absolute."""
    plain = unquote(path)
    if plain.startswith("file:"):
        return "/" + plain.removeprefix("file:").lstrip("/")
    if "://" in plain:
        fs, inner = filesystem(plain)
        return str(fs.unstrip_protocol(inner))
    return posixpath.join(root, plain)
