"""What a step computes: losses, schedules, optimisers and where weights start, by hand or as their sources state it;
and what people see of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from ncf_dist import contracts
from ncf_dist.bundle import Bundle, load_model, read_bundle, save_bundle
from ncf_dist.config import Config, Model, Pretrained, Train
from ncf_dist.errors import ConfigError, ContractError, TrainingFailed
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF, MLP, NeuMF, build_model
from ncf_dist.train import progress
from ncf_dist.train.loaders import Batch
from ncf_dist.train.losses import Objective, bce, bpr, mse, sampled_softmax
from ncf_dist.train.lr_curve import smoothed, suggest
from ncf_dist.train.optimisers import build_optimiser, set_rate
from ncf_dist.train.pipeline import train
from ncf_dist.train.plots import history_figure, rate_figure
from ncf_dist.train.progress import Meter
from ncf_dist.train.schedules import SCHEDULES, one_cycle_momentum
from ncf_dist.train.start import check_start
from ncf_dist.train.start_weights import pretrained_start, users_there, warm_start
from ncf_dist.train.world import World
from tests.tables import DS, ITEMS, USERS, prepared, small_config, table_of


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- losses ------------------------------------------------------------------------------------------------


def test_bce_by_hand() -> None:
    """-log σ(2) for the positive, -log(1 - σ(-1)) and -log(1 - σ(0)) for the negatives; the mean of the three."""
    wanted = -(math.log(sigmoid(2)) + math.log(1 - sigmoid(-1)) + math.log(1 - sigmoid(0))) / 3
    assert bce(torch.tensor([[2.0, -1.0, 0.0]])).item() == pytest.approx(wanted, rel=1e-6)


def test_bpr_by_hand() -> None:
    wanted = -(math.log(sigmoid(2 - -1)) + math.log(sigmoid(2 - 0))) / 2
    assert bpr(torch.tensor([[2.0, -1.0, 0.0]])).item() == pytest.approx(wanted, rel=1e-6)


def test_mse_by_hand() -> None:
    assert mse(torch.tensor([3.0, 4.5]), torch.tensor([5.0, 4.0])).item() == ((3 - 5) ** 2 + (4.5 - 4) ** 2) / 2


def test_sampled_softmax_by_hand() -> None:
    """Of 10 items two are shared, so each stands for 10 / 2 = 5; the second row's own item is one of them."""
    positive, shared = torch.tensor([2.0, 1.0]), torch.tensor([[0.5, -1.0], [3.0, 0.0]])
    own = torch.tensor([[False, False], [True, False]])
    first = -math.log(math.exp(2) / (math.exp(2) + 5 * math.exp(0.5) + 5 * math.exp(-1)))
    second = -math.log(math.exp(1) / (math.exp(1) + 5 * math.exp(0)))
    assert sampled_softmax(positive, shared, own, 10).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_sampled_softmax_estimates_the_softmax_over_all_items() -> None:
    """Without the logQ correction 50 of 1,000 items would give a normaliser 20 times too small: log 20 = 3.0 off."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1000, generator=generator)
    whole = torch.logsumexp(scores, 0) - scores[0]
    draws = torch.randint(1, 1000, (4000, 50), generator=generator)
    never = torch.zeros(1, 50, dtype=torch.bool)
    found = [sampled_softmax(scores[:1], scores[d][None], never, 1000).item() for d in draws]
    assert np.mean(found) == pytest.approx(whole.item(), abs=0.05)


@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf", "mf"])
def test_shared_items_score_as_pairs_do(name: Any) -> None:
    """The (B, M) block of the objective is the model on every pair."""
    torch.manual_seed(1)
    model = build_model(Model(name=name, factors=3, layers=(4, 3), init_std=1.0), 5, 9).eval()
    user, items, shared = torch.tensor([0, 3, 4]), torch.tensor([[1], [2], [8]]), torch.tensor([8, 0, 2, 2])
    found = Objective(model, "sampled_softmax")(Batch(user, items, shared=shared))
    wanted = sampled_softmax(
        model(user, items[:, 0]), model(user[:, None], shared[None]), items == shared[None], n_items=9
    )
    torch.testing.assert_close(found, wanted)


def test_an_l2_term_counts_an_embedding_as_often_as_it_is_used() -> None:
    """User 0 has two rows and user 1 has one, each with two items; biases are embeddings too. Item 2 is not used."""
    model = build_model(Model(name="mf", factors=2, biases=True), 2, 3)
    values = {
        "user": [[1.0, 2.0], [3.0, 0.0]],
        "item": [[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]],
        "user_bias": [[1.0], [0.0]],
        "item_bias": [[0.0], [2.0], [9.0]],
    }
    model.load_state_dict({f"{name}.weight": torch.tensor(value) for name, value in values.items()})
    batch = Batch(torch.tensor([0, 0, 1]), torch.tensor([[0, 1], [0, 1], [1, 0]]))
    users = ((1 + 4 + 1) + (1 + 4 + 1) + 9) / 3
    items = (4 + (1 + 4) + 4 + (1 + 4) + (1 + 4) + 4) / 6
    plain, more = Objective(model, "bce")(batch), Objective(model, "bce", l2=0.1)(batch)
    assert (more - plain).item() == pytest.approx(0.1 / 2 * (users + items), rel=1e-5)


@pytest.mark.parametrize("loss", ["bce", "bpr", "sampled_softmax", "mse"])
def test_bf16_is_close_and_gives_float32_gradients(loss: str) -> None:
    torch.manual_seed(1)
    model = build_model(Model(name="neumf", init_std=0.5), 20, 30)
    batch = Batch(torch.arange(20), torch.arange(60).reshape(20, 3) % 30, torch.ones(20), torch.arange(8))
    losses = [Objective(model, loss, precision)(batch) for precision in ("fp32", "bf16")]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert losses[1].item() != losses[0].item()
    losses[1].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# ---- schedules and optimisers ------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    at = (0.0, 0.25, 0.5, 1.0)
    assert [SCHEDULES["constant"](t) for t in at] == [1, 1, 1, 1]
    assert [SCHEDULES["linear"](t) for t in at] == [1, 0.75, 0.5, 0]
    assert [SCHEDULES["cosine"](t) for t in at] == pytest.approx([1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0])


def test_one_cycle_is_fastais() -> None:
    """fit_one_cycle: lr_max / 25 → lr_max over a quarter, → lr_max / 1e5 over the rest; momentum .95 → .85 → .95."""
    rate = SCHEDULES["one_cycle"]
    assert [rate(0), rate(0.25), rate(1)] == pytest.approx([1 / 25, 1, 1e-5])
    assert rate(0.125) == pytest.approx((1 / 25 + 1) / 2)
    assert rate(0.25 + 0.75 / 2) == pytest.approx((1 + 1e-5) / 2)
    assert [one_cycle_momentum(t) for t in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95])


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
@budget(max_examples=200, deadline=None)
def test_a_schedule_never_leaves_its_bounds(name: str, t: float) -> None:
    assert 0 <= SCHEDULES[name](t) <= 1 + 1e-12


@pytest.mark.parametrize(("optimiser", "key"), [("adam", "betas"), ("adamw", "betas"), ("sgd", "momentum")])
def test_one_cycle_moves_rate_and_momentum(optimiser: Any, key: str) -> None:
    config = Train(optimiser=optimiser, schedule="one_cycle", lr=0.5, betas=(0.9, 0.99))
    built = build_optimiser(nn.Linear(2, 1), config)
    assert set_rate(built, config, 0.25) == 0.5
    for group in built.param_groups:
        assert group["lr"] == 0.5
        assert group[key] == pytest.approx((0.85, 0.99) if key == "betas" else 0.85)


def decays(config: Train) -> dict[str, float]:
    """Weight decay of every parameter."""
    model = build_model(Model(name="neumf"), 3, 4)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimiser(model, config).param_groups
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(found) == len(names)
    return found


def test_weight_decay_is_for_layers_unless_asked() -> None:
    for name, decay in decays(Train(weight_decay=0.1)).items():
        layer = name.endswith("weight") and not name.endswith(("user.weight", "item.weight"))
        assert decay == (0.1 if layer else 0.0), name
    tables = {n: d for n, d in decays(Train(embedding_decay=0.2)).items() if n.endswith(("user.weight", "item.weight"))}
    assert len(tables) == 4
    assert set(tables.values()) == {0.2}


def test_parts_have_a_decay_of_their_own() -> None:
    found = decays(Train(weight_decay=0.1, part_decay={"gmf": 0.01, "tower": 0.02, "tower.hidden": 0.03}))
    assert found["gmf.user.weight"] == found["gmf.output.bias"] == 0.01
    assert found["tower.item.weight"] == 0.02
    assert found["tower.hidden.0.weight"] == 0.03
    assert found["output.weight"] == 0.1
    with pytest.raises(ConfigError, match="train.part_decay names tow, .*: gmf, output, tower"):
        decays(Train(part_decay={"tow": 0.1}))


def test_adam_updates_as_published() -> None:
    """Two steps with gradients 1 and 3, decay 0.1: Kingma & Ba, algorithm 1, L2 in the gradient; adamw beside it."""
    for optimiser in ("adam", "adamw"):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        config = Train(optimiser=optimiser, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-5)
        built = build_optimiser(layer, config)
        w, m, v = 2.0, 0.0, 0.0
        for step, gradient in enumerate((1.0, 3.0), start=1):
            layer.weight.grad = torch.full_like(layer.weight, gradient)
            built.step()
            g = gradient + 0.1 * w if optimiser == "adam" else gradient
            w = w if optimiser == "adam" else w * (1 - 0.01 * 0.1)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            w -= 0.01 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.99**step)) + 1e-5)
            assert layer.weight.item() == pytest.approx(w, rel=1e-6)


# ---- where weights start -----------------------------------------------------------------------------------


def bundle_of(folder: Path, model: Model, users: int = USERS, items: int = ITEMS, seed: int = 1) -> Bundle:
    torch.manual_seed(seed)
    return save_bundle(str(folder), build_model(model, users, items), model, users, items, {"seed": seed})


@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf", "mf", "embedding_nn"])
def test_a_warm_start_keeps_old_rows_and_begins_new_ones_at_their_mean(tmp_path: Path, name: Any) -> None:
    config = Model(name=name, biases=True, embedding_sizes=(3, 4), factors=4, init_std=0.5)
    old = bundle_of(tmp_path, config, users=6, items=5)
    torch.manual_seed(2)
    fresh = build_model(config, 8, 9)
    torch.manual_seed(2)
    model = build_model(config, 8, 9)
    warm_start(model, old)
    torch.manual_seed(1)
    before = build_model(config, 6, 5).state_dict()
    for key, value in model.state_dict().items():
        known = len(before[key]) if before[key].ndim else None
        assert torch.equal(value[:known] if known else value, before[key]), key
        if value.shape != before[key].shape:
            wanted = before[key].mean(dim=0) + fresh.state_dict()[key][known:]
            torch.testing.assert_close(value[known:], wanted)


@pytest.mark.parametrize("name", ["gmf", "neumf", "mf", "embedding_nn"])
def test_a_forgotten_user_s_row_starts_afresh(tmp_path: Path, name: Any) -> None:
    """Users 1 and 4 of six are forgotten: nothing of their rows is left, neither in place nor in the mean of new ones;
    an index without a user left has no mean at all."""
    config = Model(name=name, biases=True, embedding_sizes=(3, 4), factors=4, init_std=0.5)
    old = bundle_of(tmp_path, config, users=6, items=5)
    before, there = load_model(old).state_dict(), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    for users in (there, torch.zeros(8, dtype=torch.bool)):
        torch.manual_seed(2)
        fresh = build_model(config, 8, 9).state_dict()
        torch.manual_seed(2)
        model = build_model(config, 8, 9)
        warm_start(model, old, users)
        for key, value in model.state_dict().items():
            if ".user" not in f".{key}" or before[key].shape == value.shape:
                continue
            kept = users[:6]
            assert torch.equal(value[:6][kept], before[key][kept]), key
            assert torch.equal(value[:6][~kept], fresh[key][:6][~kept]), key
            mean = before[key][kept].mean(dim=0) if kept.any() else 0
            torch.testing.assert_close(value[6:], fresh[key][6:] + mean)


def test_numbers_without_a_user_are_found_in_the_index(tmp_path: Path) -> None:
    contract = contracts.user_index(pa.int64())
    files = [{"user_id": [70, 71], "user_idx": [0, 3]}, {"user_id": [72], "user_idx": [4]}]
    tables = {contract.name: table_of(tmp_path, contract, files)}
    night = Manifest(
        stage="prepare",
        ds=DS,
        run_key="p1",
        root=str(tmp_path),
        config={},
        inputs={},
        tables=tables,
        facts={"users": 6, "items": 1},
    )
    found = users_there(night)
    assert found is not None
    assert found.tolist() == [True, False, False, True, True, False]
    assert users_there(dataclasses.replace(night, facts={"users": 3, "items": 1})) is None


def test_a_bundle_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "a", Model(name="gmf", factors=4))
    check_start(bundle, Model(name="gmf", factors=4, dropout=0.5), USERS, ITEMS + 5)
    with pytest.raises(ContractError, match=r"is of .*'factors': 4.*needed .*'factors': 5"):
        check_start(bundle, Model(name="gmf", factors=5), USERS, ITEMS)
    with pytest.raises(ContractError, match="has 12 users and 20 items, the tables have 12 and 19"):
        check_start(bundle, Model(name="gmf", factors=4), USERS, ITEMS - 1)
    grown = bundle_of(tmp_path / "b", Model(name="embedding_nn"))
    with pytest.raises(ContractError, match="train with model.embedding_sizes set"):
        check_start(grown, Model(name="embedding_nn"), USERS + 1, ITEMS)


def test_neumf_is_pretrained_from_two_bundles_that_may_be_older(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"factors": 3, "layers": (6, 4)}
    gmf = bundle_of(tmp_path / "gmf", Model(name="gmf", **shape), users=10, seed=1)
    mlp = bundle_of(tmp_path / "mlp", Model(name="mlp", **shape), items=15, seed=2)
    config = Model(name="neumf", **shape)
    model = build_model(config, USERS, ITEMS)
    assert isinstance(model, NeuMF)
    start = Pretrained(gmf=gmf.path, mlp=mlp.path, alpha=0.3)
    pretrained_start(model, start, config, USERS, ITEMS)
    torch.manual_seed(1)
    first = build_model(Model(name="gmf", **shape), 10, ITEMS)
    torch.manual_seed(2)
    second = build_model(Model(name="mlp", **shape), USERS, 15)
    assert isinstance(first, GMF)
    assert isinstance(second, MLP)
    user, item = torch.arange(10)[:, None], torch.arange(15)[None]
    torch.testing.assert_close(model(user, item), 0.3 * first(user, item) + 0.7 * second(user, item))
    with pytest.raises(ContractError, match=r"needed .*'layers': \[8, 4\]"):
        pretrained_start(model, start, config.model_copy(update={"layers": (8, 4)}), USERS, ITEMS)


# ---- through the job ---------------------------------------------------------------------------------------


def job(folder: Path, model: Model, feedback: str = "implicit", **settings: Any) -> Config:
    return small_config(folder, model, feedback, **{"launcher": "none", "epochs": 2, "lr": 0.02, **settings})


def test_nights_start_from_each_other_and_neumf_from_its_parts(tmp_path: Path) -> None:
    """warm_start=previous: nothing there the first night, then last night's bundle, as the manifest says."""
    config = job(tmp_path, Model(name="gmf", factors=3), warm_start="previous")
    prepared(config, 30, "2026-01-30")
    prepared(config, 40, base="2026-01-30")
    first, second = train(config, "2026-01-30"), train(config, DS)
    stage = Lake(config.paths.lake).stage(DS, "train")
    assert stage.newest().inputs == {"prepare": "p1", "warm_start": first.extra["model_version"]}
    again = train(config, DS)
    assert (again.status, again.outputs, again.extra) == ("already-done", second.outputs, second.extra)
    assert sorted(again.outputs) == ["bundle", "history", "plot"]
    other = config.train.model_copy(update={"ranks": 7, "checkpoint_steps": 9})
    assert train(config.model_copy(update={"train": other}), DS).run_key == second.run_key

    mlp = train(job(tmp_path, Model(name="mlp", layers=(6, 4))), DS)
    start = {"gmf": second.outputs["bundle"], "mlp": mlp.outputs["bundle"]}
    neumf = Model(name="neumf", factors=3, layers=(6, 4))
    assert train(job(tmp_path, neumf, pretrained=start), DS).status == "done"
    assert stage.newest().inputs["pretrained.mlp"] == mlp.extra["model_version"]
    with pytest.raises(ContractError, match=r"train.pretrained.gmf is .*, the bundle of a mlp; needed that of a gmf"):
        train(job(tmp_path, neumf, pretrained={**start, "gmf": mlp.outputs["bundle"]}), DS)

    prepared(config, 30, "2026-02-01")  # Extends nothing: its users are others.
    for model, how in ((Model(name="gmf", factors=3), {"warm_start": start["gmf"]}), (neumf, {"pretrained": start})):
        with pytest.raises(
            ContractError, match=rf"{next(iter(how))}.* may belong to other users .*{DS}.* start afresh"
        ):
            train(job(tmp_path, model, **how), "2026-02-01")


def test_ratings_are_learnt(tmp_path: Path) -> None:
    """The job on explicit feedback: validation is the error of predicted ratings, and the plot is there to see."""
    config = job(tmp_path, Model(name="mf", biases=True, y_range=(0, 5.5)), "explicit", epochs=8, lr=0.1)
    prepared(config, 60)
    found = train(config, DS)
    assert set(found.metrics) >= {"validation.mse", "validation.mae", "train.samples_per_s", "train.data_wait"}
    story = json.loads(Path(found.outputs["history"]).read_text())
    assert story["epochs"][-1]["loss"] < story["epochs"][0]["loss"]
    assert found.metrics["validation.mse"] == min(epoch["mse"] for epoch in story["epochs"])
    assert Path(found.outputs["plot"]).read_bytes().startswith(b"<svg")
    assert read_bundle(found.outputs["bundle"]).model.y_range == (0, 5.5)


def test_lr_find_suggests_a_rate_and_makes_no_model(tmp_path: Path) -> None:
    config = job(tmp_path, Model(name="mf", init_std=0.5), lr_find=True)
    prepared(config, 200)
    found = train(config, DS)
    assert 1e-6 < found.metrics["train.lr_suggested"] < 10
    assert Path(found.outputs["lr_find"]).read_bytes().startswith(b"<svg")
    assert not Lake(config.paths.lake).stage(DS, "train").finished()
    assert not list(Path(config.paths.lake).glob("runs/*/train/*/bundle"))


def test_the_steepest_fall_is_suggested() -> None:
    """Flat to the 40th of 100 rates, a fall that is steepest half way to the 80th, then away."""
    rates = [10 ** (-6 + 6 * i / 99) for i in range(100)]
    losses = [1 - 0.8 * sigmoid((i - 60) / 4) + (0.2 * (i - 80) if i > 80 else 0) for i in range(100)]
    lag = 0.9 / 0.1  # how far an average with this memory is behind
    found = suggest(list(zip(rates, losses, strict=True)))
    assert abs(rates.index(found) - (60 + lag)) <= 4
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    with pytest.raises(TrainingFailed, match="never falls"):
        suggest([(rate, 1 + i) for i, rate in enumerate(rates)])


@pytest.mark.parametrize(("n", "draws", "how"), [(0, 2, "table"), (2, 0, "table"), (0, 0, "online")])
def test_a_pairwise_loss_needs_negatives(tmp_path: Path, n: int, draws: int, how: str) -> None:
    config = job(tmp_path, Model(name="gmf"), negatives=how)
    prepared(config, 40)
    config = config.model_copy(
        update={"negatives": config.negatives.model_copy(update={"per_positive": n, "draws": draws})}
    )
    with pytest.raises(ConfigError, match="needed at least 1 of both, or train.negatives=online"):
        train(config, DS)


def test_online_negatives_need_no_table_of_their_own(tmp_path: Path) -> None:
    config = job(tmp_path, Model(name="gmf"), negatives="online")
    prepared(config, 40)
    more = config.negatives.model_copy(update={"per_positive": 5, "draws": 0})
    assert train(config.model_copy(update={"negatives": more}), DS).status == "done"


# ---- what people see ---------------------------------------------------------------------------------------


def batch() -> Batch:
    return Batch(torch.zeros(4, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long))


def test_a_meter_counts_samples_waiting_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five steps in 10 s, 1 s of them waiting: 24 samples on each of 2 ranks; 3 + 5 steps are to come."""
    clock = iter([100.0, 101.0, 101.5, 104.0, 104.0, 104.5, 110.0, 110.0, 110.0])
    monkeypatch.setattr("ncf_dist.train.progress.time.monotonic", lambda: next(clock))
    meter = Meter(World(1, 2), epoch=0, epochs=2, steps=5, first=0)
    for loss in (3.0, 1.0):
        with meter.waiting():
            pass
        meter.step(batch(), loss)
    assert meter.now() == {
        "loss": 2.0,
        "samples_per_s": round(24 * 2 / 10),
        "data_wait": (0.5 + 0.5) / 10,
        "eta_s": (3 + 5) * 10 / 2,
    }


def test_off_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    for rank in range(2):
        meter = Meter(World(rank, 2), 1, 2, 5000, 0)
        meter.step(batch(), 0.5)
    (record,) = caplog.records
    assert re.fullmatch(
        r"epoch 2 of 2, step 1 of 5,000: loss \.5000, [\d.]+ ?[GMk]? samples/s, \d+% waiting for data, "
        r"at most [\d,]+ s left",
        record.getMessage(),
    )


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    meter = Meter(World(), 1, 2, 5, 0)
    meter.shown = 0
    meter.step(batch(), 0.5)
    meter.close()
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("epoch 2 of 2", "samples/s", "loss .5000", "waiting for data", "s left"))


MEASURED = {"samples_per_s": 2_912_345.6, "data_wait": 0.01, "seconds": 14.4}


@pytest.mark.parametrize(
    ("record", "best", "line"),
    [
        (
            {"epoch": 2, "loss": 0.39173, **MEASURED, "hr@10": 0.5, "ndcg@10": 0.31249, "mrr": 0.2},
            True,
            "epoch 3 of 20: loss .3917, ndcg@10 .312 (best), 2.9 M samples/s, 14 s",
        ),
        (
            {"epoch": 0, "loss": 1.5, **MEASURED, "mse": 1.0, "mae": 0.8, "data_wait": 0.25, "seconds": 0.31},
            False,
            "epoch 1 of 20: loss 1.5000, mse 1.000, 2.9 M samples/s, 25% waiting for data, 0.3 s",
        ),
        (
            {"epoch": 19, "loss": -0.5, **MEASURED, "samples_per_s": 999.0},
            True,
            "epoch 20 of 20: loss -.5000, 999 samples/s, 14 s",
        ),
    ],
)
def test_an_epoch_is_one_readable_line(
    record: dict[str, Any], best: bool, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for rank in range(2):
        progress.show_epoch(World(rank, 2), record, 20, best)
    assert [record.getMessage() for record in caplog.records] == [line]


def test_figures_are_the_same_for_the_same_numbers() -> None:
    epochs = [{"epoch": e, "loss": 1 / (e + 1), "ndcg@10": e / 10, "mrr": 0.1} for e in range(3)]
    history = {"epoch": 2, "epochs": epochs, "curve": [[e, s, 1.0, 0.1] for e in range(3) for s in range(4)]}
    assert history_figure(history) == history_figure(history)
    assert b"NDCG@10" in history_figure(history)
    curve = [(10.0**i, 3.0 - i) for i in range(-5, 1)]
    assert b"suggested: 0.01" in rate_figure(curve, [loss for _, loss in curve], 0.01)
