"""Whether a GPU computes what the CPU computes: the first thing to run wherever a GPU is at hand. Minutes at most.

    PYTHONPATH=. python3 benchmarks/gpu_check.py [--device cuda]

Needs no environment of this project: any Python 3.10 to 3.12 with torch 2.10 or newer, NumPy 1 or 2, and pyarrow,
pydantic (2.12 or newer), safetensors, fsspec, filelock, psutil, pyyaml and tqdm. No Spark, no Petastorm, no deltalake.

- gradients: every model by every loss, one step's loss and gradients against float64's: no further off than is allowed
- training: the checkerboard (users like the items of their own parity) in fp32 and bf16; the loss must fall
- NCCL: a process group of one rank with a file for a store; a sum, and a step under DistributedDataParallel
- resume: a training that was stopped and goes on from its checkpoint ends with the weights of one that was not
- histories: models of histories likewise, and that no step makes the host wait (gpu_histories.py)
- scoring: the lists of every model, with seen items masked, with and without allow and deny lists, against the CPU's

Prints one table and writes benchmarks/results/gpu_check.json (--results). Exits 1 when a check fails. `--device cpu`
runs the same code on a CPU, with gloo in NCCL's place.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_histories import histories
from benchmarks.gpu_rows import (
    FALLS_TO,
    GRADIENT_BOUND,
    LOSS_BOUND,
    RESUME_BOUND,
    SCORE_BOUND,
    Row,
    beyond_rounding,
    difference,
)
from ncf_dist import contracts
from ncf_dist.config import Loader, Model, Train
from ncf_dist.config.train import OF_ALL_ITEMS
from ncf_dist.errors import Preempted
from ncf_dist.manifests import Manifest
from ncf_dist.models import Recommender, Users, build_model
from ncf_dist.parquet import write_parts
from ncf_dist.scoring import Lists, ModelScorer, recommend
from ncf_dist.train import checkpoints
from ncf_dist.train.loaders import Batch, Task, TrainLoader
from ncf_dist.train.losses import LOSSES, Objective
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.world import World

ROOT = Path(__file__).parent.parent
# Embeddings far from 0: differences are then differences of what is computed, not of noise around nothing.
WIDE: dict[str, Any] = {"factors": 16, "init_std": 0.3}
MODELS = {
    "gmf": Model(name="gmf", **WIDE),
    "mlp": Model(name="mlp", layers=(32, 16, 8), **WIDE),
    "neumf": Model(name="neumf", layers=(32, 16, 8), **WIDE),
    "mf": Model(name="mf", biases=True, **WIDE),
    "embedding_nn": Model(name="embedding_nn", embedding_sizes=(12, 20), layers=(24, 8), **WIDE),
}
USERS, ITEMS = 300, 1_100
"""More than a block of the scorer in both directions."""
B, N, M, K = 512, 4, 64, 10


def model_of(name: str) -> Recommender:
    torch.manual_seed(1)
    return build_model(MODELS[name], USERS, ITEMS)


# ---- a step ------------------------------------------------------------------------------------------------


def batch_on(device: str, loss: str) -> Batch:
    """The same rows on every device."""
    rng = np.random.default_rng(1)
    user, items, shared = (
        torch.from_numpy(rng.integers(high, size=size)).to(device)
        for high, size in ((USERS, B), (ITEMS, (B, 1 + N)), (ITEMS, M))
    )
    rating = torch.from_numpy(rng.uniform(1, 5, B).astype(np.float32)).to(device)
    if loss == "mse":
        return Batch(user, items[:, :1], rating)
    if loss in OF_ALL_ITEMS:
        return Batch(user, items[:, :1], None, shared)
    return Batch(user, items)


def step(
    name: str,
    loss: str,
    device: str,
    wrap: Callable[[Objective], Any] = lambda objective: objective,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """(loss, {parameter: gradient}) of one step."""
    model = model_of(name).to(device, dtype)
    objective = wrap(Objective(model, loss, l2=1e-3).to(device))
    value = objective(batch_on(device, loss))
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients(device: str) -> Iterator[Row]:
    for name in MODELS:
        for loss in LOSSES:
            (value, found), (cpu_value, cpu) = step(name, loss, device), step(name, loss, "cpu")
            exact_value, exact = step(name, loss, "cpu", dtype=torch.float64)
            yield Row(f"{name}, {loss}: loss", beyond_rounding([value], [cpu_value], [exact_value], LOSS_BOUND), 1.0)
            assert found.keys() == cpu.keys() == exact.keys()
            of_gpu, of_cpu, wanted = ([grads[n] for n in exact] for grads in (found, cpu, exact))
            yield Row(f"{name}, {loss}: gradients", beyond_rounding(of_gpu, of_cpu, wanted, GRADIENT_BOUND), 1.0)


def process_group(device: str) -> Iterator[Row]:
    """One rank, no TCP store: nothing listens off loopback."""
    cuda = device.startswith("cuda")
    for library in ("NCCL", "GLOO"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            values = torch.arange(1000.0, device=device)
            summed = values.clone()
            dist.all_reduce(summed)
            what = "NCCL" if cuda else "gloo"
            yield Row(f"{what}, world of 1: sum", difference(summed, values), 0.0)
            _, wanted = step("neumf", "bce", device)
            ids = [0] if cuda else None
            _, found = step(
                "neumf", "bce", device, lambda objective: DistributedDataParallel(objective, device_ids=ids)
            )
            worst = max(difference(found[n], wanted[n]) for n in wanted)
            yield Row(f"{what}, world of 1: gradients under DDP", worst, GRADIENT_BOUND)
        finally:
            dist.destroy_process_group()


# ---- a training --------------------------------------------------------------------------------------------


def train_table(folder: str, explicit: bool) -> Manifest:
    """8 of the items of their own parity for each user, in 4 files; a rating is 5 or 1 by the item's half."""
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(USERS), 8)
    item = np.concatenate([rng.choice(ITEMS // 2, 8, replace=False) for _ in range(USERS)]) * 2 + user % 2
    rows = rng.permutation(len(user))
    contract = contracts.train(0, 0, explicit)
    columns = [user[rows].astype(np.int32), item[rows].astype(np.int32)]
    if explicit:
        columns.append(np.where(item[rows] < ITEMS // 2, 5, 1).astype(np.float32))
    parts = np.array_split(np.arange(len(rows)), 4)
    files = (pa.table([column[part] for column in columns], schema=contract.schema) for part in parts)
    tables = {"train": write_parts(files, folder, contract)}
    return Manifest(
        stage="prepare", ds="2026-01-31", run_key="made-up", root=folder, config={}, inputs={}, tables=tables
    )


def trainer_of(folder: str, device: str, model: Model, loss: str, precision: str, stop: int | None = None) -> Trainer:
    """`stop`: after so many updates. Negatives are drawn on the device, and the table is kept there."""
    explicit = loss == "mse"
    pairs, shared = N * (loss in ("bce", "bpr")), M * (loss == "sampled_softmax")
    world, task = World(device=device), Task(USERS, ITEMS, B, 1, pairs, 0, shared, explicit)
    loader = TrainLoader(
        train_table(folder, explicit), contracts.train(0, 0, explicit), task,
        Loader(backend="arrow", cache="device"), world,
    )  # fmt: skip
    torch.manual_seed(1)
    left = [stop]

    def asked() -> bool:
        left[0] = None if left[0] is None else left[0] - 1
        return left[0] == 0

    settings = Train.model_validate(
        {"epochs": 10, "batch_size": B, "lr": 0.05, "precision": precision, "patience": 9, "checkpoint_minutes": None}
    )
    return Trainer(
        build_model(model, USERS, ITEMS), loader, lambda model: {}, settings, world,
        loss=loss, folder=f"{folder}/checkpoints", stop=asked,
    )  # fmt: skip


def training(device: str) -> Iterator[Row]:
    for name, loss in (("neumf", "bce"), ("mf", "sampled_softmax"), ("embedding_nn", "mse")):
        for precision in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                model = MODELS[name].model_copy(update={"init_std": 0.05})
                epochs = trainer_of(folder, device, model, loss, precision).fit().epochs
            fell = epochs[-1]["loss"] / epochs[0]["loss"]
            yield Row(f"{name}, {loss}, {precision}: last epoch's loss / first's", fell, FALLS_TO)


def resume(device: str) -> Iterator[Row]:
    """Dropout draws on the device, Adam's moments go through the file: both must come back."""
    model = MODELS["mlp"].model_copy(update={"dropout": 0.2})
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer_of(folder, device, model, "bce", "fp32")
        whole.fit()
        for updates in (3, 8):  # Within the first epoch of 5 steps, and within a later one.
            stopped = trainer_of(folder, device, model, "bce", "fp32", stop=updates)
            with contextlib.suppress(Preempted):
                if (found := checkpoints.latest(f"{folder}/checkpoints")) is not None:
                    stopped.resume(found)
                stopped.fit()
        found = checkpoints.latest(f"{folder}/checkpoints")
        assert found is not None, "it was stopped, so it saved"
        again = trainer_of(folder, device, model, "bce", "fp32")
        again.resume(found)
        again.fit()
    wanted = whole.model.state_dict()
    worst = max(difference(tensor, wanted[n]) for n, tensor in again.model.state_dict().items())
    yield Row("mlp, dropout: weights after two stops", worst, RESUME_BOUND[device.split(":")[0]])


# ---- scoring -----------------------------------------------------------------------------------------------


def seen_lists() -> Lists:
    """Some items of every user, ascending; none of every tenth."""
    rng = np.random.default_rng(3)
    lists = [np.sort(rng.choice(ITEMS, 0 if u % 10 == 0 else 40, replace=False)) for u in range(USERS)]
    return Lists(np.concatenate(lists).astype(np.int64), np.cumsum([0, *map(len, lists)]).astype(np.int64))


def ranked(model: Recommender, device: str, eligible: Tensor | None, seen: Lists) -> tuple[Tensor, Tensor]:
    """As `score` ranks on an executor: (values, items), (U, K)."""
    place = torch.device(device)
    with place:
        users = torch.arange(USERS, device=place)
        items = None if eligible is None else eligible.to(place)
        scorer = ModelScorer(copy.deepcopy(model).to(place), ITEMS, eligible=items)
        values, best = recommend(scorer, Users(users), seen, K)
    return values.cpu(), best.cpu()


def scoring(device: str) -> Iterator[Row]:
    """Lists are compared by scores: where two items are as good as equal, either may come first."""
    seen = seen_lists()
    masked = torch.zeros(USERS, ITEMS, dtype=torch.bool)
    masked[torch.from_numpy(seen.row), torch.from_numpy(seen.values)] = True
    lists = {"all items": None, "allow list": torch.arange(5, ITEMS, 7), "deny list": torch.arange(40, ITEMS)}
    for name in MODELS:
        model = model_of(name).eval()
        with torch.no_grad():
            scores = model(torch.arange(USERS)[:, None], torch.arange(ITEMS)[None])
        for what, eligible in lists.items():
            barred = masked.clone()
            if eligible is not None:
                barred |= ~torch.isin(torch.arange(ITEMS), eligible)[None]
            values, items = ranked(model, device, eligible, seen)
            wanted = scores.masked_fill(barred, -torch.inf).topk(K).values
            worst = max(difference(values, wanted), difference(scores.gather(1, items), wanted))
            yield Row(f"{name}, {what}: scores of the top {K}", worst, SCORE_BOUND)
            repeated = sum(K - len(set(row)) for row in items.tolist())
            yield Row(f"{name}, {what}: barred or repeated items", int(barred.gather(1, items).sum()) + repeated, 0)


CHECKS = {f.__name__: f for f in (gradients, training, process_group, resume, histories, scoring)}


def rows_of(check: Callable[[str], Iterator[Row]], device: str) -> Iterator[Row]:
    """The rows of a check; one that ends in an error has failed."""
    try:
        yield from check(device)
    except Exception as error:
        traceback.print_exc()
        yield Row("ended in an error", float("nan"), 0.0, f"{type(error).__name__}: {error}"[:500])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu_check.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; run it where there is one, or try --device cpu")
    torch.set_num_threads(1)  # What the CPU computes here is small: threads would only wait for each other.
    device = "cuda:0" if args.device == "cuda" else "cpu"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{machine}, torch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}\n")
    print(f"{'check':<66} {'value':>10} {'bound':>10}  ok")
    found: dict[str, list[Row]] = {}
    for name, check in CHECKS.items():
        found[name] = []
        for row in rows_of(check, device):
            found[name].append(row)
            print(f"{f'{name}: {row.check}':<66} {row.value:>10.3g} {row.bound:>10.3g}  {'yes' if row.ok else 'NO'}")
            sys.stdout.flush()
    rows = [{"group": name, **asdict(row), "ok": row.ok} for name, rows in found.items() for row in rows]
    failed = sum(not row["ok"] for row in rows)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(
        json.dumps({"machine": machine, "device": args.device, **versions, "checks": rows}, indent=1)
    )
    print(f"\n{len(rows) - failed} of {len(rows)} checks are well; {args.results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
