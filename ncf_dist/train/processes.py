"""Processes that leave nothing behind: a child dies with its parent, and a tree of them can be ended as a whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

import psutil

PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # It died before we asked.
        os.kill(os.getpid(), number)


_EXEC = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, int(sys.argv[1])); "
    "os.getppid() == int(sys.argv[2]) or sys.exit(1); os.execv(sys.argv[3], sys.argv[3:])"
)


def dying_with_us(command: list[str], number: int) -> list[str]:
    """`command` (a path and its arguments), changed so that the kernel sends it a signal when the thread that starts it
    ends.

    Not by preexec_fn: the Python code that then runs between fork and exec also cleans up after the parent's threads,
    which the child does not have, and so closes py4j's connections to Spark.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _EXEC, str(int(number)), str(os.getpid()), *command]


def end_tree(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a process and all that it started: SIGTERM, and after `grace_s` seconds SIGKILL."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        process.kill()
        process.wait()
    for child in tree:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(tree, timeout=10)
