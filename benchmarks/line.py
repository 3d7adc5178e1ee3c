"""The line on a committed config, over seeds: seconds a stage, and quality beside popularity.

    .venv/bin/python benchmarks/line.py [--config conf/ml-1m.yaml] [--seeds 1 2 3] [--jobs fetch prepare train evaluate]

Each seed runs `./spark-submit.sh fetch` and every stage as its own job in a lake of its own, as a scheduler would. The
seed decides the initial weights, the order, the negatives, and the split where it is random. Prints one table (mean
and standard deviation over seeds; time is the job's wall clock, launcher and JVM included) and writes
benchmarks/results/<config's name>.json. MovieLens comes from NCF_DATA_DIR where the dataset's folder exists there, else
by download.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ncf_dist import last_line
from ncf_dist.machine import cores, processor

ROOT = Path(__file__).parent.parent
JOBS = ("fetch", "prepare", "train", "evaluate", "score", "publish")


def run(job: str, config: str, settings: list[str]) -> tuple[float, dict[str, Any]]:
    """(wall seconds, all that the job said). Stops the benchmark when a job fails."""
    command = [str(ROOT / "spark-submit.sh"), job, "--config", config, "--ds", "2026-01-31"]
    command += [part for setting in settings for part in ("--set", setting)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job} exited {done.returncode}; its log is above")
    return time.monotonic() - start, last_line.read(done.stdout.splitlines()[-1])


def run_seed(config: str, jobs: list[str], seed: int, lake: str) -> dict[str, float]:
    tree = yaml.safe_load((ROOT / config).read_text())
    settings = [f"paths.lake={lake}", f"paths.work={lake}/work", f"seed={seed}"]
    for key in ("path", "items"):
        if path := tree["input"].get(key):
            settings.append(f"input.{key}={path.replace(tree['paths']['lake'], lake, 1)}")
    local = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")) / tree["fetch"]["dataset"]
    if local.is_dir():
        settings.append(f"fetch.from={local.resolve()}")
    result: dict[str, float] = {}
    for job in jobs:
        seconds, report = run(job, config, settings)
        result[f"{job} s"] = seconds
        if job == "train":
            result["train samples/s"] = report["metrics"]["train.samples_per_s"]
        if job == "evaluate":
            result |= report["metrics"]
    result["all s"] = sum(result[f"{job} s"] for job in jobs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="conf/ml-1m.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as lake:
            runs.append(run_seed(args.config, args.jobs, seed, lake))
    machine = f"{cores()} cores, {processor()}, Python {platform.python_version()}"
    print(f"{args.config}, seeds {args.seeds}, {machine}")
    print(f"{'':32} {'mean':>12} {'sd':>10}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        digits = 4 if "." in name else 1
        print(f"{name:32} {statistics.mean(values):12,.{digits}f} {spread:10,.{digits}f}")
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    body = {"config": args.config, "seeds": args.seeds, "machine": machine, "runs": runs}
    (results / f"{Path(args.config).stem}.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
