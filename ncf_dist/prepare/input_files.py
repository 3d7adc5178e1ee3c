"""The files of a log or of a side table: found, chosen by format, and what was left out.

A folder that a table format keeps is not a folder of Parquet files: rows that were deleted are still in its files. A
Delta table is read by its log; the others are refused (table_formats.py). Folders named `key=value` give their files a
column.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from ncf_dist.errors import InputError
from ncf_dist.files import fingerprint
from ncf_dist.inputs import Listing, each_once, listing
from ncf_dist.prepare.formats import Format
from ncf_dist.prepare.table_formats import live_files

NAMES_SHOWN = 10
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFiles:
    """paths: sorted, each once; left_out: files beside them that are not read; versions: Delta table → the version that
    was read; values: path → what its folder or Delta's log says of all its rows, by column."""

    paths: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, pa.Scalar]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.paths)

    def fingerprint(self) -> Any:
        """Changes when a file is added, removed or rewritten; names the version of each Delta table."""
        files = fingerprint(list(self.paths))
        return {"files": files, "delta": dict(self.versions)} if self.versions else files


def find_files(path: str | Sequence[str], form: Format | None, name: str, key: str = "input.path") -> InputFiles:
    """The files behind `path`, of a folder or a glob those of the format (form None: all of them); what is left out is
    logged. name: the format's; key: what the config calls the path. Raises InputError where there is no file, or where
    files cannot be read as they are."""
    paths: list[str] = []
    left_out: list[str] = []
    versions: dict[str, int] = {}
    values: dict[str, Mapping[str, pa.Scalar]] = {}
    for part in [path] if isinstance(path, str) else path:
        listed = listing(part)
        chosen = list(listed.files) if form is None or listed.kind == "file" else select_files(listed, form, name, key)
        hidden = [file for file in listed.hidden if form is not None and form.holds(file)]
        other_case = [file for file in listed.other_case if form is not None and form.holds(file)]
        left = sorted(set(listed.files) - set(chosen))
        if form is not None and form.kind == "parquet":
            chosen, tables = live_files(listed, chosen, key)
            versions |= {table.root: table.version for table in tables}
            for table in tables:
                values |= table.values
        paths += chosen
        left_out += [*left, *hidden, *other_case]
        if form is not None:
            why = {
                f"not of format {name} ({' or '.join(form.patterns)})": left,
                "hidden by . or _": hidden,
                "which the pattern matches but for capital letters": other_case,
            }
            _log_left_out(listed.path, why, form)
    if not paths:
        tables_read = ", ".join(f"{root} at version {version}" for root, version in versions.items())
        raise InputError(f"{key}: no file of the Delta table {tables_read} is live here; needed at least one row")
    once = each_once(paths)
    values = {file: _folder_values(file) | dict(values.get(file, {})) for file in once}
    return InputFiles(tuple(once), tuple(left_out), versions, {file: v for file, v in values.items() if v})


def select_files(listed: Listing, form: Format, name: str, key: str = "input.path") -> list[str]:
    """The files of a folder or a glob whose names fit the format's patterns. Where none fits, all files that the glob
    matches, or the only file of the folder, as somebody must have meant these. Raises InputError."""
    chosen = [path for path in listed.files if form.holds(path)]
    if chosen or not listed.files:
        return chosen
    if (listed.kind == "glob" or len(listed.files) == 1) and not any(map(form.companion, listed.files)):
        return list(listed.files)
    what = key.split(".")[1] if key.startswith("input.") and key != "input.path" else "ratings"
    raise InputError(
        f"input folder holds {_names(listed.files)}: no file of format {name} in {listed.path}; "
        f"needed {' or '.join(form.patterns)}: set {key} to the {what} file, or {_format_key(key)} to what it is"
    )


def _log_left_out(path: str, left_out: Mapping[str, Sequence[str]], form: Format) -> None:
    """Log the files that are not read; as a warning where they may have been meant, as a log that shrinks in silence is
    noticed too late. left_out: why → these files."""
    for why, files in left_out.items():
        unknown = [file for file in files if not form.companion(file)]
        # A side table is one file in a folder of others, which nobody expects to be read.
        loud = unknown and any("*" in pattern for pattern in form.patterns)
        if files:
            log.log(
                logging.WARNING if loud else logging.INFO,
                "%s: %d file%s left out, %s: %s",
                path, len(files), "s"[: len(files) > 1], why, _names(unknown or files),
            )  # fmt: skip


def _names(files: Sequence[str]) -> str:
    names = sorted(posixpath.basename(file) for file in files)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _format_key(key: str) -> str:
    """input.path → input.format, input.items.path → input.items.format; the split's files have the log's format."""
    return f"{key.rpartition('.')[0]}.format" if key.startswith("input.") else "input.format"


def _folder_values(path: str) -> dict[str, pa.Scalar]:
    """`…/country=AT/day=2024-05-31/part-0.parquet` → country and day, as text."""
    folders = (folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder[1:])
    return {unquote(k): pa.scalar(None if v == HIVE_NULL else unquote(v), pa.string()) for k, _, v in folders}
