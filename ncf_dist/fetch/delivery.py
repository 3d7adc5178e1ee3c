"""How files get into the target folder: staged inside it, moved into place a table at a time, manifest last.

    <target>/ratings.dat, movies.dat, …   a table: one file, or a folder of that name with part files
    <target>/manifest.json                written last: without it the folder counts as unfinished
    <target>/.staging/                    an attempt in progress; removed at the end, or by the next attempt
    <target>/.lock                        held while a fetch writes here (local folders only)

Other files in the target are left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from filelock import FileLock, Timeout

from ncf_dist import __version__
from ncf_dist.errors import BusyRun
from ncf_dist.files import exists, filesystem, is_local, make_dirs, read_json, remove, write_atomic
from ncf_dist.manifests import MANIFEST
from ncf_dist.stage import Outcome

CHUNK = 1 << 20


@dataclass(frozen=True)
class DeliveredFile:
    """A file in the target; `path` is relative to it."""

    path: str
    lines: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Delivery:
    """What a finished fetch left in its target: `tables` maps table names to paths relative to it."""

    run_key: str
    dataset: str
    format: str
    tables: Mapping[str, str]
    parts: tuple[DeliveredFile, ...]
    """Every file. Its name is part of the stored manifest."""
    version: str = __version__

    def outcome(self, target: str, status: str) -> Outcome:
        """For the last line of stdout: where tables are, their lines, the `input.format` that reads them."""
        metrics = {
            name: sum(part.lines for part in self.parts if _within(part.path, table))
            for name, table in self.tables.items()
        }
        outputs = {name: posixpath.join(target, table) for name, table in self.tables.items()}
        return Outcome(status, self.run_key, outputs, {"lines": metrics}, {"format": self.format})


def find(target: str, run_key: str) -> Delivery | None:
    """The finished delivery of this key; None where one of its files is missing or has another size."""
    path = posixpath.join(target, MANIFEST)
    if not exists(path):
        return None
    try:
        delivery = read_json(Delivery, path)
    except (OSError, ValueError):
        return None  # Damaged: fetched again.
    whole = delivery.run_key == run_key and all(
        _size(posixpath.join(target, part.path)) == part.bytes for part in delivery.parts
    )
    return delivery if whole else None


@contextlib.contextmanager
def staging(target: str) -> Iterator[str]:
    """An empty folder inside `target`, gone at the end. Raises BusyRun where another fetch is writing."""
    make_dirs(target)
    with alone(posixpath.join(target, ".lock"), target) if is_local(target) else contextlib.nullcontext():
        folder = posixpath.join(target, ".staging")
        remove(folder)
        make_dirs(folder)
        try:
            yield folder
        finally:
            remove(folder)


def commit(target: str, staged: str, delivery: Delivery) -> None:
    """Move the tables and further files from the folder `staged` into `target`, then write the manifest."""
    manifest = posixpath.join(target, MANIFEST)
    remove(manifest)
    fs, inner = filesystem(target)
    _, source = filesystem(staged)
    for name in sorted({part.path.split("/")[0] for part in delivery.parts}):
        remove(posixpath.join(target, name))
        fs.mv(posixpath.join(source, name), posixpath.join(inner, name), recursive=True)
    write_atomic(manifest, json.dumps(dataclasses.asdict(delivery), indent=1).encode())


def store(source: IO[bytes], folder: str, name: str) -> DeliveredFile:
    """Copy a stream into `folder` a chunk at a time."""
    fs, inner = filesystem(posixpath.join(folder, name))
    digest, size, lines = hashlib.sha256(), 0, 0
    with fs.open(inner, "wb") as out:
        while chunk := source.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
            size, lines = size + len(chunk), lines + chunk.count(b"\n")
        if is_local(folder):
            out.flush()
            os.fsync(out.fileno())
    return DeliveredFile(name, lines, size, digest.hexdigest())


@contextlib.contextmanager
def alone(lock_file: str, what: str) -> Iterator[None]:
    """Hold a lock file while inside; the lock ends with its process. Raises BusyRun, which names `what`, where another
    process holds it."""
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyRun(f"another fetch is writing {what}; wait for it, or stop it, and run this again") from None
    try:
        yield
    finally:
        lock.release()


def _within(path: str, table: str) -> bool:
    return path == table or path.startswith(table + "/")


def _size(path: str) -> int | None:
    fs, inner = filesystem(path)
    return int(fs.size(inner)) if fs.isfile(inner) else None
