"""The places that the config names: there, readable or writable, with room for what will be made."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence

from ncf_dist import machine
from ncf_dist.config import Config, Negatives, Paths
from ncf_dist.doctor.check import Check, size
from ncf_dist.errors import NcfError
from ncf_dist.files import filesystem, is_local, keeps_conditions, resolve, takes_conditions
from ncf_dist.inputs import NoInput, input_files
from ncf_dist.lake import Lake

GIB = 1024**3
ROW_BYTES = 20
"""A short line of a log; from its size follows an upper bound of its rows."""


def lake(paths: Paths) -> Check:
    root = resolve(paths.lake)
    try:
        Lake(root).check_writable()
        if not takes_conditions(root):
            return Check("lake", "warn", f"{root} is writable, and has no lock: schedule one run a night", "data")
        if not is_local(root) and not keeps_conditions(f"{root}/.probe-{uuid.uuid4().hex}"):
            return Check(
                "lake",
                "fail",
                f"{root} is in a store that ignores conditions: of two that create one file (If-None-Match), or "
                "replace it (If-Match), both were told that they had. Two runs would then publish over each other: "
                "needed a store that lets one win, such as AWS S3: set paths.lake, or update the store",
                "data",
            )
    except NcfError as error:
        return Check("lake", "fail", str(error), "data")
    except OSError as error:
        return Check("lake", "fail", f"{root} cannot be opened ({error}): fix paths.lake", "data")
    return Check("lake", "ok", f"{root} is writable")


def work(paths: Paths) -> Check:
    """Local scratch must be a folder of this machine."""
    root = resolve(paths.work)
    try:
        os.makedirs(root, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        return Check(
            "work",
            "fail",
            f"{root} cannot be written ({error.strerror or error}): fix its permissions or set paths.work",
            "data",
        )
    return Check("work", "ok", f"{root} is writable")


def disk(config: Config) -> Iterator[Check]:
    files = _files(config.input.path)
    wanted = {"lake": GIB + _table_bytes(files or [], config.negatives), "work": GIB}
    for name, needed in wanted.items():
        root = resolve(getattr(config.paths, name))
        if not is_local(root):
            continue
        free = machine.disk_free(root)
        if free < needed:
            detail = f"{size(free)} free at {root}: needed about {size(needed)}: free some or set paths.{name}"
            yield Check(f"disk of {name}", "fail", detail, "data")
        else:
            yield Check(f"disk of {name}", "ok", f"{size(free)} free")


def inputs(config: Config) -> Iterator[Check]:
    section, split = config.input, config.split
    items, users = section.items, section.users
    given: dict[str, tuple[str, str | tuple[str, ...] | None]] = {
        "input": ("input.path", section.path),
        "items": ("input.items", items.path if items else None),
        "users": ("input.users", users.path if users else None),
        "test": ("split.test", split.test),
        "candidates": ("split.candidates", split.candidates),
    }
    for name, (key, paths) in given.items():
        if paths is None:
            if name == "items":
                yield Check(name, "ok", "none in the config: items have no titles")
            continue
        try:
            files = _input_files(paths)
            for file in (files[0], files[-1]):
                fs, inner = filesystem(file)
                fs.cat_file(inner, start=0, end=1)
        except NoInput:
            yield Check(name, "warn", f"{_shown(paths)} is not there yet: run fetch, or set {key}")
        except NcfError as error:
            yield Check(name, "fail", str(error), "data")
        except OSError as error:
            yield Check(
                name,
                "fail",
                f"{_shown(paths)} cannot be read ({error}): fix its permissions or set {key}",
                "data",
            )
        else:
            yield Check(name, "ok", f"{len(files)} file{'s' * (len(files) > 1)}, {size(_total(files))}")


def _input_files(paths: str | Sequence[str]) -> list[str]:
    return [file for path in ([paths] if isinstance(paths, str) else paths) for file in input_files(path)]


def _shown(paths: str | Sequence[str]) -> str:
    return ", ".join(resolve(path) for path in ([paths] if isinstance(paths, str) else paths))


def _files(paths: str | Sequence[str]) -> list[str] | None:
    try:
        return _input_files(paths)
    except (NcfError, OSError):
        return None


def _total(files: list[str]) -> int:
    return sum(int(fs.info(inner).get("size") or 0) for fs, inner in map(filesystem, files))


def _table_bytes(files: list[str], negatives: Negatives) -> int:
    """Rough size of prepare's tables: four bytes a column of train, and about six columns in the other
    tables.
    """
    columns = 2 + negatives.per_positive * negatives.draws + 6
    return _total(files) // ROW_BYTES * columns * 4
