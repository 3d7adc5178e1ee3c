"""A part of the scores that is a sparse matrix: each cell is the sum that the formula says, in its order and to the
bit, whoever adds it, whatever the blocks, the company and the items asked about."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor, nn

from ncf_dist import native
from ncf_dist.item_item.part import Part
from ncf_dist.item_item.rows import ItemRows, from_entries
from ncf_dist.models import MF, History, Recommender, Sequences, Users
from ncf_dist.scoring import Lists, ModelScorer, mask, recommend, sparse, top_k
from ncf_dist.scoring.sparse import LIBRARY, Expansion
from tests.far import DEVICE, Far, FarDevice
from tests.test_scoring import blocks_of, brute_force, lists, random_lists

built = pytest.mark.skipif(native.library(LIBRARY) is None, reason="not built here: no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_is_built_wherever_there_is_a_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert native.library(LIBRARY) is not None


class Case(NamedTuple):
    """Of `n_items`: a part, histories, and which items are eligible (None: all)."""

    n_items: int
    part: Part
    latest: Sequences
    eligible: Tensor | None


def matrix(rng: np.random.Generator, n_items: int, density: float, column: bool, whole: bool = False) -> ItemRows:
    """Values are normal, or whole numbers, of which sums are exact and often tie."""
    row, item = np.nonzero(rng.random((n_items, n_items)) < density)
    values = rng.integers(-2, 3, len(row)) if whole else rng.standard_normal(len(row))
    rows = from_entries(row, item, values.astype(np.float32), n_items)
    if not column:
        return rows
    every = rng.integers(-1, 2, n_items) if whole else rng.standard_normal(n_items)
    return ItemRows(rows.offsets, rows.items, rows.values, torch.from_numpy(every.astype(np.float32)))


def histories(rng: np.random.Generator, users: int, n_items: int, most: int) -> Sequences:
    """Of 0 to `most` items, some of them twice; what is past the length is an item like any other."""
    items = torch.from_numpy(rng.integers(0, n_items, (users, most)))
    return Sequences(items, torch.zeros_like(items), torch.from_numpy(rng.integers(0, most + 1, users)))


@st.composite
def cases(draw: st.DrawFn, whole: bool = False) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_items, most = draw(st.integers(1, 90)), draw(st.integers(1, 9))
    rows = matrix(rng, n_items, draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])), draw(st.booleans()), whole)
    half_life = float("inf") if whole else draw(st.sampled_from([0.5, 2.0, 30.0]))
    part = Part("any", draw(st.sampled_from([1.0, 0.0, 3.0] if whole else [1.0, 0.3, 15.0])), half_life,
                draw(st.integers(1, 12)), rows)  # fmt: skip
    some = torch.from_numpy(np.flatnonzero(rng.random(n_items) < draw(st.sampled_from([0.1, 0.6]))))
    return Case(n_items, part, histories(rng, draw(st.integers(1, 9)), n_items, most),
                draw(st.sampled_from([None, some])))  # fmt: skip


def model_of(users: int, n_items: int, whole: bool = False) -> Recommender:
    torch.manual_seed(1)
    model = MF(users, n_items, 3, biases=False, std=1.0)
    if whole:
        for table in (model.user, model.item):
            table.weight.data.round_()
    return model.requires_grad_(False)


def expanded(case: Case, width: int, compiled: bool, start: Tensor | None = None) -> Tensor:
    """(U, I) `start`, or zeros, and the part without its column, in blocks of `width` places; of the eligible items."""
    places = None
    catalogue = torch.arange(case.n_items) if case.eligible is None else case.eligible
    if case.eligible is not None:
        places = torch.full((case.n_items,), -1, dtype=torch.int32)
        places[case.eligible] = torch.arange(len(case.eligible), dtype=torch.int32)
    expansion, users = Expansion(case.part, places, compiled), len(case.latest.length)
    scores = torch.zeros(users, case.n_items) if start is None else start.clone()
    expansion.take(case.latest)
    for first in range(0, len(catalogue), width):
        items = catalogue[first : first + width]
        block = torch.full((users, width), 77.0)
        block[:, : len(items)] = scores[:, items]
        expansion.add(first, block)
        scores[:, items] = block[:, : len(items)]
        assert (block[:, len(items) :] == 77.0).all()
    return scores


def cell_by_cell(case: Case, start: Tensor) -> np.ndarray:
    """The same as the formula says, in float32: from the oldest item to the latest."""
    rows, scores = case.part.rows, start.numpy().copy()
    for user, length in enumerate(case.latest.length.tolist()):
        for at in range(max(0, length - case.part.last), length):
            item, share = case.latest.items[user, at], case.part.decay[length - 1 - at].numpy()
            for entry in range(rows.offsets[item], rows.offsets[item + 1]):
                target = rows.items[entry]
                if case.eligible is None or target in case.eligible:
                    scores[user, target] += np.float32(share * rows.values[entry].numpy())
    return scores


BOTH = [pytest.param(True, marks=built, id="compiled"), pytest.param(False, id="torch")]


@pytest.mark.parametrize("compiled", BOTH)
@given(cases(), st.sampled_from([1, 7, 16, 1024]))
@budget(max_examples=80, deadline=None)
def test_a_cell_adds_up_in_the_order_of_the_history(compiled: bool, case: Case, width: int) -> None:
    """To the bit, in blocks of any width. So compiled code and torch's operations give the same bits, too."""
    start = torch.from_numpy(np.random.default_rng(5).standard_normal((9, case.n_items)).astype(np.float32))
    start = start[: len(case.latest.length)]
    assert np.array_equal(expanded(case, width, compiled, start).numpy(), cell_by_cell(case, start))


def in_float64(model: Recommender, part: Part, users: Users, n_items: int) -> np.ndarray:
    """(U, I) the model's scores and the formula of the part, as dense matrices."""
    assert users.latest is not None
    dense, latest = np.zeros((n_items, n_items)), users.latest
    row = np.repeat(np.arange(n_items), np.diff(part.rows.offsets.numpy()))
    dense[row, part.rows.items.numpy()] = part.rows.values.double().numpy()
    if part.rows.column is not None:
        dense += part.rows.column.double().numpy()
    shares = np.zeros((len(users), n_items))
    for user, length in enumerate(latest.length.tolist()):
        for age in range(min(part.last, length)):
            shares[user, latest.items[user, length - 1 - age]] += part.weight * 0.5 ** (age / part.half_life)
    side, items = model.user_side(users.index).dot, model.item_side(None).dot
    assert side is not None
    assert items is not None
    return (side.double() @ items.double().T).numpy() + shares @ dense


@given(cases(), st.sampled_from([16, 64]))
@budget(max_examples=80, deadline=None)
def test_scores_are_the_dense_formula(case: Case, width: int) -> None:
    users = Users(torch.arange(len(case.latest.length)), case.latest)
    model = model_of(len(users), case.n_items)
    with blocks_of(4, width):
        scores = ModelScorer(model, case.n_items, parts=[case.part], eligible=case.eligible).scores(users)
    wanted = torch.from_numpy(in_float64(model, case.part, users, case.n_items)).float()
    if case.eligible is not None:
        others = torch.ones(case.n_items, dtype=torch.bool)
        others[case.eligible] = False
        assert (scores[:, others] == -torch.inf).all()
        scores, wanted = scores[:, case.eligible], wanted[:, case.eligible]
    size = 1 + 15 * 12 * 4
    torch.testing.assert_close(scores, wanted, atol=size * 2**-22, rtol=1e-5)


@given(cases(whole=True), st.integers(1, 40), st.sampled_from([16, 64]))
@budget(max_examples=100, deadline=None)
def test_the_best_are_those_of_a_full_sort(case: Case, k: int, width: int) -> None:
    """Whole numbers: exact scores, most of which tie."""
    rng, users = np.random.default_rng(3), Users(torch.arange(len(case.latest.length)), case.latest)
    seen = [np.flatnonzero(rng.random(case.n_items) < 0.2).tolist() for _ in range(len(users))]
    model = model_of(len(users), case.n_items, whole=True)
    with blocks_of(4, width):
        scorer = ModelScorer(model, case.n_items, parts=[case.part], eligible=case.eligible)
        values, items = recommend(scorer, users, lists(seen), k)
    left_out = set() if case.eligible is None else set(range(case.n_items)) - set(case.eligible.tolist())
    for user, scores in enumerate(in_float64(model, case.part, users, case.n_items).tolist()):
        wanted = brute_force(scores, [*seen[user], *left_out])[:k]
        none = values.shape[1] - len(wanted)
        assert items[user].tolist() == wanted + [-1] * none
        assert values[user].tolist() == [scores[item] for item in wanted] + [-np.inf] * none


def large(columns: bool = True) -> tuple[ModelScorer, Users, list[Part]]:
    """Two parts and a model over several blocks of users and items."""
    rng, n_items = np.random.default_rng(1), 2100
    parts = [
        Part("counts", 0.7, 2.0, 20, matrix(rng, n_items, 0.02, columns)),
        Part("ease", 5.0, 30.0, 50, matrix(rng, n_items, 0.03, False)),
    ]
    users = Users(torch.arange(300), histories(rng, 300, n_items, 60))
    return ModelScorer(model_of(300, n_items), n_items, parts=parts), users, parts


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_a_score_does_not_depend_on_the_call() -> None:
    scorer, users, _ = large()
    together = scorer.scores(users)
    shuffled = torch.from_numpy(np.random.default_rng(1).permutation(300))
    for size in (1, 2, 7, 256, 300):
        assert same_bits(scorer.scores(users.rows(shuffled[:size])), together[shuffled[:size]]), size
    seen = random_lists(300, 2100)
    values, items = recommend(scorer, users, lists(seen), 10)
    best, index = top_k(mask(together.clone(), lists(seen)), 10)
    assert same_bits(values, best)
    assert torch.equal(items, index)
    for start in (0, 255, 299):
        alone = recommend(scorer, users.rows(slice(start, start + 1)), lists(seen[start : start + 1]), 10)
        assert same_bits(alone[0], values[start : start + 1])
        assert torch.equal(alone[1], items[start : start + 1])


def test_a_longer_sequence_of_the_same_history_gives_the_same_bits() -> None:
    """Sequences are filled up to the length of the company's longest."""
    scorer, users, _ = large()
    assert users.latest is not None
    longer = Sequences(
        torch.nn.functional.pad(users.latest.items, (0, 9)), torch.nn.functional.pad(users.latest.gaps, (0, 9)),
        users.latest.length,
    )  # fmt: skip
    assert same_bits(scorer.scores(Users(users.index, longer)), scorer.scores(users))


def test_items_asked_about_have_the_bits_of_the_blocks() -> None:
    """In any order, some of them twice, eligible or not, over several calls of a block's width."""
    scorer, users, parts = large()
    rng, some = np.random.default_rng(4), users.rows(slice(0, 200))
    every = scorer.scores(some)
    asked = torch.from_numpy(rng.integers(0, 2100, 1500))
    assert same_bits(scorer.of(some, asked), every[:, asked])
    eligible = torch.from_numpy(np.flatnonzero(rng.random(2100) < 0.4))
    fewer = ModelScorer(scorer.model, 2100, parts=parts, eligible=eligible)
    assert same_bits(fewer.of(some, asked), every[:, asked])
    assert same_bits(fewer.scores(some)[:, eligible], every[:, eligible])


@built
def test_both_ways_to_add_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, users, parts = large()
    seen = Lists(np.empty(0, np.int64), np.zeros(301, np.int64))
    wanted, asked = recommend(scorer, users, seen, 10), torch.arange(5, 2000, 7)
    of = scorer.of(users.rows(slice(0, 256)), asked)
    monkeypatch.setattr(native, "library", lambda name: None)
    slow = ModelScorer(scorer.model, 2100, parts=parts)
    assert slow.parts[0].library is None
    values, items = recommend(slow, users, seen, 10)
    assert same_bits(values, wanted[0])
    assert torch.equal(items, wanted[1])
    assert same_bits(slow.of(users.rows(slice(0, 256)), asked), of)


def test_a_part_that_weighs_nothing_changes_no_bit_but_of_zeros() -> None:
    scorer, users, _ = large(columns=False)
    without = ModelScorer(scorer.model, 2100)
    nothing = Part("any", 0.0, 2.0, 20, scorer.given[0].rows)
    assert torch.equal(ModelScorer(scorer.model, 2100, parts=[nothing]).scores(users), without.scores(users))


def test_users_without_their_latest_items_are_refused() -> None:
    scorer, users, _ = large()
    with pytest.raises(ValueError, match="without their latest items; needed these"):
        scorer.scores(Users(users.index))


def test_parts_of_a_model_with_a_range_are_refused() -> None:
    _, _, parts = large()
    with pytest.raises(ValueError, match=r"scores of the range \(0.0, 5.5\); needed a model without a range"):
        ModelScorer(MF(2, 2100, 3, biases=False, y_range=(0.0, 5.5)), 2100, parts=parts)


def test_code_that_cannot_be_loaded_is_said_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the system below it was changed."""
    broken = tmp_path / "_sparse_rows_broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(broken)))
    monkeypatch.setattr(sparse, "LIBRARY", "broken")
    _, _, parts = large()
    assert Expansion(parts[0], None).library is None
    assert "_sparse_rows_broken.so cannot be loaded" in caplog.text


@pytest.mark.parametrize("listed", [False, True])
def test_parts_keep_to_the_models_device(listed: bool) -> None:
    """Nothing is taken for a tensor of the CPU, wherever the users and the parts come from."""
    rng, n_items, index = np.random.default_rng(1), 90, torch.arange(12)
    part = Part("counts", 0.7, 2.0, 5, matrix(rng, n_items, 0.2, True))
    users = Users(index, histories(rng, 12, n_items, 9))
    eligible = torch.from_numpy(np.flatnonzero(rng.random(n_items) < 0.4)) if listed else None
    model, seen = model_of(12, n_items), lists(random_lists(12, n_items, 30))
    with blocks_of(4, 16):
        scorer = ModelScorer(model, n_items, parts=[part], eligible=eligible)
        wanted, of = recommend(scorer, users, seen, 10), scorer.of(users.rows(slice(0, 4)), torch.arange(20))
        with FarDevice():
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    assert parameter is not None
                    module._parameters[key] = nn.Parameter(Far(parameter.data), False)
            scorer = ModelScorer(model, n_items, parts=[part], eligible=eligible)
            for some in (users, users.to(DEVICE)):
                values, found = recommend(scorer, some, seen, 10)
                assert torch.equal(found.cpu(), wanted[1])
                assert torch.equal(values.cpu(), wanted[0])
                assert torch.equal(scorer.of(some.rows(slice(0, 4)), torch.arange(20)).cpu(), of)


# ---- a model of histories --------------------------------------------------------------------------------------------


def history_model(n_items: int, history: int, block: str = "mix") -> Recommender:
    torch.manual_seed(1)
    model = History(9, n_items, 8, history, block=block, heads=2, std=1.0)
    nn.init.normal_(model.item_bias.weight)  # type: ignore[union-attr]
    return model.requires_grad_(False).eval()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
@budget(max_examples=100, deadline=None)
def test_the_last_of_a_sequence_are_those_before_its_end(seed: int, most: int, wanted: int) -> None:
    rng = np.random.default_rng(seed)
    given = histories(rng, 5, 50, most)
    given = replace(given, gaps=torch.from_numpy(rng.integers(0, 64, (5, most))))
    found = given.last(wanted)
    assert found.items.shape == found.gaps.shape == (5, min(most, wanted))
    for user, length in enumerate(given.length.tolist()):
        items = given.items[user, :length].tolist()[-wanted:]
        gaps = given.gaps[user, :length].tolist()[-wanted:]
        assert found.length[user] == len(items)
        assert found.items[user, : len(items)].tolist() == items
        assert found.gaps[user, 1 : len(items)].tolist() == gaps[1:]
        if most > wanted and items:
            assert found.gaps[user, 0] == 0


@pytest.mark.parametrize("block", ["mix", "attention", "gru", "mean"])
def test_a_model_of_histories_is_ranked_as_it_scores(block: str) -> None:
    """Users without items, too, whoever else is there and whatever their sequences are filled up with."""
    model, rng = history_model(1500, 20, block), np.random.default_rng(1)
    latest = histories(rng, 300, 1500, 20)
    users = Users(torch.zeros(300, dtype=torch.int64), latest)
    scorer = ModelScorer(model, 1500)
    together = scorer.scores(users)
    wanted = model.score_block(model.users(latest), model.items(torch.arange(1500)))
    torch.testing.assert_close(together, wanted, atol=1e-4, rtol=1e-5)
    assert (latest.length == 0).any()
    shuffled = torch.from_numpy(rng.permutation(300))
    for size in (1, 2, 7, 256, 300):
        assert same_bits(scorer.scores(users.rows(shuffled[:size])), together[shuffled[:size]]), size
    asked = torch.from_numpy(rng.integers(0, 1500, 1100))
    some = users.rows(slice(0, 200))
    assert same_bits(scorer.of(some, asked), together[:200][:, asked])
    values, items = recommend(scorer, users, lists([[] for _ in range(300)]), 10)
    best, index = top_k(together, 10)
    assert same_bits(values, best)
    assert torch.equal(items, index)


def test_a_part_may_look_further_back_than_the_model() -> None:
    model, rng = history_model(1500, 20), np.random.default_rng(1)
    users = Users(torch.zeros(300, dtype=torch.int64), histories(rng, 300, 1500, 45))
    assert users.latest is not None
    part = Part("ease", 2.0, 30.0, 45, matrix(rng, 1500, 0.02, False))
    tower = ModelScorer(model, 1500).scores(replace(users, latest=users.latest.last(20)))
    assert same_bits(ModelScorer(model, 1500).scores(users), tower)
    expansion = Expansion(part, None)
    expansion.take(users.latest)
    expansion.add(0, tower)
    assert same_bits(ModelScorer(model, 1500, parts=[part]).scores(users), tower)
