"""Training speed on MovieLens-1M: NeuMF (factors 8, MLP 64-32-16-8), 4 negatives, 8,192 examples a step, Adam.

    .venv/bin/python benchmarks/train.py [--epochs 2] [--repeats 3] [--recbole PYTHON]

Everything is run on this machine one after the other, `repeats` times, and the median epoch is reported:

- ours: the job train, from Parquet files through Petastorm, on one rank and on two
- bare: a plain loop of torch modules over tensors that are in memory already, with all cores
- recbole (PYTHON: the interpreter of an environment that has RecBole 1.2.1): its own trainer on the same positives

A sample is one (user, item) pair, positive or negative. Prints one table and writes benchmarks/results/train.json.

    .venv/bin/python benchmarks/train.py --busy [--settings NAME=VALUE,… …] [--pin] [--rows R] [--add]

Instead: the job train on one rank with all cores, alone and beside another program that keeps one core busy (with --pin
the last one, else whichever the system gives it), NeuMF as above and mf (64 factors) by sampled softmax, under each
setting of the environment in turn. The first is what the others are compared with: OpenMP's own default, which a person
who sets it keeps. The last is ours. Each is the median of all epochs but a training's first. Writes
benchmarks/results/train_busy.json, with --add beside what is there.

MovieLens comes from NCF_DATA_DIR/ml-1m; the tables are made here, without Spark, as `prepare` lays them out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from ncf_dist import contracts, sampling
from ncf_dist.config import Config, Negatives
from ncf_dist.lake import Lake
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import write_parts
from ncf_dist.train.pipeline import train

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
N, FILES, EXAMPLES = 4, 16, 8192
Array = npt.NDArray[np.int64]


def positives(data: Path) -> tuple[Array, Array]:
    """(user, item), dense and shuffled."""
    lines = (data / "ml-1m" / "ratings.dat").read_text(encoding="latin-1").splitlines()
    rows = np.array([line.split("::")[:2] for line in lines]).astype(np.int64)
    user, item = (np.unique(column, return_inverse=True)[1] for column in rows.T)
    order = np.random.default_rng(1).permutation(len(user))
    return user[order].astype(np.int64), item[order].astype(np.int64)


def negatives(user: Array, item: Array) -> Array:
    order = np.lexsort((item, user))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    n_items = int(item.max()) + 1
    drawn = [sampling.negatives(1, 0, slot, user, item, user, item[order], offsets, n_items) for slot in range(N)]
    return np.stack(drawn, axis=1)


def prepare(lake: str, user: Array, item: Array, drawn: Array) -> None:
    """A finished prepare run with a train table and nothing held out."""
    runs = Lake(lake).stage(DS, "prepare")
    root = runs.begin("p1")
    contract = contracts.train(N, 1)
    columns = np.column_stack([user, item, drawn]).astype(np.int32)
    parts = (pa.table(list(part.T), schema=contract.schema) for part in np.array_split(columns, FILES))
    tables = {
        "train": write_parts(parts, root, contract),
        "validation": write_parts([contracts.VALIDATION.schema.empty_table()], root, contracts.VALIDATION),
    }
    facts = {"users": int(user.max()) + 1, "items": int(item.max()) + 1}
    config = {"negatives": Negatives(per_positive=N, draws=1).model_dump(mode="json")}
    runs.finish(
        Manifest(stage="prepare", ds=DS, run_key="p1", root=root, config=config, inputs={}, tables=tables, facts=facts)
    )


def ours(lake: str, epochs: int, ranks: int, mf: bool = False, **loader: Any) -> list[dict[str, float]]:
    """history.json's epochs of the job train."""
    model = {"model": {"name": "mf", "factors": 64}} if mf else {}
    by_loss = {"loss": "sampled_softmax"} if mf else {"batch_size": EXAMPLES // (1 + N) // ranks}
    config = Config.model_validate(
        {
            "paths": {"lake": lake, "work": f"{lake}/work"},
            "input": {"path": "unused"},
            "negatives": {"per_positive": N, "draws": 1},
            **model,
            "loader": loader,
            "train": {
                "launcher": "torchrun" if ranks > 1 else "none",
                "ranks": ranks,
                "device": "cpu",
                "epochs": epochs,
                **by_loss,
            },
            "seed": time.time_ns() % 2**31,  # Else the second one is already trained.
        }
    )
    made = {"prepare": Lake(lake).stage(DS, "prepare").newest()}
    outcome = train(config, DS, made)
    history: list[dict[str, float]] = json.loads(Path(outcome.outputs["history"]).read_text())["epochs"]
    return history


class Bare(nn.Module):
    """NeuMF as one would write it first."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(n, d) for n, d in ((users, 8), (items, 8), (users, 32), (items, 32))])
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)  # type: ignore[arg-type]
        widths = (64, 32, 16, 8)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.tower, self.output = nn.Sequential(*layers), nn.Linear(16, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        a, b, c, d = (table(index) for table, index in zip(self.tables, (user, item, user, item), strict=True))
        return self.output(torch.cat([a * b, self.tower(torch.cat([c, d], dim=1))], dim=1))[:, 0]


def bare(user: Array, item: Array, drawn: Array, epochs: int) -> list[dict[str, float]]:
    """Samples/s of each epoch."""
    torch.set_num_threads(cores())
    users = torch.from_numpy(np.repeat(user, 1 + N))
    items = torch.from_numpy(np.column_stack([item, drawn]).reshape(-1))
    labels = torch.zeros(len(user), 1 + N)
    labels[:, 0] = 1
    labels = labels.reshape(-1)
    model = Bare(int(users.max()) + 1, int(items.max()) + 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = []
    for _ in range(epochs):
        start, order = time.monotonic(), torch.randperm(len(users))
        for chosen in order.split(EXAMPLES):
            loss = nn.functional.binary_cross_entropy_with_logits(model(users[chosen], items[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append({"samples_per_s": len(users) / (time.monotonic() - start)})
    return found


RECBOLE = """
import sys, json, time
import numpy as np, pandas as pd
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import NeuMF
from recbole.utils import get_trainer, init_seed
folder, epochs = sys.argv[1], int(sys.argv[2])
config = Config(model="NeuMF", dataset="ml", config_dict={
    "data_path": folder, "load_col": {"inter": ["user_id", "item_id"]}, "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id", "mf_embedding_size": 8, "mlp_embedding_size": 32, "mlp_hidden_size": [32, 16, 8],
    "dropout_prob": 0.0, "train_batch_size": 8192,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 4},
    "learner": "adam", "learning_rate": 1e-3, "use_gpu": False, "show_progress": False, "state": "ERROR",
    "eval_args": {"split": {"RS": [1, 0, 0]}, "group_by": "user", "order": "RO", "mode": "full"}})
init_seed(1, True)
dataset = create_dataset(config)
loader, _, _ = data_preparation(config, dataset)
model = NeuMF(config, loader.dataset).to("cpu")
trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
out = []
for epoch in range(epochs):
    start = time.monotonic()
    trainer._train_epoch(loader, epoch)
    out.append({"samples_per_s": 5 * len(dataset) / (time.monotonic() - start)})
print("RESULT" + json.dumps(out))
"""


def recbole(python: str, user: Array, item: Array, epochs: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ml").mkdir()
        rows = "\n".join(f"{u}\t{i}" for u, i in zip(user.tolist(), item.tolist(), strict=True))
        (Path(folder) / "ml" / "ml.inter").write_text(f"user_id:token\titem_id:token\n{rows}\n")
        command = [python, "-c", RECBOLE, folder, str(epochs)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found: list[dict[str, float]] = json.loads(line.removeprefix("RESULT"))
    return found


# ---- beside a busy neighbour ---------------------------------------------------------------------------------------

MODELS = {"neumf, compiled": False, "mf, sampled softmax": True}
OPENMP = "GOMP_SPINCOUNT=300000"
"""GNU OpenMP's default, said aloud: as a person's own setting it is left alone."""
BUSY = ROOT / "benchmarks/results/train_busy.json"


@contextlib.contextmanager
def neighbour(pinned: bool) -> Iterator[None]:
    """Another program that keeps one core busy."""
    pin = f"import os; os.sched_setaffinity(0, {{{cores() - 1}}})\n" if pinned else ""
    with subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def environment(setting: str) -> Iterator[None]:
    """NAME=VALUE,NAME=VALUE; a name without a value is not set. `ours`: what ncf_dist sets by itself."""
    before = dict(os.environ)
    for pair in [] if setting == "ours" else setting.split(","):
        name, _, value = pair.partition("=")
        os.environ.pop(name, None)
        os.environ.update({name: value} if value else {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def busy(args: argparse.Namespace, lake: str) -> None:
    """{model: {setting: {alone | beside: samples/s of every epoch but a training's first}}}"""
    found: dict[str, dict[str, dict[str, list[float]]]] = json.loads(BUSY.read_text())["epochs"] if args.add else {}
    for _ in range(args.repeats):
        for setting in args.settings:
            for model, mf in MODELS.items():
                for where in ("alone", "beside"):
                    company = neighbour(args.pin) if where == "beside" else contextlib.nullcontext()
                    with environment(setting), company:
                        epochs = ours(lake, args.epochs, 1, mf)
                    of = found.setdefault(model, {}).setdefault(setting, {}).setdefault(where, [])
                    of.extend(epoch["samples_per_s"] for epoch in epochs[1:])
    machine = f"{cores()} cores, {processor()}, torch {torch.__version__}"
    print(f"MovieLens-1M, {args.rows or 'all'} positives, one rank, {machine}; beside: one busy core")
    print(f"{'':20} {'setting':24} {'alone':>11} {'beside':>11} {'alone ÷ base':>13} {'beside ÷ base alone':>20}")
    rates = {
        model: {name: {where: statistics.median(r) for where, r in of.items()} for name, of in settings.items()}
        for model, settings in found.items()
    }
    for model, settings in rates.items():
        base = settings[args.settings[0]]["alone"]
        for name, rate in settings.items():
            alone, beside = rate["alone"], rate["beside"]
            print(f"{model:20} {name:24} {alone:11,.0f} {beside:11,.0f} {alone / base:13.2f} {beside / base:20.2f}")
    if not args.dry:
        body = {"machine": machine, "rows": args.rows, "pinned": args.pin, "median": rates, "epochs": found}
        BUSY.write_text(json.dumps(body, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recbole", metavar="PYTHON")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--settings", nargs="+", default=[OPENMP, "ours"])
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep the epochs of an earlier --busy run")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--rows", type=int, help="train on so many positives only")
    args = parser.parse_args()
    user, item = positives(Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")))
    user, item = user[: args.rows], item[: args.rows]
    drawn = negatives(user, item)
    if args.busy:
        with tempfile.TemporaryDirectory() as lake:
            prepare(lake, user, item, drawn)
            busy(args, lake)
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as lake:
            prepare(lake, user, item, drawn)
            runs = {
                "ours, 1 rank": ours(lake, args.epochs, 1),
                "ours, 2 ranks": ours(lake, args.epochs, 2),
                "ours, 2 ranks, cache": ours(lake, args.epochs, 2, cache="host"),
                "bare torch loop": bare(user, item, drawn, args.epochs),
            }
        if args.recbole:
            runs["RecBole"] = recbole(args.recbole, user, item, args.epochs)
        for name, epochs in runs.items():
            found.setdefault(name, []).extend(epochs)
    machine = f"{cores()} cores, {processor()}, torch {torch.__version__}"
    print(f"MovieLens-1M, {len(user):,} positives x (1 + {N}), {EXAMPLES:,} examples a step, {machine}")
    print(f"{'':22} {'samples/s':>12} {'sd':>10} {'x bare':>8} {'x RecBole':>10} {'data-wait':>10}")
    rate = {name: statistics.median(e["samples_per_s"] for e in epochs) for name, epochs in found.items()}
    for name, epochs in found.items():
        spread = statistics.pstdev(e["samples_per_s"] for e in epochs)
        beside = f"{rate[name] / rate['RecBole']:.2f}" if args.recbole else "–"
        wait = f"{statistics.median(e['data_wait'] for e in epochs):.1%}" if "data_wait" in epochs[0] else ""
        ratio = rate[name] / rate["bare torch loop"]
        print(f"{name:22} {rate[name]:12,.0f} {spread:10,.0f} {ratio:8.2f} {beside:>10} {wait:>10}")
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    body = {"machine": machine, "positives": len(user), "epochs": found, "median": rate}
    (results / "train.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
