"""NVIDIA's NCF recipe on a log of MovieLens-20M's shape, on GPUs: samples/s, and the share of what memory allows.

    .venv/bin/python benchmarks/train_gpu.py [--gpus 1] [--epochs 5] [--cache device] [--log 1.0]

The recipe (NVIDIA's DeepLearningExamples, NCF for PyTorch): NeuMF with 64 factors and an MLP of 256-256-128-64, 4
negatives, 2^20 examples a step over all GPUs, Adam, bf16 products. Their README gives 34.1 million samples/s on one
A100 with AMP. The log: 20,000,263 interactions of 138,493 users with 26,744 items, as many as MovieLens-20M has, users
and items drawn with long tails from seed 1; `--log 0.01` takes that share of users, of interactions and of
a step's examples, to try the script.
The tables are made here as `prepare` lays them out; then the job train reads them through Petastorm (`--backend arrow`:
where there is none), and draws the negatives on the device (`train.negatives: online`).

What a sample must move at least, in bytes: what its share of a step's dense work reads and writes, where M is the
number of embedding parameters, E = 2^20 a step's examples, P a sample's embedding width (both sides) and W the widths
of the MLP's layers:

    28 M / E        Adam: weight, gradient and two moments read; weight and moments written (float32)
     4 M / E        the gradient tables set to zero
    12 P            embeddings read, then their gradients added (read and written), float32
     6 sum(W)       activations written, read by the next layer, and their gradients written (bf16)

The limit is the device's rate of copying 1 GiB within its memory (read and write counted), measured here, divided by
that. Prints a table (median epoch, the first one left out: it reads the files) and writes
benchmarks/results/train_gpu.json. `--device cpu` runs the same on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ncf_dist import contracts
from ncf_dist.config import Config, Negatives
from ncf_dist.lake import Lake
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import write_parts
from ncf_dist.train.pipeline import train

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
USERS, ITEMS, ROWS, FILES, N, EXAMPLES = 138_493, 26_744, 20_000_263, 32, 4, 2**20
FACTORS, LAYERS = 64, (256, 256, 128, 64)
ANCHOR = 34.1e6
NEGATIVES = Negatives(per_positive=N, draws=0)


def interactions(users: int, rows: int) -> npt.NDArray[np.int64]:
    """(rows, 2) distinct (user, item) pairs, shuffled: activity log-normal, popularity falling as 1 / (rank + 50)."""
    rng = np.random.default_rng(1)
    activity = rng.lognormal(0.0, 1.1, users) + 0.15
    popularity = 1 / (np.arange(ITEMS) + 50.0)
    keys = np.empty(0, np.int64)
    while len(keys) < rows:
        count = int((rows - len(keys)) * 1.2) + users
        user = rng.choice(users, count, p=activity / activity.sum())
        item = rng.choice(ITEMS, count, p=popularity / popularity.sum())
        keys = np.unique(np.concatenate([keys, user * ITEMS + item]))
    keys = rng.permutation(keys)[:rows]
    return np.column_stack([keys // ITEMS, keys % ITEMS])


def prepare(lake: str, users: int, rows: int) -> None:
    """A finished prepare run with a train table and nothing held out."""
    runs = Lake(lake).stage(DS, "prepare")
    run = runs.begin("p1")
    contract = contracts.train(N, 0)
    pairs = np.array_split(interactions(users, rows).astype(np.int32), FILES)
    tables = {
        "train": write_parts((pa.table(list(part.T), schema=contract.schema) for part in pairs), run, contract),
        "validation": write_parts([contracts.VALIDATION.schema.empty_table()], run, contracts.VALIDATION),
    }
    config = {"negatives": NEGATIVES.model_dump(mode="json")}
    runs.finish(
        Manifest(
            stage="prepare",
            ds=DS,
            run_key="p1",
            root=run,
            config=config,
            inputs={},
            tables=tables,
            facts={"users": users, "items": ITEMS},
        )
    )


def epochs_of(lake: str, args: argparse.Namespace, examples: int) -> list[dict[str, Any]]:
    """history.json's epochs of the job train."""
    config = Config.model_validate(
        {
            "paths": {"lake": lake, "work": f"{lake}/work"},
            "input": {"path": "unused"},
            "negatives": NEGATIVES.model_dump(),
            "model": {"name": "neumf", "factors": FACTORS, "layers": LAYERS},
            "loader": {"backend": args.backend, "cache": args.cache, "cache_bytes": 2**34},
            "train": {
                "launcher": "torchrun" if args.gpus > 1 else "none",
                "ranks": args.gpus,
                "device": args.device,
                "precision": "bf16",
                "negatives": "online",
                "epochs": args.epochs,
                "batch_size": examples // (1 + N) // args.gpus,
                "lr": 0.0045,
                "betas": (0.25, 0.5),
            },
        }
    )
    made = {"prepare": Lake(lake).stage(DS, "prepare").newest()}
    outcome = train(config, DS, made)
    found: list[dict[str, Any]] = json.loads(Path(outcome.outputs["history"]).read_text())["epochs"]
    return found


def bytes_a_sample(users: int, examples: int) -> float:
    """The formula above."""
    width = FACTORS + LAYERS[0] // 2
    tables = (users + ITEMS) * width
    return 32 * tables / examples + 12 * 2 * width + 6 * sum(LAYERS)


def copy_rate(device: str) -> float:
    """Bytes/s, read and written, of copies within the device's memory; the best of ten."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).fill_(1)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=1, help="processes, with --device cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--backend", choices=["petastorm", "arrow"], default="petastorm", help="who reads the files")
    parser.add_argument("--cache", choices=["none", "host", "device"], default="device")
    parser.add_argument("--log", type=float, default=1.0, help="share of users, interactions and a step's examples")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/train_gpu.json")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs must be 2 or more: the first one is not counted")
    if args.device == "cuda" and torch.cuda.device_count() < args.gpus:
        parser.error(f"{torch.cuda.device_count()} GPUs here, {args.gpus} asked: lower --gpus, or try --device cpu")
    users, rows, examples = (int(n * args.log) for n in (USERS, ROWS, EXAMPLES))
    limit = args.gpus * copy_rate(args.device) / bytes_a_sample(users, examples)
    with tempfile.TemporaryDirectory() as lake:
        prepare(lake, users, rows)
        epochs = epochs_of(lake, args, examples)
    counted = epochs[1:]
    rates = [epoch["samples_per_s"] for epoch in counted]
    rate, wait = statistics.median(rates), statistics.median(epoch["data_wait"] for epoch in counted)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{cores()} cores, {processor()}"
    print(f"{rows:,} positives x (1 + {N}), {examples:,} examples a step, {args.gpus} x {name}, cache {args.cache}")
    print(f"samples/s               {rate:16,.0f} ± {statistics.pstdev(rates):,.0f}, {len(counted)} epochs")
    print(f"x one A100 of NVIDIA's  {rate / ANCHOR:16.3f}")
    print(f"memory would allow      {limit:16,.0f} at {bytes_a_sample(users, examples):,.0f} bytes a sample")
    print(f"share of that           {rate / limit:16.1%}")
    print(f"waiting for data        {wait:16.1%}")
    body = {
        "machine": f"{args.gpus} x {name}",
        "torch": torch.__version__,
        "log": args.log,
        "cache": args.cache,
        "epochs": epochs,
        "samples_per_s": rate,
        "bytes_a_sample": bytes_a_sample(users, examples),
        "limit": limit,
    }
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
