"""GroupLens' archives: what is in each, and how a zip or a folder from anywhere is read without trusting it.

A zip is refused, before anything is written, where a member has a path out of the archive, is a link or a device, is
encrypted or comes twice, or where all members together unpack to more than MAX_BYTES, or to more than MAX_RATIO times
the zip. Of an accepted zip only the known files are read, through zipfile, which stops at a member's declared size and
checks its CRC.

Sources: files.grouplens.org/datasets/movielens (the `.md5` beside each zip); F. M. Harper and J. A.
Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. The licence in each README allows research and forbids
redistribution.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from ncf_dist.errors import InputError

MAX_BYTES = 4 << 30
MAX_RATIO = 200
REQUIRED = ("ratings", "movies")

Files = Mapping[str, Callable[[], IO[bytes]]]


@dataclass(frozen=True)
class Archive:
    """One dataset: published checksum, `input.format` for it, its tables' files, other files to keep."""

    name: str
    md5: str
    format: str
    tables: Mapping[str, str]
    extras: tuple[str, ...] = ("README", "README.txt")

    @property
    def known(self) -> set[str]:
        return {*self.tables.values(), *self.extras}

    @property
    def required(self) -> list[str]:
        return [self.tables[table] for table in REQUIRED]


ARCHIVES = {
    archive.name: archive
    for archive in (
        Archive(
            "ml-100k",
            "0e33842e24a9c977be4e0107933c0723",
            "movielens-tsv",
            {"ratings": "u.data", "movies": "u.item", "users": "u.user"},
            ("README", "u.genre"),
        ),
        Archive(
            "ml-1m",
            "c4d9eecfca2ab87c1945afe126590906",
            "movielens-dat",
            {"ratings": "ratings.dat", "movies": "movies.dat", "users": "users.dat"},
        ),
        Archive(
            "ml-10m",
            "ce571fd55effeba0271552578f2648bd",
            "movielens-dat",
            {"ratings": "ratings.dat", "movies": "movies.dat"},
            ("README.html",),
        ),
        *(
            Archive(name, md5, "movielens-csv", {"ratings": "ratings.csv", "movies": "movies.csv"})
            for name, md5 in (
                ("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3"),
                ("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada"),
                ("ml-32m", "d472be332d4daa821edc399621853b57"),
            )
        ),
    )
}


@contextlib.contextmanager
def opened(path: str, archive: Archive) -> Iterator[Files]:
    """The known files of a zip or a folder, each with a function that opens it.

    Raises InputError, also for a damaged file that is read inside the `with`.
    """
    if os.path.isdir(path):
        yield {os.path.basename(file): _opener(file) for file in folder_files(path, archive)}
        return
    try:
        with zipfile.ZipFile(path) as zipped:
            members = zip_members(zipped, os.path.getsize(path), archive)
            yield {name: _member_opener(zipped, member) for name, member in members.items()}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise _refused(path, f"is damaged or not a zip ({error})") from None


def folder_files(path: str, archive: Archive) -> list[str]:
    """Full paths of the known files in a folder, or in the one below that has them. Raises InputError."""
    folders = [path, *sorted(entry.path for entry in os.scandir(path) if entry.is_dir())]
    held = {
        folder: [name for name in sorted(archive.known) if os.path.isfile(os.path.join(folder, name))]
        for folder in folders
    }
    whole = [folder for folder in folders if set(archive.required) <= set(held[folder])]
    if not whole:
        raise _missing(path, archive, sorted(os.listdir(path)))
    if whole[0] != path and len(whole) > 1:
        raise InputError(
            f"fetch.from {path} has {archive.name} in {' and in '.join(whole)}; "
            "needed one: set fetch.from to the one you mean"
        )
    return [os.path.join(whole[0], name) for name in held[whole[0]]]


def zip_members(zipped: zipfile.ZipFile, zip_bytes: int, archive: Archive) -> dict[str, zipfile.ZipInfo]:
    """The known files of a zip, at its root or one folder below. Raises InputError for any bad member."""
    path, chosen, seen = str(zipped.filename), dict[str, zipfile.ZipInfo](), set[str]()
    for member in zipped.infolist():
        name = member.orig_filename
        if why := _hostile(member) or ("comes twice" if name.casefold() in seen else None):
            raise _refused(path, f"holds a member {name[:200]!r} that {why}")
        seen.add(name.casefold())
        parts = name.split("/")
        if len(parts) <= 2 and parts[-1] in archive.known:
            if parts[-1] in chosen:
                raise _refused(path, f"holds {parts[-1]} in two folders, {chosen[parts[-1]].filename} and {name}")
            chosen[parts[-1]] = member
    total = sum(member.file_size for member in zipped.infolist())
    if total > MAX_BYTES:
        raise _refused(path, f"unpacks to {total:,} bytes, more than the {MAX_BYTES:,} allowed")
    if total > MAX_RATIO * zip_bytes:
        raise _refused(path, f"unpacks to {total:,} bytes from {zip_bytes:,}, more than the {MAX_RATIO} to 1 allowed")
    if not set(archive.required) <= set(chosen):
        raise _missing(path, archive, [member.filename for member in zipped.infolist()])
    return chosen


def _hostile(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked, or None."""
    name = member.orig_filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in re.split(r"[/\\]", name) or "\\" in name or "\0" in name:
        return "has a path that may lead out of the archive"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    return None


def _refused(path: str, what: str) -> InputError:
    return InputError(
        f"archive {path} is refused: it {what}; needed a zip as GroupLens publishes it: download it anew, "
        "or set fetch.from to an unpacked folder that you trust. Nothing was delivered"
    )


def _missing(path: str, archive: Archive, names: list[str]) -> InputError:
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return InputError(
        f"fetch.from {path} holds {listed or 'nothing'}; needed {' and '.join(archive.required)} of {archive.name} "
        "in it or one folder below: set fetch.from to the zip or the unpacked folder, fetch.dataset to what it is"
    )


def _opener(path: str) -> Callable[[], IO[bytes]]:
    return lambda: open(path, "rb")


def _member_opener(zipped: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: zipped.open(member)
