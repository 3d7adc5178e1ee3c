"""Ranks that are killed, stopped, asked to end, or given numbers that are not finite: real processes, real signals.

Each rank is a process of its own, forked from a server that has imported torch, so that a start costs little.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from ncf_dist.bundle import read_bundle
from ncf_dist.config import Config, Model
from ncf_dist.errors import ExitCode, Preempted, TrainingFailed
from ncf_dist.lake import Lake
from ncf_dist.models import build_model
from ncf_dist.train import checkpoints, losses, reports, worker
from ncf_dist.train.checkpoints import Checkpoint
from ncf_dist.train.epoch_order import Phase
from ncf_dist.train.launchers import SUPERVISOR
from ncf_dist.train.loaders import Batch
from ncf_dist.train.pipeline import train
from ncf_dist.train.spec import Spec
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.world import World
from tests.gloo import Ranks
from tests.tables import DS, ITEMS, USERS, prepared, small_config

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.test_faults"])
GMF = Model(name="gmf", factors=4)


# ---- SIGKILL -----------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_mid_epoch() -> None:
    """After the 8th update, the second of epoch 1, once it was made but not saved."""
    note = Trainer._note

    def dying(self: Trainer, *args: Any) -> None:
        note(self, *args)
        if self.progress.updates == 8:
            die()

    Trainer._note = dying  # type: ignore[method-assign, assignment]


def during_a_save() -> None:
    """With the second checkpoint on disk but for its rename."""
    count = 0

    def dying(source: str, target: str) -> None:
        nonlocal count
        count += 1
        die() if count == 2 else os.replace(source, target)

    os.rename = dying  # type: ignore[assignment]


def between_epochs() -> None:
    import ncf_dist.train.trainer as module

    module.show_epoch = lambda world, record, *_: die() if record["epoch"] == 1 else None  # type: ignore[attr-defined]


def rank_process(rank: int, port: int, spec: str, fault: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if fault is not None and rank == 0:
        fault()
    worker.run(spec)


def run_ranks(spec: str, fault: Callable[[], None] | None = None) -> list[int | None]:
    """Exit codes of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [SERVER.Process(target=rank_process, args=(rank, port, spec, fault)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


def outcome(run: Path) -> tuple[str, Any, Checkpoint]:
    """(the weights' checksum, the losses and metrics, the last checkpoint: weights, best weights and optimiser)"""
    story = json.loads((run / "history.json").read_text())
    epochs = [{k: v for k, v in e.items() if k in ("loss", "mrr") or "@" in k} for e in story["epochs"]]
    last = checkpoints.latest(str(run / "checkpoints"))
    assert last is not None
    return read_bundle(str(run / "bundle")).sha256, [story["curve"], story["epoch"], epochs], last


def spec_in(folder: Path, seed: int) -> tuple[str, Path]:
    """(spec, run folder) of a training of 3 epochs of ⌈(47 // 2) / 4⌉ = 6 steps that saves every third."""
    model = Model(name="mlp", layers=(8, 4), dropout=0.3)
    config = small_config(folder, model, epochs=3, lr=0.05, checkpoint_steps=3, timeout_s=20)
    config = config.model_copy(update={"seed": seed})
    run = folder / "run"
    (run / "ranks").mkdir(parents=True)
    path = str(run / "ranks" / "spec.json")
    Spec(config.model_dump_json(by_alias=True), prepared(config, 47).root, str(run)).save(path)
    return path, run


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (2, 3))])
def test_a_killed_training_goes_on_to_the_same_end(tmp_path: Path, seed: int) -> None:
    """Weights, best weights, optimiser and the sequence of losses, to the bit."""
    spec, run = spec_in(tmp_path / "whole", seed)
    assert run_ranks(spec) == [0, 0]
    sha256, story, last = outcome(run)
    for fault in (in_mid_epoch, during_a_save, between_epochs):
        spec, run = spec_in(tmp_path / fault.__name__, seed)
        killed, other = run_ranks(spec, fault)
        assert killed == -signal.SIGKILL
        assert other == ExitCode.UNEXPECTED
        assert not (run / "history.json").exists()
        assert run_ranks(spec) == [0, 0]
        found = outcome(run)
        assert (found[0], found[1]) == (sha256, story)
        assert found[2].tensors.keys() == last.tensors.keys()
        assert all(torch.equal(found[2].tensors[name], tensor) for name, tensor in last.tensors.items())


# ---- what a rank does without -------------------------------------------------------------------------------


def dies_of_a_compiler() -> None:
    leave = World.leave

    def look(self: World) -> None:
        die() if "torch._dynamo.eval_frame" in sys.modules else leave(self)

    World.leave = look  # type: ignore[method-assign]


def test_ranks_train_without_loading_torchs_compiler(tmp_path: Path) -> None:
    """It takes longer to import than torch, and its functions that optimisers and DDP call do nothing here."""
    spec, _ = spec_in(tmp_path, 1)
    assert run_ranks(spec, dies_of_a_compiler) == [0, 0]


def test_a_model_is_outlined_without_loading_torchs_compiler() -> None:
    """Every worker of Spark that loads a model, or chooses its products, does this first."""
    program = """
import sys
import torch
from ncf_dist import no_compiler
from ncf_dist.config import Model
from ncf_dist.models import MODELS, build_model, outline
for name in MODELS:
    for block in ("mix", "attention", "gru", "mean") if name == "history" else ("mix",):
        config = Model(name=name, factors=8, block=block)
        shapes, weights = outline(config, 5, 7).state_dict(), build_model(config, 5, 7).state_dict()
        assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {k: (v.shape, v.dtype) for k, v in weights.items()}
        assert all(value.is_meta for value in shapes.values())
        assert not any(value.is_meta for value in weights.values())
        with no_compiler.left_out():
            outline(config, 5, 7).ranking_items(torch.zeros(1, dtype=torch.int64, device="meta"))
        assert "torch._dynamo" not in sys.modules, "neither the compiler nor what stood in for it"
no_compiler.leave_out()
with no_compiler.left_out():
    pass
print(type(sys.modules["torch._dynamo"]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "_Eager\n", done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("how", ["no_compiler.leave_out()", "outline(Model(name='history'), 5, 7)"])
def test_a_process_that_left_the_compiler_out_may_still_compile(how: str) -> None:
    program = (
        "import torch; from ncf_dist import no_compiler; from ncf_dist.config import Model\n"
        f"from ncf_dist.models import outline; {how}; no_compiler.leave_out()\n"
        "weight = torch.nn.Parameter(torch.ones(2)); torch.optim.SGD([weight], lr=1.0).step()\n"
        "assert 'torch._dynamo.eval_frame' not in sys.modules\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys; {program}"], capture_output=True, text=True)
    assert done.stdout == "2.0\n", done.stderr


# ---- signals to a whole job --------------------------------------------------------------------------------


def job(folder: Path, **train_settings: Any) -> Config:
    """A training on two ranks that ends by itself only in days."""
    endless = {"ranks": 2, "epochs": 100_000, "patience": 100_000, "lr": 0.001, **train_settings}
    config = small_config(folder, GMF, **endless)
    prepared(config, 4000)
    return config


def ranks_alive() -> dict[int, psutil.Process]:
    """Every training rank under this process, by local rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if worker.__name__ in process.cmdline() and "LOCAL_RANK" in process.environ():
                found[int(process.environ()["LOCAL_RANK"])] = process
    return found


def supervisor() -> psutil.Process:
    (found,) = (process for process in psutil.Process().children() if SUPERVISOR in process.cmdline())
    return found


def saved_in(lake: str) -> set[Path]:
    return set(Path(lake).glob("runs/*/train/*/checkpoints/step-*"))


class When(threading.Thread):
    """Does something once the ranks have made progress: rank 0 has saved a checkpoint that was not there before."""

    def __init__(self, lake: str, act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.lake, self.act, self.at = lake, act, math.nan
        self.before = saved_in(lake)
        self.start()

    def run(self) -> None:
        while saved_in(self.lake) <= self.before:
            time.sleep(0.05)
        self.at = time.monotonic()
        self.act()


def test_sigterm_saves_and_exits_75_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """Sent to the job, and then to the ranks' supervisor."""
    config = job(tmp_path, checkpoint_steps=50)
    acting = When(config.paths.lake, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped as asked after update .* run the job train again") as caught:
        train(config, DS)
    assert time.monotonic() - acting.at < 25
    assert caught.value.exit_code == ExitCode.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before
    assert not ranks_alive()
    (run,) = Path(config.paths.lake).glob("runs/*/train/*")
    saved = checkpoints.latest(str(run / "checkpoints"))
    assert saved is not None
    assert f"update {saved.progress['updates']}, " in str(caught.value), "no step was lost"
    assert not Lake(config.paths.lake).stage(DS, "train").finished()

    # `epochs` is part of what names a run, so the next one is asked to end too: it starts where the first one was.
    acting = When(config.paths.lake, lambda: supervisor().terminate())
    with pytest.raises(Preempted, match="stopped as asked after update .*, saved in "):
        train(config, DS)
    assert not ranks_alive()
    later = checkpoints.latest(str(run / "checkpoints"))
    assert later is not None
    assert later.progress["updates"] >= saved.progress["updates"]
    assert (
        later.progress["history"]["curve"][: len(saved.progress["history"]["curve"])]
        == (saved.progress["history"]["curve"])
    )


def test_a_rank_that_stands_still_ends_the_job(tmp_path: Path) -> None:
    """SIGSTOP of rank 1: its peer waits `timeout_s`, and nothing is left 30 s later."""
    config = job(tmp_path, checkpoint_steps=50, timeout_s=4)
    acting = When(config.paths.lake, lambda: ranks_alive()[1].suspend())
    with pytest.raises(TrainingFailed, match="^rank 0: "):
        train(config, DS)
    assert time.monotonic() - acting.at < 4 + 30
    assert not ranks_alive()


def test_ranks_do_not_outlive_a_job_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the job: torchrun is told by the kernel, and so are the ranks."""
    config = job(tmp_path, checkpoint_steps=50)
    process = SERVER.Process(target=train, args=(config, DS))
    process.start()
    end = time.monotonic() + 300
    while not saved_in(config.paths.lake):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert process.pid is not None
    tree = psutil.Process(process.pid).children(recursive=True)
    assert len(tree) >= 3
    process.kill()
    assert not psutil.wait_procs(tree, timeout=25)[1]


def test_who_only_lost_others_is_named_last(tmp_path: Path) -> None:
    """Rank 0 waited for rank 1 in vain: what ended rank 1 is the message."""
    spec = str(tmp_path / "spec.json")
    reports.report(spec, 0, *worker.failure(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")))
    with pytest.raises(TrainingFailed, match=r"^rank 0: .*Connection closed .*needed all ranks within train.timeout_s"):
        reports.raise_reported(str(tmp_path))
    reports.report(spec, 1, *worker.failure(MemoryError("no room")))
    with pytest.raises(TrainingFailed, match=r"^rank 1: MemoryError: no room$"):
        reports.raise_reported(str(tmp_path))


GLOO = "[/a/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (GLOO + "Connection closed by peer [10.0.0.3]:4. This is typically so. GLHF!", "has ended (Conn"),
        (GLOO + "Read error [10.0.0.3]:4: Connection reset by peer. Check the logs", "has ended (Read error"),
        (GLOO + "Timed out waiting 6000ms for recv operation to complete", "in time (Timed out waiting 6000ms for "),
        ("wait timeout after 6000ms, keys: /0//cpu//0/1\nat a.cpp:1", "in time (wait timeout after 6000ms, keys: /0/"),
        (GLOO + "no device found", "the other ranks cannot be reached (no device found)"),
    ],
)
def test_a_lost_rank_is_told_in_words(said: str, told: str) -> None:
    """What happened and what to do; of gloo's own text, whole in the log, the first sentence without its source."""
    kind, message = worker.failure(torch.distributed.DistStoreError(said))
    assert kind == reports.LOST
    assert told in message
    assert message.endswith("run the job train again: it goes on from the last checkpoint")
    assert not any(noise in message for noise in (".cc", "typically", "logs of", "\n", "GLHF"))


def test_a_report_that_cannot_be_written_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the lake cannot be reached any more."""
    over = threading.Event()
    monkeypatch.setattr(reports, "WRITE_S", 0.05)
    monkeypatch.setattr(reports, "write_atomic", lambda *_: over.wait(60))
    began = time.monotonic()
    reports.report(str(tmp_path / "spec.json"), 0, reports.LOST, "nobody answers")
    assert time.monotonic() - began < 50
    over.set()


# ---- numbers that are not finite ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("gloo")) as two:
        yield two


PLACES = ("nan rating", "inf rating", "nan loss", "inf loss", "nan gradient", "inf gradient")


def poisoned(world: World, place: str) -> tuple[str, bool]:
    """(the error, whether the weights are those before the step) of a third step with poison on rank 1 only."""

    class Source:
        rows, phase = 24, Phase(world.size, 4, 1)

    value = math.nan if place.startswith("nan") else math.inf
    torch.manual_seed(1)
    model = build_model(Model(name="mf", factors=4, biases=True), USERS, ITEMS)
    config = small_config(Path("unused"), GMF).train
    it = Trainer(model, Source(), lambda model: {}, config, world, loss="mse")  # type: ignore[arg-type]
    it.enter_phase()
    user, items = torch.arange(4) + 4 * world.rank, torch.arange(4)[:, None]
    for step in range(3):
        rating = torch.ones(4)
        if step == 2 and world.rank == 1:
            if place.endswith("rating"):
                rating[2] = value
            elif place.endswith("loss"):
                it.objective.register_forward_hook(lambda module, args, loss: loss * value)
            else:
                model.get_parameter("item.weight").register_hook(lambda gradient: gradient * value)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        it.progress.phases[-1] = Phase(world.size, 4, 1, step)
        try:
            it.train_step(Batch(user, items, rating), 0.0)
        except TrainingFailed as error:
            return str(error), step == 2 and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    return "nothing was noticed", False


@pytest.mark.parametrize("place", PLACES)
def test_poison_stops_all_ranks_before_the_update(ranks: Ranks, place: str) -> None:
    first, second = ranks.run(poisoned, place)
    assert first == second
    message, unchanged = first
    assert unchanged, message
    assert "epoch 0, step 2, rank " in message
    if place.endswith("rating"):
        assert "rank 1: a rating is not finite (the batch of rank 1 begins with users [4, 5, 6]" in message
    elif place.endswith("loss"):
        assert f"rank 1: the loss is {place[:3]} (the batch of rank 1 begins with users [4, 5, 6]" in message
    else:
        assert "the gradient is not finite" in message
    assert "no weight was updated: lower train.lr" in message


def test_poison_ends_the_job_and_nothing_is_published(tmp_path: Path) -> None:
    """A learning rate that makes everything overflow."""
    config = small_config(tmp_path, GMF, epochs=50, lr=1e30, launcher="none", optimiser="sgd", schedule="constant")
    prepared(config, 100)
    with pytest.raises(TrainingFailed, match=r"^rank 0: epoch \d+, step \d+, rank 0: .*not? .*finite|the loss is"):
        train(config, DS)
    assert not Lake(config.paths.lake).stage(DS, "train").finished()
    assert not list(Path(config.paths.lake).glob("runs/*/train/*/bundle"))


def test_clipping_bounds_the_gradient_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sgd without momentum at rate 1: the step is the gradient. Norm 5 clipped to 2 keeps its direction: 3-4-5."""

    class Source:
        rows, phase = 4, Phase(1, 1, 1)

    class Line(torch.nn.Module):
        """The loss 3a + 4b."""

        draws_random = False

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return (3 * self.a + 4 * self.b) * torch.tensor([[2.0, 0.0]])

    monkeypatch.setitem(losses.LOSSES, "bce", lambda model, batch: model(batch.user, batch.items).mean())
    for clip, wanted in ((2.0, [-3 * 2 / 5, -4 * 2 / 5]), (6.0, [-3.0, -4.0]), (None, [-3.0, -4.0])):
        line = Line()
        settings: dict[str, Any] = {
            "optimiser": "sgd",
            "momentum": 0.0,
            "lr": 1.0,
            "schedule": "constant",
            "clip_norm": clip,
        }
        config = small_config(tmp_path, GMF, **settings).train
        it = Trainer(line, Source(), lambda model: {}, config, World())  # type: ignore[arg-type]
        it.train_step(Batch(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)), 0.0)
        assert [line.a.item(), line.b.item()] == pytest.approx(wanted, rel=1e-5)
