"""Local copies of the train table's files, where the lake is an object store: fetched ahead of use, checked against the
manifest's SHA-256, in bounded space. Readers get paths of this machine: Petastorm reads `file://` alone here.

A rank keeps what it has fetched for later epochs, as far as there is room, and drops what it has not used for longest.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ncf_dist.errors import ContractError
from ncf_dist.files import is_local, read_bytes
from ncf_dist.parquet import FileInfo
from ncf_dist.scratch import scratch_folder

AT_ONCE = 4
"""Files that are on their way at one time."""
SCRATCH = "copies"


class Copies:
    """Of one rank. room: bytes; one group of files may take more while it is read."""

    def __init__(self, work: str, room: int) -> None:
        self.room = room
        self._stack = contextlib.ExitStack()
        self._folder = self._stack.enter_context(scratch_folder(work, SCRATCH))
        # A rank ends without Python's clean-up, and then the next one sweeps what it has left.
        atexit.register(self._stack.close)
        self._there: OrderedDict[str, int] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def groups(self, files: Sequence[tuple[str, FileInfo]], size: int) -> Generator[list[str], None, None]:
        """Local paths of these files, in order, `size` at a time; while the caller reads a group the next is fetched.
        Raises ContractError for one that is not what the manifest says."""
        parts = [files[start : start + size] for start in range(0, len(files), size)]
        with ThreadPoolExecutor(1, "fetch-ahead") as ahead:
            coming = [ahead.submit(self._fetched, parts[0], [])] if parts else []
            for number, part in enumerate(parts):
                paths = coming.pop().result()
                if number + 1 < len(parts):
                    coming.append(ahead.submit(self._fetched, parts[number + 1], part))
                yield paths

    def keep(self, path: str, info: FileInfo) -> None:
        """Fetch a file as far as there is room for it without dropping another, and check it all the same."""
        if self._used + info.bytes <= self.room:
            self._fetched([(path, info)], [])
        else:
            checked(path, info)

    def _fetched(self, files: Sequence[tuple[str, FileInfo]], in_use: Sequence[tuple[str, FileInfo]]) -> list[str]:
        """in_use: files that are not to be dropped for these."""
        with self._lock:
            needed = {path: info.bytes for path, info in files}
            missing = [(path, info) for path, info in dict(files).items() if path not in self._there]
            for path in needed.keys() & self._there.keys():
                self._there.move_to_end(path)
            self._make_room(sum(info.bytes for _, info in missing), needed.keys() | {path for path, _ in in_use})
        with ThreadPoolExecutor(AT_ONCE, "fetch") as threads:
            list(threads.map(lambda each: self._fetch(*each), missing))
        return [self._place(path) for path, _ in files]

    def _fetch(self, path: str, info: FileInfo) -> None:
        place = self._place(path)
        data = checked(path, info)
        with open(f"{place}.part", "wb") as out:
            out.write(data)
        os.replace(f"{place}.part", place)
        with self._lock:
            self._there[path] = len(data)
            self._used += len(data)

    def _make_room(self, size: int, kept: set[str]) -> None:
        for path in [path for path in self._there if path not in kept]:
            if self._used + size <= self.room:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._place(path))
            self._used -= self._there.pop(path)

    def _place(self, path: str) -> str:
        # Not the name alone: a table may have files of one name in several folders.
        return os.path.join(
            self._folder, f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{posixpath.basename(path)}"
        )


def checked(path: str, info: FileInfo) -> bytes:
    """The bytes of a file. Raises ContractError where they are not the manifest's."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise ContractError(f"{path} cannot be read ({error}); the manifest names it: rerun the job prepare") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != info.sha256:
        raise ContractError(
            f"{path} has SHA-256 {digest[:12]}…, the manifest says {info.sha256[:12]}…: "
            "the file changed, rerun the job prepare"
        )
    return data


def copies_for(path: str, work: str, room: int) -> Copies | None:
    """None where `path` is on this machine's own file system, and needs no copy."""
    return None if is_local(path) else Copies(work, room)
