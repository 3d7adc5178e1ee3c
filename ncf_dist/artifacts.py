"""Where things live in the lake, and the rule that makes them trustworthy: `manifest.json` is written last.

    <lake>/runs/<ds>/<stage>/<run_key>/…             one immutable output a (config, inputs)
    <lake>/runs/<ds>/<stage>/<run_key>/manifest.json written last: without it the output does not exist

The only file that knows the file system: every path goes through fsspec, so a lake is a folder or any URL fsspec opens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ncf_dist import __version__
from ncf_dist.contracts import Contract
from ncf_dist.errors import BusyRun, ContractError, InputError
from ncf_dist.scratch import replace_file
from ncf_dist.stored import MAX_JSON_BYTES, parse_json
from ncf_dist.urls import hide, real_url

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class FileInfo:
    """One Parquet file of a table; `path` is relative to the table."""

    path: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableInfo:
    """A stored table: `path` relative to the run, its files in order, and the fingerprint of its schema."""

    path: str
    schema: str
    files: tuple[FileInfo, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished run is: its key, what it was made from, and what it holds.

    name: of an experiment; production has none. finished: when, UTC, ISO 8601.
    """

    stage: str
    ds: str
    run_key: str
    root: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    tables: Mapping[str, TableInfo] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    version: str = __version__
    name: str | None = None
    finished: str = ""

    def table_path(self, name: str) -> str:
        return posixpath.join(self.root, self._table(name).path)

    def files(self, name: str) -> list[str]:
        """Full paths of the files of table `name`, in the manifest's order."""
        return [posixpath.join(self.table_path(name), file.path) for file in self._table(name).files]

    def table(self, contract: Contract) -> TableInfo:
        """The stored table, after checking that it was written to this contract. Raises ContractError."""
        info = self._table(contract.name)
        if info.schema != contract.fingerprint:
            files = self.files(contract.name)
            if files:
                contract.check(read_schema(files[0]))
        return info

    def outputs(self) -> dict[str, str]:
        return {name: self.table_path(name) for name in self.tables}

    def _table(self, name: str) -> TableInfo:
        if name not in self.tables:
            raise ContractError(
                f"{self.stage} run {self.run_key} has no table {name} (it has {', '.join(self.tables)}); "
                f"rerun {self.stage}"
            )
        return self.tables[name]


@dataclass(frozen=True)
class Outcome:
    """What a job tells the scheduler in its last line."""

    status: str
    run_key: str | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None

    @classmethod
    def of(
        cls, manifest: Manifest, status: str = "done", outputs: Mapping[str, str] | None = None, **extra: Any
    ) -> Outcome:
        """outputs: beside the run's tables."""
        return cls(
            status, manifest.run_key, {**(outputs or {}), **manifest.outputs()}, manifest.metrics, extra, manifest
        )


class Lake:
    """The root of everything the line stores."""

    def __init__(self, root: str) -> None:
        self.root = resolve(root)

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def stage(self, ds: str, stage: str) -> StageRuns:
        return StageRuns(self, ds, stage)

    def check_writable(self) -> None:
        """Raise InputError unless a file can be made and removed at the root."""
        probe = self.path(f".probe-{os.getpid()}")
        try:
            make_dirs(self.root)
            write_bytes(probe, b"")
            remove(probe)
        except OSError as error:
            raise InputError(
                f"the lake {self.root} cannot be written ({error.strerror or error}); "
                "needed a place this user may write: mend its permissions or set paths.lake"
            ) from None

    def nights(self) -> list[str]:
        """Every ds for which a run was begun, ascending."""
        return [name for name in list_names(self.path("runs")) if re.fullmatch(r"\d{4}-\d\d-\d\d", name)]

    @contextlib.contextmanager
    def hold(self, ds: str) -> Iterator[None]:
        """Keep every other run away from this ds while inside; the lock dies with its process.

        Raises BusyRun. On lakes that are not a local or mounted folder there is no lock: schedule one run a ds.
        """
        if not is_local(self.root):
            yield
            return
        self.check_writable()
        make_dirs(self.path("runs", ds))
        lock = FileLock(self.path("runs", ds, ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BusyRun(
                f"another run holds ds {ds} of {self.root}; wait for it, or stop it, and run this again"
            ) from None
        try:
            yield
        finally:
            lock.release()


class StageRuns:
    """The runs of one stage of one night."""

    def __init__(self, lake: Lake, ds: str, stage: str) -> None:
        self.ds, self.stage = ds, stage
        self.root = lake.path("runs", ds, stage)

    def run_path(self, run_key: str) -> str:
        return posixpath.join(self.root, run_key)

    def find(self, run_key: str) -> Manifest | None:
        """The finished run of this key, or None."""
        path = self.run_path(run_key)
        return read_manifest(path) if exists(posixpath.join(path, MANIFEST)) else None

    def load(self, run_key: str) -> Manifest:
        """The finished run of this key. Raises ContractError where there is none."""
        manifest = self.find(run_key)
        if manifest is None:
            raise ContractError(
                f"{self.run_path(run_key)} cannot be read: it is no finished run, but a later one was made from it; "
                f"needed it whole: rerun the job {self.stage}, and what comes after it"
            )
        return manifest

    def finished(self) -> list[Manifest]:
        """Every finished run, experiments included, the newest first. A damaged manifest is logged and passed over."""
        found = []
        for name in list_names(self.root):
            try:
                if manifest := self.find(name):
                    found.append(manifest)
            except ContractError as error:
                log.warning("%s", error)
        return sorted(found, key=lambda run: (run.finished, run.run_key), reverse=True)

    def production(self) -> list[Manifest]:
        """The finished runs that are no experiment's, whatever their config, the newest first."""
        return [run for run in self.finished() if run.name is None]

    def newest(self) -> Manifest:
        """The first of `production`. Raises ContractError where this stage has not finished for this ds."""
        found = self.production()
        if not found:
            raise ContractError(
                f"{self.root} has no finished run; needed the output of {self.stage} for ds {self.ds}: "
                f"run the job {self.stage} first"
            )
        return found[0]

    def begin(self, run_key: str, keep: Sequence[str] = ()) -> str:
        """A folder for this run; what an attempt that died left there is removed, but for the names in `keep`."""
        path = self.run_path(run_key)
        for name in list_names(path):
            if name not in keep:
                remove(posixpath.join(path, name))
        make_dirs(path)
        return path

    def finish(self, manifest: Manifest) -> Manifest:
        """Make the run exist, finished now. Returns it as it is stored."""
        manifest = dataclasses.replace(manifest, finished=dt.datetime.now(dt.timezone.utc).isoformat())
        body = {k: v for k, v in dataclasses.asdict(manifest).items() if k != "root"}
        write_atomic(posixpath.join(manifest.root, MANIFEST), json.dumps(body, indent=1, sort_keys=True).encode())
        return manifest


def read_manifest(run: str) -> Manifest:
    """The manifest of the finished run at `run`. Raises ContractError where it cannot be read."""
    try:
        return read_json(Manifest, posixpath.join(run, MANIFEST), root=run)
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{run}/{MANIFEST} cannot be read ({error}); needed a finished run: delete the folder and rerun the job"
        ) from None


def run_key(stage: str, ds: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Names a run by what decides its bytes: the stage, the night, the config it uses, its inputs and our version."""
    text = json.dumps([stage, ds, config, inputs, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- files -------------------------------------------------------------------------------------------------------


def resolve(path: str) -> str:
    """An absolute path for a local `path` (relative ones start at the working directory), any other URL in its public
    form."""
    if "://" not in path:
        return os.path.abspath(os.path.expanduser(path))
    return path[len("file://") :] if path.startswith("file://") else hide(path).rstrip("/")


def is_local(path: str) -> bool:
    return "://" not in path


def file_url(path: str) -> str:
    """`path` as a URL, for readers that insist on one."""
    return f"file://{path}" if is_local(path) else path


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `path`, and `path` in that file system's own form."""
    fs, inner = fsspec.core.url_to_fs(real_url(path))
    return fs, inner


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def make_dirs(path: str) -> None:
    fs, inner = filesystem(path)
    fs.makedirs(inner, exist_ok=True)


def remove(path: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens where there is none."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def list_names(path: str) -> list[str]:
    """Names in a folder, sorted; empty where there is no such folder."""
    fs, inner = filesystem(path)
    if not fs.exists(inner):
        return []
    return sorted(posixpath.basename(str(p).rstrip("/")) for p in fs.ls(inner, detail=False))


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    return bytes(fs.cat_file(inner))


def read_json(kind: type[T], path: str, /, *, more_keys: bool = False, **given: Any) -> T:
    """`stored.parse_json` of a file of ours. Raises OSError where it cannot be read, ValueError for what it holds."""
    fs, inner = filesystem(path)
    if (size := int(fs.size(inner) or 0)) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, needed at most {MAX_JSON_BYTES:,}")
    return parse_json(kind, read_bytes(path), more_keys=more_keys, **given)


def write_bytes(path: str, data: bytes) -> None:
    fs, inner = filesystem(path)
    with fs.open(inner, "wb") as out:
        out.write(data)


def write_atomic(path: str, data: bytes) -> None:
    """Readers see the old file or the new one. Object stores give that for a plain write; a folder needs a rename."""
    if not is_local(path):
        write_bytes(path, data)
        return
    replace_file(path, data)


def sync(path: str) -> None:
    """Make a local file, or a local folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def listed_ids(given: str | Sequence[str | int]) -> tuple[str, ...]:
    """Distinct ids as text, ascending: those given, or the lines of a text file (UTF-8; spaces at their ends and blank
    lines are left out). Raises InputError where the file cannot be read."""
    lines: Sequence[str | int] = ()
    if isinstance(given, str):
        path = resolve(given)
        try:
            lines = read_bytes(path).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the list of ids {path} cannot be read ({error}); needed a text file with one id a line"
            ) from None
    else:
        lines = given
    return tuple(sorted({text for line in lines if (text := str(line).strip())}))


def ids_digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def fingerprint(files: list[str]) -> str:
    """Changes when a file is added, removed or rewritten:
    hash of names, sizes and modification times (or entity tags)."""
    facts = []
    for path in files:
        fs, inner = filesystem(path)
        info = fs.info(inner)
        facts.append([path, info.get("size"), str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def read_schema(path: str) -> pa.Schema:
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as source:
        return pq.read_schema(source)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as an Arrow table."""
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as source:
        return pq.ParquetFile(source).read(columns=columns)


def write_parquet(table: pa.Table, folder: str, name: str) -> FileInfo:
    """Write `table` as one file with one row group, zstd, and say what was written.

    The same table gives the same bytes, so a task that is retried, or runs twice, replaces a file by its equal.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), compression="zstd", write_statistics=True)
    data = sink.getvalue().to_pybytes()
    make_dirs(folder)
    write_atomic(posixpath.join(folder, name), data)
    return FileInfo(name, table.num_rows, 1, len(data), hashlib.sha256(data).hexdigest())
