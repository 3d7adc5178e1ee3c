"""Prepare at scale: interactions/s, growth with rows, and the driver's live heap, beside the usual way in the same run.

    .venv/bin/python benchmarks/prepare.py [--millions 1 5 25]

For each size a synthetic CSV log (ids drawn from power laws, seed 1) is prepared twice on local[2] with a 2 GiB heap:
by this project (4 negatives × 1 draw, 99 candidates, quarantine, checksums) and by `_usual_prepare.py`. Prints one
table and writes benchmarks/results/prepare.json. "live heap" is the largest heap left after a collection, from the
JVM's own log (in local mode the driver's heap is also the executors'). "exponent" is log(time ratio) / log(rows
ratio) against the size before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

ROOT = Path(__file__).parent.parent
MASTER, HEAP = "local[2]", "2g"


def write_log(path: Path, rows: int) -> None:
    """`rows` lines: users of about 100 rows each, a catalogue that grows with the square root, both long-tailed."""
    rng = np.random.default_rng(1)
    users, items = rows // 100, int(8 * math.sqrt(rows))
    with pa.csv.CSVWriter(
        path, pa.schema([(c, pa.int64()) for c in ("userId", "movieId", "rating", "timestamp")])
    ) as out:
        for start in range(0, rows, 1_000_000):
            n = min(1_000_000, rows - start)
            columns = [
                1 + (users * rng.random(n) ** 1.5).astype(np.int64),
                1 + (items * rng.random(n) ** 3).astype(np.int64),
                rng.integers(1, 6, n),
                rng.integers(1_000_000_000, 1_100_000_000, n),
            ]
            out.write_table(pa.table(columns, names=["userId", "movieId", "rating", "timestamp"]))


def live_heap(folder: Path) -> float:
    """MiB left after the fullest collection of any JVM that logged here."""
    found = [m for log in folder.glob("gc-*.log") for m in re.findall(r"Pause.*?\d+M->(\d+)M", log.read_text())]
    return max((float(m) for m in found), default=0.0)


def timed(command: list[str], folder: Path) -> tuple[float, float, str]:
    """(wall seconds, live heap MiB, stdout). Stops the benchmark when the command fails."""
    for old in folder.glob("gc-*.log"):
        old.unlink()
    environment = {**os.environ, "JAVA_TOOL_OPTIONS": f"-Xlog:gc:file={folder}/gc-%p.log"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[:3]} exited {done.returncode}; its log is above")
    return time.monotonic() - start, live_heap(folder), done.stdout


def ours(log: Path, folder: Path) -> dict[str, float]:
    config = {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "input": {"path": str(log), "format": "movielens-csv"},
        "negatives": {"per_positive": 4, "draws": 1, "candidates": 99},
        "spark": {"master": MASTER, "driver_memory": HEAP, "shuffle_partitions": 16},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    seconds, heap, out = timed(
        [str(ROOT / "spark-submit.sh"), "prepare", "--config", str(path), "--ds", "2026-01-31"], folder
    )
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert rows["input"] == rows["accepted"] + rows["duplicates"], rows
    shutil.rmtree(folder / "lake")
    return {"seconds": seconds, "heap": heap}


def usual(log: Path, folder: Path) -> dict[str, float]:
    python = str(ROOT / ".venv/bin/python")
    options = [
        "--master",
        MASTER,
        "--driver-memory",
        HEAP,
        "--conf",
        f"spark.pyspark.python={python}",
        "--conf",
        f"spark.pyspark.driver.python={python}",
    ]
    options += [
        "--conf",
        f"spark.local.dir={folder}",
        "--conf",
        "spark.ui.showConsoleProgress=false",
        "--conf",
        "spark.sql.shuffle.partitions=16",
    ]
    script = str(ROOT / "benchmarks/_usual_prepare.py")
    seconds, heap, _ = timed(
        [str(ROOT / ".venv/bin/spark-submit"), *options, script, str(log), str(folder / "usual")], folder
    )
    shutil.rmtree(folder / "usual")
    return {"seconds": seconds, "heap": heap}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 5, 25])
    parser.add_argument("--skip-usual", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"{'rows':>12} {'way':6} {'seconds':>8} {'rows/s':>9} {'exponent':>8} {'live heap MiB':>13}")
    for millions in args.millions:
        rows = int(millions * 1e6)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            log = folder / "ratings.csv"
            write_log(log, rows)
            for way, run in (("ours", ours), *([] if args.skip_usual else [("usual", usual)])):
                found: dict[str, Any] = {"rows": rows, "way": way, **run(log, folder)}
                before = [r for r in results if r["way"] == way]
                if before:
                    last = before[-1]
                    found["exponent"] = math.log(found["seconds"] / last["seconds"]) / math.log(rows / last["rows"])
                results.append(found)
                print(
                    f"{rows:12,} {way:6} {found['seconds']:8.1f} {rows / found['seconds']:9,.0f} "
                    f"{found.get('exponent', float('nan')):8.2f} {found['heap']:13.0f}",
                    flush=True,
                )
    path = ROOT / "benchmarks/results/prepare.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
