"""The models are what their papers (and fastai's lessons) say, written out again here in NumPy pair by pair; and the
fast ways to score many pairs or a whole catalogue give what the plain way gives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from ncf_dist.config import Model, embedding_size
from ncf_dist.models import (
    GMF,
    MF,
    MLP,
    MODELS,
    EmbeddingNN,
    ItemToItem,
    NeuMF,
    Recommender,
    Tower,
    build_model,
    parameter_count,
)

Array = npt.NDArray[np.float64]
NAMES: list[Any] = sorted(set(MODELS) - {"history"})
"""Models of indexes; tests/test_history.py has the others."""

models = st.builds(
    lambda **fields: fitting(**fields),
    name=st.sampled_from(NAMES),
    factors=st.integers(1, 9),
    layers=st.tuples(st.integers(1, 6).map(lambda half: 2 * half), *[st.integers(1, 7)] * 2).flatmap(
        lambda widths: st.integers(1, 3).map(lambda depth: widths[:depth])
    ),
    dropout=st.sampled_from([0.0, 0.5]),
    biases=st.booleans(),
    embedding_sizes=st.sampled_from([None, (1, 4), (5, 2)]),
    batch_norm=st.booleans(),
    y_range=st.sampled_from([None, (0.0, 5.5), (-1.0, 2.0)]),
)


def fitting(**fields: Any) -> Model:
    """A Model whose y_range is left out where the model has none."""
    return Model(**{**fields, "y_range": fields["y_range"] if fields["name"] in ("mf", "embedding_nn") else None})


def build(config: Model, n_users: int, n_items: int, seed: int = 1) -> Recommender:
    """A model in evaluation mode whose every parameter, biases too, is large enough to be seen in a score."""
    torch.manual_seed(seed)
    model = build_model(config, n_users, n_items).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model


def weight(module: nn.Embedding | nn.Linear) -> Array:
    return module.weight.detach().numpy().astype(np.float64)


def bias(module: nn.Linear) -> Array:
    return module.bias.detach().numpy().astype(np.float64)


def tower(part: Tower, user: int, item: int) -> Array:
    """z_1 = [p_u; q_i];  z_l = ReLU(W_l z_(l-1) + b_l): the paper's φ, on one pair."""
    z = np.concatenate([weight(part.user)[user], weight(part.item)[item]])
    for layer in part.hidden:
        assert isinstance(layer, nn.Linear)
        z = np.maximum(weight(layer) @ z + bias(layer), 0)
    return z


def fastai(model: EmbeddingNN, user: int, item: int) -> float:
    """x = [p_u; q_i]; x = BN(ReLU(W x)) a layer, the bias in W's place without BN; w · x + b."""
    x = np.concatenate([weight(model.user)[user], weight(model.item)[item]])
    for number, layer in enumerate(model.hidden):
        assert isinstance(layer, nn.Linear)
        x = np.maximum(weight(layer) @ x + (0 if model.norms else bias(layer)), 0)
        if model.norms:
            norm = model.norms[number]
            mean, var = (getattr(norm, f"running_{k}").numpy().astype(np.float64) for k in ("mean", "var"))
            x = weight(norm) * (x - mean) / np.sqrt(var + 1e-5) + bias(norm)  # type: ignore[arg-type]
    return float((weight(model.output) @ x + bias(model.output))[0])


def in_range(score: float, y_range: tuple[float, float] | None) -> float:
    return score if y_range is None else y_range[0] + (y_range[1] - y_range[0]) / (1 + math.exp(-score))


def paper(model: Recommender, user: int, item: int) -> float:
    """The score of one pair, as eq. 9 (GMF), 10 (MLP) and 12 (NeuMF) of He et al. 2017 state it, and as fastai's
    EmbeddingDotBias (MF) and EmbeddingNN do."""
    if isinstance(model, ItemToItem):
        return float(weight(model.item)[item, 0])  # 0 in fact: all that it ranks by are its parts.
    if isinstance(model, EmbeddingNN):
        return in_range(fastai(model, user, item), model.y_range)
    if isinstance(model, MF):
        score = float(weight(model.user)[user] @ weight(model.item)[item])
        if model.user_bias is not None and model.item_bias is not None:
            score += float(weight(model.user_bias)[user, 0] + weight(model.item_bias)[item, 0])
        return in_range(score, model.y_range)
    if isinstance(model, GMF):
        product = weight(model.user)[user] * weight(model.item)[item]
        return float(weight(model.output)[0] @ product + bias(model.output)[0])
    if isinstance(model, MLP):
        return float(weight(model.output)[0] @ tower(model.tower, user, item) + bias(model.output)[0])
    assert isinstance(model, NeuMF)
    product = weight(model.gmf.user)[user] * weight(model.gmf.item)[item]
    h = np.concatenate([weight(model.gmf.output)[0], weight(model.output)[0]])
    return float(h @ np.concatenate([product, tower(model.tower, user, item)]) + bias(model.gmf.output)[0])


def all_pairs(model: Recommender, n_users: int, n_items: int) -> Array:
    with torch.no_grad():
        return model(torch.arange(n_users)[:, None], torch.arange(n_items)[None]).numpy().astype(np.float64)


def set_to(parameter: torch.Tensor, values: object) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values))


# ---- worked examples ---------------------------------------------------------------------------------------


def test_gmf_by_hand() -> None:
    model = GMF(n_users=1, n_items=1, factors=2)
    set_to(model.user.weight, [[1.0, 2.0]])
    set_to(model.item.weight, [[3.0, 4.0]])
    set_to(model.output.weight, [[5.0, 6.0]])
    set_to(model.output.bias, [7.0])
    assert all_pairs(model, 1, 1).item() == 5 * (1 * 3) + 6 * (2 * 4) + 7


def test_mlp_by_hand() -> None:
    """One hidden layer of two: the second unit is negative before ReLU and must not count."""
    model = MLP(n_users=1, n_items=1, layers=(2, 2), dropout=0.0)
    first = model.tower.hidden[0]
    assert isinstance(first, nn.Linear)
    set_to(model.tower.user.weight, [[2.0]])
    set_to(model.tower.item.weight, [[3.0]])
    set_to(first.weight, [[1.0, 10.0], [1.0, -10.0]])
    set_to(first.bias, [0.5, 0.5])
    set_to(model.output.weight, [[4.0, 1000.0]])
    set_to(model.output.bias, [-1.0])
    on = 1 * 2 + 10 * 3 + 0.5
    off = max(0, 1 * 2 - 10 * 3 + 0.5)
    assert all_pairs(model, 1, 1).item() == 4 * on + 1000 * off - 1


def test_mf_by_hand() -> None:
    model = MF(n_users=1, n_items=1, factors=2, biases=True, y_range=(0, 5.5))
    assert model.user_bias is not None
    assert model.item_bias is not None
    set_to(model.user.weight, [[1.0, 2.0]])
    set_to(model.item.weight, [[0.5, -0.25]])
    set_to(model.user_bias.weight, [[0.75]])
    set_to(model.item_bias.weight, [[-0.5]])
    score = 1 * 0.5 + 2 * -0.25 + 0.75 - 0.5
    assert all_pairs(model, 1, 1).item() == pytest.approx(5.5 / (1 + math.exp(-score)), abs=1e-6)


def test_embedding_sizes_follow_fastais_rule() -> None:
    """MovieLens-100K as the lessons have it; a catalogue of ten million does not get ten thousand numbers an item."""
    assert (embedding_size(944), embedding_size(1625)) == (74, 101)
    assert embedding_size(10**7) == 600
    model = EmbeddingNN(944, 1625, (100, 50), None, 0.0, True)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (944, 74),
        (1625, 101),
        (100, 74 + 101),
        (50, 100),
        (1, 50),
    ]


# ---- laws --------------------------------------------------------------------------------------------------


@given(config=models, users=st.integers(1, 5), items=st.integers(1, 6), seed=st.integers(0, 99))
@budget(max_examples=80, deadline=None)
def test_forward_is_the_paper(config: Model, users: int, items: int, seed: int) -> None:
    model = build(config, users, items, seed)
    wanted = [[paper(model, user, item) for item in range(items)] for user in range(users)]
    np.testing.assert_allclose(all_pairs(model, users, items), wanted, atol=1e-5, rtol=1e-5)


@given(config=models, seed=st.integers(0, 99))
@budget(max_examples=80, deadline=None)
def test_a_row_alone_can_be_trained_on(config: Model, seed: int) -> None:
    """An epoch of 65 rows in steps of 64 ends with one: batch norm has no variance of it, takes the running one, and
    keeps that."""
    model = build(config.model_copy(update={"dropout": 0.0}), 3, 4, seed)
    user, item = torch.tensor([2]), torch.tensor([1])
    wanted, before = model(user, item), {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = model.train()(user, item)
    assert found.detach() == pytest.approx(wanted.detach(), abs=1e-6)
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@given(config=models, users=st.integers(1, 9), items=st.integers(1, 12), seed=st.integers(0, 99))
@budget(max_examples=80, deadline=None)
def test_score_block_equals_forward_for_all_pairs(config: Model, users: int, items: int, seed: int) -> None:
    model = build(config, users, items, seed)
    with torch.no_grad():
        block = model.score_block(model.user_side(torch.arange(users)), model.item_side(torch.arange(items))).numpy()
    assert block.shape == (users, items)
    np.testing.assert_allclose(block, all_pairs(model, users, items), atol=1e-5, rtol=1e-5)


@given(config=models, count=st.integers(1, 30), seed=st.integers(0, 99))
@budget(max_examples=80, deadline=None)
def test_computing_all_and_looking_up_changes_nothing(config: Model, count: int, seed: int) -> None:
    """Below 5 users or 6 items a batch's own are computed, from there on all of them: the same scores, and the same
    gradients."""
    model = build(config, 5, 6, seed)
    user, item = torch.randint(5, (count,)), torch.randint(6, (count,))
    together = model(user, item)
    apart = torch.stack([model(u[None], i[None])[0] for u, i in zip(user, item, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    left, right = (torch.autograd.grad((s * torch.arange(count)).sum(), parameters) for s in (together, apart))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_with_dropout_every_pair_has_a_mask_of_its_own() -> None:
    """100 pairs of one user and one item: computed once and looked up, they would all be dropped alike."""
    model = build(Model(name="mlp", layers=(8, 4), dropout=0.5), 1, 1).train()
    zero = torch.zeros(100, dtype=torch.long)
    assert len(set(model(zero, zero).tolist())) > 2


@given(alpha=st.floats(0, 1), layers=st.sampled_from([(8,), (8, 4), (6, 5, 3)]), seed=st.integers(0, 99))
@budget(max_examples=40, deadline=None)
def test_pretrained_neumf_starts_as_the_mean_of_its_parts(alpha: float, layers: tuple[int, ...], seed: int) -> None:
    """Section 3.4.1: with h = [α·h_GMF; (1 - α)·h_MLP] the logit is α·GMF + (1 - α)·MLP."""
    gmf, mlp, neumf = (
        build(Model(name=name, factors=3, layers=layers), 4, 5, seed) for name in ("gmf", "mlp", "neumf")
    )
    assert isinstance(gmf, GMF)
    assert isinstance(mlp, MLP)
    assert isinstance(neumf, NeuMF)
    neumf.start_from(gmf, mlp, alpha)
    wanted = alpha * all_pairs(gmf, 4, 5) + (1 - alpha) * all_pairs(mlp, 4, 5)
    np.testing.assert_allclose(all_pairs(neumf, 4, 5), wanted, atol=1e-5, rtol=1e-5)
    assert not {p.data_ptr() for p in neumf.parameters()} & {
        p.data_ptr() for p in (*gmf.parameters(), *mlp.parameters())
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_users_column_broadcasts_over_the_positive_and_its_negatives(name: Any) -> None:
    """(B, 1) × (B, 1 + N) → (B, 1 + N), the same as every pair on its own."""
    model = build(Model(name=name, factors=3, layers=(4, 3)), 7, 9)
    user, items = torch.tensor([[6], [0], [3]]), torch.tensor([[8, 1, 1, 0], [2, 2, 5, 7], [4, 3, 8, 8]])
    with torch.no_grad():
        together = model(user, items)
        apart = model(user.expand(3, 4).reshape(-1), items.reshape(-1)).reshape(3, 4)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layers", [(64, 32, 16, 8), (8,)])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: Any, layers: tuple[int, ...]) -> None:
    """DDP waits for ever for the gradient of a parameter that no loss reaches."""
    model = build(Model(name=name, factors=4, layers=layers), 3, 4).train()
    model(torch.arange(3)[:, None], torch.arange(4)[None]).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["mlp", "neumf"])
def test_dropout_is_for_training_only(name: Any) -> None:
    model = build(Model(name=name, layers=(64, 32), dropout=0.5), 2, 3)
    assert np.array_equal(all_pairs(model, 2, 3), all_pairs(model, 2, 3))
    model.train()
    assert not np.array_equal(all_pairs(model, 2, 3), all_pairs(model, 2, 3))


@given(config=models, users=st.integers(1, 50), items=st.integers(1, 50))
@budget(max_examples=50, deadline=None)
def test_parameter_count_is_the_models(config: Model, users: int, items: int) -> None:
    real = sum(p.numel() for p in build_model(config, users, items).parameters())
    assert parameter_count(config, users, items) == real


def test_parameter_count_by_hand_and_without_allocating() -> None:
    config = Model(name="neumf", factors=8, layers=(64, 32))
    users, items = 10**9, 10**8
    gmf = (users + items) * 8 + (8 + 1)
    mlp = (users + items) * 32 + (64 * 32 + 32) + 32
    assert parameter_count(config, users, items) == gmf + mlp


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return list(build_model(Model(), 4, 5).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))
