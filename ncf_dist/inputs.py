"""Which files a path of the config stands for: a file, a folder, a glob; local or behind a URL.

Nothing is left out without a word. Links are followed, each real file is taken once, and a folder that is linked into
itself is entered once. Names that begin with `.` or `_` are hidden, as Spark and Hadoop have it (`_SUCCESS`,
`_temporary`, `_delta_log`): their names are kept, so that a caller can tell what they were.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from ncf_dist.errors import InputError
from ncf_dist.files import filesystem, is_local, read_bytes, resolve
from ncf_dist.urls import public_url

WILDCARDS = re.compile(r"[*?\[]")
_HIDDEN = re.compile(r"(^|/)(\.|_(?![^/]*=))")
"""`_day=2024-05-31` is a partition, as Spark has it."""
_LINE_END = re.compile(r"\r\n|\n|\r")
log = logging.getLogger(__name__)


class NoInput(InputError):
    """There is no such file: it may be one that is still to come."""


@dataclass(frozen=True)
class Listing:
    """What a path stands for. files: sorted, each once; hidden: files and folders that a folder hides by their name;
    other_case: files that a glob would match but for capital letters in its last part."""

    path: str
    kind: Literal["file", "folder", "glob"]
    files: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    other_case: tuple[str, ...] = ()


def input_files(path: str) -> list[str]:
    """The files behind a file, a folder or a glob, sorted, each once. Raises InputError where there is none."""
    return list(listing(path).files)


def listing(path: str) -> Listing:
    """The files behind `path` and what they hide. A name that exists is taken as it is (`log[1].csv`, and the folder of
    `log[1]/*.csv`), and any other as a pattern. Raises InputError where there is no file, or where one cannot be
    reached."""
    root = resolve(path)
    fs, inner = filesystem(root)
    found = _Found()
    kind: Literal["file", "folder", "glob"] = "file"
    if fs.isdir(inner):
        kind = "folder"
        _walk(fs, inner, is_local(root), found)
    elif fs.exists(inner):
        found.files.append(inner)
    elif WILDCARDS.search(inner):
        kind = "glob"
        above, pattern = _literal_start(fs, inner)
        matches = _matches(fs, pattern, is_local(root), found)
        for match in sorted(matches, key=lambda path: (is_local(root) and os.path.islink(path), path)):
            if fs.isdir(match):
                _walk(fs, match, is_local(root), found)
            elif is_local(root) and not os.path.exists(match):
                raise _broken(match)
            else:
                found.files.append(match)
        found.files = [p for p in found.files if not _HIDDEN.search(posixpath.relpath(p, above))]
        found.other_case = _other_case(fs, pattern, is_local(root), set(matches))
    elif is_local(root) and os.path.islink(inner):
        raise _broken(inner)
    files = each_once(found.files) if is_local(root) else sorted(set(found.files))
    if not files and not any("/_delta_log" in path for path in found.hidden):
        what = (
            "is an empty folder" if kind == "folder" else "matches no file" if not fs.exists(inner) else "holds nothing"
        )
        raise NoInput(
            f"input {root} {what}; needed a file, a folder or a glob with the interaction log: "
            "set input.path (or run the job fetch)"
        )
    if kind == "file" and not is_local(root):
        return Listing(root, kind, (root,))
    named = files if is_local(root) else [public_url(str(fs.unstrip_protocol(p))) for p in files]
    hidden, other_case = (
        sorted(paths if is_local(root) else [public_url(str(fs.unstrip_protocol(p))) for p in paths])
        for paths in (found.hidden, found.other_case)
    )
    return Listing(root, kind, tuple(sorted(named)), tuple(hidden), tuple(other_case))


@dataclass
class _Found:
    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    other_case: list[str] = field(default_factory=list)
    entered: set[str] = field(default_factory=set)
    """Real paths of local folders."""


def _walk(fs: Any, top: str, local: bool, found: _Found) -> None:
    """Add every file below the folder `top`."""
    if local:
        _walk_local(top, found)
        return
    for path in fs.find(top):
        hidden = _HIDDEN.search(posixpath.relpath(path, top))
        (found.hidden if hidden else found.files).append(path)


def _walk_local(top: str, found: _Found) -> None:
    """Folders themselves before links to folders, so that a file is named by its own path where it has one here."""
    folders, linked = [top], list[str]()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop()
        real = os.path.realpath(folder)
        if real in found.entered:
            log.info("%s is a second way to %s: its files are read once", folder, real)
            continue
        found.entered.add(real)
        for entry in _entries(folder):
            if _HIDDEN.match(entry.name):
                found.hidden.append(entry.path)
            elif entry.is_dir():
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise _broken(entry.path)
            else:
                found.files.append(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"input folder {folder} cannot be listed ({error.strerror}); needed a folder this user may read: fix its "
            "permissions, or leave it out of input.path"
        ) from None


def _broken(path: str) -> InputError:
    return InputError(
        f"input {path} is a link to {os.readlink(path)}, which is not there; needed the file or folder it stands for: "
        "mount or restore it, or remove the link"
    )


def _literal_start(fs: Any, pattern: str) -> tuple[str, str]:
    """(the folder that a pattern begins with: as many of its parts as hold no wildcard or exist by that very name; the
    pattern in which these match nothing else)."""
    literal, parts = list[str](), pattern.split("/")
    while len(parts) > 1 and (not WILDCARDS.search(parts[0]) or fs.exists("/".join([*literal, parts[0]]))):
        literal.append(parts.pop(0))
    folder = "/".join(literal) or pattern[: pattern.startswith("/")]
    return folder, "/".join([glob.escape(part) for part in literal] + parts)


def _matches(fs: Any, pattern: str, local: bool, found: _Found) -> list[str]:
    return list(_local_glob(pattern, found) if local else fs.glob(pattern))


def _other_case(fs: Any, pattern: str, local: bool, matches: set[str]) -> list[str]:
    """Files that match only where the case of the pattern's last part does not matter: A.CSV for *.csv."""
    above, _, last = pattern.rpartition("/")
    either = "".join(f"[{sign.lower()}{sign.upper()}]" if sign.isascii() and sign.isalpha() else sign for sign in last)
    if "[" in last or "**" in pattern or either == last:
        return []
    near = set(_matches(fs, f"{above}/{either}", local, _Found())) - matches
    return sorted(path for path in near if fs.isfile(path))


def _local_glob(pattern: str, found: _Found) -> Iterable[str]:
    """What a local pattern matches, links followed; `**` is any number of folders, none included."""
    before, stars, after = pattern.partition("/**")
    if not stars or after[:1] not in ("", "/"):
        return glob.glob(pattern)
    parts = ["**", *[part for part in after.split("/") if part]]
    matched = []
    for base in sorted(glob.glob(before) if WILDCARDS.search(before) else [before or "/"]):
        below = _Found(entered=found.entered)
        if os.path.isdir(base):
            _walk_local(base, below)
        matched += [path for path in below.files if _below(os.path.relpath(path, base).split("/"), parts)]
    return matched


def _below(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the pattern matches the path, or a folder that it is in."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _below(path, pattern[1:]) or (bool(path) and _below(path[1:], pattern))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _below(path[1:], pattern[1:])


def each_once(files: Iterable[str]) -> list[str]:
    """Sorted; one path a real file: its own, else the shortest."""
    ways: dict[str, list[str]] = {}
    for path in dict.fromkeys(files):
        ways.setdefault(os.path.realpath(path) if is_local(path) else path, []).append(path)
    for real, paths in ways.items():
        if len(paths) > 1:
            log.info("%s are one file, %s: it is read once", ", ".join(paths[:5]), real)
    return sorted(min(paths, key=lambda path: (path != real, path.count("/"), path)) for real, paths in ways.items())


def listed_ids(given: str | Sequence[str | int]) -> tuple[str, ...]:
    """Distinct ids as text, ascending: those given, or the lines of a text file (UTF-8; what Unicode calls white space
    is left out at their ends, as `Forget.among` leaves it out of the log's ids, and so are blank lines). Raises
    InputError where the file cannot be read."""
    lines: Sequence[str | int] = ()
    if isinstance(given, str):
        path = resolve(given)
        try:
            # Not splitlines(): an id may hold a U+2028 or another character that this takes for a line's end.
            lines = _LINE_END.split(read_bytes(path).decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the list of ids {path} cannot be read ({error}); needed a text file with one id a line"
            ) from None
    else:
        lines = given
    return tuple(sorted({text for line in lines if (text := str(line).strip())}))


def ids_digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
