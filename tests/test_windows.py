"""Windows of histories: every item but a user's first is predicted once an epoch, from what came before it, however
windows are dealt, grouped and read; and the trainer keeps for them what it promises for rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor

from ncf_dist.bundle import load_model, read_bundle
from ncf_dist.config import Loader, Model, Train
from ncf_dist.errors import ConfigError, ContractError, Preempted, TrainingFailed
from ncf_dist.manifests import Manifest
from ncf_dist.models import History, Sequences, build_model
from ncf_dist.models.latest import latest
from ncf_dist.parquet import read_table
from ncf_dist.train import all_items, checkpoints
from ncf_dist.train.all_items import beta_of, total_loss
from ncf_dist.train.epoch_order import Phase
from ncf_dist.train.loaders import Batch, Task
from ncf_dist.train.losses import gbce, sampled_softmax, softmax
from ncf_dist.train.memory_check import memory_parts
from ncf_dist.train.pipeline import train
from ncf_dist.train.start_weights import warm_start
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.validation import Validator
from ncf_dist.train.windows import GROUPS, WindowLoader, grouped
from ncf_dist.train.world import World
from tests.gloo import Ranks
from tests.histories import LENGTH, TINY, history_config, history_prepared, history_run, lives
from tests.tables import DS, ITEMS, USERS
from tests.test_checkpoints import assert_same, everything

LOSSES = ("sampled_softmax", "softmax", "gbce")
SHARED = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These products are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("gloo")) as two:
        yield two


def loader_of(
    run: Manifest, world: World | None = None, batch_size: int = 3, shared: int = SHARED, **config: Any
) -> WindowLoader:
    task = Task(USERS, ITEMS, batch_size, 1, shared=shared)
    return WindowLoader(run, task, Loader(**{"backend": "arrow", "shuffle_files": 2, **config}), world or World())


def trainer_of(
    run: Manifest,
    world: World,
    *,
    model: Model = TINY,
    loss: str = "sampled_softmax",
    batch_size: int = 4,
    folder: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Trainer:
    loader = loader_of(run, world, batch_size, SHARED * (loss != "softmax"))
    torch.manual_seed(1)
    config = Train(**{"epochs": 3, "lr": 0.02, "batch_size": batch_size, "patience": 9, **settings})
    validate = Validator(run, world, history=model.history)
    built = build_model(model, USERS, ITEMS)
    return Trainer(built, loader, validate, config, world, loss=loss, seed=1, folder=folder, stop=stop)


# ---- groups ----------------------------------------------------------------------------------------------------------

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def windows_of(lengths: Sequence[int], length: int) -> Rows:
    """Windows whose item at place p of row r is 1000 r + p."""
    row, place = np.arange(len(lengths))[:, None], np.arange(length + 1)
    there = place < np.array(lengths)[:, None]
    items = np.where(there, 1000 * row + place, 0).astype("<i4")
    return np.array(lengths), items, np.where(there, place % 64, 0).astype(np.uint8)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(2, n + 1), min_size=1))))
@budget(max_examples=100, deadline=None)
def test_a_step_predicts_each_item_but_the_first_from_the_one_before_it(case: tuple[int, list[int]]) -> None:
    length, lengths = case
    spread = -(-length // GROUPS)
    order, windows, targets = grouped(*windows_of(lengths, length), spread)
    before = torch.cat([group.items.reshape(-1) for group in windows.groups])[windows.known]
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (targets == before.numpy() + 1).all()
    assert sorted(targets.tolist()) == sorted(1000 * r + p for r, n in enumerate(lengths) for p in range(1, n))
    for group in windows.groups:
        assert group.items.shape[1] == group.length.max()
        assert int(group.length.max() - group.length.min()) < spread
    rows = [n for group in windows.groups for n in group.length.tolist()]
    assert rows == [lengths[r] - 1 for r in order]


@pytest.mark.parametrize("length", [50, 100, 150, 200])
def test_padding_is_a_small_share_of_the_positions(length: int) -> None:
    """Histories as MovieLens-1M has them: 20 items at least, 96 in the middle, 165 on average."""
    rng = np.random.default_rng(1)
    items = np.maximum(20, np.round(np.exp(rng.normal(np.log(96), 1.04, 6040)))).astype(int)
    lengths = [1 + min(length, left) for count in items - 1 for left in range(count, 0, -length)]
    rng.shuffle(lengths)
    known = real = 0
    for start in range(0, len(lengths), 48):
        _, windows, targets = grouped(*windows_of(lengths[start : start + 48], length), -(-length // GROUPS))
        known, real = known + sum(group.items.numel() for group in windows.groups), real + len(targets)
        assert windows.padding < 0.15
    assert 1 - real / known < 0.08


# ---- the loader ------------------------------------------------------------------------------------------------------


def predicted(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    """(item, the one it is predicted from) of each target."""
    found = []
    for batch in batches:
        assert batch.windows is not None
        items = torch.cat([group.items.reshape(-1) for group in batch.windows.groups])
        found += list(zip(batch.items[:, 0].tolist(), items[batch.windows.known].tolist(), strict=True))
    return found


def plain(batches: Sequence[Batch]) -> list[Any]:
    """Batches as lists, to compare."""
    return [
        [b.user.tolist(), b.items.tolist(), None if b.shared is None else b.shared.tolist(), b.divisor]
        + [[group.items.tolist(), group.gaps.tolist()] for group in (b.windows.groups if b.windows else ())]
        for b in batches
    ]


def wanted_pairs() -> list[tuple[int, int]]:
    return sorted((after, before) for life in lives() for before, after in itertools.pairwise(life))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_item_but_a_user_s_first_is_predicted_once_an_epoch(tmp_path: Path, size: int) -> None:
    """Except those of the last `windows mod ranks` windows of that epoch's order."""
    run = history_run(tmp_path)
    loaders = [loader_of(run, World(rank, size)) for rank in range(size)]
    batches = [list(loader.epoch(2)) for loader in loaders]
    assert {len(own) for own in batches} == {loaders[0].steps}
    found = sorted(pair for own in batches for pair in predicted(own))
    left = loaders[0].rows % size
    missing = list(wanted_pairs())
    for pair in found:
        missing.remove(pair)
    assert len(missing) <= left * LENGTH
    assert bool(missing) == bool(left)


@pytest.mark.parametrize("cache", ["none", "host", "device"])
@pytest.mark.parametrize("backend", ["arrow", "petastorm"])
def test_what_reads_the_windows_does_not_change_a_batch(tmp_path: Path, backend: str, cache: str) -> None:
    run = history_run(tmp_path)
    wanted = plain(list(loader_of(run).epoch(1)))
    assert plain(list(loader_of(run, backend=backend, cache=cache).epoch(1))) == wanted
    assert plain(list(loader_of(run, backend=backend, cache=cache).epoch(1, (), 2))) == wanted[2:]


def test_a_step_s_sum_is_divided_by_its_windows_times_the_table_s_mean(tmp_path: Path) -> None:
    """Whatever the lengths of the step's own windows."""
    run = history_run(tmp_path)
    facts = run.facts["sequences"]
    batches = list(loader_of(run).epoch(0))
    wanted = [len(b.user) * facts["targets"] / facts["rows"] for b in batches]
    assert [b.divisor for b in batches] == pytest.approx(wanted)
    assert len({len(b.items) for b in batches}) > 1
    assert sum(b.divisor or 0 for b in batches) == pytest.approx(facts["targets"])


DAMAGE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "length from 1 to": ("length", lambda c: [1, *c[1:]]),
    f"needed 2 to {LENGTH + 1}": ("length", lambda c: [LENGTH + 2, *c[1:]]),
    f"items from .* needed 0 to {ITEMS - 1}": ("items", lambda c: [b"\xff" * len(c[0]), *c[1:]]),
    "gaps from .* needed 0 to 63": ("gaps", lambda c: [b"\xff" * len(c[0]), *c[1:]]),
    f"user_idx from .* needed 0 to {USERS - 1}": ("user_idx", lambda c: [USERS, *c[1:]]),
}


@pytest.mark.parametrize("backend", ["arrow", "petastorm"])
@pytest.mark.parametrize("problem", DAMAGE)
def test_windows_that_cannot_be_are_refused(tmp_path: Path, backend: str, problem: str) -> None:
    from ncf_dist.parquet import write_parquet

    run = history_run(tmp_path, files=1)
    [path] = run.files("sequences")
    table, (column, change) = read_table(path), DAMAGE[problem]
    place = table.column_names.index(column)
    field = table.schema.field(place)
    changed = pa.array(change(table[column].to_pylist()), field.type)
    write_parquet(table.set_column(place, field, changed), str(Path(path).parent), Path(path).name)
    with pytest.raises(ContractError, match=f"{problem}.*rerun the job prepare"):
        list(loader_of(run, backend=backend).epoch(0))


# ---- losses ----------------------------------------------------------------------------------------------------------


def doubled(kind: str, user: Tensor, item: Tensor, bias: Tensor, target: Tensor, shared: Tensor | None) -> Tensor:
    """The plain formulas of losses.py, a sum over rows."""
    own = (user * item[target]).sum(-1) + bias[target]
    if shared is None:
        return softmax(own, user @ item.T + bias) * len(user)
    scores, same = user @ item[shared].T + bias[shared], target[:, None] == shared
    if kind == "gbce":
        return gbce(own, scores, same, beta_of(len(shared), len(item))) * len(user)
    return sampled_softmax(own, scores, same, len(item)) * len(user)


def fused(kind: str, user: Tensor, item: Tensor, bias: Tensor, target: Tensor, shared: Tensor | None) -> Tensor:
    own = (user * item[target]).sum(-1) + bias[target]
    if shared is None:
        return total_loss(all_items.softmax, user, item, bias, own)
    if kind == "gbce":
        rule, added = all_items.gbce(beta_of(len(shared), len(item))), 0.0
    else:
        rule, added = all_items.sampled_softmax, math.log(len(item) / len(shared))
    return total_loss(rule, user, item[shared], bias[shared] + added, own, target, shared)


@given(
    st.sampled_from(LOSSES),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 20),
    st.sampled_from([1, 7, 64, 2**19]),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.integers(0, 9),
)
@budget(max_examples=150, deadline=None)
def test_losses_and_gradients_are_those_of_the_plain_formulas(
    kind: str, rows: int, items: int, drawn: int, block: int, size: float, seed: int
) -> None:
    """In float64 to 1e-9, in blocks of any size. Few items: shared ones repeat, and are often a row's own; at size 0
    all scores tie."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, 3), (items, 3), (items,))
    values = [torch.randn(*shape, generator=draw, dtype=torch.float64) * size for shape in shapes]
    target = torch.randint(items, (rows,), generator=draw)
    shared = None if kind == "softmax" else torch.randint(items, (drawn,), generator=draw)
    found: list[Tensor | None] = []
    wanted: list[Tensor | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(all_items.BLOCK, "cpu", block)
        for compute, results in ((fused, found), (doubled, wanted)):
            leaves = [value.clone().requires_grad_() for value in values]
            user, item, bias = leaves
            loss = compute(kind, user, item, bias, target, shared) / 7
            loss.backward()
            results += [loss.detach(), *(leaf.grad for leaf in leaves)]
    for left, right in zip(found, wanted, strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-9)


def test_gbce_by_hand() -> None:
    """Of 11 items 5 are shared: α = 5 / 10, β = ½ (¾ (1 - 2) + 2) = .625. The second shared item is the row's own."""
    positive, shared = torch.tensor([2.0]), torch.tensor([[0.5, 2.0, -1.0, 0.0, 0.0]])
    own = torch.tensor([[False, True, False, False, False]])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    wanted = -(0.625 * math.log(sigmoid(2)) + sum(math.log(1 - sigmoid(x)) for x in (0.5, -1.0, 0.0, 0.0))) / 6
    assert beta_of(5, 11) == pytest.approx(0.625)
    assert gbce(positive, shared, own, 0.625).item() == pytest.approx(wanted, rel=1e-6)


def test_softmax_by_hand() -> None:
    every = torch.tensor([[1.0, 2.0, 0.0]])
    wanted = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + 1))
    assert softmax(every[:, 1], every).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("block", ["mix", "attention", "gru", "mean"])
def test_bf16_is_close_and_gives_float32_gradients(tmp_path: Path, block: str, loss: str) -> None:
    run, model = history_run(tmp_path), TINY.model_copy(update={"block": block})
    batch = next(loader_of(run, shared=SHARED * (loss != "softmax")).epoch(0))
    found = []
    for precision in ("fp32", "bf16"):
        trainer = trainer_of(run, World(), model=model, loss=loss, precision=precision)
        value = trainer.objective(batch)
        value.backward()
        assert value.dtype == torch.float32
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainer.model.parameters())
        found.append(value.item())
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


# ---- the trainer -----------------------------------------------------------------------------------------------------


def fit(world: World, run: Manifest, model: Model, loss: str, batch_size: int) -> tuple[list[Any], dict[str, Any]]:
    trainer = trainer_of(run, world, model=model, loss=loss, batch_size=batch_size, embedding_l2=0.3)
    # Every rank's windows of a step, in the order in which one process has them: the deal differs by world.
    trainer.loader = Dealt(trainer.loader, world, batch_size)  # type: ignore[assignment]
    epochs = trainer.fit().epochs
    return epochs, {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}


class Dealt:
    """The steps of one process on 2 B windows, of which each of two ranks gets every second window."""

    def __init__(self, loader: Any, world: World, batch_size: int) -> None:
        self.whole = loader_of_like(loader, batch_size * world.size)
        self.world, self.rows = world, 16
        self.phase = Phase(world.size, batch_size, 1)

    def order(self, epoch: int, done: Sequence[Phase] = ()) -> Any:
        from ncf_dist.train.epoch_order import EpochOrder

        return EpochOrder([self.rows], 1, epoch, done)

    def epoch(self, epoch: int, done: Sequence[Phase] = (), skip: int = 0) -> Iterator[Batch]:
        whole, used = self.whole, 0
        rows = whole._whole_table(whole._names(epoch))
        for start in range(0, self.rows, whole.task.batch_size):
            mine = slice(start + self.world.rank, start + whole.task.batch_size, self.world.size)
            columns = [torch.from_numpy(np.ascontiguousarray(rows[name][mine])) for name in whole._names(epoch)]
            yield whole._batch(epoch, used, columns)
            used += whole.task.batch_size


def loader_of_like(loader: WindowLoader, batch_size: int) -> WindowLoader:
    task = dataclasses.replace(loader.task, batch_size=batch_size)
    copy = WindowLoader.__new__(WindowLoader)
    copy.__dict__.update({**loader.__dict__, "task": task, "world": World()})
    return copy


@pytest.mark.parametrize(
    ("block", "loss"),
    [("mix", "sampled_softmax"), ("mix", "softmax"), ("mix", "gbce"), ("attention", "gbce"), ("gru", "softmax")],
)
def test_two_ranks_of_batch_b_are_one_process_of_2b(ranks: Ranks, tmp_path: Path, block: str, loss: str) -> None:
    """Their windows are of other lengths, so they predict unequal numbers of items: the fixed divisor weighs each item
    alike all the same."""
    run, model = history_run(tmp_path), TINY.model_copy(update={"block": block})
    one_history, one = fit(World(), run, model, loss, 4)
    (first_history, first), (second_history, second) = ranks.run(fit, run, model, loss, 2)
    for key, wanted in one.items():
        assert np.array_equal(first[key], second[key]), key
        np.testing.assert_allclose(first[key], wanted, atol=2e-6, rtol=0, err_msg=key)
    for left, right, record in zip(first_history, second_history, one_history, strict=True):
        assert left["loss"] == right["loss"] == pytest.approx(record["loss"], abs=1e-6)
        assert left["ndcg@10"] == right["ndcg@10"] == pytest.approx(record["ndcg@10"])


Used = list[tuple[int, tuple[int, int]]]


def go_on(world: World, run: Manifest, folder: str, updates: int, settings: dict[str, Any]) -> tuple[Any, Used]:
    """Go on for so many updates: (what everything is, what was predicted from what in which epoch)"""
    count = itertools.count(1)
    trainer = trainer_of(run, world, folder=folder, stop=lambda: next(count) >= updates, **settings)
    if (found := checkpoints.latest(folder)) is not None:
        trainer.resume(found)
    used: Used = []
    step = trainer.train_step

    def noting(batch: Batch, done: float, asked: tuple[bool, bool] = (False, False)) -> Any:
        used.extend((trainer.progress.epoch, pair) for pair in predicted([batch]))
        return step(batch, done, asked)

    trainer.train_step = noting  # type: ignore[method-assign]
    with contextlib.suppress(Preempted):
        trainer.fit()
    return everything(trainer), used


RESUMED: dict[str, dict[str, Any]] = {
    "mix, dropout, adamw": {
        "model": TINY.model_copy(update={"dropout": 0.3}),
        "optimiser": "adamw",
        "schedule": "linear",
        "weight_decay": 0.1,
    },
    "attention, gbce, bf16": {
        "model": TINY.model_copy(update={"block": "attention"}),
        "loss": "gbce",
        "precision": "bf16",
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_training_that_is_stopped_anywhere_ends_the_same(tmp_path: Path, name: str) -> None:
    """3 epochs of ⌈19 windows / 4⌉ = 5 steps: stopped after every single one, and several times in a row."""
    run, case = history_run(tmp_path / "run"), RESUMED[name]
    whole = trainer_of(run, World(), **case)
    whole.fit()
    assert len(whole.history.curve) == 15
    for number, stops in enumerate([*([n] for n in range(1, 15)), [2, 1, 3]]):
        folder = str(tmp_path / str(number))
        for updates in (*stops, 10**9):
            found, _ = go_on(World(), run, folder, updates, case)
        assert_same(found, everything(whole))


def test_two_ranks_then_one_then_two_predict_every_item_once(ranks: Ranks, tmp_path: Path) -> None:
    """19 windows: 2 ranks x 2 x 2 steps, 1 rank x 2 x 1 step, 8 of the 9 that are left on 2 ranks; then two more
    epochs."""
    run, folder = history_run(tmp_path / "run"), str(tmp_path / "kept")
    settings: dict[str, Any] = {"batch_size": 2}
    stretches = ranks.run(go_on, run, folder, 2, settings)
    stretches.append(go_on(World(), run, folder, 1, settings))
    last = ranks.run(go_on, run, folder, 10**9, settings)
    # A rank's curve is of its own losses.
    assert_same((last[0][0][0], last[0][0][1][1:]), (last[1][0][0], last[1][0][1][1:]))
    missing = list(wanted_pairs())
    for _, used in (*stretches, *last):
        for epoch, pair in used:
            if epoch == 0:
                missing.remove(pair)
    assert 1 <= len(missing) <= LENGTH


def test_a_number_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    trainer = trainer_of(history_run(tmp_path), World())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with torch.no_grad():
        before["item.weight"][:] = trainer.model.get_parameter("item.weight")[:] = math.nan
    with pytest.raises(TrainingFailed, match=r"the loss is nan .*no weight was updated"):
        trainer.fit()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_planted_order_is_learned(tmp_path: Path) -> None:
    """The next item is always the next number: nothing a set of items tells."""
    run = history_run(tmp_path)
    trainer = trainer_of(run, World(), epochs=30, lr=0.03, loss="softmax", patience=40)
    trainer.validate = lambda model: {}
    trainer.fit()
    model = trainer.model
    assert isinstance(model, History)
    with torch.no_grad():
        users = latest(read_table(run.files("recent")[0]), 0, LENGTH)
        scores = model.score_block(model.users(users), model.item_side(None))
    lasts = [(user, life[-1]) for user, life in enumerate(lives()) if len(life) > 1]
    right = [int(scores[user].argmax()) == (last + 1) % ITEMS for user, last in lasts]
    assert np.mean(right) > 0.8


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_ranks_by_what_users_did_last_in_train(tmp_path: Path) -> None:
    """As scored one user at a time; a user without train items has no validation row."""
    run = history_run(tmp_path)
    torch.manual_seed(2)
    model = build_model(TINY, USERS, ITEMS).eval()
    places = []
    for path in run.files("validation"):
        for row in read_table(path).to_pylist():
            life = lives()[row["user_idx"]][-LENGTH:]
            table = read_table(run.files("recent")[0]).slice(row["user_idx"], 1)
            one = latest(table, 0, LENGTH)
            assert one.items[0, : len(life)].tolist() == life
            with torch.no_grad():
                side = model.users(one)
                scores = model.score_block(side, model.item_side(None))[0]
            own = scores[row["item_idx"]]
            places.append(1 + sum(bool(scores[c] > own) for c in row["candidates"]))
    validator = Validator(run, World(), history=LENGTH)
    assert validator.users is not None
    assert validator.users.latest is not None
    known = [life[-LENGTH:] for life in lives() if life]
    read = validator.users.latest
    assert [row[:n] for row, n in zip(read.items.tolist(), read.length.tolist(), strict=True)] == known
    found = validator(model)
    assert found["mrr"] == pytest.approx(np.mean([1 / place for place in places]))
    assert 1 < np.mean(places) < 3


def test_two_ranks_validate_as_one(ranks: Ranks, tmp_path: Path) -> None:
    run = history_run(tmp_path)
    assert ranks.run(validate, run) == [validate(World(), run)] * 2


def validate(world: World, run: Manifest) -> dict[str, float]:
    torch.manual_seed(2)
    return Validator(run, world, history=LENGTH)(build_model(TINY, USERS, ITEMS))


def test_users_that_are_missing_from_recent_are_told(tmp_path: Path) -> None:
    run = history_run(tmp_path)
    shorter = history_run(tmp_path / "other", sequences=lives()[:-1])
    tables = {**run.tables, "recent": dataclasses.replace(shorter.tables["recent"], path="other/recent")}
    with pytest.raises(ContractError, match=r"table recent of .* has 10 of the 11 users .* rerun the job prepare"):
        Validator(dataclasses.replace(run, tables=tables), World(), history=LENGTH)


# ---- the job ---------------------------------------------------------------------------------------------------------


def test_the_job_trains_a_model_of_histories_on_two_ranks(tmp_path: Path) -> None:
    config = history_config(tmp_path, ranks=2, epochs=2, checkpoint_steps=1)
    history_prepared(config)
    outcome = train(config, DS)
    bundle = read_bundle(outcome.outputs["bundle"])
    assert bundle.model == TINY
    assert json.loads(Path(outcome.outputs["history"]).read_text())["epochs"][-1]["loss"] > 0
    assert {"validation.ndcg@10", "train.loss"} <= outcome.metrics.keys()
    model = load_model(bundle)
    with torch.no_grad():
        side = model.ranking_users(Sequences(torch.tensor([[2, 4]]), torch.tensor([[0, 3]]), torch.tensor([2])))
    assert side.dot.shape == (1, TINY.factors + 1)
    # Warm start: two more items tonight, and the tower as it was.
    more = history_config(tmp_path, warm_start=outcome.outputs["bundle"])
    grown = build_model(more.model, USERS, ITEMS + 2)
    fresh = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    warm_start(grown, bundle)
    old = model.state_dict()
    for name, tensor in grown.state_dict().items():
        if name in ("item.weight", "item_bias.weight"):
            assert torch.equal(tensor[:ITEMS], old[name])
            torch.testing.assert_close(tensor[ITEMS:], fresh[name][ITEMS:] + old[name].mean(0))
        else:
            assert torch.equal(tensor, old[name])


def test_a_learning_rate_is_found(tmp_path: Path) -> None:
    config = history_config(tmp_path, launcher="none", lr_find=True)
    history_prepared(config)
    outcome = train(config, DS)
    assert 1e-7 < outcome.metrics["train.lr_suggested"] < 10


def test_memory_is_counted_by_positions(tmp_path: Path) -> None:
    parts = memory_parts(history_config(tmp_path, batch_size=10), USERS, ITEMS, 1000, 100)
    [step] = [size for name, size in parts.items() if "a step of 60 positions" in name]
    assert step == 4 * 60 * 8 * (25 * 2 + 15)
    [window] = [size for name, size in parts.items() if "window" in name]
    assert window == 4 * (2 * 4 + 5 * (LENGTH + 1)) * 8 * 100


def test_what_does_not_fit_a_model_of_histories_is_refused(tmp_path: Path) -> None:
    config = history_config(tmp_path)
    with pytest.raises(ValueError, match="model.history is 6 with sequences.length=0; needed the same number"):
        type(config).model_validate({**config.model_dump(by_alias=True), "sequences": {"length": 0}})
    with pytest.raises(ValueError, match="train.loss is bce with model.name=history; needed sampled_softmax or"):
        history_config(tmp_path, loss="bce")
    with pytest.raises(ValueError, match="model.factors is 9 with 2 heads; needed a multiple .* 10"):
        Model(name="history", factors=9, heads=2)
    history_prepared(config)
    with pytest.raises(ConfigError, match="GiB"):
        train(history_config(tmp_path, max_model_bytes=1000), DS)
