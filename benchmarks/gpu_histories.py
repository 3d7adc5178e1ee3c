"""The checks of gpu_check.py for models of histories.

- every block by every loss: one step's loss and gradients against the CPU's
- neither a step nor its batch makes the host wait for the device: torch ends it with an error where it would
- the vectors that rank, of users of all lengths, against the CPU's
- training: what follows an item is always the next number; in fp32 and bf16, the loss must fall
- resume: a training that was stopped twice, with dropout, ends with the weights of one that was not
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.gpu_rows import FALLS_TO, GRADIENT_BOUND, LOSS_BOUND, RESUME_BOUND, SCORE_BOUND, Row, difference
from ncf_dist import contracts
from ncf_dist.config import Loader, Model, Train
from ncf_dist.config.train import OF_ALL_ITEMS
from ncf_dist.errors import Preempted
from ncf_dist.manifests import Manifest
from ncf_dist.models import Sequences, build_model
from ncf_dist.models.history import BLOCKS
from ncf_dist.parquet import write_parts
from ncf_dist.train import checkpoints
from ncf_dist.train.loaders import Batch, Task
from ncf_dist.train.losses import Objective
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.windows import WindowLoader
from ncf_dist.train.world import World

USERS, ITEMS, LENGTH, B, M = 200, 1_100, 40, 32, 64
# Embeddings far from 0: differences are then differences of what is computed, not of noise around nothing.
WIDE: dict[str, Any] = {"name": "history", "factors": 32, "heads": 4, "history": LENGTH, "init_std": 0.3}


def model_of(block: str, **fields: Any) -> Model:
    return Model(**{**WIDE, "block": block, **fields})


def windows_table(folder: str) -> Manifest:
    """A window of 2 to L + 1 items a user, one number after another, in 4 files."""
    rng = np.random.default_rng(2)
    size = rng.integers(2, LENGTH + 2, USERS)
    places = np.arange(LENGTH + 1)
    real = places < size[:, None]
    items = np.where(real, (rng.integers(ITEMS, size=USERS)[:, None] + places) % ITEMS, 0).astype("<i4")
    gaps = np.where(real & (places > 0), rng.integers(64, size=items.shape), 0).astype(np.uint8)
    contract = contracts.sequences(LENGTH)

    def file(rows: np.ndarray) -> pa.Table:
        packed = ([row.tobytes() for row in matrix[rows]] for matrix in (items, gaps))
        columns = [rows, np.zeros(len(rows)), size[rows], *packed]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, contract.schema, strict=True)], contract.schema)

    tables = {contract.name: write_parts(map(file, np.array_split(np.arange(USERS), 4)), folder, contract)}
    facts = {"sequences": {"rows": USERS, "targets": int((size - 1).sum()), "length": LENGTH}}
    return Manifest(
        stage="prepare", ds="2026-01-31", run_key="made-up", root=folder, config={"sequences": {"length": LENGTH}},
        inputs={}, tables=tables, facts=facts,
    )  # fmt: skip


def loader_of(folder: str, device: str, loss: str) -> WindowLoader:
    task = Task(USERS, ITEMS, B, 1, shared=M * (loss != "softmax"))
    return WindowLoader(windows_table(folder), task, Loader(backend="arrow", cache="device"), World(device=device))


def batches(device: str, loss: str) -> list[Batch]:
    """The first two of an epoch; before the second one, CUDA's memory for copies is made."""
    with tempfile.TemporaryDirectory() as folder:
        epoch = loader_of(folder, device, loss).epoch(0)
        first = next(epoch)
        with no_waiting(device):
            return [first, next(epoch)]


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """torch ends with an error what would make the host wait for a GPU."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def step(model: Model, loss: str, device: str, may_wait: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {parameter: gradient}) of one step."""
    torch.manual_seed(1)
    objective, batch = Objective(build_model(model, USERS, ITEMS), loss).to(device), batches(device, loss)[0]
    with contextlib.nullcontext() if may_wait else no_waiting(device):
        value = objective(batch)
        value.backward()
    return value.detach(), {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}


def trainer_of(folder: str, device: str, model: Model, precision: str, stop: int | None = None) -> Trainer:
    """`stop`: after so many updates."""
    left = [stop]

    def asked() -> bool:
        left[0] = None if left[0] is None else left[0] - 1
        return left[0] == 0

    settings = Train.model_validate(
        {"epochs": 6, "batch_size": B, "lr": 0.01, "precision": precision, "patience": 9, "checkpoint_minutes": None}
    )
    torch.manual_seed(1)
    return Trainer(
        build_model(model, USERS, ITEMS), loader_of(folder, device, "sampled_softmax"), lambda model: {}, settings,
        World(device=device), loss="sampled_softmax", folder=f"{folder}/checkpoints", stop=asked,
    )  # fmt: skip


def steps(device: str) -> Iterator[Row]:
    for block in BLOCKS:
        for loss in OF_ALL_ITEMS:
            (value, found), (wanted_value, wanted) = (
                step(model_of(block), loss, device),
                step(model_of(block), loss, "cpu"),
            )
            yield Row(f"{block}, {loss}: loss", difference(value, wanted_value), LOSS_BOUND)
            assert found.keys() == wanted.keys()
            worst = max(difference(found[n], wanted[n]) for n in wanted)
            yield Row(f"{block}, {loss}: gradients", worst, GRADIENT_BOUND)
    for block in ("mix", "attention"):
        step(model_of(block, dropout=0.2), "sampled_softmax", device, may_wait=False)
        yield Row(f"{block}: the host waits in a step", 0, 0)


def ranking(device: str) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(3)
    items, gaps = (torch.randint(high, (USERS, LENGTH), generator=draw) for high in (ITEMS, 64))
    latest = Sequences(items, gaps, torch.arange(USERS) % (LENGTH + 1))
    for block in BLOCKS:
        torch.manual_seed(1)
        model = build_model(model_of(block), USERS, ITEMS).eval()
        with torch.no_grad():
            wanted = model.ranking_users(latest).dot
            found = copy.deepcopy(model).to(device).ranking_users(latest.to(device)).dot
        yield Row(f"{block}: vectors that rank", difference(found, wanted), SCORE_BOUND)


def training(device: str) -> Iterator[Row]:
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            epochs = trainer_of(folder, device, model_of("mix"), precision).fit().epochs
        yield Row(f"mix, {precision}: last epoch's loss / first's", epochs[-1]["loss"] / epochs[0]["loss"], FALLS_TO)


def resume(device: str) -> Iterator[Row]:
    model = model_of("mix", dropout=0.2)
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer_of(folder, device, model, "fp32")
        whole.fit()
        for updates in (3, 8, None):
            trainer = trainer_of(folder, device, model, "fp32", updates)
            if (found := checkpoints.latest(f"{folder}/checkpoints")) is not None:
                trainer.resume(found)
            with contextlib.suppress(Preempted):
                trainer.fit()
    wanted = whole.model.state_dict()
    worst = max(difference(tensor, wanted[n]) for n, tensor in trainer.model.state_dict().items())
    yield Row("mix, dropout: weights after two stops", worst, RESUME_BOUND[device.split(":")[0]])


def histories(device: str) -> Iterator[Row]:
    for check in (steps, ranking, training, resume):
        yield from check(device)
