"""Cores and memory against made-up trees of /proc and /sys: control groups of both versions, mixed, nested, absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist import machine

MEGABYTE = 2**20
NO_LIMIT = "9223372036854771712"
V1_CPU = "32 31 0:29 {top} /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "41 31 0:38 {top} /sys/fs/cgroup{place} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


def tree(root: Path, mounts: list[str], groups: list[str], files: dict[str, str]) -> Path:
    """A machine of 64 MiB, half of it available. `files`: path below /sys/fs/cgroup → its text."""
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:          65536 kB\nMemFree: 1 kB\nMemAvailable:      32768 kB\n")
    (proc / "self/mountinfo").write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n" + "\n".join(mounts) + "\n")
    (proc / "self/cgroup").write_text("\n".join(groups) + "\n")
    for path, text in files.items():
        place = root / "sys/fs/cgroup" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")
    return root


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def what(root: Path) -> tuple[int, int, int | None]:
    """(cores, MiB that can be had, MiB available)"""
    free = machine.memory_available(root)
    return machine.cores(root), machine.memory(root) // MEGABYTE, None if free is None else free // MEGABYTE


def v1_memory(limit: object, used: int = 0, cache: int = 0, group: str = "memory/") -> dict[str, str]:
    """MiB, a string as it is."""
    return {
        f"{group}memory.limit_in_bytes": limit if isinstance(limit, str) else str(int(str(limit)) * MEGABYTE),
        f"{group}memory.usage_in_bytes": str(used * MEGABYTE),
        f"{group}memory.stat": f"inactive_file 1\ntotal_cache 7\ntotal_inactive_file {cache * MEGABYTE}",
    }


def v1_cores(quota: int, period: int = 100_000, group: str = "cpu/") -> dict[str, str]:
    return {f"{group}cpu.cfs_quota_us": str(quota), f"{group}cpu.cfs_period_us": str(period)}


def v2_memory(limit: object, used: int = 0, cache: int = 0, group: str = "") -> dict[str, str]:
    return {
        f"{group}memory.max": limit if isinstance(limit, str) else str(int(str(limit)) * MEGABYTE),
        f"{group}memory.current": str(used * MEGABYTE),
        f"{group}memory.stat": f"anon 5\ninactive_file {cache * MEGABYTE}",
    }


MACHINES: dict[str, tuple[list[str], list[str], dict[str, str], tuple[int, int, int]]] = {
    # mounts, lines of /proc/self/cgroup, files, (cores of 8, MiB of 64, MiB available of 32)
    "no groups": ([], [], {}, (8, 64, 32)),
    "v1 without limits": (
        [V1_CPU.format(top="/"), V1_MEMORY.format(top="/")],
        ["4:memory:/", "1:cpu,cpuacct:/"],
        v1_memory(NO_LIMIT, 10) | v1_cores(-1),
        (8, 64, 32),
    ),
    "v1 with its own group as the root that it sees": (
        [V1_CPU.format(top="/docker/ab"), V1_MEMORY.format(top="/docker/ab")],
        ["4:memory:/docker/ab", "1:cpu,cpuacct:/docker/ab"],
        v1_memory(20, 12, 4) | v1_cores(150_000),
        (2, 20, 20 - 12 + 4),
    ),
    "v1 in a group below": (
        [V1_CPU.format(top="/"), V1_MEMORY.format(top="/")],
        ["4:memory:/jobs/a b/c", "1:cpu,cpuacct:/jobs"],
        v1_memory(NO_LIMIT)
        | v1_memory(40, 39, 0, "memory/jobs/")
        | v1_memory(16, 1, 0, "memory/jobs/a b/")
        | v1_memory(30, 1, 0, "memory/jobs/a b/c/")
        | v1_memory(1, 1, 0, "memory/other/")
        | v1_cores(-1)
        | v1_cores(50_000, group="cpu/jobs/"),
        (1, 16, 1),
    ),
    "v2 without limits": (
        [V2.format(top="/", place="")],
        ["0::/user.slice"],
        v2_memory("max", 3, 0, "user.slice/") | {"user.slice/cpu.max": "max 100000"},
        (8, 64, 32),
    ),
    "v2 as its own root": (
        [V2.format(top="/", place="")],
        ["0::/"],
        v2_memory(20, 12, 4) | {"cpu.max": "350000 100000"},
        (4, 20, 20 - 12 + 4),
    ),
    "v2 with a limit above its own": (
        [V2.format(top="/", place="")],
        ["0::/pod/box"],
        v2_memory(10, 2, 0, "pod/")
        | v2_memory("max", 1, 0, "pod/box/")
        | {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "600000 100000"},
        (3, 10, 10 - 2),
    ),
    "v2 seen from another root": (
        [V2.format(top="/", place="")],
        ["0::/../../elsewhere"],
        v2_memory(11, 1) | {"cpu.max": "100000 100000"},
        (1, 11, 11 - 1),
    ),
    "hybrid: processors by v1, memory by v2": (
        [V1_CPU.format(top="/"), V2.format(top="/", place="/unified")],
        ["1:cpu,cpuacct:/a", "0::/a"],
        v1_cores(200_000, group="cpu/a/") | v2_memory(9, 1, 0, "unified/a/"),
        (2, 9, 9 - 1),
    ),
    "more used than allowed": (
        [V1_MEMORY.format(top="/")],
        ["4:memory:/"],
        v1_memory(5, 7),
        (8, 5, 0),
    ),
    "a mount with a blank in its name": (
        [V2.format(top="/", place="/a\\040b")],
        ["0::/"],
        v2_memory(8, 0, 0, "a b/"),
        (8, 8, 8),
    ),
    "files that cannot be understood": (
        [V1_CPU.format(top="/"), V1_MEMORY.format(top="/"), V2.format(top="/", place="/unified")],
        ["4:memory:/", "0::/"],
        {"cpu/cpu.cfs_quota_us": "1", "memory/memory.limit_in_bytes": "", "unified/cpu.max": "100 0"},
        (8, 64, 32),
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_process_may_use(name: str, tmp_path: Path, eight: None) -> None:
    mounts, groups, files, wanted = MACHINES[name]
    assert what(tree(tmp_path, mounts, groups, files)) == wanted


limits = st.none() | st.integers(1, 100)


@given(
    levels=st.lists(st.tuples(limits, limits), min_size=1, max_size=4), version=st.sampled_from([1, 2]), below=st.data()
)
def test_the_lowest_limit_of_all_levels_holds(
    levels: list[tuple[int | None, int | None]],
    version: int,
    below: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Levels of (MiB, tenths of a core), the highest first, and what the process sees of them begins anywhere."""
    seen = below.draw(st.integers(0, len(levels) - 1))
    top = "/" + "/".join("abc"[:seen])
    files: dict[str, str] = {}
    for depth, (mebibytes, tenths) in enumerate(levels[seen:]):
        group = "".join(f"{name}/" for name in "abc"[seen : seen + depth])
        if version == 1:
            files |= v1_memory(mebibytes or NO_LIMIT, group=f"memory/{group}")
            files |= v1_cores(tenths * 10_000 if tenths else -1, group=f"cpu/{group}")
        else:
            files |= v2_memory(mebibytes or "max", group=group)
            files |= {f"{group}cpu.max": f"{tenths * 10_000 if tenths else 'max'} 100000"}
    own = "/" + "/".join("abc"[: len(levels) - 1])
    mounts = [V1_CPU, V1_MEMORY] if version == 1 else [V2]
    groups = [f"4:memory:{own}", f"1:cpu,cpuacct:{own}"] if version == 1 else [f"0::{own}"]
    root = tree(tmp_path_factory.mktemp("root"), [m.format(top=top, place="") for m in mounts], groups, files)
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert machine.memory(root) == min([64, *(m for m, _ in levels[seen:] if m)]) * MEGABYTE
    assert machine.memory_available(root) == min([32, *(m for m, _ in levels[seen:] if m)]) * MEGABYTE
    assert machine.cores(root) == max(1, min([mine, *(-(-t // 10) for _, t in levels[seen:] if t)]))


def test_what_this_process_may_use_is_no_more_than_there_is() -> None:
    free = machine.memory_available()
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert free is None or 0 <= free <= machine.memory()
    assert machine.memory() > 2**28
    assert machine.processor()


def test_what_cannot_be_told(tmp_path: Path) -> None:
    """No /proc, as on macOS: what psutil says of the whole machine, and nothing of what is free."""
    assert machine.memory_available(tmp_path) is None
    assert machine.memory(tmp_path) > 2**28
    assert machine.processor(tmp_path) == os.uname().machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", os.uname().machine),
    ],
)
def test_the_processor_has_a_name(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert machine.processor(tmp_path) == name


def test_nobody_else_asks_the_machine() -> None:
    """One place, so that a container's limits hold everywhere."""
    here = Path(__file__).parent.parent
    asked = ("cpu_count", "virtual_memory", "sched_getaffinity", "/proc/meminfo", "/sys/fs/cgroup", "cpu_affinity")
    users = {
        str(path.relative_to(here))
        for folder in ("ncf_dist", "jobs", "benchmarks")
        for path in (here / folder).rglob("*.py")
        if any(word in path.read_text() for word in asked)
    }
    assert users == {"ncf_dist/machine.py"}
