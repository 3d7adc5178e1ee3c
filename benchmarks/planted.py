"""A synthetic log with planted order: what tables of order cost, and how near a model gets to the rule.

    .venv/bin/python -m benchmarks.planted [--millions 5] [--seeds 1 2 3] [--rounds 1] [--models item_to_item history]
        [--set …]

Items stand on a ring, in random order. Each user takes LENGTH of them: after an item comes with odds RULE one of the
FOLLOWERS that follow it on the ring, the n-th with a weight of 1 / n, and else an item at random; what the user has had
is drawn again. So whoever knows the rule knows the odds of every next item. The oracle does, and ranks by them what the
user has not had: its HR@10 on each user's last item is the most that a model of order can reach.

- cost: `prepare` without tables of order, with `sequences` and `recent`, and with the counts of what follows what too,
  in turn, `rounds` times there and back, each a job of its own in a lake of its own, with a heap of HEAP. Seconds are
  wall clock, launcher and JVM included, MiB the largest resident size of any Python process; the median counts.
- models: `prepare`, `train` and `evaluate`, with the settings of `--set` and those that a model gets in SETTINGS: as
  the rule looks back one item, so do counts; `history` has no item-to-item parts. HR@10 on the whole catalogue, and its
  share of the oracle's, of each seed: a ring, users and training of its own.

Prints both and writes benchmarks/results/planted.json, in which the seeds and models that are not asked for stay, and
the cost.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import yaml

from benchmarks._job import job
from ncf_dist.machine import cores, processor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/planted.json"
K = 10
LENGTH, ITEMS, FOLLOWERS, RULE = 100, 5_000, 20, 0.6
WINDOW, HEAP = 100, "2g"
START, STEP = 1_600_000_000, 3_600
IntArray = npt.NDArray[np.int64]


class Rule:
    """followers: (ITEMS, FOLLOWERS), the items that come after each, the next one first."""

    def __init__(self, seed: int) -> None:
        ring = np.random.default_rng(seed).permutation(ITEMS)
        self.followers: IntArray = np.empty((ITEMS, FOLLOWERS), dtype=np.int64)
        self.followers[ring] = np.stack([np.roll(ring, -step) for step in range(1, FOLLOWERS + 1)], axis=1)
        weight = 1 / np.arange(1, FOLLOWERS + 1)
        self.weight = weight / weight.sum()

    def next(self, rng: np.random.Generator, item: IntArray) -> IntArray:
        """(U,) what comes after each item, whoever asks."""
        place = rng.choice(FOLLOWERS, size=len(item), p=self.weight)
        return np.where(rng.random(len(item)) < RULE, self.followers[item, place], rng.integers(ITEMS, size=len(item)))

    def odds(self, item: IntArray) -> npt.NDArray[np.float64]:
        """(U, ITEMS) the odds of every next item."""
        odds = np.full((len(item), ITEMS), (1 - RULE) / ITEMS)
        odds[np.arange(len(item))[:, None], self.followers[item]] += RULE * self.weight
        return odds


def histories(rule: Rule, users: int, seed: int) -> IntArray:
    """(users, LENGTH) items in order, none twice."""
    rng = np.random.default_rng(seed)
    taken: IntArray = np.empty((users, LENGTH), dtype=np.int64)
    taken[:, 0] = rng.integers(ITEMS, size=users)
    for step in range(1, LENGTH):
        left = np.arange(users)
        while len(left):
            taken[left, step] = rule.next(rng, taken[left, step - 1])
            left = left[(taken[left, :step] == taken[left, step, None]).any(axis=1)]
    return taken


def oracle(rule: Rule, taken: IntArray) -> float:
    """HR@10 of ranking by the odds, each user's last item among all that the user had not had."""
    hits = 0.0
    for rows in np.array_split(taken, max(1, len(taken) // 1_000)):
        before, last = rows[:, :-1], rows[:, -1]
        odds = rule.odds(before[:, -1])
        np.put_along_axis(odds, before, -1.0, axis=1)
        own = np.take_along_axis(odds, last[:, None], axis=1)
        better, equal = (odds > own).sum(axis=1), (odds == own).sum(axis=1)
        # Items of equal odds are ranked in any order: the share of the orders in which the item is among the first.
        hits += float(np.clip((K - better) / equal, 0, 1).sum())
    return hits / len(taken)


def write_log(path: Path, taken: IntArray) -> None:
    """The users' rows, mixed, with times that ascend within each user."""
    users = len(taken)
    columns = {
        "user": np.repeat(np.arange(users), LENGTH),
        "item": taken.ravel(),
        "time": START + np.tile(np.arange(LENGTH) * STEP, users) + np.repeat(np.arange(users) % STEP, LENGTH),
    }
    mixed = np.random.default_rng(2).permutation(users * LENGTH)
    pa.csv.write_csv(pa.table({name: column[mixed] for name, column in columns.items()}), path)


def base(folder: Path, seed: int) -> dict[str, Any]:
    named = {"user": "user", "item": "item", "timestamp": "time"}
    return {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "input": {
            "path": str(folder / "log.csv"), "format": "csv", "columns": named, "user_type": "int", "item_type": "int",
        },
        "negatives": {"per_positive": 4, "draws": 1, "candidates": 99},
        "sequences": {"length": 0},
        "seed": seed,
        "spark": {"master": f"local[{min(2, cores())}]", "driver_memory": HEAP, "shuffle_partitions": 16},
    }  # fmt: skip


SETTINGS = {
    "item_to_item": ["sequences.steps=1", "parts.counts.last=1"],
    "history": [
        *("sequences.length=20", "model.history=20", "model.factors=64", "model.init_std=0.05"),
        *("train.ranks=2", "train.loss=sampled_softmax", "train.shared_negatives=512", "train.batch_size=40"),
        *("train.optimiser=adamw", "train.lr=0.002", "train.betas=[0.9,0.98]", "train.schedule=linear"),
        *("train.epochs=6", "train.patience=6", "loader.cache=host"),
    ],
}
WAYS = {
    "without": ["sequences.length=0"],
    "sequences": [f"sequences.length={WINDOW}", "sequences.next_items=0"],
    "and counts": [f"sequences.length={WINDOW}"],
}


def cost(config: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians by way."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    lake = config.parent / "timed"
    for number in range(2 * rounds):
        for way in reversed(WAYS) if number % 2 else WAYS:
            found[way].append(job("prepare", config, [*WAYS[way], f"paths.lake={lake}"]))
            print(f"  {way:12} {found[way][-1]['wall']:8.1f} s", flush=True)
            shutil.rmtree(lake)
    names = ("wall", "python")
    return {way: {name: statistics.median(r[name] for r in runs) for name in names} for way, runs in found.items()}


def judged(config: Path, model: str, settings: list[str]) -> dict[str, float]:
    """HR@10 and the seconds of training."""
    chosen = [*WAYS["and counts"], f"model.name={model}", *SETTINGS.get(model, []), *settings]
    job("prepare", config, chosen)
    train = job("train", config, chosen)
    found = job("evaluate", config, chosen)
    return {"hr@10": found["metrics"]["full.hr@10"], "train_s": train["wall"]}


def run_seed(seed: int, users: int, rounds: int, models: list[str], settings: list[str]) -> None:
    """Prints what it finds, and keeps it."""
    rule = Rule(seed)
    taken = histories(rule, users, seed)
    best = oracle(rule, taken)
    machine = f"{cores()} cores, {processor()}, Python {platform.python_version()}"
    print(f"{taken.size:,} interactions, {ITEMS:,} items, seed {seed}; {machine}")
    print(f"oracle       HR@10 {best:.4f}", flush=True)
    told: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seeds": {}}
    log = {"interactions": taken.size, "items": ITEMS, "oracle": best}
    of_seed = told["seeds"].get(str(seed), {})
    if {name: of_seed.get(name) for name in log} != log:
        of_seed = log  # What models reached on another log says nothing of this one.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "log.csv", taken)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(base(folder, seed)))
        if rounds:
            told["cost"] = {
                "machine": machine, "interactions": taken.size, "rounds": rounds, "ways": cost(config, rounds),
            }  # fmt: skip
            for way, each in told["cost"]["ways"].items():
                times = each["wall"] / told["cost"]["ways"]["without"]["wall"]
                print(f"{way:12} {each['wall']:8.1f} s {times:6.2f} × Python {each['python']:.0f} MiB", flush=True)
        for model in models:
            found = judged(config, model, settings)
            of_seed[model] = {**found, "share": found["hr@10"] / best, "settings": settings, "machine": machine}
            print(f"{model:12} HR@10 {found['hr@10']:.4f}, {of_seed[model]['share']:.1%} of the oracle's", flush=True)
    told["seeds"][str(seed)] = of_seed
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=1, help="of the cost, on the first seed; 0 leaves it out")
    parser.add_argument("--models", nargs="*", default=["item_to_item"])
    parser.add_argument("--set", nargs="*", default=[], help="settings of train and evaluate: section.key=value …")
    args = parser.parse_args()
    for number, seed in enumerate(args.seeds):
        run_seed(seed, int(args.millions * 1e6) // LENGTH, args.rounds * (number == 0), args.models, args.set)


if __name__ == "__main__":
    main()
