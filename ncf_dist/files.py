"""The one file layer: every path goes through fsspec, so a lake is a folder or any URL that fsspec opens.

The only module, with `s3`, that imports fsspec. Drivers, tasks and ranks read and write through it. Of an object store
nothing is asked that it has not: there are no folders and no renames, a file is asked for by its name, and where one
winner is needed the store decides (`create`, `replace`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec

from ncf_dist.errors import ConfigError
from ncf_dist.retries import retried
from ncf_dist.scratch import create_file, replace_file, replace_file_if
from ncf_dist.stored import MAX_JSON_BYTES, parse_json
from ncf_dist.urls import hide, real_url, scrub

T = TypeVar("T")

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
"""Protocols of stores that have no folders."""
RANGE_BYTES = 2**23
"""What is read at a time of a file in an object store."""
_S3 = re.compile(r"(^|::)s3a?://")


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
    """The file system of `path`, and `path` in that file system's own form. Raises ConfigError where it is of a kind
    that nothing here can open."""
    if is_s3(path) and "@" in real_url(path).split("/")[2]:
        raise ConfigError(
            f"{path} was given with credentials; needed the bucket's URL alone: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment"
        )
    try:
        if _S3.search(path):
            _register_s3()
        fs, inner = fsspec.core.url_to_fs(real_url(path))
    except (ImportError, ValueError) as error:  # A package that is not installed; a protocol that fsspec does not know.
        raise ConfigError(
            f"{scrub(path)} cannot be opened ({scrub(str(error))}): install fsspec's package for it, or correct it"
        ) from None
    return fs, inner


@functools.cache
def _register_s3() -> None:
    from ncf_dist.s3 import S3

    for protocol in S3.protocol:
        fsspec.register_implementation(protocol, S3, clobber=True)


def is_s3(path: str) -> bool:
    return path.startswith(("s3://", "s3a://"))


def has_folders(path: str) -> bool:
    """Whether its store knows folders that have to be made, and stay when they are empty."""
    return path.partition("://")[0] not in OBJECT_STORES


def delta_options(path: str) -> dict[str, str]:
    """What delta-rs, which opens tables itself, has to be told of the store of `path`: never stored, never logged."""
    if not is_s3(path):
        return {}
    from ncf_dist import s3

    return s3.delta_options(filesystem(path)[0])


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name. Raises OSError where a store does not say."""
    fs, inner = filesystem(path)
    if is_local(path):
        return bool(fs.exists(inner))
    try:
        return bool(fs.info(inner))
    except (FileNotFoundError, NotADirectoryError):
        return False


def make_dirs(path: str) -> None:
    """In an object store a folder is there once it holds something."""
    if has_folders(path):
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
    if is_local(path) and not fs.exists(inner):
        return []
    try:
        found = fs.ls(inner, detail=False)
    except FileNotFoundError:
        return []
    # Some stores keep an object for the folder itself.
    return sorted(posixpath.basename(p) for p in (str(p).rstrip("/") for p in found) if is_local(path) or p != inner)


class Size(NamedTuple):
    """Of a stored file; modified: seconds since 1970, None where its store does not say."""

    bytes: int
    modified: float | None


def sizes(path: str) -> dict[str, Size]:
    """Every file below a folder, by its path from there on; of a file itself, by "."."""
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        found = fs.find(inner, detail=True)
        return {
            posixpath.relpath(name, inner): Size(int(info["size"] or 0), _modified(info))
            for name, info in found.items()
            if not str(name).endswith("/")  # An object that some stores keep for a folder.
        }
    return {}


def _modified(info: Mapping[str, Any]) -> float | None:
    for name in ("mtime", "LastModified", "last_modified", "created"):
        if (found := info.get(name)) is not None:
            return float(found.timestamp() if isinstance(found, dt.datetime) else found)
    return None


def read_bytes(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file, or its bytes from `start` to before `end`."""
    fs, inner = filesystem(path)
    if is_local(path):
        return bytes(fs.cat_file(inner, start=start, end=end))
    # A body may break off after its store has answered, and then nobody below has tried again.
    if is_s3(path) and start is None and end is None:
        return retried(lambda: bytes(fs.get_whole(inner)))
    return retried(lambda: bytes(fs.cat_file(inner, start=start, end=end)))


@contextlib.contextmanager
def open_read(path: str) -> Iterator[BinaryIO]:
    """A file that is open for reading, with `seek`; one in S3 is read by ranges, and no byte that nobody asks for but
    for what fills the last range."""
    fs, inner = filesystem(path)
    if not is_s3(path):
        with fs.open(inner, "rb") as file:
            yield file
        return
    with io.BufferedReader(_Ranges(path, fs.info(inner)), RANGE_BYTES) as file:
        yield cast(BinaryIO, file)


class _Ranges(io.RawIOBase):
    """A file in S3 whose reads are requests of their own, all of the object that it was when it was opened."""

    def __init__(self, path: str, info: Mapping[str, Any]) -> None:
        self._path, self._size, self._tag, self._place = path, int(info["size"]), str(info["ETag"]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        fs, inner = filesystem(self._path)
        data = retried(lambda: fs.get_range(inner, self._place, end, self._tag))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def read_json(kind: type[T], path: str, /, *, more_keys: bool = False, **given: Any) -> T:
    """`stored.parse_json` of a file of ours. Raises OSError where it cannot be read, ValueError for what it holds."""
    fs, inner = filesystem(path)
    if (size := int(fs.size(inner) or 0)) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes, needed at most {MAX_JSON_BYTES:,}")
    return parse_json(kind, read_bytes(path), more_keys=more_keys, **given)


def write_bytes(path: str, data: bytes) -> None:
    fs, inner = filesystem(path)
    if not is_local(path):
        fs.pipe_file(inner, data)  # Whole, in parts that travel side by side; through an open file half may arrive.
        return
    with fs.open(inner, "wb") as out:
        out.write(data)


def write_atomic(path: str, data: bytes) -> None:
    """Readers see the old file or the new one. Object stores give that for a plain write; a folder needs a rename."""
    if not is_local(path):
        write_bytes(path, data)
        return
    replace_file(path, data)


def write_verified(path: str, data: bytes) -> None:
    """`write_atomic`, and read back from a store that is not this machine's. Raises OSError where it keeps something
    else than what it was given."""
    write_atomic(path, data)
    if is_local(path):
        return
    wanted, found = (hashlib.sha256(each).hexdigest() for each in (data, read_bytes(path)))
    if found != wanted:
        raise OSError(f"{path} was written with SHA-256 {wanted[:12]}…, its store returns {found[:12]}…")


# ---- one winner ------------------------------------------------------------------------------------------------------


class Tagged(NamedTuple):
    """A stored file, the tag that changes with its content, and how long ago it was written, by its store's clock."""

    data: bytes
    tag: str
    age_s: float


def takes_conditions(path: str) -> bool:
    """Whether `create` and `replace` can have one winner here. (`doctor` tries whether the store keeps its word.)"""
    return is_local(path) or is_s3(path) or path.startswith("memory://")


def is_conditional(path: str) -> bool:
    """Whether `create` and `replace` are the only way to have one winner: no lock here keeps others away."""
    return not is_local(path) and takes_conditions(path)


def create(path: str, data: bytes) -> str | None:
    """Make a file that is not there yet; its tag, or None where somebody was faster. Of writers at once one wins; those
    that write the same bytes may all be told that they have."""
    if not is_s3(path):
        return _create_elsewhere(path, data)
    fs, inner = filesystem(path)
    return fs.put_if(inner, data, IfNoneMatch="*") or _mine_after_all(path, data)


def replace(path: str, data: bytes, tag: str) -> str | None:
    """Write a file that still has this tag; its new one, or None where somebody has changed or removed it. Of writers
    at once one wins."""
    if is_s3(path):
        fs, inner = filesystem(path)
        return fs.put_if(inner, data, IfMatch=tag) or _mine_after_all(path, data)
    if is_local(path):
        return _tag(data) if replace_file_if(path, data, lambda old: _tag(old) == tag) else None
    if not exists(path) or _tag(read_bytes(path)) != tag:
        return None
    write_bytes(path, data)
    return _tag(data)


def read_tagged(path: str) -> Tagged:
    """Raises FileNotFoundError where there is no such file."""
    fs, inner = filesystem(path)
    if is_s3(path):
        return Tagged(*retried(lambda: fs.get_tagged(inner)))
    data = read_bytes(path)
    written = _modified(fs.info(inner))
    age = dt.datetime.now(dt.timezone.utc).timestamp() - written if written is not None else 0.0
    return Tagged(data, _tag(data), max(0.0, age))


def _mine_after_all(path: str, data: bytes) -> str | None:
    """A put whose answer was lost is tried again, and finds its own work there."""
    try:
        found = read_tagged(path)
    except FileNotFoundError:
        return None
    return found.tag if found.data == data else None


def _create_elsewhere(path: str, data: bytes) -> str | None:
    if is_local(path):
        return _tag(data) if create_file(path, data) else None
    fs, inner = filesystem(path)
    try:
        fs.pipe_file(inner, data, mode="create")
    except FileExistsError:
        return None
    return _tag(data)


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keeps_conditions(probe: str) -> bool:
    """Whether the store of `probe`, a path that nobody else uses, lets one writer win. Leaves nothing behind."""
    try:
        first, second = create(probe, b"1"), create(probe, b"2")
        swapped = replace(probe, b"3", first or "")
        return first is not None and second is None and swapped is not None and replace(probe, b"4", first) is None
    finally:
        remove(probe)


def sync(path: str) -> None:
    """Make a local file, or a local folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(files: list[str]) -> str:
    """Changes when a file is added, removed or rewritten: hash of names, sizes and entity tags or what else its file
    system knows a state of a file by."""
    facts = []
    for path in files:
        fs, inner = filesystem(path)
        info = fs.info(inner)
        facts.append([path, info.get("size"), _state(fs, inner, info)])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


_STATES = ("ETag", "mtime", "LastModified", "etag", "generation", "last_modified", "modificationTime", "updated")
"""Keys of fsspec's implementations; the first three first, as they are in run keys that are stored."""


def _state(fs: fsspec.AbstractFileSystem, inner: str, info: Mapping[str, Any]) -> str:
    for name in _STATES:
        if info.get(name):
            return str(info[name])
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    # Of HTTP it is the URL's, and no state.
    return "None" if protocol.startswith("http") else str(fs.ukey(inner))
