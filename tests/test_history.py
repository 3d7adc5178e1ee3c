"""The model of histories is what its formulas say, written out again in NumPy for one user at a time; a position knows
nothing of later ones, and a user's vector nothing of other users, to the bit.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor, nn

from ncf_dist.config import Model
from ncf_dist.gaps import GAP_CODES
from ncf_dist.models import History, Sequences, Windows, build_model
from ncf_dist.models import history as kernel
from ncf_dist.models.history import BLOCKS, Attention, Block, Mix, bucket_lengths, lag_matrices

Array = npt.NDArray[np.float64]
HISTORY, WIDTH, HEADS, USERS, ITEMS = 21, 12, 3, 9, 40
CONFIG: dict[str, Any] = {"name": "history", "factors": WIDTH, "heads": HEADS, "history": HISTORY}


def model_of(block: str, **fields: Any) -> History:
    """In evaluation mode, with every parameter large enough to be seen in a score."""
    torch.manual_seed(1)
    model = build_model(Model(**{**CONFIG, "block": block, **fields}), USERS, ITEMS).eval()
    assert isinstance(model, History)
    for name, parameter in model.named_parameters():
        if "kernel" not in name and "log_scale" not in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
    return model


def histories(users: int, longest: int = HISTORY, seed: int = 1) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    items, gaps = (torch.randint(high, (users, longest), generator=draw) for high in (ITEMS, GAP_CODES))
    gaps[:, 0] = 0
    return Sequences(items, gaps, torch.randint(0, longest + 1, (users,), generator=draw))


# ---- the formulas ----------------------------------------------------------------------------------------------------


def doubles(parameter: Tensor) -> Array:
    return parameter.detach().numpy().astype(np.float64)


def biases(model: History) -> Tensor:
    assert model.item_bias is not None
    return model.item_bias.weight[:, 0]


def linear(x: Array, layer: nn.Linear) -> Array:
    return x @ doubles(layer.weight).T + doubles(layer.bias)


def norm(x: Array, layer: nn.LayerNorm) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return scaled * doubles(layer.weight) + doubles(layer.bias)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def mixed(x: Array, layer: Any) -> Array:
    """(T, D) → (T, D), position by position and head by head."""
    y = np.zeros((len(x), WIDTH))
    heads = np.split(np.arange(WIDTH), HEADS)
    if isinstance(layer, Mix):
        u, v = np.split(silu(linear(x, layer.gate)), 2, axis=1)
        for head, columns in enumerate(heads):
            weights = np.exp(doubles(layer.kernel)[head])
            for t in range(len(x)):
                share = weights[: t + 1][::-1] / weights[: t + 1].sum()
                y[t, columns] = share @ v[: t + 1, columns]
        return linear(u * y, layer.out)
    if isinstance(layer, Attention):
        q, k, v = np.split(x @ doubles(layer.qkv.weight).T, 3, axis=1)
        for columns in heads:
            for t in range(len(x)):
                weights = np.exp(k[: t + 1, columns] @ q[t, columns] / np.sqrt(len(columns)))
                y[t, columns] = weights / weights.sum() @ v[: t + 1, columns]
        return linear(y, layer.out)
    return linear(np.stack([x[: t + 1].mean(0) for t in range(len(x))]), layer.out)


def by_hand(model: History, items: Array, gaps: Array) -> Array:
    """(T, I) scores of every item after each position."""
    table = doubles(model.item.weight)
    h = table[items] * np.sqrt(WIDTH) / 2
    if model.gap is not None:
        h = h + doubles(model.gap.weight)[gaps]
    if model.position is not None:
        h = h + doubles(model.position.weight)[: len(items)]
    for block in cast(list[Block], list(model.blocks)):
        h = h + mixed(norm(h, block.before_mixing), block.mixing)
        h = h + linear(silu(linear(norm(h, block.before_layers), block.wide)), block.narrow)
    h = norm(h, model.norm)
    cosine = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (table / np.linalg.norm(table, axis=1, keepdims=True)).T
    return np.exp(doubles(model.log_scale)) * cosine + doubles(biases(model))


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("block", ["mix", "attention", "mean"])
def test_scores_are_what_the_formulas_say(block: str, gaps: bool) -> None:
    model, latest = model_of(block, gaps=gaps), histories(6)
    latest.length[0] = HISTORY
    with torch.no_grad():
        scores = model.score_block(model.users(latest), model.item_side(None)).numpy()
        ranked = (model.ranking_users(latest).dot @ model.ranking_items(torch.arange(ITEMS)).dot.T).numpy()
    for row, length in enumerate(latest.length.tolist()):
        items, codes = (part[row, :length].numpy() for part in (latest.items, latest.gaps))
        wanted = by_hand(model, items, codes)[-1] if length else doubles(biases(model))
        np.testing.assert_allclose(scores[row], wanted, atol=2e-4)
        np.testing.assert_allclose(ranked[row], wanted, atol=2e-4)


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_groups_of_a_step_are_one_another_s_padding(block: str) -> None:
    """Three users in one wide group, and the same in groups of their own length: the same vectors."""
    model = model_of(block)
    items, gaps = histories(3).items, histories(3).gaps
    lengths = [20, 11, 1]
    known = torch.cat([row * HISTORY + torch.arange(length) for row, length in enumerate(lengths)])
    whole = Windows((Sequences(items, gaps, torch.tensor(lengths)),), known)
    apart = tuple(
        Sequences(items[r : r + 1, :length], gaps[r : r + 1, :length], torch.tensor([length]))
        for r, length in enumerate(lengths)
    )
    with torch.no_grad():
        found, wanted = (model.positions(w).dot for w in (Windows(apart, torch.arange(sum(lengths))), whole))
    assert found is not None
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@given(st.integers(1, 6), st.integers(1, 40))
@budget(max_examples=30, deadline=None)
def test_a_kernel_s_weights_are_a_mean_over_what_was(heads: int, positions: int) -> None:
    found = lag_matrices(torch.randn(heads, positions, generator=torch.Generator().manual_seed(positions)) * 5)
    assert not found.triu(1).any()
    torch.testing.assert_close(found.sum(-1), torch.ones(heads, positions))


def test_kernels_of_any_size_stay_finite() -> None:
    """Weights are learned as logarithms: their exponentials alone would overflow."""
    assert lag_matrices(torch.tensor([[500.0, -500.0, 499.0]])).isfinite().all()


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_a_later_item_changes_no_earlier_position(block: str) -> None:
    model, latest = model_of(block), histories(4)
    with torch.no_grad():
        before = model.tower([latest]).view(4, HISTORY, WIDTH)
        for changed in (1, 7, HISTORY - 1):
            items, gaps = latest.items.clone(), latest.gaps.clone()
            items[:, changed] = (items[:, changed] + 1) % ITEMS
            gaps[:, changed] = (gaps[:, changed] + 1) % GAP_CODES
            after = model.tower([Sequences(items, gaps, latest.length)]).view(4, HISTORY, WIDTH)
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed:], before[:, changed:])


# ---- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", sorted(BLOCKS))
@pytest.mark.parametrize("width", [WIDTH, 96])
def test_a_user_s_vector_depends_on_that_user_alone_to_the_bit(block: str, width: int) -> None:
    """Whoever else is in the call, in whatever order, and however wide their table is."""
    model = model_of(block, factors=width, heads=4 if width == 96 else 3)
    latest = histories(150)
    with torch.no_grad():
        together = model.ranking_users(latest).dot
        shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model.ranking_users(latest.rows(shuffled)).dot, together[shuffled])
        for row in (0, 3, 149):
            length = int(latest.length[row])
            alone = latest.rows(slice(row, row + 1))
            cut = Sequences(alone.items[:, :length], alone.gaps[:, :length], alone.length)
            for one in (alone, cut):
                assert torch.equal(model.ranking_users(one).dot[0], together[row])


def test_what_follows_a_user_s_items_does_not_count() -> None:
    model, latest = model_of("mix"), histories(40)
    after = torch.arange(HISTORY) >= latest.length[:, None]
    other = Sequences(torch.where(after, 7, latest.items), torch.where(after, 5, latest.gaps), latest.length)
    with torch.no_grad():
        assert torch.equal(model.ranking_users(latest).dot, model.ranking_users(other).dot)


def test_a_user_without_items_is_ranked_by_the_items_biases() -> None:
    model = model_of("mix")
    nobody = Sequences(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 3]))
    with torch.no_grad():
        scores = model.score_block(model.users(nobody), model.item_side(None))
    assert torch.equal(scores[0], biases(model))
    assert not torch.equal(scores[1], biases(model))


def test_longer_histories_than_the_model_s_are_refused() -> None:
    latest = histories(3, HISTORY + 1)
    latest.length[1] = HISTORY + 1
    with pytest.raises(ValueError, match=f"{HISTORY + 1} latest items; needed at most model.history, {HISTORY}"):
        model_of("mix").ranking_users(latest)


@given(st.integers(1, 1000))
@budget(max_examples=50, deadline=None)
def test_buckets_double_up_to_the_history(history: int) -> None:
    found = bucket_lengths(history)
    assert found == sorted(set(found))
    assert found[-1] == history
    assert all(longer <= 2 * shorter for shorter, longer in itertools.pairwise(found))


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(4)
    dropped = kernel.Dropout(0.25)(torch.ones(400, 501))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # The standard error of a share of 200,400 draws is .001.
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.005)
    for dimension in (0, 1):
        assert float((dropped == 0).double().mean(dimension).std()) < 0.03
    assert torch.equal(kernel.Dropout(0.25).eval()(torch.ones(3)), torch.ones(3))
