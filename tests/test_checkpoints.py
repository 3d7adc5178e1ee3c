"""A training that was cut short goes on as if it had not been: to the bit, from whatever whole checkpoint there is."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncf_dist import contracts
from ncf_dist.config import Loader, Model, Train
from ncf_dist.errors import ContractError, Preempted
from ncf_dist.manifests import Manifest
from ncf_dist.models import build_model
from ncf_dist.train import checkpoints
from ncf_dist.train.epoch_order import Phase
from ncf_dist.train.loaders import Batch, Task, TrainLoader
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.validation import Validator
from ncf_dist.train.world import World
from tests.gloo import Ranks
from tests.tables import DRAWS, ITEMS, USERS, N, prepare_run

TENSORS = {"model/w": torch.arange(6.0).reshape(2, 3), "optimiser/w/step": torch.tensor(3.0)}
PROGRESS = {"epoch": 2, "loss": 0.1 + 0.2}


# ---- on disk -----------------------------------------------------------------------------------------------


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = checkpoints.save(str(tmp_path), 7, TENSORS, PROGRESS)
    found = checkpoints.latest(str(tmp_path))
    assert found is not None
    assert (found.path, found.progress) == (path, PROGRESS)
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_the_latest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 400):
        checkpoints.save(str(tmp_path), step, TENSORS, PROGRESS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000030", "step-000000400"]
    assert checkpoints.latest(str(tmp_path / "nowhere")) is None


def test_a_save_that_did_not_end_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(str(tmp_path), 1, TENSORS, PROGRESS)

    class Dead(BaseException):
        pass

    def die(*_: object) -> None:
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(Dead):
            checkpoints.save(str(tmp_path), 2, TENSORS, PROGRESS)
    found = checkpoints.latest(str(tmp_path))
    assert found is not None
    assert found.path.endswith("step-000000001")
    checkpoints.save(str(tmp_path), 3, TENSORS, PROGRESS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


def test_any_damage_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """50 flipped bits and 20 cuts, spread over the three files by their size, and each file missing."""
    good = checkpoints.save(str(tmp_path), 1, TENSORS, PROGRESS)
    path = Path(checkpoints.save(str(tmp_path), 2, TENSORS, {**PROGRESS, "epoch": 3}))
    rng, files = np.random.default_rng(1), sorted(path.iterdir())
    assert [file.name for file in files] == ["SHA256SUMS", "progress.json", "tensors.safetensors"]

    def check(file: Path, damaged: bytes | None) -> None:
        data = file.read_bytes()
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        caplog.clear()
        found = checkpoints.latest(str(tmp_path))
        assert found is not None
        assert (found.path, found.progress["epoch"]) == (good, 2)
        assert "step-000000002 is damaged" in caplog.text
        file.write_bytes(data)

    for number in range(70):
        file = files[number % 3]
        data = bytearray(file.read_bytes())
        place = int(rng.integers(len(data)))
        if number < 50:
            data[place] ^= 1 << int(rng.integers(8))
        check(file, bytes(data) if number < 50 else bytes(data[:place]))
    for file in files:
        check(file, None)
    found = checkpoints.latest(str(tmp_path))
    assert found is not None
    assert found.path == str(path), "undamaged, it is the latest"


# ---- going on ----------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "gmf, adam": {"model": Model(name="gmf", factors=4)},
    "mlp, dropout, adamw, one cycle": {
        "model": Model(name="mlp", layers=(8, 4), dropout=0.3),
        "train": {"optimiser": "adamw", "schedule": "one_cycle", "weight_decay": 0.1},
    },
    "mf, sgd, linear, bpr": {
        "model": Model(name="mf", factors=4),
        "train": {"optimiser": "sgd", "schedule": "linear", "clip_norm": 0.1},
        "loss": "bpr",
    },
    "embedding_nn, batch norm, mse": {
        "model": Model(name="embedding_nn", embedding_sizes=(3, 4), layers=(6, 4), y_range=(0, 5.5), dropout=0.2),
        "loss": "mse",
    },
    "mf, sampled softmax, bf16": {
        "model": Model(name="mf", factors=4),
        "loss": "sampled_softmax",
        "train": {"precision": "bf16"},
    },
}


def trainer_of(
    run: Manifest,
    world: World,
    model: Model,
    folder: str | None = None,
    loss: str = "bce",
    train: dict[str, Any] | None = None,
    seed: int = 1,
    batch_size: int = 4,
    stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    explicit, pairs = loss == "mse", loss in ("bce", "bpr")
    task = Task(USERS, ITEMS, batch_size, seed, N * pairs, DRAWS * pairs, 5 * (loss == "sampled_softmax"), explicit)
    contract = contracts.train(N, DRAWS, explicit)
    loader = TrainLoader(run, contract, task, Loader(backend="arrow", shuffle_files=2), world)
    torch.manual_seed(seed)
    config = Train(**{"epochs": 3, "lr": 0.05, "batch_size": batch_size, "patience": 9, **(train or {})})
    validate = Validator(run, world, explicit)
    built = build_model(model, USERS, ITEMS)
    return Trainer(built, loader, validate, config, world, loss=loss, seed=seed, folder=folder, stop=stop)


def stop_after(updates: int) -> Callable[[], bool]:
    """Asked before each step; true from the `updates`-th on."""
    count = itertools.count(1)
    return lambda: next(count) >= updates


def everything(trainer: Trainer) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights, best weights and optimiser; the curve of losses and each epoch's numbers but the times."""
    timed = ("samples_per_s", "data_wait", "seconds")
    epochs = [{k: v for k, v in epoch.items() if k not in timed} for epoch in trainer.history.epochs]
    tensors = {name: tensor.clone() for name, tensor in trainer._tensors().items()}
    return tensors, [trainer.history.curve, epochs, trainer.history.best, trainer.history.best_epoch]


def assert_same(left: tuple[dict[str, Tensor], list[Any]], right: tuple[dict[str, Tensor], list[Any]]) -> None:
    assert left[0].keys() == right[0].keys()
    for name, tensor in left[0].items():
        assert torch.equal(tensor, right[0][name]), name
    assert left[1] == right[1]


def interrupted(run: Manifest, folder: Path, stops: Sequence[int], case: dict[str, Any]) -> Trainer:
    """A training that is stopped after so many updates, each time by a process that then ends, and finished."""
    shutil.rmtree(folder, ignore_errors=True)
    for updates in (*stops, 10**9):
        trainer = trainer_of(run, World(), folder=str(folder), stop=stop_after(updates), **case)
        if (found := checkpoints.latest(str(folder))) is not None:
            trainer.resume(found)
        try:
            trainer.fit()
        except Preempted:
            continue
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_a_training_that_is_stopped_anywhere_ends_the_same(tmp_path: Path, name: str) -> None:
    """3 epochs of ⌈23 / 4⌉ = 6 steps: stopped after every single one, and several times in a row."""
    case = CASES[name]
    run = prepare_run(tmp_path / "run", 23, 3, 4, explicit=case.get("loss") == "mse")
    whole = trainer_of(run, World(), **case)
    whole.fit()
    assert len(whole.history.curve) == 18
    for stops in ([1], [5], [6], [7], [12], [17], [2, 3, 1, 6]):
        assert_same(everything(interrupted(run, tmp_path / "kept", stops, case)), everything(whole))


def test_a_training_that_forgets_where_it_was_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that starts the epoch's data again, and the one that forgets the optimiser."""
    run, case = prepare_run(tmp_path / "run", 23, 3, 4), CASES["gmf, adam"]
    whole = trainer_of(run, World(), **case)
    whole.fit()
    epoch, load = TrainLoader.epoch, Trainer._load

    def from_the_start(self: TrainLoader, number: int, done: Sequence[Phase] = (), skip: int = 0) -> Iterator[Batch]:
        return epoch(self, number, done)

    def without_optimiser(self: Trainer, checkpoint: checkpoints.Checkpoint) -> None:
        load(self, checkpoint)
        self.optimiser.state.clear()

    for owner, attribute, mutant in ((TrainLoader, "epoch", from_the_start), (Trainer, "_load", without_optimiser)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, mutant)
            found = everything(interrupted(run, tmp_path / "kept", [3], case))
        with pytest.raises(AssertionError):
            assert_same(found, everything(whole))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "run", 23, 3, 4)
    trainer_of(run, World(), Model(name="gmf", factors=4), folder=str(tmp_path / "kept")).save()
    other = trainer_of(run, World(), Model(name="gmf", factors=5))
    found = checkpoints.latest(str(tmp_path / "kept"))
    assert found is not None
    with pytest.raises(ContractError, match="does not fit this training .*delete the folder to start afresh"):
        other.resume(found)


FORGED: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "optimiser: item.weight/exp_avg is .* needed": lambda t, _: t.update(
        {"optimiser/item.weight/exp_avg": torch.zeros(ITEMS, 5)}
    ),
    "optimiser: item.weight/step is missing": lambda t, _: t.pop("optimiser/item.weight/step"),
    "optimiser: item.weight/speed is not part of it": lambda t, _: t.update(
        {"optimiser/item.weight/speed": torch.zeros(())}
    ),
    "best: user.weight is missing": lambda t, _: t.pop("best/user.weight"),
    "model: item.weight is torch.float64": lambda t, _: t.update(
        {"model/item.weight": t["model/item.weight"].double()}
    ),
    "updates: .*valid integer": lambda _, p: p.update(updates="3"),
    "epoch: .*greater than or equal to 0": lambda _, p: p.update(epoch=-1),
    "phases.0.ranks: ": lambda _, p: p["phases"][0].update(ranks=0),
    "not of these rows": lambda _, p: p["phases"][0].update(ranks=10**9),
    "history.curve.0.2: ": lambda _, p: p["history"]["curve"][0].__setitem__(2, "x"),
    "sums: ": lambda _, p: p.pop("sums"),
}


@pytest.mark.parametrize("problem", FORGED)
def test_a_whole_checkpoint_with_wrong_contents_is_refused_and_named(tmp_path: Path, problem: str) -> None:
    """Its digests fit, as those of a file that was made by hand, or by another version, do."""
    run, folder = prepare_run(tmp_path / "run", 23, 3, 4), str(tmp_path / "kept")
    trainer = trainer_of(run, World(), Model(name="gmf", factors=4), folder=folder, stop=stop_after(3))
    with contextlib.suppress(Preempted):
        trainer.fit()
    found = checkpoints.latest(folder)
    assert found is not None
    FORGED[problem](found.tensors, found.progress)
    checkpoints.save(folder, 4, found.tensors, found.progress)
    forged, before = checkpoints.latest(folder), everything(trainer)
    assert forged is not None
    with pytest.raises(ContractError, match=f"step-000000004 does not fit this training .*{problem}"):
        trainer.resume(forged)
    assert_same(everything(trainer), before)


def test_checkpoints_come_every_so_many_steps_or_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved = prepare_run(tmp_path / "run", 23, 3, 4), list[int]()
    monkeypatch.setattr(checkpoints, "save", lambda folder, step, *_: saved.append(step))
    for settings, wanted in (
        ({"checkpoint_steps": 5, "checkpoint_minutes": None}, [5, 10, 15]),
        ({"checkpoint_minutes": 1e-9}, list(range(1, 19))),
        ({"checkpoint_minutes": None}, []),
        ({}, []),
    ):
        saved.clear()
        trainer_of(run, World(), Model(name="gmf"), folder=str(tmp_path / "kept"), train=settings).fit()
        assert saved == wanted


# ---- other worlds ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("gloo")) as two:
        yield two


def part(world: World, run: Manifest, folder: str, updates: int) -> tuple[list[tuple[int, int]], list[Any], Any]:
    """Go on for so many updates: (the (user, item) rows used, the epochs' records, what everything is)"""
    trainer = trainer_of(run, world, CASES["gmf, adam"]["model"], folder=folder, stop=stop_after(updates))
    found = checkpoints.latest(folder)
    if found is not None:
        trainer.resume(found)
    rows: list[tuple[int, int]] = []
    step = trainer.train_step

    def noting(batch: Batch, done: float, asked: tuple[bool, bool] = (False, False)) -> tuple[float, float, list[bool]]:
        rows.extend(zip(batch.user.tolist(), batch.items[:, 0].tolist(), strict=True))
        return step(batch, done, asked)

    trainer.train_step = noting  # type: ignore[method-assign]
    with contextlib.suppress(Preempted):
        trainer.fit()
    return rows, trainer.history.epochs, everything(trainer)


def test_two_ranks_then_one_then_two_use_every_row_once(ranks: Ranks, tmp_path: Path) -> None:
    """40 rows: 2 ranks x 4 rows x 2 steps, 1 rank x 4 rows x 3 steps, and the 12 that are left on 2 ranks; then two
    more epochs."""
    run, folder = prepare_run(tmp_path / "run", 40, 3, 4), str(tmp_path / "kept")
    data = sorted(part(World(), run, str(tmp_path / "other"), 10)[0])
    first, second = ranks.run(part, run, folder, 2)
    alone = part(World(), run, folder, 3)
    last = ranks.run(part, run, folder, 10**9)
    assert [len(p[0]) for p in (first, second, alone)] == [8, 8, 12]
    used = first[0] + second[0] + alone[0] + last[0][0][:6] + last[1][0][:6]
    assert sorted(used) == data
    assert len(last[0][1]) == 3
    assert [epoch["loss"] for epoch in last[0][1]] == [epoch["loss"] for epoch in last[1][1]]


def test_two_ranks_that_are_stopped_end_the_same(ranks: Ranks, tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "run", 23, 3, 4)
    whole = ranks.run(part, run, str(tmp_path / "whole"), 10**9)
    for updates in (2, 3, 4):
        ranks.run(part, run, str(tmp_path / f"kept{updates}"), updates)
        first, second = ranks.run(part, run, str(tmp_path / f"kept{updates}"), 10**9)
        assert_same(first[2], whole[0][2])
        assert_same((second[2][0], []), (whole[1][2][0], []))  # The curve is rank 0's.
