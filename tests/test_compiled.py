"""A step in one compiled call is the step that torch's operations do."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ncf_dist.config import Model
from ncf_dist.models import GMF, MF, MLP, EmbeddingNN, NeuMF, Recommender, Side, build_model
from ncf_dist.train import compiled
from ncf_dist.train.compiled import BUILDS, best_library, compiled_loss, library
from ncf_dist.train.loaders import Batch
from ncf_dist.train.losses import LOSSES, Objective
from ncf_dist.train.trainer import in_few_pieces

THREADS = torch.get_num_threads()


def runnable() -> list[str]:
    return list(BUILDS.get(torch.backends.cpu.get_cpu_capability(), ()))


built = pytest.mark.skipif(best_library() is None, reason="not built here: no C++ compiler, or another kind of CPU")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(THREADS)


def test_it_is_built_wherever_there_is_a_compiler() -> None:
    if shutil.which("g++") is None or not runnable():
        pytest.skip("no g++, or another kind of CPU")
    assert all(library(build) for build in runnable())


def model_of(
    name: str, users: int = 9, items: int = 7, factors: int = 5, layers: tuple[int, ...] = (6, 4)
) -> Recommender:
    """With weights that matter: half of the units on, embeddings far from zero."""
    model = build_model(Model(name=name, factors=factors, layers=layers), users, items)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def gradients(model: Recommender, loss: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def batch_of(users: int, items: int, rows: int, each: int) -> Batch:
    return Batch(torch.randint(users, (rows,)), torch.randint(items, (rows, each)))


@built
@given(
    seed=st.integers(0, 2**31),
    build=st.sampled_from(runnable() or ["none"]),
    name=st.sampled_from(["gmf", "mlp", "neumf"]),
    loss=st.sampled_from(["bce", "bpr"]),
    # Fewer and more pairs than items: the item side a pair, or a whole catalogue. Widths that fill a vector, and not.
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 400), st.integers(1, 70), st.integers(2, 6)),
    factors=st.sampled_from([1, 7, 8, 16, 21, 40]),
    half=st.integers(1, 35),
    hidden=st.lists(st.sampled_from([1, 3, 8, 16, 17, 33, 40]), min_size=1, max_size=4),
    threads=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_loss_and_gradients_are_those_of_torch(
    seed: int,
    build: str,
    name: str,
    loss: str,
    sizes: tuple[int, int, int, int],
    factors: int,
    half: int,
    hidden: list[int],
    threads: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    users, items, rows, each = sizes
    model = model_of(name, users, items, factors, (2 * half, *hidden))
    batch = batch_of(users, items, rows, each)
    one_call = compiled_loss(model, loss, library(build))
    assert one_call is not None
    found, expected = one_call(model, batch), LOSSES[loss](model, batch)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    mine, theirs = gradients(model, found), gradients(model, expected)
    # BPR's terms may cancel and leave the rounding of what they were: about as large as those of BCE, which do not.
    terms = gradients(model, LOSSES["bce"](model, batch))
    for one, other, term in zip(mine, theirs, terms, strict=True):
        most = float(torch.maximum(other.abs(), term.abs()).max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 + 2e-5 * most)


@built
def test_the_loss_by_hand() -> None:
    """One user, p = (1, 2), items q = (3, 1) and (0, 1), h = (1, .5), b = -1: scores 3 + 1 - 1 = 3 and 0 + 1 - 1 = 0.
    BCE is (log(1 + e^-3) + log 2) / 2; the slope of the second score is (σ(0) - 0) / 2 = .25, that of b
    (σ(3) - 1 + .5) / 2."""
    model = GMF(1, 2, 2)
    with torch.no_grad():
        model.user.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.item.weight.copy_(torch.tensor([[3.0, 1.0], [0.0, 1.0]]))
        model.output.weight.copy_(torch.tensor([[1.0, 0.5]]))
        model.output.bias.fill_(-1.0)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    loss = one_call(model, Batch(torch.tensor([0]), torch.tensor([[0, 1]])))
    assert loss.item() == pytest.approx((0.0485874 + 0.6931472) / 2, rel=1e-5)
    loss.backward()
    assert model.item.weight.grad is not None
    assert model.output.bias.grad is not None
    # .25 · h ⊙ p = .25 · (1, 1)
    assert model.item.weight.grad[1].tolist() == pytest.approx([0.25, 0.25])
    assert model.output.bias.grad.item() == pytest.approx((0.9525741 - 1 + 0.5) / 2, rel=1e-5)


@built
@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_scores_far_from_zero_overflow_nowhere(loss: str) -> None:
    """Scores of ±2,000: the losses are as long, not infinite."""
    model = GMF(1, 3, 1)
    with torch.no_grad():
        model.user.weight.fill_(1.0)
        model.output.weight.fill_(1.0)
        model.output.bias.zero_()
        model.item.weight.copy_(torch.tensor([[-2000.0], [2000.0], [0.0]]))
    batch = Batch(torch.tensor([0]), torch.tensor([[0, 1, 2]]))
    one_call = compiled_loss(model, loss)
    assert one_call is not None
    # bce: (2000 + 2000 + log 2) / 3; bpr: (4000 + 2000) / 2
    expected = {"bce": (4000 + 0.6931472) / 3, "bpr": 3000.0}[loss]
    assert one_call(model, batch).item() == pytest.approx(expected)


@built
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_step_gives_the_same_bits(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model, batch = model_of("neumf", 500, 300, 8, (64, 32, 16, 8)), batch_of(500, 300, 700, 5)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    first = gradients(model, one_call(model, batch))
    for _ in range(5):
        assert all(map(torch.equal, gradients(model, one_call(model, batch)), first))


@built
@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf"])
def test_what_is_not_finite_is_not_hidden(name: str) -> None:
    """A NaN that passes through a hidden layer is no unit that is off."""
    model = model_of(name)
    with torch.no_grad():
        next(model.tables("item")).weight[3] = torch.nan
    one_call, batch = compiled_loss(model, "bce"), Batch(torch.tensor([2, 4]), torch.tensor([[1, 3], [2, 5]]))
    assert one_call is not None
    loss = one_call(model, batch)
    assert loss.isnan()
    for mine, theirs in zip(gradients(model, loss), gradients(model, LOSSES["bce"](model, batch)), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


@built
@pytest.mark.parametrize("slope", [1.0, 2.5, torch.nan])
def test_the_slope_of_what_follows_is_multiplied_in(slope: float) -> None:
    model, batch = model_of("neumf"), batch_of(9, 7, 4, 3)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    once = gradients(model, one_call(model, batch))
    for found, one in zip(gradients(model, one_call(model, batch) * slope), once, strict=True):
        torch.testing.assert_close(found, one * slope, equal_nan=True)


@built
def test_an_l2_term_is_added_to_it() -> None:
    model, batch = model_of("neumf"), batch_of(9, 7, 20, 5)
    losses = [Objective(model, "bce", l2=0.3, compiled=how) for how in (True, False)]
    assert [objective.compiled for objective in losses] == [True, False]
    found, expected = (gradients(model, objective(batch)) for objective in losses)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@built
@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf"])
@pytest.mark.parametrize(
    ("user", "item"), [(9, 0), (-1, 0), (0, 7), (0, -1)], ids=["user", "user below", "item", "item below"]
)
def test_an_index_outside_the_tables_reads_no_other_memory(name: str, user: int, item: int) -> None:
    model = model_of(name)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    with pytest.raises(IndexError, match=r"needed indexes of the model's tables"):
        one_call(model, Batch(torch.tensor([1, user]), torch.tensor([[0, 1], [item, 2]])))


@built
def test_weights_that_were_moved_are_found() -> None:
    model, batch = model_of("neumf"), batch_of(9, 7, 4, 3)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    one_call(model, batch)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    torch.testing.assert_close(one_call(model, batch), LOSSES["bce"](model, batch))


@built
def test_gradients_fill_one_piece_of_memory_and_are_handed_on_uncopied() -> None:
    model, batch = model_of("neumf"), batch_of(9, 7, 4, 3)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    found = gradients(model, one_call(model, batch))
    [whole] = in_few_pieces(found)
    assert torch.equal(whole, torch.cat([gradient.reshape(-1) for gradient in found]))


@built
@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf"])
def test_a_step_takes_the_memory_of_gradients_that_nobody_holds(name: str) -> None:
    model, batch, other = model_of(name), batch_of(9, 7, 4, 3), batch_of(9, 7, 2, 3)
    one_call = compiled_loss(model, "bce")
    assert one_call is not None
    held = gradients(model, one_call(model, batch))
    copied = [gradient.clone() for gradient in held]
    again = gradients(model, one_call(model, other))
    assert all(map(torch.equal, held, copied)), "somebody has them"
    place = again[0].untyped_storage().data_ptr()
    expected = [gradient.clone() for gradient in again]
    in_few_pieces(again)[0].fill_(torch.nan)
    del again
    for parameter in model.parameters():
        parameter.grad = None
    found = gradients(model, one_call(model, other))
    assert found[0].untyped_storage().data_ptr() == place
    assert all(map(torch.equal, found, expected)), "all of it is written anew"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_few_pieces_hold_the_same_numbers(sizes: list[int], before: int, after: int) -> None:
    """Whether or not the tensors fill their memory, nothing of what lies around them is taken."""
    memory = torch.cat([torch.full((before,), -1.0), torch.arange(float(sum(sizes))), torch.full((after,), -1.0)])
    tensors = [*memory[before : before + sum(sizes)].split(sizes), torch.arange(100.0, 103.0).clone()]
    found = in_few_pieces(list(tensors))
    assert sorted(torch.cat(found).tolist()) == sorted(torch.cat(tensors).tolist())
    assert len(found) == (len(tensors) if before + after else 2)


def test_everything_else_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_loss(MF(9, 7, 4, biases=True), "bce") is None
    assert compiled_loss(EmbeddingNN(9, 7, (4,), None, 0.0, False), "bce") is None
    assert compiled_loss(model_of("neumf"), "sampled_softmax") is None
    assert compiled_loss(MLP(9, 7, (6, 4), dropout=0.1), "bce") is None
    assert compiled_loss(MLP(9, 7, (6,), dropout=0.0), "bce") is None
    assert compiled_loss(NeuMF(9, 7, 4, (6, 4), 0.0).double(), "bce") is None
    assert not Objective(model_of("gmf"), "bce", "bf16", compiled=True).compiled
    assert not Objective(model_of("gmf"), "bce", compiled=False).compiled

    class Another(GMF):
        def join(self, user: Side, item: Side) -> Tensor:
            return -super().join(user, item)

    assert compiled_loss(Another(9, 7, 4), "bce") is None
    monkeypatch.setattr(compiled, "BUILDS", {})
    assert compiled_loss(model_of("gmf"), "bce") is None
    assert not Objective(model_of("gmf"), "bce", compiled=True).compiled


def test_a_build_that_cannot_be_loaded_is_said_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the system below it was changed."""
    broken = tmp_path / "_neumf_step_broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(broken)))
    assert library("broken") is None
    assert "_neumf_step_broken.so cannot be loaded" in caplog.text
    assert "run make -B install" in caplog.text
