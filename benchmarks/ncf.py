"""Quality on the NCF paper's files (He et al. 2017): the committed settings of each model, trained on all of train.

    .venv/bin/python benchmarks/ncf.py [--seeds 1 2 3] [--at-once 1] [--models ncf-ml-1m-mf]

Each seed prepares the files once and then trains and judges, each as its own job: NeuMF, a GMF and an MLP, a NeuMF
that starts from those two, and MF. The settings were chosen on each user's latest train row (`split.validation: true`);
here that row is trained on too, and nothing but `evaluate` reads the test rows. Prints one table (mean and standard
deviation over seeds; wall seconds of training, the cores shared by `at-once` seeds) and writes
benchmarks/results/ncf-ml-1m.json; with `--models` these models alone are run, and the others there, of the same seeds,
stay. The files come from NCF_DATA_DIR/ncf-ml-1m.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ncf_dist import last_line
from ncf_dist.machine import cores, processor

ROOT = Path(__file__).parent.parent
FIGURES = ("candidates.hr@10", "candidates.ndcg@10", "full.hr@10", "full.ndcg@10")
PRETRAINED = "ncf-ml-1m-pretrained"
STARTS = {"gmf": "ncf-ml-1m-gmf", "mlp": "ncf-ml-1m-mlp"}
"""What that one starts from."""
RESULTS = ROOT / "benchmarks/results/ncf-ml-1m.json"
MODELS = ("ncf-ml-1m-neumf", *STARTS.values(), PRETRAINED, "ncf-ml-1m-mf")


def run(job: str, config: str, settings: dict[str, object], threads: int | None = None) -> dict[str, Any]:
    """All that the job said, and its wall seconds. threads: of each process; None for the job's own choice. Stops the
    benchmark when a job fails."""
    command = [str(ROOT / "spark-submit.sh"), job, "--config", f"conf/{config}.yaml", "--ds", "2026-01-31"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    start = time.monotonic()
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{job} of {config} exited {done.returncode}; its log is above")
    return {**last_line.read(done.stdout.splitlines()[-1]), "wall": time.monotonic() - start}


def papers_files() -> Path:
    """Their folder. Stops the benchmark where it is not there."""
    files = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")).resolve() / "ncf-ml-1m"
    if not files.is_dir():
        sys.exit(f"{files} is not there; needed the three files of the NCF paper's repository: set NCF_DATA_DIR")
    return files


def places(files: Path, lake: str, seed: int) -> dict[str, object]:
    """Settings of a run on the paper's files."""
    return {
        "paths.lake": lake,
        "paths.work": f"{lake}/work",
        "input.path": files / "ml-1m.train.rating",
        "split.test": files / "ml-1m.test.rating",
        "split.candidates": files / "ml-1m.test.negative",
        "seed": seed,
    }


def run_seed(files: Path, threads: int, models: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Figures by model, popularity among them."""
    with tempfile.TemporaryDirectory() as lake:
        settings = places(files, lake, seed)
        prepared = run("prepare", models[0], settings, threads)
        found: dict[str, dict[str, float]] = {"prepare": {"wall": prepared["wall"]}}
        bundles: dict[str, str] = {}
        for config in models:
            start = {}
            if config == PRETRAINED:
                start = {f"train.pretrained.{part}": bundles[name] for part, name in STARTS.items()}
            trained = run("train", config, settings | start, threads)
            bundles[config] = trained["outputs"]["bundle"]
            metrics = run("evaluate", config, settings | start, threads)["metrics"]
            found[config] = {"wall": trained["wall"]} | {name: metrics[name] for name in FIGURES}
            found["popularity"] = {name: metrics[f"popularity.{name}"] for name in FIGURES}
            print(f"seed {seed}, {config}: {found[config]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="seeds that share the cores")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    if PRETRAINED in args.models and not set(STARTS.values()) <= set(args.models):
        parser.error(f"{PRETRAINED} starts from {' and '.join(STARTS.values())}: name them, too")
    files = papers_files()
    models = [name for name in MODELS if name in args.models]
    threads = max(1, cores() // args.at_once)
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = list(pool.map(partial(run_seed, files, threads, models), args.seeds))
    machine = f"{cores()} cores, {args.at_once} seeds at once, {processor()}"
    if RESULTS.exists() and (before := json.loads(RESULTS.read_text()))["seeds"] == args.seeds:
        runs = [old | new for old, new in zip(before["runs"], runs, strict=True)]
    print(f"The NCF paper's MovieLens-1M, seeds {args.seeds}, {machine}")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in (*FIGURES, "training s")))
    for model in (name for name in ("popularity", *MODELS) if name in runs[0]):
        cells = []
        for name in (*FIGURES, "wall"):
            values = [run[model][name] for run in runs if name in run[model]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 0 if name == "wall" else 4
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}" if values else "")
        print(f"{model:24}" + "".join(f"{cell:>20}" for cell in cells))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"seeds": args.seeds, "machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
