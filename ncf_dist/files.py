"""The one file layer: every path goes through fsspec, so a lake is a folder or any URL that fsspec opens.

The only module that imports fsspec. Drivers, tasks and ranks read and write through it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import posixpath
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import fsspec

from ncf_dist.errors import ConfigError
from ncf_dist.scratch import replace_file
from ncf_dist.stored import MAX_JSON_BYTES, parse_json
from ncf_dist.urls import hide, real_url, scrub

T = TypeVar("T")


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
    try:
        fs, inner = fsspec.core.url_to_fs(real_url(path))
    except (ImportError, ValueError) as error:  # A package that is not installed; a protocol that fsspec does not know.
        raise ConfigError(
            f"{scrub(path)} cannot be opened ({scrub(str(error))}): install fsspec's package for it, or correct it"
        ) from None
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
        }
    return {}


def _modified(info: Mapping[str, Any]) -> float | None:
    for name in ("mtime", "LastModified", "last_modified", "created"):
        if (found := info.get(name)) is not None:
            return float(found.timestamp() if isinstance(found, dt.datetime) else found)
    return None


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


def fingerprint(files: list[str]) -> str:
    """Changes when a file is added, removed or rewritten:
    hash of names, sizes and modification times (or entity tags)."""
    facts = []
    for path in files:
        fs, inner = filesystem(path)
        info = fs.info(inner)
        facts.append([path, info.get("size"), str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
