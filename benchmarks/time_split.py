"""One moment for all: MovieLens-1M cut by time, its last tenth the test, with every model side by side.

    .venv/bin/python -m benchmarks.time_split [--seeds 1 2 3] [--models ncf-ml-1m-history …] [--add]

A night knows nothing of the days after it; a split by each user's latest item does not say how a model does then, as it
trains on what others did later. Here everything up to one moment is train, and what each user did after it and had not
done before is the test, ranked in the whole catalogue but what the user has seen.

mf, NeuMF and the model of histories have the settings of conf/ncf-ml-1m-*.yaml, which were chosen on another split;
item_to_item, EASE and the popularities are evaluate's baselines. Each job is run by itself. Prints one table, mean and
standard deviation over seeds, and writes benchmarks/results/time_split.json after each of them; --add keeps the other
seeds and models that it has. MovieLens comes from NCF_DATA_DIR/ml-1m.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ncf import run
from benchmarks.sequence_peers import read_ratings
from ncf_dist.machine import cores, processor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/time_split.json"
HISTORY = "ncf-ml-1m-history"
MODELS = (HISTORY, "ncf-ml-1m-mf", "ncf-ml-1m-neumf")
FIGURES = ("hr@10", "ndcg@10", "recall@10", "coverage@10")
TEST = 0.1


def settings_of(files: Path, lake: str, seed: int) -> dict[str, object]:
    return {
        "paths.lake": lake,
        "paths.work": f"{lake}/work",
        "input.path": files / "ratings.dat",
        "input.format": "movielens-dat",
        "split.strategy": "temporal",
        "split.test_fraction": TEST,
        "split.test": "null",
        "split.candidates": "null",
        "seed": seed,
    }


def held_out(ratings: Path) -> dict[str, float]:
    """What the split holds out, counted from the raw file: users, those of them who have no row before the cut, the
    median of a user's rows; and of the rows of users who have some, the days since the user's last row in train: their
    median, and the share of more than 30."""
    rows = read_ratings(ratings)
    cut = np.sort(rows["time"].to_numpy())[-round(len(rows) * TEST)]
    train, test = rows[rows["time"] < cut], rows[rows["time"] >= cut]
    days = ((test["time"] - test["user"].map(train.groupby("user")["time"].max())) / 86_400).dropna()
    return {
        "rows": len(test),
        "users": test["user"].nunique(),
        "new users": test["user"].nunique() - int(test["user"].drop_duplicates().isin(train["user"]).sum()),
        "median rows": float(test.groupby("user").size().median()),
        "median days": float(days.median()),
        "over 30 days": float((days > 30).mean()),
    }


def run_seed(files: Path, models: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Figures by model and baseline, the seconds of training among them."""
    found: dict[str, dict[str, float]] = {}
    for config in models:
        with tempfile.TemporaryDirectory() as lake:
            settings = settings_of(files, lake, seed)
            run("prepare", config, settings)
            trained = run("train", config, settings)
            judged = run("evaluate", config, settings)
            report = json.loads(Path(judged["outputs"]["metrics"]).read_text())
            name = config.rpartition("-")[2]
            found[name] = {figure: value for figure, value in report["full"].items() if figure in FIGURES}
            found[name]["train s"] = trained["wall"]
            if config == HISTORY:
                for other, figures in report["baselines"].items():
                    found[other] = {figure: value for figure, value in figures["full"].items() if figure in FIGURES}
            print(f"seed {seed}: {found}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--add", action="store_true", help="keep the seeds that the results have")
    args = parser.parse_args()
    files = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")).resolve() / "ml-1m"
    if not files.is_dir():
        sys.exit(f"{files} is not there; needed MovieLens-1M: set NCF_DATA_DIR")
    machine = f"{cores()} cores, {processor()}"
    told: dict[str, Any] = json.loads(RESULTS.read_text()) if args.add and RESULTS.exists() else {"runs": {}}
    told["held out"] = held_out(files / "ratings.dat")
    for seed in args.seeds:
        before = told["runs"].get(str(seed), {"found": {}})["found"]
        told["runs"][str(seed)] = {"machine": machine, "found": before | run_seed(files, args.models, seed)}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    machines = " and ".join(sorted({run["machine"] for run in told["runs"].values()}))
    seeds, runs = " ".join(told["runs"]), [run["found"] for run in told["runs"].values()]
    print(f"MovieLens-1M, the last {TEST:.0%} by time held out, whole catalogue, seeds {seeds}, {machines}")
    for name in dict.fromkeys(name for found in runs for name in found):
        of_name = [found[name] for found in runs if name in found]
        line = []
        for figure in of_name[0]:
            values = [found[figure] for found in of_name]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            line.append(f"{figure} {statistics.mean(values):.4f}{spread}")
        print(f"{name:<20} {'   '.join(line)}")
    print(told["held out"])


if __name__ == "__main__":
    main()
