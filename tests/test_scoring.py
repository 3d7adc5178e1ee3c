"""The top K is what a full sort gives, whatever ties there are; a rank is a place in that order; and no
score depends on who else is scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor, nn

from ncf_dist import scoring
from ncf_dist.config import Model
from ncf_dist.models import MODELS, build_model
from ncf_dist.scoring import Lists, ModelScorer, PopularityScorer, catalogue_rank, mask, top_k

Seen = list[list[int]]


def lists(seen: Seen) -> Lists:
    flat = [item for items in seen for item in items]
    return Lists(np.array(flat, dtype=np.int64), np.cumsum([0, *(len(items) for items in seen)], dtype=np.int64))


def brute_force(scores: list[float], seen: list[int]) -> list[int]:
    """Unseen items, best first, equal scores by index."""
    return sorted(set(range(len(scores))) - set(seen), key=lambda item: (-scores[item], item))


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Seen]:
    """Scores (U, I) out of at most four values, so that most of them tie; and what each user has seen, up
    to everything.
    """
    users, items = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    row = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0]), min_size=items, max_size=items)
    scores = draw(st.lists(row, min_size=users, max_size=users))
    seen = draw(st.lists(st.sets(st.integers(0, items - 1)).map(sorted), min_size=users, max_size=users))
    return torch.tensor(scores), seen


@given(blocks(), st.integers(1, 15))
@budget(max_examples=300, deadline=None)
def test_top_k_is_the_head_of_a_full_sort(block: tuple[Tensor, Seen], k: int) -> None:
    scores, seen = block
    values, index = top_k(mask(scores.clone(), lists(seen)), k)
    assert values.shape == index.shape == (len(seen), min(k, scores.shape[1]))
    for user, wanted in enumerate(brute_force(s, i) for s, i in zip(scores.tolist(), seen, strict=True)):
        offered = torch.isfinite(values[user])
        assert index[user][offered].tolist() == wanted[:k]
        assert values[user][offered].tolist() == [scores[user, item].item() for item in wanted[:k]]
        # Fewer unseen items than places: the masked ones are at the end, and can be told by their score.
        assert offered.sum() == min(k, len(wanted))
        assert not offered[len(wanted) :].any()


@given(blocks())
@budget(max_examples=200, deadline=None)
def test_the_rank_of_an_item_is_its_place_in_top_k(block: tuple[Tensor, Seen]) -> None:
    scores, seen = block
    masked = mask(scores.clone(), lists(seen))
    _, index = top_k(masked, scores.shape[1])
    for item in range(scores.shape[1]):
        ranks = catalogue_rank(masked, torch.full((len(seen),), item))
        for user, rank in enumerate(ranks.tolist()):
            assert index[user, rank - 1] == item


def test_ties_by_hand() -> None:
    """Items 1, 3 and 4 share the best score and only two fit: the lower indexes. Item 2 would be fifth; 1
    is masked, so it is fourth.
    """
    scores = torch.tensor([[5.0, 9.0, 5.0, 9.0, 9.0]])
    assert top_k(scores, 2)[1].tolist() == [[1, 3]]
    assert catalogue_rank(scores, torch.tensor([2])).tolist() == [5]
    mask(scores, lists([[1]]))
    assert top_k(scores, 2)[1].tolist() == [[3, 4]]
    assert catalogue_rank(scores, torch.tensor([2])).tolist() == [4]


def test_ties_at_the_last_place_of_many_items() -> None:
    """topk alone picks freely among them."""
    scores = torch.zeros(3, 1000)
    scores[1, 700] = 1
    assert top_k(scores, 4)[1].tolist() == [[0, 1, 2, 3], [700, 0, 1, 2], [0, 1, 2, 3]]


def test_mask_changes_only_what_was_seen() -> None:
    scores = torch.arange(6.0).reshape(2, 3)
    seen = lists([[0, 2], []])
    assert seen.row.tolist() == [0, 0]
    assert mask(scores, seen) is scores
    assert scores.tolist() == [[-np.inf, 1.0, -np.inf], [3.0, 4.0, 5.0]]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(1, 3))
@budget(max_examples=100, deadline=None)
def test_popularity_orders_by_count(counts: list[int], users: int) -> None:
    scores = PopularityScorer(np.array(counts)).scores(torch.arange(users))
    assert scores.shape == (users, len(counts))
    assert scores.dtype == torch.float32
    assert top_k(scores, len(counts))[1].tolist() == [brute_force(counts, [])] * users  # type: ignore[arg-type]


def test_popularity_tells_counts_apart_that_float32_does_not() -> None:
    counts = np.array([2**24, 2**24 + 1, 2**24 + 1])
    assert np.float32(2**24) == np.float32(2**24 + 1)
    assert top_k(PopularityScorer(counts).scores(torch.arange(1)), 3)[1].tolist() == [[1, 2, 0]]


def test_scores_are_the_callers_to_change() -> None:
    for scorer in (
        PopularityScorer(np.array([3, 1, 2])),
        ModelScorer(build_model(Model(name="gmf"), 2, 3), 3),
    ):
        first = scorer.scores(torch.tensor([0, 0]))
        before = first.clone()
        mask(first, lists([[0, 1, 2], []]))
        assert torch.equal(scorer.scores(torch.tensor([0, 0])), before)


# ---- independence of blocks --------------------------------------------------------------------------------


def scorer_of(name: Any, n_users: int, n_items: int, factors: int = 32) -> ModelScorer:
    torch.manual_seed(1)
    model = build_model(Model(name=name, factors=factors, layers=(20, 10, 6)), n_users, n_items)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ModelScorer(model, n_items)


@pytest.mark.parametrize("n_items", [30, 777, 3706, 20_000])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_score_does_not_depend_on_the_block(name: str, n_items: int) -> None:
    """The same bits alone, in any company and in any place: a matrix product of 1, 3 or 17 rows rounds
    differently, and the published bytes would change with the number of Spark tasks.
    """
    n_users = 70 if n_items < 10_000 else 9
    scorer = scorer_of(name, n_users, n_items)
    together = scorer.scores(torch.arange(n_users))
    shuffled = torch.from_numpy(np.random.default_rng(1).permutation(n_users))
    assert torch.equal(scorer.scores(shuffled), together[shuffled])
    for size in (1, 2, 3, 5, 7, 17, 31):
        some = shuffled[:size]
        assert torch.equal(scorer.scores(some), together[some]), size


@pytest.mark.parametrize("name", sorted(MODELS))
def test_scores_are_the_models(name: str) -> None:
    scorer = scorer_of(name, 9, 11)
    users = torch.tensor([8, 0, 8])
    with torch.no_grad():
        wanted = scorer.model(users[:, None], torch.arange(11)[None])
    torch.testing.assert_close(scorer.scores(users), wanted, atol=1e-5, rtol=1e-5)


def test_memory_is_bounded_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1,000 pairs at once, 300 items leave 3 users a call: 2, the power of two below."""
    monkeypatch.setattr(scoring, "PAIRS_A_BLOCK", 1000)
    scorer, calls = scorer_of("neumf", 7, 300), []
    score_block = scorer.model.score_block

    def noting(user: tuple[Tensor, ...], item: tuple[Tensor, ...]) -> Tensor:
        calls.append((len(user[0]), len(item[0])))
        return score_block(user, item)

    monkeypatch.setattr(scorer.model, "score_block", noting)
    assert scorer.scores(torch.arange(7)).shape == (7, 300)
    assert calls == [(2, 300)] * 4


def test_no_users_no_scores() -> None:
    scores = scorer_of("neumf", 3, 5).scores(torch.arange(0))
    assert scores.shape == (0, 5)
    assert top_k(scores, 2)[1].shape == (0, 2)
