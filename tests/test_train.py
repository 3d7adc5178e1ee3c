"""Two ranks train what one process trains; nothing can make them wait for each other for ever; the job
ends with an answer that says why.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn

from ncf_dist import contracts, machine
from ncf_dist.bundle import load_model, read_bundle, verify_weights
from ncf_dist.config import Config, Loader, Model, Negatives, Train
from ncf_dist.errors import ConfigError, ContractError, ExitCode, TrainingFailed
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF, Users, build_model
from ncf_dist.parquet import read_table
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.scoring import Lists, ModelScorer, mask
from ncf_dist.train import worker
from ncf_dist.train.epoch_order import EpochOrder, Phase
from ncf_dist.train.loaders import Batch, Task, TrainLoader
from ncf_dist.train.losses import bce
from ncf_dist.train.memory_check import check_memory, memory_parts
from ncf_dist.train.pipeline import FEW_STEPS, few_steps, train
from ncf_dist.train.spec import Spec
from ncf_dist.train.trainer import History, Trainer
from ncf_dist.train.validation import Validator, candidate_ranks, read_held_out
from ncf_dist.train.world import World
from tests.gloo import Ranks
from tests.oracles import catalogue_rank
from tests.tables import (
    DRAWS,
    DS,
    ITEMS,
    USERS,
    N,
    prepare_run,
    prepared,
    small_config,
    some_rows,
    table_of,
    validation_files,
)

GOLDEN = Path(__file__).with_name("golden_losses.txt")
TINY = {name: Model(name=name, factors=4, layers=(8, 6, 4)) for name in ("gmf", "mlp", "neumf")}
TINY["mf"] = Model(name="mf", factors=4, biases=True)
TINY["dot"] = Model(name="mf", factors=4)  # Biases have no gradient under bpr but rounding, which Adam enlarges.
TINY["embedding_nn"] = Model(name="embedding_nn", embedding_sizes=(5, 3), layers=(6, 4), batch_norm=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("gloo")) as two:
        yield two


class Fixed:
    """A loader that gives the same batches every epoch, each rank its own share of every one."""

    def __init__(
        self, rows: npt.NDArray[np.int64], batch_size: int, world: World, rating: Tensor | None = None
    ) -> None:
        """rows: (R, 2 + N) user, item, negatives; R a multiple of batch_size, and that of the ranks. rating: (R,)"""
        self.batches = []
        for start in range(0, len(rows), batch_size):
            own = np.array_split(np.arange(start, start + batch_size), world.size)[world.rank]
            part = torch.from_numpy(rows[own])
            shared = torch.arange(start, start + 6) % ITEMS
            self.batches.append(Batch(part[:, 0], part[:, 1:], None if rating is None else rating[own], shared))
        self.rows, self.phase = len(rows), Phase(world.size, batch_size // world.size, 1)

    def order(self, epoch: int, done: Sequence[Phase] = ()) -> EpochOrder:
        return EpochOrder([self.rows], 1, epoch, done)

    def epoch(self, epoch: int, done: Sequence[Phase] = (), skip: int = 0) -> Iterator[Batch]:
        yield from self.batches[skip:]


def nothing_held_out(model: nn.Module) -> dict[str, float]:
    return {}


def fit(
    world: World, config: Model, rows: int, batch_size: int, loss: str = "bce", **settings: Any
) -> tuple[History, dict[str, Any]]:
    """(history, weights) after training on `rows` fixed rows, `batch_size` of them a step over all ranks."""
    torch.manual_seed(3)
    model = build_model(config, USERS, ITEMS)
    loader: Any = Fixed(some_rows(rows), batch_size, world, torch.arange(float(rows)) % 5 + 1)
    train = Train(**{"epochs": 3, "lr": 0.02, **settings})
    trainer = Trainer(model, loader, nothing_held_out, train, world, loss=loss)
    history = trainer.fit()
    return history, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


# ---- the objective -----------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """-log σ(2) for the positive, -log(1 - σ(-1)) and -log(1 - σ(0)) for the negatives; the mean of the
    three.
    """

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    wanted = -(math.log(sigmoid(2)) + math.log(1 - sigmoid(-1)) + math.log(1 - sigmoid(0))) / 3
    assert bce(torch.tensor([[2.0, -1.0, 0.0]])).item() == pytest.approx(wanted, rel=1e-6)


GOLDEN_CASES = [*((name, "bce") for name in TINY), *(("dot", loss) for loss in ("bpr", "sampled_softmax", "mse"))]


def test_golden_losses() -> None:
    """A change of these numbers is a change of what everybody's training does: move them in the same
    commit, knowingly.
    """
    found = [
        f"{name} {loss} epoch {record['epoch']} loss {record['loss']:.6f}"
        for name, loss in GOLDEN_CASES
        for record in fit(World(), TINY[name], 96, 16, loss, epochs=4)[0].epochs
    ]
    wanted = GOLDEN.read_text().splitlines()
    message = f"{GOLDEN.name} would have to be:\n" + "\n".join(found)
    assert [line.rsplit(" ", 1)[0] for line in found] == [line.rsplit(" ", 1)[0] for line in wanted], message
    losses = [[float(line.rsplit(" ", 1)[1]) for line in lines] for lines in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5), message


# ---- two ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loss"), [*((name, "bce") for name in TINY), ("dot", "bpr"), ("dot", "sampled_softmax"), ("mf", "mse")]
)
def test_two_ranks_of_batch_b_are_one_process_of_2b(ranks: Ranks, name: str, loss: str) -> None:
    """9 steps: both ranks end with the weights that one process has after seeing their batches as one."""
    one_history, one = fit(World(), TINY[name], 48, 16, loss)
    (first_history, first), (second_history, second) = ranks.run(fit, TINY[name], 48, 16, loss)
    for key, wanted in one.items():
        assert np.array_equal(first[key], second[key]), key
        np.testing.assert_allclose(first[key], wanted, atol=1e-6, rtol=0, err_msg=key)
    for left, right, record in zip(first_history.epochs, second_history.epochs, one_history.epochs, strict=True):
        assert left["loss"] == right["loss"] == pytest.approx(record["loss"], abs=1e-6)


Run = tuple[Manifest, dict[str, Any], dict[str, Any]]


def train_runs(world: World, runs: list[Run]) -> list[tuple[int, list[dict[str, Any]]]]:
    """(steps taken, history) of each run, trained as a rank trains it."""
    return [train_one(world, run, Train(**train), Loader(**loader)) for run, train, loader in runs]


def train_one(world: World, run: Manifest, config: Train, how: Loader) -> tuple[int, list[dict[str, Any]]]:
    task = Task(USERS, ITEMS, config.batch_size, 1, N, DRAWS)
    loader = TrainLoader(run, contracts.train(N, DRAWS), task, how, world)
    torch.manual_seed(1)
    model = build_model(TINY["gmf"], USERS, ITEMS)
    trainer = Trainer(model, loader, Validator(run, world), config, world)
    taken, step = 0, trainer.train_step

    def counting(
        batch: Batch, done: float, asked: tuple[bool, bool] = (False, False)
    ) -> tuple[float, float, list[bool]]:
        nonlocal taken
        taken += 1
        return step(batch, done, asked)

    trainer.train_step = counting  # type: ignore[method-assign]
    epochs = trainer.fit().epochs
    return taken, epochs


def test_twenty_row_counts_that_do_not_divide_never_hang(ranks: Ranks, tmp_path: Path) -> None:
    """Odd rows in unequal files, batches that do not fill, fewer validation rows than ranks: equal steps,
    and an end.
    """
    counts = [3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 29, 31, 37, 41, 43, 47, 53, 59]
    runs: list[Run] = []
    for number, rows in enumerate(counts):
        settings: dict[str, Any] = {"batch_size": 1 + number % 7, "epochs": 2}
        loader = {
            "backend": "petastorm" if number % 5 == 0 else "arrow",
            "shuffle_files": 1 + number % 3,
            "cache": ("none", "host", "device")[number % 3],
        }
        run = prepare_run(tmp_path / str(rows), rows, files=1 + number % 6, held_out=number % 4)
        runs.append((run, settings, loader))
    first, second = ranks.run(train_runs, runs, timeout_s=120)
    for rows, (_, settings, _), left, right in zip(counts, runs, first, second, strict=True):
        each = rows // 2
        assert left[0] == right[0] == 2 * math.ceil(each / settings["batch_size"]), rows
        metrics = [[{k: r[k] for k in r if "@" in k} for r in side[1]] for side in (left, right)]
        assert metrics[0] == metrics[1], "ranks that see different metrics stop at different epochs"


# ---- validation --------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """Not a model: the score of (user, item) is what the table says."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.table[user, item]


BY_HAND = [[float(item) for item in range(20)]] * 4
HELD_OUT: list[list[tuple[int, int, list[int]]]] = [
    [(0, 19, [1, 2, 3])],  # nothing beats item 19: rank 1
    [(1, 5, [1, 2, 7, 9]), (2, 4, [0, 1])],  # 7 and 9 beat item 5: rank 3 · nothing beats item 4: rank 1
    [(3, 0, list(range(1, 12)))],  # 11 items beat item 0: rank 12
]


def validation_run(folder: Path, lists: list[list[tuple[int, int, list[int]]]]) -> Manifest:
    info = table_of(folder, contracts.VALIDATION, validation_files(lists))
    return Manifest(
        stage="prepare", ds=DS, run_key="p1", root=str(folder), config={}, inputs={}, tables={"validation": info}
    )


def test_validation_metrics_by_hand(tmp_path: Path) -> None:
    found = Validator(validation_run(tmp_path, HELD_OUT), World())(Scores(BY_HAND))  # type: ignore[arg-type]
    assert found == pytest.approx(
        {
            "hr@10": (1 + 1 + 1 + 0) / 4,
            "ndcg@10": (1 / math.log2(2) + 1 / math.log2(4) + 1 / math.log2(2) + 0) / 4,
            "mrr": (1 / 1 + 1 / 3 + 1 / 1 + 1 / 12) / 4,
        }
    )


def test_padding_is_no_candidate(tmp_path: Path) -> None:
    """A short list is padded with the positive itself: counted, it would tie with itself and share worse
    places.
    """
    run = validation_run(tmp_path, [[(0, 5, []), (1, 5, [9]), (2, 5, [1, 2, 3, 4, 9])]])
    held_out = read_held_out(run.files("validation")[0])
    assert candidate_ranks(Scores(BY_HAND), held_out, "cpu").tolist() == [1.0, 2.0, 2.0]  # type: ignore[arg-type]


def test_a_constant_model_gets_chance_not_luck(tmp_path: Path) -> None:
    """All 1 + 3 tie: the mean of the places 1 to 4."""
    run = validation_run(tmp_path, [[(0, 5, [1, 2, 3])]])
    held_out = read_held_out(run.files("validation")[0])
    constant: Any = Scores([[0.0] * 20])
    assert candidate_ranks(constant, held_out, "cpu").tolist() == [(1 + 2 + 3 + 4) / 4]


def validate(world: World, run: Manifest) -> dict[str, float]:
    return Validator(run, world)(Scores(BY_HAND))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "files", [HELD_OUT, [[row for file in HELD_OUT for row in file]], [[]]], ids=["three", "one", "none"]
)
def test_two_ranks_validate_as_one(ranks: Ranks, tmp_path: Path, files: list[Any]) -> None:
    run = validation_run(tmp_path, files)
    one = validate(World(), run)
    assert ranks.run(validate, run) == [one, one]
    assert bool(one) == any(files)


def test_ranks_share_the_validation_rows(tmp_path: Path) -> None:
    run = validation_run(tmp_path, HELD_OUT)
    users = [[part.user.tolist() for part in Validator(run, World(rank, 2)).parts] for rank in range(2)]
    assert users == [[[0], [3]], [[1, 2]]]


def test_validation_leaves_out_dropout(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, 10, 1, held_out=10)
    model = build_model(Model(name="mlp", layers=(8, 4), dropout=0.9), USERS, ITEMS).train()
    validator = Validator(run, World())
    assert validator(model) == validator(model.train())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_scores_nan_is_not_the_best_one(tmp_path: Path, value: float) -> None:
    """No candidate is greater than nan: it would rank every positive first."""
    run, table = validation_run(tmp_path, [[(0, 5, [1, 2, 3])]]), [list(row) for row in BY_HAND]
    table[0][5] = value
    with pytest.raises(TrainingFailed, match="not finite"):
        Validator(run, World())(Scores(table))  # type: ignore[arg-type]


# ---- the loop ----------------------------------------------------------------------------------------------


def run_scripted(ndcgs: list[float], patience: int) -> tuple[History, list[Tensor], Tensor]:
    """(history, item weights after each epoch, item weights at the end) when validation gives `ndcgs`."""
    snapshots: list[Tensor] = []

    def validate(model: Any) -> dict[str, float]:
        snapshots.append(model.item.weight.detach().clone())
        return {"ndcg@10": ndcgs[len(snapshots) - 1]} if ndcgs else {}

    torch.manual_seed(1)
    model = GMF(USERS, ITEMS, 4)
    loader: Any = Fixed(some_rows(8), 4, World())
    history = Trainer(model, loader, validate, Train(epochs=6, lr=0.01, patience=patience), World()).fit()
    return history, snapshots, model.item.weight.detach()


def test_a_training_that_stops_early_is_the_beginning_of_the_whole_one() -> None:
    """To the learning rate of every step."""
    whole, _ = fit(World(), TINY["gmf"], 24, 4, epochs=5, schedule="cosine")
    short, _ = fit(World(), TINY["gmf"], 24, 4, epochs=5, schedule="cosine", stop_after=2)
    assert (len(whole.epochs), len(short.epochs), short.best_epoch) == (5, 2, 1)
    assert short.curve == whole.curve[: len(short.curve)]


def test_patience_ends_the_run_and_the_best_epoch_comes_back() -> None:
    history, snapshots, kept = run_scripted([0.1, 0.4, 0.4, 0.3, 0.9, 0.9], patience=2)
    assert (len(history.epochs), history.best_epoch, history.best) == (4, 1, 0.4)
    assert torch.equal(kept, snapshots[1])
    assert not torch.equal(kept, snapshots[3])


def test_validation_must_give_what_the_best_epoch_is_chosen_by() -> None:
    """Figures of other names would keep the last epoch, and nobody would notice."""
    torch.manual_seed(1)
    loader: Any = Fixed(some_rows(8), 4, World())
    trainer = Trainer(GMF(USERS, ITEMS, 4), loader, lambda model: {"ndcg@5": 0.1}, Train(epochs=2), World())
    with pytest.raises(ValueError, match=r"validation gives ndcg@5; needed ndcg@10 or mse to choose by"):
        trainer.fit()


@pytest.mark.parametrize(("source", "negatives", "draws"), [("table", 2, 2), ("online", 3, 0)])
def test_how_many_draws_there_are_is_what_the_table_says(
    tmp_path: Path, source: str, negatives: int, draws: int
) -> None:
    """A config that says otherwise would read columns that the table has not, or leave some of its draws unread. Online
    draws are the config's."""
    run = prepare_run(tmp_path, 8, 1, 2)
    config = small_config(tmp_path, Model(), negatives=source)
    config = config.model_copy(update={"negatives": Negatives(per_positive=3, draws=1)})
    task = worker.task_of(config, run)
    assert (task.negatives, task.draws) == (negatives, draws)


def test_a_better_epoch_renews_patience() -> None:
    history, snapshots, kept = run_scripted([0.1, 0.0, 0.2, 0.1, 0.3, 0.2], patience=2)
    assert (len(history.epochs), history.best_epoch) == (6, 4)
    assert torch.equal(kept, snapshots[4])


def test_without_validation_rows_the_last_epoch_stands() -> None:
    history, snapshots, kept = run_scripted([], patience=2)
    assert (len(history.epochs), history.best_epoch) == (6, 5)
    assert torch.equal(kept, snapshots[5])


# ---- a rank ------------------------------------------------------------------------------------------------


def spec_of(folder: Path, model: Model = TINY["mlp"], rows: int = 10, **train: Any) -> Spec:
    """The spec of a training over a hand-made prepare run."""
    config = small_config(folder, model, **train)
    run = prepared(config, rows)
    return Spec(config.model_dump_json(by_alias=True), run.root, str(folder / "run"))


def start_of(world: World, spec: Spec) -> tuple[npt.NDArray[np.float32], list[list[float]]]:
    """(initial item weights, the first random numbers of the first two steps)"""
    found: list[Any] = []

    class Stop(Exception):
        pass

    def stop(trainer: Trainer) -> None:
        found.append(trainer.model.get_parameter("tower.item.weight").detach().numpy().copy())
        draws = []
        for update in range(2):
            trainer.progress.updates = update
            trainer._seed_step()
            draws.append(torch.rand(3).tolist())
        found.append(draws)
        raise Stop

    with contextlib.suppress(Stop), mock.patch.object(Trainer, "fit", stop):
        worker.train_rank(spec, world)
    return found[0], found[1]


def test_ranks_start_equal_and_drop_units_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    """The draws of a step are the same whenever it is taken, and those of no other step or rank."""
    spec = spec_of(tmp_path, model=TINY["mlp"].model_copy(update={"dropout": 0.5}))
    first, second = ranks.run(start_of, spec)
    assert np.array_equal(first[0], second[0])
    draws = [tuple(draw) for draw in (*first[1], *second[1])]
    assert len(set(draws)) == 4
    assert ranks.run(start_of, spec)[1][1] == second[1]


@pytest.mark.parametrize("table", ["train", "validation"])
def test_a_rank_reads_no_damaged_file(tmp_path: Path, table: str) -> None:
    spec = spec_of(tmp_path)
    path = Path(spec.prepare) / table / "part-00000-000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ContractError, match=rf"{table}/part-00000-000\.parquet.*rerun the job prepare"):
        worker.train_rank(spec, World())


def test_a_rank_takes_denormal_numbers_for_zero(ranks: Ranks) -> None:
    torch.set_flush_denormal(False)
    assert torch.tensor([1e-40]).mul(1).item() > 0  # The control: this machine has them.
    assert ranks.run(_smallest_product) == [0.0, 0.0]


def _smallest_product(world: World) -> float:
    World().join(1)
    return torch.full((100_000,), 1e-40).mul(1).max().item()


def test_the_world_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert World.from_environment("cpu") == World(rank=5, size=8, local_rank=1, device="cpu", one_machine=False)
    assert not World.from_environment("cpu").is_main
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert World.from_environment("cpu").one_machine


# ---- the job -----------------------------------------------------------------------------------------------

PEOPLE, GOODS = 60, 30


def checkerboard() -> list[str]:
    """User u likes all 15 items of its own parity, in an order of its own; the last one is held out.

    What is left to offer a user is that item and the 15 of the other parity: the best answer is known.
    """
    lines = []
    for user in range(PEOPLE):
        liked = np.random.default_rng(user).permutation(np.arange(user % 2, GOODS, 2))
        lines += [f"{user + 1}::{item + 1}::5::{1_000_000 + second}" for second, item in enumerate(liked)]
    return lines


class Line:
    """A small line with its prepare run made; `config(section={...})` changes settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "ratings.dat").write_text("\n".join(checkerboard()) + "\n")

    def config(self, **sections: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "paths": {"lake": str(self.folder / "lake"), "work": str(self.folder / "work")},
            "input": {"path": str(self.folder / "ratings.dat")},
            "negatives": {"candidates": 10, "draws": 2},
            "layout": {"min_files": 4},
            "model": {"name": "gmf", "factors": 8},
            "train": {
                "ranks": 2,
                "device": "cpu",
                "batch_size": 16,
                "lr": 0.05,
                "epochs": 12,
                "timeout_s": 60,
            },
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
        }
        return Config.model_validate(
            {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
        )

    @property
    def prepared(self) -> Manifest:
        return Lake(str(self.folder / "lake")).stage(DS, "prepare").newest()


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Line:
    line = Line(tmp_path_factory.mktemp("line"))
    assert prepare(line.config(), DS).status == "done"
    return line


def ranks_alive() -> dict[int, psutil.Process]:
    """Every training rank under this process, by local rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ncf_dist.train.worker" in process.cmdline() and "LOCAL_RANK" in process.environ():
                found[int(process.environ()["LOCAL_RANK"])] = process
    return found


def test_train_from_log_to_bundle_on_two_ranks(line: Line) -> None:
    """The held-out item is first for nearly everybody, where chance would be 1 in 16; and training again
    finds it done.
    """
    outcome = train(line.config(), DS)
    assert outcome.status == "done"
    bundle = read_bundle(outcome.outputs["bundle"])
    verify_weights(bundle)
    assert bundle.model_version == outcome.extra["model_version"]

    history, test = (read_all(line.prepared, name) for name in ("history", "test"))
    assert len(test) == PEOPLE
    assert test["user_idx"].tolist() == history["user_idx"].tolist()
    seen = Lists(
        np.concatenate(history["item_idx"].to_list()).astype(np.int64),
        np.arange(PEOPLE + 1, dtype=np.int64) * (GOODS // 2 - 1),
    )
    users, items = (torch.from_numpy(test[name].to_numpy().astype(np.int64)) for name in ("user_idx", "item_idx"))
    scores = mask(ModelScorer(load_model(bundle), bundle.n_items).scores(Users(users)), seen)
    assert (catalogue_rank(scores, items) == 1).double().mean() > 0.9

    story = json.loads(Path(outcome.outputs["history"]).read_text())
    kept = story["epochs"][story["epoch"]]
    assert outcome.metrics["validation.ndcg@10"] == kept["ndcg@10"] == max(e["ndcg@10"] for e in story["epochs"])
    assert outcome.metrics["train.epochs"] == len(story["epochs"])
    again = train(line.config(), DS)
    assert (again.status, again.run_key, dict(again.metrics)) == (
        "already-done",
        outcome.run_key,
        outcome.metrics,
    )
    assert not ranks_alive()


def read_all(run: Manifest, name: str) -> Any:
    """A table as a frame in the order of user_idx."""
    return pa.concat_tables([read_table(path) for path in run.files(name)]).sort_by("user_idx").to_pandas()


def test_a_rank_that_is_killed_ends_the_job(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in mid-training: TrainingFailed that names it, no rank left, and no run that a later stage could take for
    finished.
    """
    config = line.config(train={"epochs": 100_000, "patience": 100_000})
    log, end = "", time.monotonic() + 120
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(train, config, DS)
        try:
            while " epoch 2 of " not in log:
                assert not job.done(), log
                assert time.monotonic() < end, log
                time.sleep(0.1)
                log += capfd.readouterr().err
            ranks_alive()[1].kill()
            named = r"^rank 1: ended by SIGKILL \(the kernel .*\); needed .*: lower .* run"
            with pytest.raises(TrainingFailed, match=named):
                job.result(timeout=60)
        finally:
            for rank in ranks_alive().values():
                rank.kill()
    assert not ranks_alive()
    runs = Path(Lake(config.paths.lake).stage(DS, "train").root)
    assert all((run / "history.json").exists() for run in (path.parent for path in runs.glob("*/manifest.json")))


def test_what_a_rank_reports_is_the_jobs_own_error(line: Line) -> None:
    """Rank 1 finds its file damaged while rank 0 waits for it in the first collective."""
    path = Path(line.prepared.files("train")[1])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(ContractError, match=r"^rank 1: .*part-00001.* rerun the job prepare") as caught:
            train(line.config(train={"epochs": 1}), DS)
    finally:
        path.write_bytes(data)
    assert int(caught.value.exit_code) == 3
    assert not ranks_alive()


def test_a_run_is_judged_by_what_it_left_not_by_its_exit_code(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that says 0 without having trained; what an earlier attempt reported is not this one's
    error.
    """
    config = line.config(train={"launcher": "none", "lr": 0.01})
    monkeypatch.setattr(sys, "executable", "true")
    with pytest.raises(TrainingFailed, match="code 0 and no history.json"):
        train(config, DS)
    runs = Path(Lake(config.paths.lake).stage(DS, "train").root)
    spec = max(runs.glob("*/ranks/spec.json"), key=lambda path: path.stat().st_mtime_ns)
    (spec.parent / "error-0.json").write_text(json.dumps({"kind": "ContractError", "message": "of last time"}))
    with pytest.raises(TrainingFailed, match="code 0 and no history.json"):
        train(config, DS)


def test_negatives_that_were_not_prepared_are_refused(line: Line) -> None:
    with pytest.raises(
        ContractError, match=r"negatives.per_positive=its default, this config says 3.*rerun the job prepare"
    ):
        train(line.config(negatives={"per_positive": 3}), DS)


def test_a_night_that_was_not_prepared(line: Line) -> None:
    with pytest.raises(ContractError, match="run the job prepare first"):
        train(line.config(), "2026-02-01")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("few", [True, False])
def test_a_training_of_a_handful_of_steps_is_told(few: bool, ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    """A first log of a few thousand rows with the batch size of a large one trains nothing, and a gate refuses it."""
    steps, epochs = FEW_STEPS // 20 - few, 20
    warning = few_steps(Train(batch_size=7, epochs=epochs, ranks=ranks), steps * 7 * ranks, ranks)
    assert ("lower train.batch_size" in caplog.text) == few == (warning is not None)
    assert warning is None or f"at most {steps * epochs} steps" in warning


def memory_config(limit: int | None, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    train = {"device": "cpu", "max_model_bytes": limit, "batch_size": 10, **sections.pop("train", {})}
    tree = {"paths": {"lake": "unused"}, "input": {"path": "unused"}, "train": train, **sections}
    return Config.model_validate({**tree, "model": model or {"name": "gmf", "factors": 8}})


ROWS, FILE_ROWS = 1000, 100


def test_a_training_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    users, items, ranks = 1_000_000, 50_000, 2
    parameters = (users + items) * 8 + (8 + 1)
    rank = (
        4 * parameters * 5  # weights, gradients, Adam's two moments, the best epoch
        # 8 files of six int32 columns: handed out; the next 8 as read, side by side, mixed
        + 4 * 4 * (2 + 4) * 8 * FILE_ROWS
        + 2 * 4 * 10 * (1 + 4) * 2 * 8  # value and gradient of 50 scored pairs of 8 factors twice
    )
    writing = 4 * parameters * 4  # a checkpoint: weights, best epoch, moments
    needed = rank * ranks + writing

    def check(limit: int, **train: Any) -> None:
        check_memory(memory_config(limit, train=train), users, items, ROWS, FILE_ROWS)

    check(needed, ranks=ranks)
    check(rank + writing, ranks=ranks, launcher="none")
    with pytest.raises(ConfigError) as caught:
        check(needed - 1, ranks=ranks)
    for part in ("1,000,000 users", "50,000 items", f"{parameters:,} parameters x 4 bytes x 5", "2 rank(s)", "lower"):
        assert part in str(caught.value)
    assert f"{needed / 2**30:.2f} GiB" in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("sections", "what", "size"),
    [
        ({"train": {"optimiser": "sgd"}}, "parameters", 4 * 25 * 4),
        ({"loader": {"cache": "host"}}, "loader.cache", 4 * ROWS * (2 + 4 * 4)),
        ({"loader": {"cache": "host", "cache_bytes": 71_999}}, "a window", 4 * 4 * 6 * 8 * FILE_ROWS),
        ({"loader": {"shuffle_files": 99}}, "a window", 4 * 4 * 6 * ROWS),
        ({"train": {"negatives": "online"}}, "online", 8 * (ROWS + 1 + 1)),
        ({"train": {"negatives": "online"}}, "a window", 4 * 4 * 2 * 8 * FILE_ROWS),
        ({"train": {"loss": "sampled_softmax", "shared_negatives": 7}}, "scored", 2 * 4 * 10 * (7 + 1) * 2),
        ({"input": {"path": "x", "feedback": "explicit"}}, "a window", 4 * 4 * 3 * 8 * FILE_ROWS),
        ({"model": {"name": "mlp", "layers": (8, 6, 4)}}, "scored", 2 * 4 * 10 * 5 * (8 + 6 + 4 + 2)),
    ],
)
def test_what_memory_is_for(sections: dict[str, Any], what: str, size: int) -> None:
    """One user and one item of 8 factors are (1 + 1)·8 + 9 = 25 parameters; 10 rows a step, 4 negatives, 4 draws."""
    parts = memory_parts(memory_config(None, **sections), 1, 1, ROWS, FILE_ROWS)
    (found,) = (bytes_ for name, bytes_ in parts.items() if what in name)
    assert found == size


def test_memory_is_refused_by_default_where_the_machine_has_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = 4 * 25 * 5 + 4 * 4 * 6 * 800 + 2 * 4 * 50 * 16 + 4 * 25 * 4
    have = math.ceil(needed / 0.8)
    monkeypatch.setattr(machine, "memory", lambda: have)
    check_memory(memory_config(None), 1, 1, ROWS, FILE_ROWS)
    monkeypatch.setattr(machine, "memory", lambda: have - 10)
    with pytest.raises(ConfigError, match="lower model.factors"):
        check_memory(memory_config(None), 1, 1, ROWS, FILE_ROWS)


def test_memory_is_checked_before_anything_is_read(line: Line) -> None:
    """By the ranks: the job itself does without torch, and does not know on what they run."""
    with pytest.raises(ConfigError, match=r"^rank \d: model gmf .* GiB"):
        train(line.config(train={"max_model_bytes": 1000, "lr": 0.3}), DS)
