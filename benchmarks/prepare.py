"""Prepare at scale: interactions/s, growth with rows, the live heap, skew; beside the usual way, in the same run.

    .venv/bin/python -m benchmarks.prepare [--millions 1 5 25] [--driver-millions 1 25] [--skew-millions 5]

Each size is a synthetic CSV log (ids drawn from power laws, seed 1), prepared on local[2] with a 2 GiB heap by this
project (4 negatives × 1 draw, 99 candidates, quarantine, checksums) and by `_usual_prepare.py`. Then one user, and one
item, is given 30 % of a log's rows. Prints one table and writes its parts into benchmarks/results/prepare.json.

seconds: the job's wall clock, launcher and JVM included. exponent: log(time ratio) / log(rows ratio) against the size
before. heap: the most that was alive in the driver at a full collection, asked for every 5 seconds (on local[2] the
driver's heap is also the executors', sort buffers and all); Python: the largest resident size of any Python process
below the job. The smallest and the largest log are then prepared once more with executors in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyspark
import yaml

from benchmarks._job import ROOT, watched
from ncf_dist.machine import cores, processor

MASTER, HEAP, PARTITIONS = "local[2]", "2g", 16
CLUSTER = "local-cluster[2,1,1024]"
NAMES = ["userId", "movieId", "rating", "timestamp"]
SKEW, COLLECT_S = 0.3, 5.0
JAVA = subprocess.run(
    [str(ROOT / "spark-submit.sh"), "--java-home"], capture_output=True, text=True, check=True
).stdout.strip()
JCMD = f"{JAVA}/bin/jcmd"
SPARK = str(Path(pyspark.__file__).parent)


def write_log(path: Path, rows: int, skew: str | None = None) -> None:
    """`rows` lines: users of about 100 rows each, a catalogue that grows with the square root, both long-tailed.
    `skew`: user or item, of which number 1 gets 30 % of the rows."""
    rng = np.random.default_rng(1)
    users, items = rows // 100, int(8 * math.sqrt(rows))
    with open(path, "wb") as out:
        out.write((",".join(NAMES) + "\n").encode())
        for start in range(0, rows, 1_000_000):
            n = min(1_000_000, rows - start)
            columns = [
                1 + (users * rng.random(n) ** 1.5).astype(np.int64),
                1 + (items * rng.random(n) ** 3).astype(np.int64),
                rng.integers(1, 6, n),
                rng.integers(1_000_000_000, 1_100_000_000, n),
            ]
            if skew:
                columns[("user", "item").index(skew)][rng.random(n) < SKEW] = 1
            options = pa.csv.WriteOptions(include_header=False)
            pa.csv.write_csv(pa.table(columns, names=NAMES), out, options)


class Watch(threading.Thread):
    """Looks at the processes below the given one: the largest resident size of a Python process, MiB; and asks its JVM
    for a full collection every COLLECT_S seconds, so that its log says what is alive."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.ended = psutil.Process(pid), 0.0, threading.Event()
        self.driver = 0

    def run(self) -> None:
        collected = time.monotonic()
        while not self.ended.wait(0.5):
            try:
                below = self.process.children(recursive=True)
                sizes = [p.memory_info().rss / 2**20 for p in below if "python" in p.name()]
                self.most = max([self.most, *sizes])
                if time.monotonic() - collected > COLLECT_S:
                    collected = time.monotonic()
                    for java in [p for p in [self.process, *below] if p.name() == "java"]:
                        self.driver = java.pid if "SparkSubmit" in " ".join(java.cmdline()) else self.driver
                        subprocess.run([JCMD, str(java.pid), "GC.run"], capture_output=True, check=False)
            except psutil.Error:
                continue


def live_heap(log: Path) -> float:
    """MiB alive at the fullest of the full collections of the JVM that logged here."""
    whole = r"Pause Full.*?\d+M->(\d+)M"
    return max((float(m) for m in re.findall(whole, log.read_text())), default=0.0)


def timed(command: list[str], folder: Path) -> tuple[dict[str, float], str]:
    """(seconds, heap and python in MiB; stdout). Stops the benchmark when the command fails."""
    for old in folder.glob("gc-*.log"):
        old.unlink()
    options = f"-XX:+UseG1GC -Xlog:gc:file={folder}/gc-%p.log"
    environment = {
        **os.environ,
        "SPARK_WORKER_DIR": str(folder / "workers"),
        "JAVA_HOME": JAVA,
        "SPARK_HOME": SPARK,
        "JAVA_TOOL_OPTIONS": options,
    }
    out, seconds, watch = watched(command, Watch, environment)
    return {"seconds": seconds, "heap": live_heap(folder / f"gc-{watch.driver}.log"), "python": watch.most}, out


def ours(log: Path, folder: Path, master: str = MASTER) -> dict[str, float]:
    named = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"}
    config = {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "input": {"path": str(log), "format": "csv", "columns": named, "user_type": "int", "item_type": "int"},
        "negatives": {"per_positive": 4, "draws": 1, "candidates": 99},
        "spark": {"master": master, "driver_memory": HEAP, "executor_memory": "1g", "shuffle_partitions": PARTITIONS},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    found, out = timed([str(ROOT / "spark-submit.sh"), "prepare", "--config", str(path), "--ds", "2026-01-31"], folder)
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert rows["input"] == rows["accepted"] + rows["duplicates"], rows
    shutil.rmtree(folder / "lake")
    return found


def usual(log: Path, folder: Path) -> dict[str, float]:
    python = str(ROOT / ".venv/bin/python")
    settings = {
        "spark.pyspark.python": python,
        "spark.pyspark.driver.python": python,
        "spark.local.dir": str(folder),
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": str(PARTITIONS),
    }
    options = ["--master", MASTER, "--driver-memory", HEAP]
    options += [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
    script = str(ROOT / "benchmarks/_usual_prepare.py")
    found, _ = timed([f"{SPARK}/bin/spark-submit", *options, script, str(log), str(folder / "usual")], folder)
    shutil.rmtree(folder / "usual")
    return found


def apart(log: Path, folder: Path) -> dict[str, float]:
    """`ours` with executors in processes of their own, to see the driver's heap alone."""
    return ours(log, folder, CLUSTER)


def measure(rows: int, ways: dict[str, Any], skew: str | None = None) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "ratings.csv"
        write_log(log, rows, skew)
        for way, run in ways.items():
            yield {"rows": rows, "way": way, "skew": skew, **run(log, Path(name))}


def show(found: dict[str, Any]) -> None:
    skew = f"30 % one {found['skew']}" if found["skew"] else ""
    ratio = found.get("exponent", found.get("times", float("nan")))
    print(
        f"{found['rows']:12,} {found['way']:6} {skew:14} {found['seconds']:8.1f} "
        f"{found['rows'] / found['seconds']:9,.0f} {ratio:8.2f} {found['heap']:9.0f} {found['python']:7.0f}",
        flush=True,
    )


def growth(millions: list[float], ways: dict[str, Any]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for size in millions:
        for found in measure(int(size * 1e6), ways):
            if before := [r for r in results if r["way"] == found["way"]]:
                last = before[-1]
                times = math.log(found["seconds"] / last["seconds"])
                found["exponent"] = times / math.log(found["rows"] / last["rows"])
            results.append(found)
            show(found)
    return results


def skewed(millions: float) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for skew in (None, "user", "item"):
        [found] = measure(int(millions * 1e6), {"ours": ours}, skew)
        results.append(found)
        found["times"] = found["seconds"] / results[0]["seconds"]
        show(found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="*", default=[1, 5, 25], help="sizes of part growth")
    parser.add_argument("--driver-millions", type=float, nargs="*", default=[1, 25], help="sizes of part driver")
    parser.add_argument("--skew-millions", type=float, default=5, help="size of part skew; 0 leaves it out")
    args = parser.parse_args()
    print(f"{'rows':>12} {'way':6} {'':14} {'seconds':>8} {'rows/s':>9} {'exponent':>8} {'heap MiB':>9} {'Python':>7}")
    parts = {"growth": growth(args.millions, {"ours": ours, "usual": usual})} if args.millions else {}
    if args.driver_millions:
        print("executors in processes of their own: the heap is the driver's alone")
        parts["driver"] = growth(args.driver_millions, {"apart": apart})
    if args.skew_millions:
        print("skew; in place of the exponent, how many times the time of an even log")
        parts["skew"] = skewed(args.skew_millions)
    path = ROOT / "benchmarks/results/prepare.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    machine = {"cores": cores(), "machine": processor(), "python": platform.python_version()}
    path.write_text(json.dumps({**old, **machine, **parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
