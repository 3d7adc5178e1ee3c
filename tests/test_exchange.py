"""However ranks add up their gradients, they train what one process trains; and no gradient is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ncf_dist.config import Loader, Model, Train
from ncf_dist.errors import ConfigError
from ncf_dist.models import build_model
from ncf_dist.train import exchange as exchange_module
from ncf_dist.train.exchange import Exchange, lookups, said, understood
from ncf_dist.train.loaders import Batch, Task
from ncf_dist.train.losses import LOSSES, Objective
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.windows import WindowLoader
from ncf_dist.train.world import World
from tests.gloo import Ranks
from tests.histories import TINY as HISTORY
from tests.histories import history_run
from tests.tables import ITEMS, USERS, some_rows
from tests.test_train import TINY, Fixed, fit, nothing_held_out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three: the order in which two are added up makes no difference."""
    with Ranks(3, tmp_path_factory.mktemp("gloo")) as three:
        yield three


# ---- what a batch looks up -------------------------------------------------------------------------------------------


def batch_of(model: Model, folder: Path) -> Batch:
    """Some rows, few enough that not all of a table is looked up."""
    if model.name == "history":
        run = history_run(folder, sequences=[[3, 4, 5], [9, 3], *[[] for _ in range(USERS - 2)]])
        task = Task(USERS, ITEMS, 2, 1, shared=3)
        return next(iter(WindowLoader(run, task, Loader(backend="arrow"), World()).epoch(0)))
    rows = torch.from_numpy(some_rows(3))
    return Batch(rows[:, 0], rows[:, 1:], torch.tensor([1.0, 4.0, 2.0]), torch.tensor([2, 17]))


CASES = [
    *((name, loss) for name in TINY for loss in LOSSES),
    *(("history", loss) for loss in ("sampled_softmax", "gbce")),
]


@pytest.mark.parametrize(("name", "loss"), CASES)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_what_a_batch_does_not_look_up_has_no_gradient(name: str, loss: str, l2: float, tmp_path: Path) -> None:
    """Of every model and loss, compiled or not: a row that was not said to be looked up would be lost."""
    config = HISTORY if name == "history" else TINY[name]
    batch = batch_of(config, tmp_path)
    for compiled in (False, True):
        torch.manual_seed(1)
        model = build_model(config, USERS, ITEMS)
        Objective(model, loss, l2=l2, compiled=compiled)(batch).backward()
        found = lookups(batch, model.history, loss == "softmax")
        assert set(found) == {k for k, there in (("user", not model.sequential), ("item", loss != "softmax")) if there}
        for kind, looked_up in found.items():
            index = looked_up.index.unique()
            assert len(index) <= looked_up.most
            for table in model.tables(kind):
                assert table.weight.grad is not None
                touched = table.weight.grad.ne(0).any(1).nonzero()[:, 0]
                assert set(touched.tolist()) <= set(index.tolist()) != set(range(table.num_embeddings))


@given(st.data())
@budget(max_examples=60, deadline=None)
def test_ranks_understand_which_rows_are_meant(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3000))
    index = data.draw(st.lists(st.integers(0, rows - 1), max_size=40))
    most = min(rows, 1 + len(index) + data.draw(st.integers(0, 90)))
    message = said(torch.tensor(index, dtype=torch.int64), rows, most)
    assert message.dtype == torch.uint8
    assert len(message) <= min(-(-rows // 8), 4 * (1 + most)) + 4
    assert len(message) == len(said(torch.tensor([0]), rows, most)), "ranks give each other messages of one length"
    assert understood(message, rows, most).tolist() == sorted(set(index))


# ---- three ranks -----------------------------------------------------------------------------------------------------


STEPS = (("neumf", "bce"), ("embedding_nn", "bce"), ("mf", "mse"), ("dot", "softmax"), ("dot", "gbce"))


@pytest.mark.parametrize("exchange", ["rows", "dense", "auto"])
def test_three_ranks_train_what_one_process_trains(ranks: Ranks, exchange: str) -> None:
    """Four steps on two rows a rank, which look up some rows of a table and not others."""
    wanted, *_ = ranks.run(fit_all, {}, True)
    found = ranks.run(fit_all, {"exchange": exchange})
    for case, one in wanted.items():
        for key, weights in one.items():
            first, *others = (of_rank[case][key] for of_rank in found)
            assert all(np.array_equal(first, other) for other in others), (case, key)
            np.testing.assert_allclose(first, weights, atol=1e-6, rtol=0, err_msg=f"{case} {key}")


def fit_all(world: World, settings: dict[str, Any], alone: bool = False) -> Any:
    """{case: weights}. alone: each rank trains on all rows, as one process does."""
    return {case: weights(World() if alone else world, *case, settings) for case in STEPS}


def weights(world: World, name: str, loss: str, settings: dict[str, Any]) -> Any:
    return fit(world, TINY[name], 24, 6, loss, epochs=1, **settings)[1]


@pytest.mark.parametrize("exchange", ["rows", "dense"])
def test_bf16_rounds_what_travels_and_leaves_ranks_equal(ranks: Ranks, exchange: str) -> None:
    """Plain gradient descent, so that what a gradient is off by is what a weight is off by: 2^-9 of it at most, for
    each rank's part and for the sum."""
    how = {"optimiser": "sgd", "momentum": 0.0, "lr": 0.5, "exchange": exchange}
    full, *_ = ranks.run(weights, "neumf", "bce", how)
    found = ranks.run(weights, "neumf", "bce", {**how, "exchange_dtype": "bf16"})
    differs = False
    for key, wanted in full.items():
        assert all(np.array_equal(found[0][key], other[key]) for other in found[1:]), key
        np.testing.assert_allclose(found[0][key], wanted, atol=2e-3, rtol=0, err_msg=key)
        differs |= not np.array_equal(found[0][key], wanted)
    assert differs


# ---- what is sent ----------------------------------------------------------------------------------------------------

LARGE = 1000


def traffic(
    world: World, settings: dict[str, Any], lookups_of_each: int, loss: str, least: int | None = None
) -> dict[str, int]:
    """Bytes that one step gives to each collective, by its name. least: that rows must save, on one machine."""
    if least is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange_module, "LEAST_BYTES", least)
            return traffic(dataclasses.replace(world, one_machine=True), settings, lookups_of_each, loss)
    torch.manual_seed(1)
    model = build_model(Model(name="mf", factors=4), LARGE, LARGE)
    rows = torch.arange(lookups_of_each) + world.rank
    batch = Batch(rows % LARGE, (rows % LARGE)[:, None].repeat(1, 2))
    loader: Any = Fixed(some_rows(3), 3, world)
    trainer = Trainer(model, loader, nothing_held_out, Train(**settings), world, loss=loss)
    trainer.enter_phase()
    trainer.train_step(batch, 0.0)
    found = {"all_reduce": 0, "all_gather_single": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in found:
            patch.setattr(dist, name, partial(counted, found, name, getattr(dist, name)))
        trainer.train_step(batch, 0.0)
    return found


def counted(found: dict[str, int], name: str, collective: Any, *tensors: torch.Tensor, **how: Any) -> Any:
    found[name] += tensors[-1].numel() * tensors[-1].itemsize
    return collective(*tensors, **how)


@pytest.mark.parametrize(
    ("how", "loss", "count", "gathered", "reduced"),
    [
        # Which rows: a count and a number for each look-up, of 10 users, and of an item and a negative for each.
        ({}, "bpr", 10, 4 * (1 + 10 + 1 + 2 * 10) + 2 * 10 * 4 * 4, 0),
        ({"exchange_dtype": "bf16"}, "bpr", 10, 4 * (1 + 10 + 1 + 2 * 10) + 2 * 10 * 4 * 2, 0),
        ({"exchange": "dense"}, "bpr", 10, 0, 2 * LARGE * 4),
        # All rows are looked up: the tables go as a whole, and a bit for each row was sent to find that out.
        ({}, "bpr", LARGE, 2 * 125, 2 * LARGE * 4),
        ({"exchange": "rows"}, "bpr", LARGE, 2 * 125 + 2 * LARGE * 4 * 4, 0),
        # Every item has a gradient: nothing is said of items.
        ({}, "softmax", 10, 4 * (1 + 10) + 10 * 4 * 4, LARGE * 4),
    ],
)
def test_a_step_sends_what_it_looked_up(
    ranks: Ranks, how: dict[str, Any], loss: str, count: int, gathered: int, reduced: int
) -> None:
    """Two tables of 1,000 rows of width 4. gathered: bytes; reduced: numbers, beside the two flags of the ranks."""
    size = 2 if how.get("exchange_dtype") == "bf16" else 4
    wanted = {"all_gather_single": gathered, "all_reduce": size * (reduced + 2)}
    assert ranks.run(traffic, how, count, loss) == [wanted] * 3


SAID = 4 * (1 + 10 + 1 + 2 * 10)


@pytest.mark.parametrize(
    ("how", "least", "gathered", "reduced"),
    [
        # For each of two tables a rank sends 10 rows of 4 numbers to two others, and not its 2/3 of 1,000 rows to both:
        # (2 x 1,000 / 3 - 10) x 2 x 4 x 4 bytes less, in all 42,026.
        ({}, 42_000, SAID + 2 * 10 * 4 * 4, 0),
        ({}, 42_100, SAID, 2 * LARGE * 4),
        # Rows could not save so much if nothing were looked up, so nobody says what is: 2 x 1,000 / 3 x 2 x 4 x 4 x 2.
        ({}, 42_700, 0, 2 * LARGE * 4),
        ({"exchange": "rows"}, 42_700, SAID + 2 * 10 * 4 * 4, 0),
    ],
)
def test_on_one_machine_rows_must_save_much(
    ranks: Ranks, how: dict[str, Any], least: int, gathered: int, reduced: int
) -> None:
    wanted = {"all_gather_single": gathered, "all_reduce": 4 * (reduced + 2)}
    assert ranks.run(traffic, how, 10, "bpr", least) == [wanted] * 3


def test_rows_are_not_for_gpus() -> None:
    objective = Objective(build_model(TINY["gmf"], USERS, ITEMS), "bce")
    with pytest.raises(ConfigError, match="train.exchange is rows with ranks on GPUs; needed ranks on CPUs"):
        Exchange(objective, "bce", Train(exchange="rows"), World(0, 2, 0, "cuda:0"))
