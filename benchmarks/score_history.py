"""Ranking by histories beside ranking by ids: what item-to-item parts and a tower cost, on one core.

    .venv/bin/python -m benchmarks.score_history [--size 50000x20000] [--rounds 3] [--tower-users 1024]

`scoring.recommend`, 10 items a user, 100 seen items masked, 512 users a call, width 64 (random weights), 100 latest
items a user, all drawn at random, which is the hardest for a processor's caches:

- mf: dot products of ids, as in benchmarks/score.py
- history: the model of histories with its tower's output given, so ranking alone: one column, the item's bias, more
- + counts: beside it a part of each user's last 20 items, 200 kept of each, and a column
- + ease: beside these a part of the last 100 items, 200 kept of each

In turns, `rounds` times after one that is not counted, in CPU seconds; a share is of one round's own mf. The towers:
`ranking_users` of 100 items, 64 wide, 2 blocks of each kind, milliseconds a user.

Prints one table and writes benchmarks/results/score_history.json. pairs: users x items, in millions a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.score import RANK, USERS_A_CALL, K, model_of, seen_items
from ncf_dist import native, scoring
from ncf_dist.item_item.part import Part
from ncf_dist.item_item.rows import ItemRows
from ncf_dist.machine import processor
from ncf_dist.models import History, Sequences, Side, Users
from ncf_dist.models.history import BLOCKS
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.scoring.sparse import LIBRARY

ROOT = Path(__file__).parent.parent
HISTORY, KEPT, COUNTED = 100, 200, 20


class OutputGiven(History):
    """The tower's output is not computed: one of 256 vectors, by the user's first item."""

    def user_side(self, user: Sequences) -> Side:
        if not hasattr(self, "outputs"):
            self.outputs = torch.nn.functional.normalize(torch.randn(256, RANK), dim=1) * 14
        return Side(self.outputs[user.items[:, 0] % 256])


def history_model(kind: type[History], items: int, block: str = "mix") -> History:
    torch.manual_seed(1)
    model = kind(1, items, RANK, HISTORY, block=block).requires_grad_(False).eval()
    model.item.weight.normal_()
    return model


def rows(items: int, rng: np.random.Generator, column: bool) -> ItemRows:
    """KEPT of each item: one of each of as many equal stretches."""
    edges = np.linspace(0, items, KEPT + 1).astype(np.int64)
    kept = rng.integers(edges[:-1], edges[1:], (items, KEPT)).astype(np.int32).reshape(-1)
    values, every = (rng.random(size, dtype=np.float32) for size in (len(kept), items))
    offsets = torch.arange(items + 1) * KEPT
    return ItemRows(
        offsets, torch.from_numpy(kept), torch.from_numpy(values), torch.from_numpy(every) if column else None
    )


def ways(users: int, items: int) -> dict[str, ModelScorer]:
    rng, model = np.random.default_rng(1), history_model(OutputGiven, items)
    counts = Part("counts", 0.6, 2.0, COUNTED, rows(items, rng, column=True))
    ease = Part("ease", 5.0, 30.0, HISTORY, rows(items, rng, column=False))
    return {
        "mf": ModelScorer(model_of("gaussian", users, items), items),
        "history": ModelScorer(model, items),
        "+ counts": ModelScorer(model, items, parts=[counts]),
        "+ ease": ModelScorer(model, items, parts=[counts, ease]),
    }


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def rank(scorer: ModelScorer, users: Users, seen: Lists) -> None:
    for first in range(0, len(users), USERS_A_CALL):
        end = min(first + USERS_A_CALL, len(users))
        scoring.recommend(scorer, users.rows(slice(first, end)), seen.part(first, end), K)


def ranking(users: int, items: int, rounds: int) -> dict[str, dict[str, Any]]:
    drawn = torch.from_numpy(np.random.default_rng(2).integers(0, items, (users, HISTORY)))
    described = Users(torch.arange(users), Sequences(drawn, torch.zeros_like(drawn), torch.full((users,), HISTORY)))
    masked = seen_items(users, items)
    seen = Lists(masked.reshape(-1), np.arange(users + 1) * masked.shape[1])
    scorers = ways(users, items)
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for number in range(1 + rounds):
        for name, scorer in scorers.items():
            spent = cpu_seconds(lambda scorer=scorer: rank(scorer, described, seen))  # type: ignore[misc]
            seconds[name] += [spent] if number else []
    found = {}
    for name, times in seconds.items():
        share = statistics.median(mf / own for mf, own in zip(seconds["mf"], times, strict=True))
        found[name] = {"seconds": times, "pairs": users * items / statistics.median(times) / 1e6, "share": share}
    return found


def towers(items: int, users: int, rounds: int) -> dict[str, float]:
    """Milliseconds a user, by block."""
    drawn = torch.from_numpy(np.random.default_rng(3).integers(0, items, (users, HISTORY)))
    latest = Sequences(drawn, drawn % 64, torch.full((users,), HISTORY))
    found = {}
    for block in BLOCKS:
        model = history_model(History, items, block)
        with torch.no_grad():
            times = [cpu_seconds(lambda model=model: model.ranking_users(latest)) for _ in range(1 + rounds)]  # type: ignore[misc]
        found[block] = 1000 * statistics.median(times[1:]) / users
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="50000x20000", metavar="USERSxITEMS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tower-users", type=int, default=1024)
    args = parser.parse_args()
    users, items = map(int, args.size.split("x"))
    torch.set_num_threads(1)
    built = "compiled" if native.library(LIBRARY) else "torch's operations"
    machine = f"one core of {processor()}, torch {torch.__version__}, parts added by {built} code"
    print(machine)
    results: dict[str, Any] = {"machine": machine, "size": args.size, "ranking": ranking(users, items, args.rounds)}
    title = f"ranking, {users:,} x {items:,}"
    print(f"{title:32} {'CPU s':>8} {'pairs':>8} {'of mf':>8} {'us a user':>10}")
    for name, one in results["ranking"].items():
        seconds = statistics.median(one["seconds"])
        print(f"{name:32} {seconds:8.2f} {one['pairs']:8.0f} {one['share']:8.0%} {1e6 * seconds / users:10.1f}")
    results["towers"] = towers(items, args.tower_users, args.rounds)
    for block, milliseconds in results["towers"].items():
        print(f"tower of {HISTORY} items, {block:14} {milliseconds:8.2f} ms a user")
    path = ROOT / "benchmarks/results/score_history.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
