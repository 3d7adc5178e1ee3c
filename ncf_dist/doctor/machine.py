"""What this machine has: facts only, no judgement. Reads files and asks programs; imports nothing heavy.

Memory and cores are those that this process may use: the smaller of the machine's and its cgroup's. None
means: could not be told.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
TIMEOUT_S = 30


def java() -> tuple[str, str] | None:
    """(version, path) of the Java that the driver would use: JAVA_HOME's, else the one on PATH."""
    home = os.environ.get("JAVA_HOME")
    path = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if path is None:
        return None
    version = re.search(r'version "([^"]+)"', _said(path, "-version"))
    return (version.group(1), path) if version else None


def java_major(version: str) -> int:
    """17 for 17.0.15, 8 for 1.8.0_392."""
    parts = [int(part) for part in re.findall(r"\d+", version)]
    return parts[1] if parts[0] == 1 and len(parts) > 1 else parts[0]


def gpus() -> int:
    """CUDA devices that the driver tool lists."""
    tool = shutil.which("nvidia-smi")
    return len(re.findall(r"^GPU \d+:", _said(tool, "-L"), re.MULTILINE)) if tool else 0


def cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_words(CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        return max(1, min(allowed, -(-int(quota[0]) // int(quota[1]))))
    return allowed


def memory_available() -> int | None:
    """Bytes that could be taken now without swapping."""
    found = [free for free in (_machine_memory(), _cgroup_memory()) if free is not None]
    return min(found) if found else None


def disk_free(path: str) -> int:
    """Free bytes where `path` is or would be made."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _machine_memory() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _cgroup_memory() -> int | None:
    """Version 2: the limit less what is used, where the page cache that can be dropped does not count as
    used.
    """
    limit, used = _first_words(CGROUP / "memory.max"), _first_words(CGROUP / "memory.current")
    if not limit or not used or limit[0] == "max":
        return None
    cache = re.search(r"^inactive_file (\d+)", _text(CGROUP / "memory.stat"), re.MULTILINE)
    return int(limit[0]) - int(used[0]) + (int(cache.group(1)) if cache else 0)


def _first_words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _said(*command: str) -> str:
    """All that a program printed; nothing where it cannot be run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout + ran.stderr
