"""A cluster's executors beside the driver: one task looks at each, and what differs is named before a night starts."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ncf_dist import gateway, machine
from ncf_dist.attempts import code
from ncf_dist.config import Config
from ncf_dist.doctor import programs
from ncf_dist.doctor.check import Check, size
from ncf_dist.doctor.versions import WINDOW
from ncf_dist.errors import NcfError
from ncf_dist.files import exists, make_dirs, read_bytes, remove, write_bytes
from ncf_dist.lake import Lake

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

    from ncf_dist.spark_io import Pass

COME_S, QUIET_S = 60.0, 5.0
"""What executors have to come, and after how long without a new one they all have."""
STAY_S = 3.0
"""A task keeps its slot for so long that the others go to other slots."""
PROBE = ".probe-"


@dataclass(frozen=True)
class Place:
    """What one process finds. host, folder: these tell executors apart; memory: bytes; wrong: what it cannot do in the
    lake; wrote: a file that it put there."""

    host: str
    folder: str
    python: str
    packages: Mapping[str, str | None]
    code: str
    processor: str
    cores: int
    memory: int | None
    gpus: int
    wrong: str | None = None
    wrote: str | None = None


def here() -> Place:
    return Place(
        host=socket.gethostname(),
        folder=os.getcwd(),
        python=".".join(str(part) for part in sys.version_info[:3]),
        packages={name: _version(name) for name in WINDOW if name != "python"},
        code=code().sha256[:12],
        processor=machine.processor(),
        cores=machine.cores(),
        memory=machine.memory_available(),
        gpus=programs.gpus(),
    )


def _version(name: str) -> str | None:
    """As a module says, where it has no metadata: executors have pyspark from Spark itself."""
    if name == "pyspark":
        from pyspark.version import __version__

        return str(__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def looking(lake: str, probe: str) -> Pass:
    """A pass that looks at its executor, and at the driver's probe in the lake; it leaves one of its own there."""

    def look(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for _ in batches:
            found = asdict(here()) | lake_seen(lake, probe)
            time.sleep(STAY_S)
            yield pa.RecordBatch.from_pydict({"stats": [json.dumps(found)]})

    return look


def lake_seen(lake: str, probe: str) -> dict[str, str | None]:
    """`wrong` and `wrote` of a process that looks for the driver's probe in the lake and puts one of its own there."""
    theirs = posixpath.join(lake, PROBE + probe)
    ours = f"{theirs}-{uuid.uuid4().hex}"
    try:
        if read_bytes(theirs).decode() != probe:
            return {"wrong": "has something else than the driver there"}
        write_bytes(ours, probe.encode())
    except FileNotFoundError:
        return {"wrong": "does not see what the driver has just written there"}
    except Exception as error:  # Each store has errors of its own.
        return {"wrong": f"cannot read or write there ({type(error).__name__}: {' '.join(str(error).split())})"}
    return {"wrote": ours}


def executors(config: Config) -> Iterator[Check]:
    """A line for all executors together, and one for each way in which some differ from the driver."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    from ncf_dist.spark_io import spark_session

    lake, probe = Lake(config.paths.lake), uuid.uuid4().hex
    ours = lake.path(PROBE + probe)
    found: list[Place] = []
    try:
        make_dirs(lake.root)
        write_bytes(ours, probe.encode())
        with spark_session("ncf-doctor", config.spark) as spark:
            found = _asked(spark, lake.root, probe)
        yield from judged(here(), [_seen_again(place) for place in found], lake.root)
    except (NcfError, PySparkException, Py4JError) as error:
        detail = (
            f"did not answer ({_reason(str(error))}): needed a cluster that lets this application in (one with a "
            f"secret: export {gateway.SECRET}) and runs a task on each executor: see the log above"
        )
        yield Check("executors", "fail", detail)
    except OSError as error:
        yield Check("executors", "fail", f"are not asked: the lake {lake.root} cannot be written ({error})", "data")
    finally:
        for path in (ours, *(place.wrote for place in found)):
            with contextlib.suppress(OSError):
                remove(path or ours)


def _seen_again(place: Place) -> Place:
    """`place`, which is wrong where the driver does not find what it wrote."""
    if place.wrong is None and not exists(str(place.wrote)):
        return replace(place, wrong="writes what the driver does not see there")
    return place


def _asked(spark: SparkSession, lake: str, probe: str) -> list[Place]:
    """What each task finds; a task a slot, so that no executor is left out."""
    from ncf_dist.spark_io import on_executor, task_stats

    slots = _slots(spark)
    tasks = spark.range(0, slots, 1, slots)
    found = task_stats(tasks, on_executor("ncf_dist.doctor.executors:looking", lake, probe))
    return [Place(**stats) for stats in found]


def _slots(spark: SparkSession) -> int:
    """Slots of all executors, once no more of them come."""
    start = changed = time.monotonic()
    slots = spark.sparkContext.defaultParallelism
    while time.monotonic() - changed < QUIET_S and time.monotonic() - start < COME_S:
        time.sleep(0.5)
        if (now := spark.sparkContext.defaultParallelism) != slots:
            slots, changed = now, time.monotonic()
    return slots


def judged(driver: Place, found: Sequence[Place], lake: str) -> Iterator[Check]:
    """found: of every task, at least one an executor."""
    executors = {(place.host, place.folder): place for place in found}
    least = min((place.memory for place in found if place.memory is not None), default=0)
    detail = (
        f"{len(executors)} on {_listed([place.host for place in found])}, {len(found)} tasks at once; on a machine at "
        f"least {min(place.cores for place in found)} cores, {size(least)} of memory free and "
        f"{min(place.gpus for place in found) or 'no'} GPUs"
    )
    yield Check("executors", "ok", detail)
    yield from _differing(driver, found)
    wrong: dict[str, list[str]] = {}
    for place in found:
        if place.wrong is not None:
            wrong.setdefault(place.wrong, []).append(place.host)
    for what, hosts in wrong.items():
        detail = f"{lake}: {_listed(hosts)} {what}: needed a place that all machines reach: set paths.lake"
        yield Check("executors' lake", "fail", detail, "data")
    if not wrong:
        yield Check("executors' lake", "ok", f"{lake} is read and written by all")


def _differing(driver: Place, found: Sequence[Place]) -> Iterator[Check]:
    """A line a difference, with all who have it."""
    needed = "needed the driver's: run make package and submit with --cluster, or make a new image"
    differing: dict[tuple[str, str, str], list[str]] = {}
    for place in found:
        ours, theirs = ({"python": p.python, "code": p.code, **p.packages} for p in (driver, place))
        for name, version in ours.items():
            if theirs.get(name) != version:
                differing.setdefault((name, str(theirs.get(name)), str(version)), []).append(place.host)
    for (name, theirs_is, ours_is), hosts in differing.items():
        yield Check(f"executors' {name}", "fail", f"{theirs_is} on {_listed(hosts)}, {ours_is} here: {needed}")
    kinds = sorted({place.processor for place in found})
    if len(kinds) > 1:
        detail = f"{_listed(kinds)}: the last bits of scores may depend on which executor computes them"
        yield Check("executors' processors", "warn", detail)


def _listed(names: Sequence[str]) -> str:
    seen = sorted(set(names))
    return ", ".join(seen[:5]) + (f" and {len(seen) - 5} more" if len(seen) > 5 else "")


def _reason(text: str) -> str:
    lines = [line.strip().removeprefix(": ") for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("An error occurred while calling"):  # py4j says what was called first.
        del lines[0]
    told: Any = next((line for line in lines if "Cannot run program" in line or "ModuleNotFoundError" in line), None)
    return str(told or (lines[0] if lines else "no message"))[:300]
