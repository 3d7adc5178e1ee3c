"""The whole line on MovieLens-1M: seconds a stage and quality beside popularity, over seeds.

    .venv/bin/python benchmarks/line.py [--config conf/ml-1m.yaml] [--seeds 1 2 3]

Each seed runs `./spark-submit.sh fetch` and every stage as its own job in a lake of its own, as a scheduler would.
Prints one table (mean and standard deviation over seeds; time is the job's wall clock, launcher and JVM included) and
writes benchmarks/results/line.json. MovieLens comes from NCF_DATA_DIR/ml-1m where that folder exists, else by download.
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

ROOT = Path(__file__).parent.parent
JOBS = ("fetch", "prepare", "train", "evaluate", "score", "publish")
METRICS = ("full.hr@10", "full.ndcg@10", "candidates.hr@10", "candidates.ndcg@10")


def run(job: str, config: str, settings: list[str]) -> tuple[float, dict[str, Any]]:
    """(wall seconds, the job's last line). Stops the benchmark when a job fails."""
    command = [str(ROOT / "spark-submit.sh"), job, "--config", config, "--ds", "2026-01-31"]
    command += [part for setting in settings for part in ("--set", setting)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job} exited {done.returncode}; its log is above")
    return time.monotonic() - start, json.loads(done.stdout.splitlines()[-1])


def run_seed(config: str, seed: int, lake: str) -> dict[str, float]:
    raw = f"{lake}/raw/ml-1m"
    settings = [f"paths.lake={lake}", f"paths.work={lake}/work", f"seed={seed}"]
    settings += [f"input.path={raw}/ratings.dat", f"input.items={raw}/movies.dat"]
    local = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")) / "ml-1m"
    if local.is_dir():
        settings.append(f"fetch.from={local.resolve()}")
    result: dict[str, float] = {}
    for job in JOBS:
        seconds, report = run(job, config, settings)
        result[f"{job} s"] = seconds
        if job == "train":
            result["train samples/s"] = report["metrics"]["train.samples_per_s"]
        if job == "evaluate":
            for name in METRICS:
                result[name] = report["metrics"][name]
                result[f"popularity {name}"] = report["metrics"][f"popularity.{name}"]
    result["all s"] = sum(result[f"{job} s"] for job in JOBS)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="conf/ml-1m.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as lake:
            runs.append(run_seed(args.config, seed, lake))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"{args.config}, seeds {args.seeds}, {machine}")
    print(f"{'':32} {'mean':>12} {'sd':>10}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        digits = 4 if "@" in name else 1
        print(f"{name:32} {statistics.mean(values):12,.{digits}f} {spread:10,.{digits}f}")
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    body = {"config": args.config, "seeds": args.seeds, "machine": machine, "runs": runs}
    (results / "line.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
