"""Score at scale: seconds, pairs/s and resident memory over shares of one million users × 20,000 items, and how well
the first share, and the job's own `--dry-run`, forecast the others.

    .venv/bin/python -m benchmarks.score_scale [--users 1000000] [--items 20000] [--shares 0.01 0.05]

`--shares 0.01 1` runs the million. Each share is a lake of its own with that share of the users: indexes, histories of
20 to 50 items a user (a long-tailed catalogue), interactions over 100 days, one user in 50 without a history, and a
NeuMF (factors 8, MLP 64-32-16-8) with random weights: scoring takes as long whatever they are. The tables are written
here as `prepare` lays them out; then the job score runs on local[2] with a 2 GiB heap, K = 10, and beside it the
resident size of its Python workers is sampled every second.

From share a, share b is forecast to take: a's seconds that are not scoring or writing + b/a × those that are. Memory
is flat where the largest worker's size in the last half of the time of scoring is not above that of the first half (+
10 %). Prints a table and writes benchmarks/results/score_scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import yaml

from benchmarks._job import ROOT, watched
from ncf_dist import contracts
from ncf_dist.bundle import save_bundle
from ncf_dist.config import Model
from ncf_dist.lake import Lake
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest
from ncf_dist.models import build_model
from ncf_dist.parquet import FileInfo, TableInfo, write_parquet

DS, SLOTS, K, WORKER = "2026-01-31", 2, 10, 2 * 2**30
USERS_PER_FILE = 50_000
DAY = 86_400 * 10**6


def write_lake(root: str, users: int, items: int) -> None:
    """A finished prepare run and a trained model."""
    runs = Lake(root).stage(DS, "prepare")
    run, rng = runs.begin("p1"), np.random.default_rng(1)
    user_index, item_index = contracts.user_index(pa.int64()), contracts.item_index(pa.int64())
    files: dict[contracts.Contract, list[FileInfo]] = {}

    def write(contract: contracts.Contract, columns: list[Any]) -> None:
        table = pa.table(
            [pa.array(c).cast(f.type) for c, f in zip(columns, contract.schema, strict=True)], contract.schema
        )
        infos = files.setdefault(contract, [])
        infos.append(write_parquet(table, f"{run}/{contract.name}", f"part-{len(infos):05d}-000.parquet"))

    write(item_index, [np.arange(items) + 1, np.arange(items)])
    night = int(np.datetime64(DS, "us").astype(np.int64))
    for start in range(0, users, USERS_PER_FILE):
        user = np.arange(start, min(users, start + USERS_PER_FILE))
        write(user_index, [user * 7 + 1, user])
        with_history = user[user % 50 != 0]
        wanted = rng.integers(20, 51, len(with_history))
        row = np.repeat(with_history, wanted)
        pairs = np.unique(row * items + (items * rng.random(len(row)) ** 2).astype(np.int64))
        row, item = pairs // items, pairs % items
        sizes = np.bincount(row - start, minlength=len(user))[with_history - start]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        none = pa.ListArray.from_arrays(pa.array(np.zeros_like(offsets)), pa.array([], pa.int32()))
        write(
            contracts.HISTORY, [with_history, pa.ListArray.from_arrays(offsets, pa.array(item.astype(np.int32))), none]
        )
        when = night - rng.integers(1, 100 * DAY, len(row))
        write(contracts.INTERACTIONS, [row, item, np.ones(len(row)), when, np.zeros(len(row), dtype=np.int8)])
    tables = {c.name: TableInfo(c.name, c.fingerprint, tuple(infos)) for c, infos in files.items()}
    made_with = {"input": {"path": "unused"}}  # As `job` says; everything else is at its default.
    runs.finish(Manifest(stage="prepare", ds=DS, run_key="p1", root=run, config=made_with, inputs={}, tables=tables))
    config = Model(name="neumf")
    torch.manual_seed(1)
    runs = Lake(root).stage(DS, "train")
    run = runs.begin("t1")
    save_bundle(f"{run}/bundle", build_model(config, users, items), config, users, items, {})
    runs.finish(Manifest(stage="train", ds=DS, run_key="t1", root=run, config={}, inputs={"prepare": "p1"}))


class Watch(threading.Thread):
    """(seconds since the start, bytes of the largest Python process below the given one), every second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.ended = psutil.Process(pid), threading.Event()
        self.seen: list[tuple[float, int]] = []

    def run(self) -> None:
        start = time.monotonic()
        while not self.ended.wait(1.0):
            self.seen.append((time.monotonic() - start, max(map(size_of, self._below()), default=0)))

    def _below(self) -> list[psutil.Process]:
        try:
            return self.process.children(recursive=True)
        except psutil.Error:
            return []


def size_of(process: psutil.Process) -> int:
    """Resident bytes of a Python worker of Spark; 0 for any other process, or one that has ended."""
    try:
        return process.memory_info().rss if "pyspark.daemon" in process.cmdline() else 0
    except psutil.Error:
        return 0


def job(root: str, *more: str) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """(the last line of the job score, sizes of its workers)"""
    tree = {
        "paths": {"lake": root, "work": f"{root}/work"},
        "input": {"path": "unused"},
        "score": {"k": K},
        "spark": {"master": f"local[{SLOTS}]", "driver_memory": "2g"},
    }
    path = Path(root) / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    java = subprocess.run([str(ROOT / "spark-submit.sh"), "--java-home"], capture_output=True, text=True, check=True)
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "JAVA_HOME": java.stdout.strip()}
    command = [sys.executable, "-m", "ncf_dist.cli", "score", "--config", str(path), "--ds", DS, *more]
    out, _, watch = watched(command, Watch, environment)
    return json.loads(out.splitlines()[-1]), watch.seen


def measure(users: int, items: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        write_lake(root, users, items)
        dry, _ = job(root, "--dry-run")
        done, sizes = job(root)
        facts = Lake(root).stage(DS, "score").newest().facts
    within = (facts["seconds"]["score"] + facts["seconds"]["write"]) / SLOTS  # Loading is done once a worker.
    busy = [size for _, size in sizes if size > 100 * 2**20]  # Torch is loaded: a worker that scores.
    first, last = busy[: len(busy) // 2], busy[len(busy) // 2 :]
    return {
        "users": users,
        "items": items,
        "seconds": done["seconds"],
        "within": within,
        "pairs": done["metrics"]["score.pairs"],
        "rows": done["metrics"]["score.rows"],
        "dry_run": dry["metrics"],
        "most_bytes": max(busy, default=0),
        "flat": max(last, default=0) <= 1.1 * max(first, default=1),
        "sizes": [[round(second, 1), size] for second, size in sizes],
    }


def show(found: dict[str, Any], first: dict[str, Any]) -> None:
    times = found["users"] / first["users"]
    forecast = first["seconds"] - first["within"] + times * first["within"]
    dry = found["dry_run"]["forecast.seconds"]
    found["forecast_from_first"] = forecast
    rate = found["pairs"] / found["within"] / SLOTS
    print(
        f"{found['users']:10,} {found['seconds']:8.0f} {found['within']:8.0f} {rate:12,.0f} "
        f"{forecast:8.0f} {forecast / found['seconds'] - 1:+6.0%} {dry:8.0f} {dry / found['seconds'] - 1:+6.0%} "
        f"{found['most_bytes'] / 2**20:8.0f} {found['dry_run']['forecast.memory_bytes'] / 2**20:8.0f} "
        f"{'yes' if found['flat'] else 'NO':>5}",
        flush=True,
    )
    step = max(1, len(found["sizes"]) // 12)
    sizes = "  ".join(f"{second:.0f}s {size / 2**20:.0f}" for second, size in found["sizes"][::step])
    print(f"{'':10} largest worker, MiB: {sizes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05])
    args = parser.parse_args()
    print(f"{args.items:,} items, K {K}, local[{SLOTS}], {cores()} cores, heap 2 GiB; allowed a worker: 2,048 MiB")
    print(
        f"{'users':>10} {'seconds':>8} {'in pass':>8} {'pairs/s/slot':>12} {'from 1st':>8} {'off':>6} {'dry-run':>8} "
        f"{'off':>6} {'MiB':>8} {'forecast':>8} {'flat':>5}"
    )
    results: list[dict[str, Any]] = []
    for share in args.shares:
        results.append(measure(round(args.users * share), args.items))
        show(results[-1], results[0])
        assert results[-1]["most_bytes"] < WORKER
    path = ROOT / "benchmarks/results/score_scale.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"cores": cores(), "machine": processor(), "torch": torch.__version__, "slots": SLOTS}
    path.write_text(json.dumps({**machine, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
