"""The top K is what a full sort gives, whatever ties there are; a rank is a place in that order; scores are the
model's, and none depends on who else is scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor, nn

from ncf_dist.config import Model
from ncf_dist.models import MF, MODELS, Embedding, Recommender, Users, build_model
from ncf_dist.scoring import Lists, ModelScorer, PopularityScorer, mask, recommend, top_k
from ncf_dist.scoring import blocks as kernel
from ncf_dist.scoring.topk import Best
from tests.far import DEVICE, Far, FarDevice
from tests.oracles import catalogue_rank

Seen = list[list[int]]
INDEXED = sorted(set(MODELS) - {"history"})
"""Models that know users by an index."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a Spark worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@given(blocks(), st.integers(0, 3))
@budget(max_examples=100, deadline=None)
def test_several_items_a_user_are_ranked_as_if_alone(block: tuple[Tensor, Seen], asked: int) -> None:
    scores, _ = block
    items = torch.randint(scores.shape[1], (len(scores), asked))
    ranks = catalogue_rank(scores, items)
    assert ranks.shape == items.shape
    for column in range(asked):
        assert torch.equal(ranks[:, column], catalogue_rank(scores, items[:, column]))


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
    scores = PopularityScorer(np.array(counts)).scores(Users(torch.arange(users)))
    assert scores.shape == (users, len(counts))
    assert scores.dtype == torch.float32
    assert top_k(scores, len(counts))[1].tolist() == [brute_force(counts, [])] * users  # type: ignore[arg-type]


def test_popularity_tells_counts_apart_that_float32_does_not() -> None:
    counts = np.array([2**24, 2**24 + 1, 2**24 + 1])
    assert np.float32(2**24) == np.float32(2**24 + 1)
    assert top_k(PopularityScorer(counts).scores(Users(torch.arange(1))), 3)[1].tolist() == [[1, 2, 0]]


def test_scores_are_the_callers_to_change() -> None:
    for scorer in (
        PopularityScorer(np.array([3, 1, 2])),
        ModelScorer(build_model(Model(name="gmf"), 2, 3), 3),
    ):
        first = scorer.scores(Users(torch.tensor([0, 0])))
        before = first.clone()
        mask(first, lists([[0, 1, 2], []]))
        assert torch.equal(scorer.scores(Users(torch.tensor([0, 0]))), before)


# ---- a model's scores -------------------------------------------------------------------------------------


def filled(model: Recommender, std: float = 0.3) -> Recommender:
    """In evaluation mode, every parameter and every statistic of batch norm large enough to be seen in a score."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model.eval()


def model_of(name: Any, n_users: int, n_items: int, factors: int = 32, **fields: Any) -> Recommender:
    config = Model(name=name, factors=factors, **{"layers": (20, 10, 6), **fields})
    return filled(build_model(config, n_users, n_items))


class Visits:
    """Sides that are functions of more than an embedding: a user's is the mean of the items of a sequence, an item's
    its embedding and that of its genre."""

    def __init__(self, visits: Tensor, item: Embedding, genre: Embedding) -> None:
        self.visits, self.item, self.genre = visits, item, genre

    def user_side(self, user: Tensor | None) -> Tensor:
        visits = self.visits if user is None else self.visits[user.to(self.visits.device)]
        return self.item_side(visits.to(self.item.weight.device)).mean(-2)

    def item_side(self, item: Tensor | None) -> Tensor:
        index = torch.arange(len(self.item.weight), device=self.item.weight.device) if item is None else item
        return self.item(index) + self.genre(index % 3)


class Histories(MF):
    """A model of another kind, that only declares its sides."""

    def __init__(self, n_users: int, n_items: int, factors: int, y_range: tuple[float, float] | None) -> None:
        super().__init__(n_users, n_items, factors, True, y_range)
        self.genre = Embedding(3, factors)
        visits = torch.arange(n_users * 5).view(n_users, 5) * 7 % n_items
        self.dot_sides = Visits(visits, self.item, self.genre)


@contextlib.contextmanager
def blocks_of(users: int, items: int, hidden: int = 8192) -> Iterator[None]:
    with mock.patch.multiple(kernel, USERS=users, ITEMS=items, HIDDEN_NUMBERS=hidden):
        yield


SHAPES: Any = st.fixed_dictionaries(
    {
        "name": st.sampled_from(INDEXED),
        "factors": st.integers(1, 9),
        "layers": st.sampled_from([(8,), (8, 4), (20, 10, 6), (64, 32, 16, 8)]),
        "biases": st.booleans(),
        "embedding_sizes": st.sampled_from([None, (1, 4), (5, 2)]),
        "batch_norm": st.booleans(),
        "y_range": st.sampled_from([None, (0.0, 5.5), (-1.0, 2.0)]),
    }
)


@given(SHAPES, st.integers(1, 20), st.integers(1, 150), st.booleans())
@budget(max_examples=100, deadline=None)
def test_scores_are_the_models(shape: dict[str, Any], n_users: int, n_items: int, hidden: bool) -> None:
    """Whatever the model's shape; towers too that have no hidden layer."""
    y_range = shape["y_range"] if shape["name"] in ("mf", "embedding_nn") else None
    layers = () if shape["name"] == "embedding_nn" and not hidden else shape["layers"]
    model = filled(build_model(Model(**{**shape, "y_range": y_range, "layers": layers}), n_users, n_items))
    users = torch.randint(n_users, (n_users + 3,))
    with torch.no_grad(), blocks_of(8, 64):
        wanted = model(users[:, None], torch.arange(n_items)[None])
        torch.testing.assert_close(ModelScorer(model, n_items).scores(Users(users)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("y_range", [None, (0.0, 5.5)])
def test_a_model_is_scored_through_the_sides_that_it_declares(y_range: tuple[float, float] | None) -> None:
    model = filled(Histories(300, 1500, 4, y_range))
    users = torch.arange(300).flip(0)
    with torch.no_grad():
        wanted = model(users[:, None], torch.arange(1500)[None])
    torch.testing.assert_close(ModelScorer(model, 1500).scores(Users(users)), wanted, atol=1e-5, rtol=1e-5)


def test_no_users_no_scores() -> None:
    scorer = ModelScorer(model_of("neumf", 3, 5), 5)
    scores = scorer.scores(Users(torch.arange(0)))
    assert scores.shape == (0, 5)
    assert top_k(scores, 2)[1].shape == (0, 2)
    assert recommend(scorer, Users(torch.arange(0)), lists([]), 2)[1].shape == (0, 2)


def test_hidden_layers_are_bounded_whatever_the_catalogue() -> None:
    """2,048 numbers a layer hold 4 users × 64 items × 8 units; 200 units leave the 2 users that there must be."""
    with blocks_of(32, 64, 2048):
        for layers, shapes in {
            (8, 8, 4): [(8, 4, 64), (4, 4, 64)],
            (8, 200, 4): [(200, 2, 64), (4, 2, 64)],
        }.items():
            for n_items in (10, 1000):
                block = ModelScorer(model_of("mlp", 3, n_items, layers=layers), n_items).block
                assert [tuple(v.shape) for v in block.hidden] == shapes
                assert block.out.shape == (32, 64)


def test_bf16_rounds_factors_and_leaves_other_products_alone() -> None:
    """Eight bits of precision a factor: an error of at most 2^-7 of the sum of the terms' sizes, were there no luck."""
    model = model_of("mf", 50, 2000, 64)
    users, items = torch.arange(50), torch.arange(2000)
    exact = ModelScorer(model, 2000).scores(Users(users))
    rounded = ModelScorer(model, 2000, precision="bf16").scores(Users(users))
    with torch.no_grad():
        user, item = model.user_side(users).dot, model.item_side(items).dot
        assert user is not None
        assert item is not None
        sizes = user.abs() @ item.abs().T
    assert ((rounded - exact).abs() <= 2**-7 * sizes + 1e-6).all()
    assert torch.equal(ModelScorer(model, 2000).scores(Users(users)), exact)


# ---- recommend ---------------------------------------------------------------------------------------------


@st.composite
def small_catalogues(draw: st.DrawFn) -> tuple[Tensor, Tensor, Seen, list[int] | None, int]:
    """Factors of whole numbers (U, 2), (I, 2), so that scores are exact and most of them tie; what each user has seen,
    up to everything; the eligible items or None; K.
    """
    users, items = draw(st.integers(1, 9)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    seen = [np.flatnonzero(rng.random(items) < share).tolist() for _ in range(users)]
    eligible = np.flatnonzero(rng.random(items) < draw(st.sampled_from([0.0, 0.3, 1.0]))).tolist()
    widest = draw(st.integers(0, 3))
    factors = (torch.from_numpy(rng.integers(-widest, widest + 1, (n, 2)).astype(np.float32)) for n in (users, items))
    return *factors, seen, draw(st.sampled_from([None, eligible])), draw(st.integers(1, 40))


def scorer_of_factors(user: Tensor, item: Tensor, eligible: list[int] | None = None) -> ModelScorer:
    model = MF(len(user), len(item), user.shape[1], biases=False)
    with torch.no_grad():
        model.user.weight.copy_(user)
        model.item.weight.copy_(item)
    return ModelScorer(model, len(item), eligible=None if eligible is None else torch.tensor(eligible).long())


@given(small_catalogues(), st.sampled_from([2, 4, 256]), st.sampled_from([16, 32, 64, 1024]))
@budget(max_examples=200, deadline=None)
def test_recommend_is_the_head_of_a_full_sort(
    case: tuple[Tensor, Tensor, Seen, list[int] | None, int], users_a_block: int, items_a_block: int
) -> None:
    """Whatever the ties, whatever was seen, whatever is eligible, in blocks of any shape."""
    user, item, seen, eligible, k = case
    wanted_scores = (user @ item.T).tolist()
    left_out = set() if eligible is None else set(range(len(item))) - set(eligible)
    with blocks_of(users_a_block, items_a_block):
        values, items = recommend(
            scorer_of_factors(user, item, eligible), Users(torch.arange(len(user))), lists(seen), k
        )
    assert values.shape == items.shape == (len(user), min(k, len(item)))
    for row, scores in enumerate(wanted_scores):
        wanted = brute_force(scores, [*seen[row], *left_out])[:k]
        none = [-1] * (values.shape[1] - len(wanted))
        assert items[row].tolist() == wanted + none
        assert values[row].tolist() == [scores[i] for i in wanted] + [-np.inf for _ in none]


def random_lists(users: int, items: int, most: int = 200) -> Seen:
    rng = np.random.default_rng(2)
    return [rng.permutation(items)[: rng.integers(0, min(most, items))].tolist() for _ in range(users)]


@pytest.mark.parametrize("k", [1, 10, 2000])
@pytest.mark.parametrize("name", INDEXED)
def test_recommend_is_top_k_of_the_masked_scores(name: str, k: int) -> None:
    scorer, seen = ModelScorer(model_of(name, 300, 2100), 2100), lists(random_lists(300, 2100))
    users = torch.arange(300)
    values, items = recommend(scorer, Users(users), seen, k)
    best, index = top_k(mask(scorer.scores(Users(users)), seen), k)
    assert torch.equal(values, best)
    assert torch.equal(items, index.masked_fill(best == -torch.inf, -1))


def test_recommend_ranks_any_scorer() -> None:
    """Item 1 is the most popular; user 1 has seen all but item 0."""
    values, items = recommend(PopularityScorer(np.array([3, 9, 3])), Users(torch.arange(2)), lists([[], [2, 1]]), 5)
    assert items.tolist() == [[1, 0, 2], [0, -1, -1]]
    assert values.tolist() == [[1.0, 0.0, 0.0], [0.0, -np.inf, -np.inf]]


def test_a_seen_item_does_not_raise_the_bar() -> None:
    """All the best items of the first block are seen: those of lower score must still be found."""
    item = torch.arange(3000.0).flip(0)[:, None]
    values, items = recommend(
        scorer_of_factors(torch.ones(1, 1), item), Users(torch.arange(1)), lists([list(range(2500))]), 3
    )
    assert items.tolist() == [[2500, 2501, 2502]]
    assert values.tolist() == [[499.0, 498.0, 497.0]]


@pytest.mark.parametrize("order", ["falling", "rising", "equal"])
def test_what_is_kept_does_not_grow_with_the_catalogue(order: str) -> None:
    """Rising scores: everything is the best so far. Equal ones: everything ties with the best."""
    places = torch.arange(50 * 64.0)
    score = {"falling": -places, "rising": places, "equal": torch.zeros(len(places))}[order]
    with blocks_of(4, 64):
        best, kept = Best(4, 5, 64), 0
        for number, part in enumerate(score.split(64)):
            best.add(number * 64, part.expand(4, 64).contiguous())
            kept = max(kept, best.count)
    values, found = best.result()
    wanted = torch.arange(5) if order != "rising" else len(places) - 1 - torch.arange(5)
    assert torch.equal(found, wanted.expand(4, 5))
    assert torch.equal(values, score[wanted].expand(4, 5))
    assert kept <= 8 * 4 * 5


@pytest.mark.parametrize("eligible", [[3, 1], [1, 1], [-1, 2], [2, 9]])
def test_eligible_items_must_be_ascending_ones_of_the_catalogue(eligible: list[int]) -> None:
    with pytest.raises(ValueError, match="needed ascending indexes from 0 to 8"):
        ModelScorer(model_of("mf", 2, 9), 9, eligible=torch.tensor(eligible))


@pytest.mark.parametrize("name", INDEXED)
def test_what_is_not_eligible_scores_lowest_and_the_others_keep_their_bits(name: str) -> None:
    model, users = model_of(name, 50, 5000), torch.arange(50)
    eligible = torch.from_numpy(np.flatnonzero(np.random.default_rng(3).random(5000) < 0.4))
    every, some = (
        ModelScorer(model, 5000).scores(Users(users)),
        ModelScorer(model, 5000, eligible=eligible).scores(Users(users)),
    )
    assert torch.equal(some[:, eligible], every[:, eligible])
    others = torch.ones(5000, dtype=torch.bool)
    others[eligible] = False
    assert (some[:, others] == -torch.inf).all()


# ---- independence of blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", INDEXED)
def test_a_score_does_not_depend_on_the_call(name: str, precision: Literal["fp32", "bf16"]) -> None:
    """The same bits alone, in any company and in any place: a matrix product of 1, 3 or 17 rows rounds
    differently, and the published bytes would change with the number of Spark tasks.
    """
    n_users, n_items = 520, 1100
    scorer = ModelScorer(model_of(name, n_users, n_items), n_items, precision=precision)
    together = scorer.scores(Users(torch.arange(n_users)))
    shuffled = torch.from_numpy(np.random.default_rng(1).permutation(n_users))
    for size in (1, 2, 7, 512):
        some = shuffled[:size]
        assert torch.equal(scorer.scores(Users(some)), together[some]), size


@pytest.mark.parametrize("name", INDEXED)
def test_a_recommendation_does_not_depend_on_the_call(name: str) -> None:
    n_users, n_items = 520, 1100
    scorer, seen = ModelScorer(model_of(name, n_users, n_items), n_items), random_lists(n_users, n_items)
    values, items = recommend(scorer, Users(torch.arange(n_users)), lists(seen), 10)
    for size in (1, 2, 7, 512):
        for start in (0, 512) if size == 512 else (0, 255, 256, 519):
            users = torch.arange(n_users)[start : start + size]
            some = recommend(scorer, Users(users), lists([seen[u] for u in users]), 10)
            assert torch.equal(some[0], values[users]), (size, start)
            assert torch.equal(some[1], items[users]), (size, start)


# ---- another device ----------------------------------------------------------------------------------------


def test_the_device_that_is_not_there_refuses_what_a_gpu_refuses() -> None:
    with FarDevice():
        far = torch.ones(3, device=DEVICE) + torch.arange(3, device=DEVICE)
        assert far.device == DEVICE
        assert far.cpu().tolist() == [1, 2, 3]
        with pytest.raises(RuntimeError, match="numpy.. is not supported"):
            far.numpy()
        with pytest.raises(AssertionError, match="mixes devices"):
            far + torch.ones(3)


@pytest.mark.parametrize("name", ["mf", "neumf", "histories"])
@pytest.mark.parametrize("listed", [False, True])
def test_scoring_keeps_to_the_models_device(name: str, listed: bool) -> None:
    """With item lists too: nothing is taken for a tensor of the CPU. Users may come from either."""
    n_users, n_items = 12, 90
    model = filled(Histories(n_users, n_items, 4, None)) if name == "histories" else model_of(name, n_users, n_items)
    model.requires_grad_(False)
    seen, users = lists(random_lists(n_users, n_items, 60)), torch.arange(n_users)
    eligible = torch.from_numpy(np.flatnonzero(np.random.default_rng(3).random(n_items) < 0.4)) if listed else None
    with blocks_of(4, 16):
        wanted = recommend(ModelScorer(model, n_items, eligible=eligible), Users(users), seen, 10)
        with FarDevice():
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    module._parameters[key] = (
                        nn.Parameter(Far(parameter.data), False) if parameter is not None else None
                    )
            ours = [None, eligible] if eligible is None else [eligible, eligible.to(DEVICE)]
            for items in ours:
                scorer = ModelScorer(model, n_items, eligible=items)
                assert scorer.scores(Users(users.to(DEVICE))).device == DEVICE
                assert scorer.of(Users(users[:4].to(DEVICE)), torch.arange(20)).device == DEVICE
                for some in (users, users.to(DEVICE)):
                    values, found = recommend(scorer, Users(some), seen, 10)
                    assert values.device == found.device == some.device
                    assert torch.equal(found.cpu(), wanted[1])
                    assert torch.equal(values.cpu(), wanted[0])


def test_popularity_and_ranks_keep_to_the_users_device() -> None:
    with FarDevice():
        users = torch.arange(2).to(DEVICE)
        scorer = PopularityScorer(np.array([3, 9, 3]))
        assert recommend(scorer, Users(users), lists([[], [2, 1]]), 5)[1].cpu().tolist() == [[1, 0, 2], [0, -1, -1]]
        assert catalogue_rank(scorer.scores(Users(users)), torch.tensor([0, 2]).to(DEVICE)).cpu().tolist() == [2, 3]
