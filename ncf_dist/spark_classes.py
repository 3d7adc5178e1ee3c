"""Archive the classes that Spark's JVM loads for a night, so that later ones map them from a file (class data sharing,
JEP 350) in place of finding, checking and parsing them: a start of Spark takes half the time.

    python -m ncf_dist.spark_classes

`make install` runs it. It prepares a small made-up log and writes `gateway.class_archive()`. The archive holds for this
Java and the jars of this Spark; a JVM to which it does not fit passes over it. Where none can be made, as where Spark's
class path holds a folder with files, it says so, and Spark starts as ever.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from ncf_dist import gateway
from ncf_dist.config import Config
from ncf_dist.prepare.pipeline import prepare

DUMP_S = 300.0
"""What the JVM has to write the archive when it ends."""


def make() -> Path | None:
    """Write the archive; returns where it is, None where the JVM wrote none."""
    place = gateway.class_archive()
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".spark-classes-") as folder:
        written = Path(folder) / "archive"
        place.unlink(missing_ok=True)  # Else it would be mapped, and only what it lacks would be written.
        os.environ["SPARK_SUBMIT_OPTS"] = f"-XX:TieredStopAtLevel=1 -Xlog:cds=off -XX:ArchiveClassesAtExit={written}"
        _a_small_night(folder)
        gateway.END_S = DUMP_S
        gateway.end()
        with contextlib.suppress(FileNotFoundError):
            return written.rename(place)
    return None


def _a_small_night(folder: str) -> None:
    log = [f"{user}::{item}::5::{1_000_000 + item}\n" for user in range(1, 21) for item in range(user % 3, 30, 3)]
    Path(folder, "ratings.dat").write_text("".join(log))
    tree = {
        "paths": {"lake": f"{folder}/lake", "work": f"{folder}/work"},
        "input": {"path": f"{folder}/ratings.dat"},
        "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2},
    }
    prepare(Config.model_validate(tree), "2026-01-01")


def main() -> int:
    start = time.monotonic()
    if (place := make()) is None:
        print("no archive of Spark's classes could be written; Spark says why above, and starts without it")
        return 0
    print(f"{place}: {place.stat().st_size >> 20} MiB, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
