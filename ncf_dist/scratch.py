"""What is being written, and may be left behind: folders and files that belong to a live process, found and removed
when that process is gone.

An owner holds the kernel's lock (flock) on what it writes; the lock dies with it, whatever killed it, so the next run
sees exactly what nobody owns any more. Where the file system has no such locks nothing is taken for left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
_OURS = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""The end of our own temporary names. Others, such as delta-rs, write files `.tmp` without holding a lock."""


@contextlib.contextmanager
def scratch_folder(work: str, name: str) -> Iterator[str]:
    """A new folder `<name>-…` in `work` that only this user can read (0700), removed at the end. Those that owners who
    were killed left there are removed first."""
    os.makedirs(work, exist_ok=True)
    # The lock on `work` keeps another process from seeing the new folder before it is locked.
    with _open_locked(work, wait=True):
        for entry in os.listdir(work):
            path = os.path.join(work, entry)
            if entry.startswith(f"{name}-") and os.path.isdir(path) and not os.path.islink(path):
                _remove_unowned(path)
        path = tempfile.mkdtemp(prefix=f"{name}-", dir=work)
        held = os.open(path, os.O_RDONLY)
        lock(held)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def replace_file(path: str, data: bytes) -> None:
    """Write a local file so that readers see the old one or the new one, also after a power cut. An attempt that fails
    leaves nothing; what one that is killed leaves is found by `sweep_temporary`."""
    _put(path, data, os.replace)


def create_file(path: str, data: bytes) -> bool:
    """`replace_file` where there is no such file; whether there was none. Of writers at once one wins."""
    try:
        _put(path, data, _move_to_new)
    except FileExistsError:
        return False
    return True


def replace_file_if(path: str, data: bytes, unchanged: Callable[[bytes], bool]) -> bool:
    """`replace_file` where there is a file that is still as it was looked at; whether it was. Of writers at once, all
    by this function, one wins."""
    with _open_locked(os.path.dirname(path) or ".", wait=True):
        try:
            with open(path, "rb") as file:
                old = file.read()
        except FileNotFoundError:
            return False
        if unchanged(old):
            replace_file(path, data)
            return True
    return False


def _move_to_new(old: str, new: str) -> None:
    """`os.rename` that refuses where there is a file `new`."""
    os.link(old, new)
    os.unlink(old)


def _put(path: str, data: bytes, place: Callable[[str, str], None]) -> None:
    """place: how the temporary file, whole and durable, gets its name."""
    handle, temporary = _new_file(path)
    try:
        with open(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
            place(temporary, path)  # While it is locked: a sweep takes only what nobody holds.
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep_temporary(folder: str) -> None:
    """Remove the temporary files of `replace_file` in a local folder whose writers are dead."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.listdir(folder):
            if _OURS.fullmatch(entry[-37:]):
                _remove_unowned(os.path.join(folder, entry))


def lock(handle: int, wait: bool = False) -> bool | None:
    """Whether this process now holds `handle`; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _open_locked(path: str, wait: bool = False) -> Iterator[bool | None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield lock(handle, wait)
    finally:
        os.close(handle)


def _remove_unowned(path: str) -> None:
    """Remove a file or folder of this user unless a live process holds it."""
    try:
        if os.stat(path).st_uid != os.geteuid():
            return
        with _open_locked(path) as ours:
            if ours:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
                log.info("removed %s, which a run that was killed had left", path)
    except FileNotFoundError:
        pass  # Its owner, or another sweep, was faster.
    except OSError as error:
        log.warning("%s, left by a run that was killed, cannot be removed (%s); remove it by hand", path, error)


def _new_file(path: str) -> tuple[int, str]:
    """(handle, name) of a new temporary file beside `path`, held by this process."""
    while True:
        # Not mkstemp: it sets mode 0600, and these files follow the umask.
        temporary = f"{path}.{os.urandom(16).hex()}{TEMPORARY}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        lock(handle, wait=True)
        # A sweep that came between the two lines above has removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(temporary).st_ino == os.fstat(handle).st_ino:
                return handle, temporary
        os.close(handle)
