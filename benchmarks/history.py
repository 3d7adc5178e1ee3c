"""Quality and speed of the model of histories on MovieLens-1M, by a committed config.

    .venv/bin/python -m benchmarks.history [--config ncf-ml-1m-history] [--seeds 1 2 3] [--set …] [--add]
        [--shares-only] [--lakes FOLDER [--prepare-only]]

ncf-ml-1m-history: the NCF paper's files (He et al. 2017), from NCF_DATA_DIR/ncf-ml-1m. ml-1m-5core-history: the
protocol of the sequential papers, from NCF_DATA_DIR/ml-1m. ncf-ml-1m-history-long: the first's files, trained on a
GPU: `--lakes FOLDER --prepare-only` prepares FOLDER/SEED and prints the command that trains a seed there. It needs
neither Spark nor Petastorm, so the folder may be carried to another machine and back (there `paths.…` may be others;
`input.…` and `split.…` name the tables, and stay). Then, with the same settings, `--lakes FOLDER` judges it.

Each seed prepares the files and then trains and judges, each as its own job: each user's latest item is held out and
ranked in the whole catalogue but what the user has seen, and among 99 others (the paper's, or drawn ones). The settings
were chosen on each user's latest train row (`--set split.validation=true`: then what is printed of the parts' weights
is what counts); nothing but `evaluate` and the figures "without parts" read the test rows: these are of the same model
without its item-to-item parts. "p" is the paired bootstrap's of "no difference", the largest of the full catalogue's
HR@10 and NDCG@10.

Where it trains here, the share of padding, and where a step's time goes, from torch's profiler over some steps of one
thread. Prints mean and standard deviation over seeds, and writes benchmarks/results/history-CONFIG.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ncf import FIGURES, places, run
from ncf_dist import contracts, metrics
from ncf_dist.bundle import load_model, read_bundle
from ncf_dist.config import Config
from ncf_dist.config.load import load_config
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest, read_manifest
from ncf_dist.models import build_model
from ncf_dist.models.latest import latest
from ncf_dist.parquet import read_table
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.windows import WindowLoader
from ncf_dist.train.worker import task_of
from ncf_dist.train.world import World

ROOT = Path(__file__).parent.parent
STEPS = 20
KINDS = {
    "products of matrices": ("mm", "addmm", "bmm", "baddbmm"),
    "dropout": ("random_", "ge", "bernoulli_", "native_dropout"),
    "exponentials and activations": ("exp_", "exp", "silu", "silu_backward", "softplus", "sigmoid_", "log"),
    "norms": ("native_layer_norm", "native_layer_norm_backward", "linalg_vector_norm"),
    "copies and look-ups": ("copy_", "cat", "index_select", "index", "index_add_", "scatter_add_", "fill_", "clone"),
    "the optimiser": ("_fused_adamw_", "_fused_adam_"),
}
"""torch's operations (aten::…) by what they do here; the rest is arithmetic on elements, and Python."""


def sequential_places(files: Path, lake: str, seed: int) -> dict[str, object]:
    """Settings of a run on GroupLens' own files."""
    inputs = {"input.path": files / "ratings.dat", "input.items": files / "movies.dat"}
    return {"paths.lake": lake, "paths.work": f"{lake}/work", **inputs, "seed": seed}


DATA = {
    "ncf-ml-1m-history": ("ncf-ml-1m", places),
    "ncf-ml-1m-history-long": ("ncf-ml-1m", places),
    "ml-1m-5core-history": ("ml-1m", sequential_places),
}
"""By config: the folder of NCF_DATA_DIR, and the settings that name its files."""


def run_seed(config: str, settings: dict[str, object], shares_only: bool) -> dict[str, Any]:
    """The figures with parts and without; of a training here wall seconds by job and where a step's time goes."""
    lake = Path(str(settings["paths.lake"]))
    prepared = run("prepare", config, settings)
    manifest = read_manifest(str(lake / prepared["runs"]["prepare"]))
    given = [f"{name}={value}" for name, value in settings.items()]
    tree = load_config(str(ROOT / f"conf/{config}.yaml"), given)
    if shares_only:
        return {"prepare": {"wall": prepared["wall"]}, "step": step_shares(tree, manifest)}
    trained = run("train", config, settings)
    judged = run("evaluate", config, settings)
    report = json.loads(Path(judged["outputs"]["metrics"]).read_text())
    found: dict[str, Any] = {}
    if prepared["status"] == "done":
        found["prepare"] = {"wall": prepared["wall"]}
    if trained["status"] == "done":
        found |= {"step": step_shares(tree, manifest), "train": {"wall": trained["wall"]}}
    else:
        seconds = read_manifest(str(lake / trained["runs"]["train"])).seconds
        found["trained before, maybe elsewhere"] = {"seconds": seconds}
    found["parts"] = json.loads(Path(trained["outputs"]["parts"]).read_text())["weights"]
    found["with parts"] = {name: judged["metrics"][name] for name in FIGURES}
    found["without parts"] = without_parts(manifest, trained["outputs"]["bundle"])
    for other in report["baselines"]:
        found[other] = {name: judged["metrics"][f"{other}.{name}"] for name in FIGURES}
        found[other]["p"] = max(row["p"] for row in report["comparisons"] if compared(row, other))
    print(f"seed {settings['seed']}: {found}", file=sys.stderr)
    return found


def train_command(config: str, settings: dict[str, object]) -> str:
    command = ["python", "jobs/train.py", "--config", f"conf/{config}.yaml", "--ds", "2026-01-31"]
    settings = {**settings, "loader.backend": "arrow"}
    return shlex.join([*command, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))])


def compared(row: dict[str, Any], other: str) -> bool:
    """Whether it is one of the comparisons that the model must win."""
    return row["with"] == other and row["protocol"] == "full" and row["metric"] in ("hr@10", "ndcg@10")


# ---- without parts ---------------------------------------------------------------------------------------------------


def without_parts(prepare: Manifest, bundle_path: str) -> dict[str, float]:
    """The figures of the tower alone, from all scores at once: the catalogue is small."""
    bundle = read_bundle(bundle_path)
    model, totals = load_model(bundle), dict.fromkeys(FIGURES, 0.0)
    rows = 0
    tables = [prepare.files(table.name) for table in (contracts.TEST, contracts.RECENT, contracts.HISTORY)]
    for names in zip(*tables, strict=True):
        held, recent, seen = (read_table(path).sort_by("user_idx") for path in names)
        assert recent["user_idx"].equals(seen["user_idx"]), "both are by user, in files of the same users"
        index = {user: place for place, user in enumerate(recent["user_idx"].to_pylist())}
        users = np.array([index[user] for user in held["user_idx"].to_pylist()], np.int64)
        with torch.no_grad():
            sides = model.users(latest(recent, contracts.VALIDATION_SPLIT, bundle.model.history))
            scores = model.score_block(sides, model.item_side(None)).numpy()[users]
        own = scores[np.arange(len(users)), held["item_idx"].to_numpy()]
        among = [np.append(scores[r, c], own[r]) for r, c in enumerate(held["candidates"].to_pylist())]
        for row, items in enumerate(seen["item_idx"].take(users).to_pylist()):
            scores[row, items] = -np.inf
        for name, lists in (("candidates", among), ("full", scores)):
            ranks = np.array([1 + (values > mine).sum() for values, mine in zip(lists, own, strict=True)], np.float64)
            for figure, value in metrics.sums(ranks, (10,)).items():
                if f"{name}.{figure}" in totals:
                    totals[f"{name}.{figure}"] += value
        rows += len(users)
    return {name: total / rows for name, total in totals.items()}


# ---- a step ----------------------------------------------------------------------------------------------------------


def step_shares(config: Config, prepare: Manifest) -> dict[str, float]:
    """Share of positions that are padding; milliseconds of a step of all ranks' windows on one thread, and how they are
    spent."""
    size = config.train.batch_size * config.train.ranks
    task = dataclasses.replace(task_of(config, prepare), batch_size=size)
    loader = WindowLoader(prepare, task, config.loader, World())
    batches = [batch for batch, _ in zip(loader.epoch(0), range(STEPS), strict=False)]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = build_model(config.model, task.n_users, task.n_items)
    trainer = Trainer(model, loader, lambda _: {}, config.train, World(), loss=config.loss)
    trainer.objective.train()
    for batch in batches[:3]:
        trainer.train_step(batch, 0.0)
    start = time.process_time()
    for batch in batches:
        trainer.train_step(batch, 0.0)
    milliseconds = 1000 * (time.process_time() - start) / len(batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for batch in batches:
            trainer.train_step(batch, 0.0)
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    whole = sum(times.values())
    shares = {kind: sum(times.get(name, 0) for name in names) / whole for kind, names in KINDS.items()}
    padding = float(np.mean([batch.windows.padding for batch in batches if batch.windows is not None]))
    predicted = float(np.mean([len(batch.items) for batch in batches]))
    return {
        "padding": padding,
        "steps an epoch": float(loader.steps),
        "predicted a step": predicted,
        "ms a step": milliseconds,
        **shares,
        "the rest": 1 - sum(shares.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="ncf-ml-1m-history", choices=list(DATA), help="of conf/, without .yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings in place of the config's")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/history-CONFIG.json")
    parser.add_argument("--add", action="store_true", help="keep the seeds that the results have")
    parser.add_argument("--shares-only", action="store_true", help="measure a step, train nothing")
    parser.add_argument("--lakes", type=Path, help="a seed's lake is the folder of its name here, and stays")
    parser.add_argument("--prepare-only", action="store_true", help="with --lakes: train and judge nothing")
    args = parser.parse_args()
    if args.prepare_only and not args.lakes:
        parser.error("--prepare-only without --lakes keeps nothing; needed --lakes FOLDER")
    files = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")).resolve() / DATA[args.config][0]
    if not files.is_dir():
        sys.exit(f"{files} is not there; needed the files that the top of this script names: set NCF_DATA_DIR")
    more = dict(setting.split("=", 1) for setting in args.set)
    results = args.results or ROOT / f"benchmarks/results/history-{args.config}.json"
    results.parent.mkdir(exist_ok=True)
    told = json.loads(results.read_text()) if args.add and results.exists() else {"settings": more, "runs": {}}
    if told["settings"] != more:
        sys.exit(f"{results} has runs with the settings {told['settings']}; needed {more} to add to them")
    machine = f"{cores()} cores, {processor()}"
    for seed in args.seeds:
        kept = args.lakes and str(args.lakes.resolve() / str(seed))
        with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as lake:
            settings = {**DATA[args.config][1](files, lake, seed), **more}
            if args.prepare_only:
                run("prepare", args.config, settings)
                print(train_command(args.config, settings))
                continue
            found = run_seed(args.config, settings, args.shares_only)
        told["runs"][str(seed)] = found | {"machine": machine}
        if not args.shares_only:
            results.write_text(json.dumps(told, indent=1) + "\n")
    if args.prepare_only:
        return
    runs = list(told["runs"].values())
    machines = " and ".join(sorted({run.pop("machine") for run in runs}))
    print(f"MovieLens-1M, conf/{args.config}.yaml {' '.join(args.set)}, seeds {' '.join(told['runs'])}, {machines}")
    for part, name in dict.fromkeys((said, figure) for found in runs for said in found for figure in found[said]):
        values = [found[part][name] for found in runs if name in found.get(part, {})]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{part + ': ' + name:<48} {statistics.mean(values):>10.4f}{spread}")


if __name__ == "__main__":
    main()
