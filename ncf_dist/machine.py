"""What this process may use: cores, memory, the processor's name. The one place that asks.

Cores are those of the affinity mask, memory is the machine's; both at most what the control groups of this process
grant, of version 1 or 2 or of each for some, at every level that can be seen here. Imports nothing heavy. `root` is the
folder that /proc and /sys are read under.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores that this process can keep busy at once, at least 1; a part of a core counts as one."""
    return max(1, min([cores_of_mask(), *(-(-quota // period) for quota, period in _quotas(root))]))


def cores_of_mask() -> int:
    """Cores that this process may be put on; OpenMP's count, which knows no quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(root: Path = ROOT) -> int:
    """Bytes that all processes of this one's kind may have together: what the machine has, or the lowest limit."""
    physical = _kilobytes(root / "proc/meminfo", "MemTotal") or psutil.virtual_memory().total
    return min([physical, *(level.limit for level in _memory_levels(root))])


def memory_available(root: Path = ROOT) -> int | None:
    """Bytes that could be taken now without swapping; None where that cannot be told. Page cache that can be dropped
    does not count as used."""
    free = _kilobytes(root / "proc/meminfo", "MemAvailable")
    found = [level.limit - level.used + level.cache for level in _memory_levels(root)]
    if (free := _kilobytes(root / "proc/meminfo", "MemAvailable")) is not None:
        found.append(free)
    return max(0, min(found)) if found else None


def disk_free(path: str) -> int:
    """Free bytes where `path` is or would be made."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def processor(root: Path = ROOT) -> str:
    """The processor's name as a person would tell it apart from others: many clouds show no more than "AMD EPYC"."""
    name = _cpuinfo(root, "model name") or os.uname().machine
    numbers = [f"{key} {found}" for key in ("cpu family", "model") if (found := _cpuinfo(root, key))]
    return f"{name} ({', '.join(numbers).replace('cpu ', '')})" if numbers else name


# ---- control groups ------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """limit, used, cache (a part of used): bytes."""

    limit: int
    used: int
    cache: int


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(microseconds of processor time, in so many microseconds) of every level that limits them."""
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and int(words[1]):
            yield int(words[0]), int(words[1])


def _memory_levels(root: Path) -> Iterator[_Level]:
    for folder in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            words = _words(folder / limit) + _words(folder / used)
            if len(words) == 2 and words[0].isdigit():
                cached = re.search(rf"^{cache} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                yield _Level(int(words[0]), int(words[1]), int(cached.group(1)) if cached else 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups that may limit `controller`, from its own up to the highest in sight."""
    own = dict(_own_groups(root))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        name = controller if kind == "cgroup" and controller in options.split(",") else ""
        if kind != "cgroup2" and not name:
            continue
        top, mounted = (PurePosixPath(_unescaped(word)) for word in before.split()[3:5])
        path = PurePosixPath(own.get(name, "/"))
        # What is mounted in a container may be its own group, called by the name that the host gives it, or not.
        below = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()
        place = root / mounted.relative_to("/")
        yield from (place / part for part in (below, *below.parents))


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """(controller, path) of every line of /proc/self/cgroup; that of version 2 has no name."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield from ((controller, path or "/") for controller in controllers.split(","))


def _unescaped(word: str) -> str:
    """A path as mountinfo writes it: blanks and the like as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), word)


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _text(path), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _cpuinfo(root: Path, key: str) -> str:
    found = re.search(rf"^{key}\s*:[ \t]*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
