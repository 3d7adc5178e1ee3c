"""Quality on the NCF paper's files (He et al. 2017): the committed settings of each model, trained on all of train.

    .venv/bin/python benchmarks/ncf.py [--seeds 1 2 3] [--at-once 1]

Each seed prepares the files once and then trains and judges, each as its own job: NeuMF, a GMF and an MLP, a NeuMF
that starts from those two, and MF. The settings were chosen on each user's latest train row (`split.validation: true`);
here that row is trained on too, and nothing but `evaluate` reads the test rows. Prints one table (mean and standard
deviation over seeds; wall seconds of training, the cores shared by `at-once` seeds) and writes
benchmarks/results/ncf-ml-1m.json. The files come from NCF_DATA_DIR/ncf-ml-1m.
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIGURES = ("candidates.hr@10", "candidates.ndcg@10", "full.hr@10", "full.ndcg@10")
PRETRAINED = "ncf-ml-1m-pretrained"
MODELS = ("ncf-ml-1m-neumf", "ncf-ml-1m-gmf", "ncf-ml-1m-mlp", PRETRAINED, "ncf-ml-1m-mf")


def run(job: str, config: str, settings: dict[str, object], threads: int) -> dict[str, Any]:
    """The job's last line, and its wall seconds. Stops the benchmark when a job fails."""
    command = [str(ROOT / "spark-submit.sh"), job, "--config", f"conf/{config}.yaml", "--ds", "2026-01-31"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{job} of {config} exited {done.returncode}; its log is above")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**report, "wall": time.monotonic() - start}


def run_seed(files: Path, threads: int, seed: int) -> dict[str, dict[str, float]]:
    """Figures by model, popularity among them."""
    with tempfile.TemporaryDirectory() as lake:
        settings: dict[str, object] = {
            "paths.lake": lake,
            "paths.work": f"{lake}/work",
            "input.path": files / "ml-1m.train.rating",
            "split.test": files / "ml-1m.test.rating",
            "split.candidates": files / "ml-1m.test.negative",
            "seed": seed,
        }
        prepared = run("prepare", MODELS[0], settings, threads)
        found: dict[str, dict[str, float]] = {"prepare": {"wall": prepared["wall"]}}
        bundles: dict[str, str] = {}
        for config in MODELS:
            start = {}
            if config == PRETRAINED:
                start = {f"train.pretrained.{part}": bundles[f"ncf-ml-1m-{part}"] for part in ("gmf", "mlp")}
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
    args = parser.parse_args()
    files = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")).resolve() / "ncf-ml-1m"
    if not files.is_dir():
        sys.exit(f"{files} is not there; needed the three files of the NCF paper's repository: set NCF_DATA_DIR")
    threads = max(1, (os.cpu_count() or 1) // args.at_once)
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = list(pool.map(partial(run_seed, files, threads), args.seeds))
    machine = f"{os.cpu_count()} cores, {args.at_once} seeds at once, {platform.machine()}"
    print(f"The NCF paper's MovieLens-1M, seeds {args.seeds}, {machine}")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in (*FIGURES, "training s")))
    for model in ("popularity", *MODELS):
        cells = []
        for name in (*FIGURES, "wall"):
            values = [run[model][name] for run in runs if name in run[model]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 0 if name == "wall" else 4
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}" if values else "")
        print(f"{model:24}" + "".join(f"{cell:>20}" for cell in cells))
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    body = {"seeds": args.seeds, "machine": machine, "runs": runs}
    (results / "ncf-ml-1m.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
