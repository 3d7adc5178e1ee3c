"""What is being written belongs to a live process; what killed ones left is found and removed, and nothing else is."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ncf_dist.scratch import TEMPORARY, replace_file, scratch_folder, sweep_temporary

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files -------------------------------------------------------------------------------------------------


def too_large(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The kernel lets files grow to 100 bytes: a write stops in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(name: str, error: BaseException) -> Callable[[pytest.MonkeyPatch], Callable[[], None]]:
    def fault(patch: pytest.MonkeyPatch) -> Callable[[], None]:
        def fail(*args: object) -> None:
            raise error

        patch.setattr(os, name, fail)
        return patch.undo

    return fault


FAULTS = {
    "no room": too_large,
    "fsync": failing("fsync", OSError(28, "No space left on device")),
    "replace": failing("replace", PermissionError(13, "Permission denied")),
    "stopped": failing("fsync", KeyboardInterrupt()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    replace_file(str(path), b"old")
    undo = FAULTS[fault](monkeypatch)
    try:
        with pytest.raises((OSError, KeyboardInterrupt)):
            replace_file(str(path), b"new" * 1000)
    finally:
        undo()
    assert names(tmp_path) == ["state.json"]
    assert path.read_bytes() == b"old"
    replace_file(str(path), b"new")
    assert path.read_bytes() == b"new"


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(str(tmp_path / "file"), b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


WRITER = """
import sys
from ncf_dist import scratch

def stop(handle):
    print("writing", flush=True)
    sys.stdin.readline()

scratch.os.fsync = stop
scratch.replace_file(sys.argv[1], b"half")
"""

OWNER = """
import sys
from ncf_dist.scratch import scratch_folder

with scratch_folder(sys.argv[1], "publish") as folder:
    open(folder + "/rows", "w").close()
    print(folder, flush=True)
    sys.stdin.readline()
"""


def started(code: str, path: Path) -> tuple[subprocess.Popen[str], str]:
    """(a process that holds what it writes until it is told to go on, the line it printed)"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    kept = ["_commit_0b1e.json.tmp", "a.tmp", "kept.parquet"]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    process, said = started(WRITER, tmp_path / "latest.json")
    assert said == "writing"
    (half,) = tmp_path.glob(f"latest.json.*{TEMPORARY}")
    sweep_temporary(str(tmp_path))
    assert half.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    sweep_temporary(str(tmp_path))
    assert names(tmp_path) == kept


def test_a_sweep_never_takes_a_file_from_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep may come between any two calls of a writer: 2,000 writes while another thread sweeps without pause (the
    kernel's locks are of an open file, so threads meet as processes do). A writer that waits for a disk is seldom seen
    anywhere else."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            sweep_temporary(str(tmp_path))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(2_000):
            replace_file(str(tmp_path / "file"), str(number).encode())
    finally:
        done.set()
        sweeper.join()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"1999"


# ---- folders -----------------------------------------------------------------------------------------------


def test_a_scratch_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    work = tmp_path / "work"
    before = os.umask(0)
    try:
        with pytest.raises(ZeroDivisionError), scratch_folder(str(work), "publish") as folder:  # noqa: PT012
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
            Path(folder, "deep").mkdir()
            raise ZeroDivisionError
    finally:
        os.umask(before)
    assert names(work) == []


def test_what_a_killed_owner_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["other-1", "publish-a-file", "publish-link", "published"]
    for name in ("other-1", "published"):
        (tmp_path / name).mkdir()
    (tmp_path / "publish-a-file").write_text("")
    (tmp_path / "publish-link").symlink_to(tmp_path / "published")
    (live, alive), (dead, left) = started(OWNER, tmp_path), started(OWNER, tmp_path)
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    assert Path(left, "rows").exists()
    with scratch_folder(str(tmp_path), "publish") as folder:
        assert names(tmp_path) == sorted([*kept, Path(alive).name, Path(folder).name])
        assert Path(alive, "rows").exists()
    live.communicate("\n")
    assert live.returncode == 0
    assert names(tmp_path) == kept
