"""Bytes and milliseconds of a training step over a network of 1 Gbit/s, by the way gradients are exchanged.

    sudo .venv/bin/python -m benchmarks.exchange [--steps 30] [--rate 1gbit | --rate none]

Two ranks of one thread, each in a network namespace of its own, joined by a pair of interfaces that send `rate`
(a token bucket of 64 kB); with `--rate none` both over loopback, as `train.ranks: 2` runs on one machine. Bytes are
what an interface has sent, headers included; both are means over ranks, and the milliseconds medians over steps. Every
way trains the same model on the same batches, through the trainer:

- alone: one rank that exchanges nothing: what a step computes
- DDP: DistributedDataParallel as torch has it
- dense, rows, auto: train.exchange; bf16: train.exchange_dtype

NeuMF is that of benchmarks/train.py (8,192 examples a step over both ranks), the model of histories that of
conf/ncf-ml-1m-history.yaml (20 windows a rank). What matters of a batch is which rows it touches: users and items are
drawn from the rows of MovieLens-1M (NCF_DATA_DIR/ml-1m), or, of 50,000 users and 20,000 items, users uniformly and
items with a long tail; negatives uniformly.

Namespaces need root, `ip` and `tc`. Prints one table and writes benchmarks/results/exchange.json, or for --rate none
exchange_one_machine.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.train import positives
from ncf_dist.config import Model, Train
from ncf_dist.machine import cores, processor
from ncf_dist.models import build_model
from ncf_dist.train.epoch_order import Phase
from ncf_dist.train.loaders import Batch
from ncf_dist.train.network import LISTENING, bound_to, listen
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.windows import grouped
from ncf_dist.train.world import World

ROOT = Path(__file__).parent.parent
N, ROWS, WINDOWS, LENGTH, SHARED = 4, 8192 // (1 + 4) // 2, 20, 150, 1024
SIZES = {"MovieLens-1M": (6_040, 3_706), "50,000 x 20,000": (50_000, 20_000)}
Draw = Callable[[np.random.Generator, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
TAIL = 3
"""An item's rank is a uniform number to this power: half of the rows are of the most popular eighth of the items."""
WAYS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "dense": {"exchange": "dense"},
    "rows": {"exchange": "rows"},
    "auto": {"exchange": "auto"},
    "auto, bf16": {"exchange": "auto", "exchange_dtype": "bf16"},
}
LINK = "ncf-bench"
ADDRESSES = ("10.211.3.1", "10.211.3.2")
LOOPBACK = "lo"
PORT = 29_511


def model_and_loss(name: str) -> tuple[Model, str]:
    if name == "neumf":
        return Model(name="neumf", factors=8, layers=(64, 32, 16, 8)), "bce"
    return Model(name="history", factors=128, history=LENGTH, blocks=2, heads=8, dropout=0.2), "sampled_softmax"


def positives_of(where: str) -> Draw:
    """So many users, and what each of them likes."""
    users, items = SIZES[where]
    if where != "MovieLens-1M":
        return lambda rng, n: (rng.integers(users, size=n), (items * rng.random(n) ** TAIL).astype(np.int64))
    known = positives(Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")))

    def draw(rng: np.random.Generator, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows = rng.integers(len(known[0]), size=n)
        return known[0][rows], known[1][rows]

    return draw


def batches(name: str, draw: Draw, items: int, steps: int, rank: int) -> list[Batch]:
    rng, same = np.random.default_rng(rank), np.random.default_rng(1000)
    found = []
    for _ in range(steps):
        if name == "neumf":
            user, item = draw(rng, ROWS)
            rows = np.column_stack([item, rng.integers(items, size=(ROWS, N))])
            found.append(Batch(torch.from_numpy(user), torch.from_numpy(rows)))
            continue
        length = np.where(rng.random(WINDOWS) < 0.5, LENGTH + 1, rng.integers(2, LENGTH + 2, WINDOWS))
        gaps = rng.integers(0, 64, (WINDOWS, LENGTH + 1))
        history = draw(rng, WINDOWS * (LENGTH + 1))[1].reshape(WINDOWS, -1)
        _, windows, targets = grouped(length, history, gaps, -(-LENGTH // 8))
        shared = torch.from_numpy(same.integers(items, size=SHARED))
        found.append(
            Batch(torch.arange(WINDOWS), torch.from_numpy(targets)[:, None], None, shared, windows, WINDOWS * 90.0)
        )
    return found


# ---- a rank --------------------------------------------------------------------------------------------------------


class Loader:
    rows, phase = 1, Phase(1, 1, 1)


class Nothing:
    """DDP as torch has it: nothing beside it is exchanged."""

    def announce(self, batch: Batch) -> None:
        pass

    def finish(self) -> None:
        pass


def trainer_of(name: str, size: tuple[int, int], world: World, way: str | None) -> Trainer:
    model, loss = model_and_loss(name)
    torch.manual_seed(1)
    loader: Any = Loader()
    config = Train(**(WAYS[way] if way else {}), optimiser="adamw", device="cpu")
    alone = World() if way in (None, "DDP") else world
    trainer = Trainer(build_model(model, *size), loader, lambda _: {}, config, alone, loss=loss)
    if way == "DDP":
        trainer.world, trainer.objective = world, DistributedDataParallel(trainer.signals, gradient_as_bucket_view=True)
        trainer.exchange = Nothing()  # type: ignore[assignment]
    return trainer


def sent(interface: str) -> int:
    """Bytes that a rank has sent so far over this namespace's interface. Loopback sends what both say."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8]) // (2 if interface == LOOPBACK else 1)
    return 0


def measured(trainer: Trainer, some: list[Batch], interface: str, together: bool) -> dict[str, float]:
    """Mean bytes and median milliseconds of a step, after three to warm up."""
    taken = []
    for number, batch in enumerate(some):
        if number == 3:
            before = sent(interface)
        start = time.perf_counter()
        trainer.train_step(batch, 0.0)
        taken.append(1000 * (time.perf_counter() - start))
        trainer.progress.updates += 1
    counted = sent(interface) - before
    if together:
        dist.barrier()
    return {"bytes": counted / (len(some) - 3), "ms": statistics.median(taken[3:])}


def rank_main(rank: int, interface: str, steps: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    one_machine = interface == LOOPBACK
    address = "127.0.0.1" if one_machine else ADDRESSES[0]
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT=str(PORT))
    os.environ.update(bound_to(interface))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            listening = stack.enter_context(listen(address, PORT))
            os.environ[LISTENING] = str(listening.fileno())
        else:
            os.environ[LISTENING] = ""
        world, draws = World(rank, 2, one_machine=one_machine), {where: positives_of(where) for where in SIZES}
        world.join(120)
        for name in ("neumf", "history"):
            for where, size in SIZES.items():
                some = batches(name, draws[where], size[1], steps + 3, rank)
                for way in (None, *WAYS):
                    trainer = trainer_of(name, size, world, way)
                    with mock.patch.object(trainer.progress, "phases", [trainer.loader.phase]):
                        found = measured(trainer, some, interface, together=True)
                    row = {"model": name, "where": where, "way": way or "alone", **found}
                    print(json.dumps(row), flush=True)
        world.leave()


# ---- the network ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def network(rate: str) -> Iterator[list[tuple[list[str], str]]]:
    """Two namespaces, or this one twice: (how to run a command there, its interface) of each."""
    if rate == "none":
        yield [([], LOOPBACK)] * 2
        return
    spaces = [f"{LINK}-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"ncfb{os.getpid() % 10_000}{side}" for side in "ab"]

    def run(*command: str) -> None:
        subprocess.run(command, check=True)

    try:
        for space in spaces:
            run("ip", "netns", "add", space)
        run("ip", "link", "add", ends[0], "netns", spaces[0], "type", "veth", "peer", ends[1], "netns", spaces[1])
        for space, end, address in zip(spaces, ends, ADDRESSES, strict=True):
            inside = ("ip", "netns", "exec", space)
            run(*inside, "ip", "address", "add", f"{address}/24", "dev", end)
            run(*inside, "ip", "link", "set", end, "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            shaped = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")
            run(*inside, "tc", "qdisc", "add", "dev", end, *shaped)
        yield [(["ip", "netns", "exec", space], end) for space, end in zip(spaces, ends, strict=True)]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], stderr=subprocess.DEVNULL, check=False)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with network(args.rate) as sides:
        ranks = [
            subprocess.Popen(
                [
                    *inside,
                    sys.executable,
                    __file__,
                    "--rank",
                    str(rank),
                    "--interface",
                    end,
                    "--steps",
                    str(args.steps),
                ],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for rank, (inside, end) in enumerate(sides)
        ]
        lines = [rank.communicate()[0].splitlines() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank failed; its message is above")
    found = []
    for pair in zip(*lines, strict=True):
        one, other = map(json.loads, pair)
        found.append({**one, **{what: (one[what] + other[what]) / 2 for what in ("bytes", "ms")}})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--interface", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    if args.rank is not None:
        return rank_main(args.rank, args.interface, args.steps)
    if args.rate != "none" and (os.geteuid() or not (shutil.which("ip") and shutil.which("tc"))):
        print("left out: needs root, ip and tc, for two network namespaces")
        return
    rows = measure(args)
    machine = f"{cores()} cores, {processor()}, torch {torch.__version__}"
    print(f"a step of two ranks of one thread, {args.rate}, {machine}")
    print(f"{'model':8} {'users x items':16} {'exchange':11} {'kB sent':>9} {'DDP ÷ it':>9} {'ms':>7}")
    for row in rows:
        base = next(r for r in rows if (r["model"], r["where"], r["way"]) == (row["model"], row["where"], "DDP"))
        fewer = f"{base['bytes'] / row['bytes']:9.1f}" if row["way"] != "alone" else f"{'':9}"
        print(
            f"{row['model']:8} {row['where']:16} {row['way']:11} {row['bytes'] / 1000:9,.0f} {fewer} {row['ms']:7.1f}"
        )
    if not args.dry:
        name = "exchange_one_machine" if args.rate == "none" else "exchange"
        path = ROOT / f"benchmarks/results/{name}.json"
        path.parent.mkdir(exist_ok=True)
        body = {"machine": machine, "rate": args.rate, "steps": args.steps, "rows": rows}
        path.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
