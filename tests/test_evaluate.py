"""evaluate's parts on their own: ranks of a block, sums of a file, the bootstrap, segments, histograms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist import products
from ncf_dist.config import Model
from ncf_dist.contracts import INDEX_LIST, RANKS
from ncf_dist.evaluate import segments
from ncf_dist.evaluate.baselines import DotScorer
from ncf_dist.evaluate.bootstrap import interval, p_value, poisson_weights
from ncf_dist.evaluate.histogram import BINS, Histogram, on_common_bins
from ncf_dist.evaluate.lists import list_metrics, train_counts
from ncf_dist.evaluate.periods import UNITS
from ncf_dist.evaluate.ranks import Judged, Score, blocks, model_scores, popularity_scores, rank_users
from ncf_dist.evaluate.segments import KINDS, PopularityDeciles, codes_of, name_of
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.evaluate.summary import by_segment, comparisons, flat_metrics, of_scorer
from ncf_dist.evaluate.sums import Ranks, file_sums, read_ranks, sum_up, with_other
from ncf_dist.models import MF, Users, build_model
from ncf_dist.parquet import write_parquet
from ncf_dist.scoring import ModelScorer, PopularityScorer, Scores, by_item, mask, top_k
from ncf_dist.scoring import blocks as kernel
from tests.oracles import catalogue_rank


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a Spark worker."""
    with products.one_thread():
        yield


# ---- ranks of a block --------------------------------------------------------------------------------------

HELD_OUT = pa.list_(
    pa.struct(
        [("item_idx", pa.int32()), ("rating", pa.float32()), ("timestamp", pa.int64()), ("candidates", INDEX_LIST)]
    )
)


@st.composite
def cases(draw: st.DrawFn, most_items: int = 9) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Scores out of three values, so that most tie; each user's seen items, held-out items (at least one, none of them
    seen) and candidates of each held-out item."""
    n_users, n_items = draw(st.integers(1, 4)), draw(st.integers(2, most_items))
    row = st.lists(st.sampled_from([-1.0, 0.0, 2.5]), min_size=n_items, max_size=n_items)
    scores = draw(st.lists(row, min_size=n_users, max_size=n_users))
    users = []
    for _ in range(n_users):
        held = draw(st.sets(st.integers(0, n_items - 1), min_size=1))
        others = sorted(set(range(n_items)) - held)
        some = st.sets(st.sampled_from(others)) if others else st.just(set())
        users.append({"seen": sorted(draw(some)), "held": {item: sorted(draw(some)) for item in sorted(held)}})
    return scores, users


def users_of(users: list[dict[str, Any]]) -> Judged:
    held_out = [
        [{"item_idx": item, "rating": 4.0, "timestamp": item + 10, "candidates": c} for item, c in user["held"].items()]
        for user in users
    ]
    table = pa.table(
        {
            "user_idx": pa.array(range(5, 5 + len(users)), pa.int32()),
            "seen": pa.array([user["seen"] for user in users], INDEX_LIST),
            "held_out": pa.array(held_out, HELD_OUT),
        }
    )
    return Judged.of(table)


def dense(scores: torch.Tensor) -> Score:
    """A scorer with all its scores (U, I) given."""
    return lambda users: by_item(scores.shape[1], lambda items: scores[:, items])


@given(cases(), st.integers(1, 10))
@budget(max_examples=150, deadline=None)
def test_ranks_are_those_of_a_full_sort(case: tuple[list[list[float]], list[dict[str, Any]]], longest: int) -> None:
    """Every held-out item among all unseen items, ties by item_idx; among its candidates by counting."""
    scores, users = case
    table = rank_users("any", dense(torch.tensor(scores)), users_of(users), longest)
    assert table.schema.equals(RANKS.schema)
    for number, (row, own, user) in enumerate(zip(table.to_pylist(), scores, users, strict=True)):
        order = sorted(set(range(len(own))) - set(user["seen"]), key=lambda item: (-own[item], item))
        held = user["held"]
        assert (row["user_idx"], row["scorer"], row["seen_items"]) == (5 + number, "any", len(user["seen"]))
        assert row["item_idx"] == list(held)
        assert row["timestamp"] == [item + 10 for item in held]
        assert (row["rating"], row["score"]) == ([4.0] * len(held), [own[item] for item in held])
        assert row["full_rank"] == [1 + order.index(item) for item in held]
        assert row["top"] == order[:longest]
        assert row["candidates"] == [len(c) for c in held.values()]
        assert row["greater"] == [sum(own[c] > own[item] for c in cs) for item, cs in held.items()]
        assert row["equal"] == [sum(own[c] == own[item] for c in cs) for item, cs in held.items()]


def whole_ranks(name: str, scores: torch.Tensor, users: Judged, longest: int) -> tuple[dict[str, Any], list[Any]]:
    """What `rank_users` says, from all scores (U, I) at once: columns as lists, and histograms."""
    held, among = users.held, users.candidates
    row, item = torch.from_numpy(held.row), torch.from_numpy(held.values)
    own = scores[row, item]
    theirs = scores[row[torch.from_numpy(among.row)], torch.from_numpy(among.values)]
    of = own[torch.from_numpy(among.row)]
    greater, equal = (np.bincount(among.row, weights=w, minlength=len(own)) for w in (theirs > of, theirs == of))
    scores = mask(scores.clone(), users.seen)
    values, top = top_k(scores, longest)
    histograms = [Histogram(), Histogram(), Histogram()]
    for histogram, counted in zip(histograms, (scores.ravel(), own, values[:, 0]), strict=True):
        histogram.add(counted.numpy())
    flat = {
        "score": own.tolist(),
        "full_rank": catalogue_rank(scores[row], item).tolist(),
        "greater": greater.tolist(),
        "equal": equal.tolist(),
        "top": [t[torch.isfinite(v)].tolist() for v, t in zip(values, top, strict=True)],
    }
    return flat, [histogram.as_json() for histogram in histograms]


@given(cases(most_items=60), st.integers(1, 10), st.sampled_from(["ties", "model"]))
@budget(max_examples=100, deadline=None)
def test_a_pass_over_blocks_gives_what_all_scores_at_once_give(
    case: tuple[list[list[float]], list[dict[str, Any]]], longest: int, kind: str
) -> None:
    """To the bit, histograms too: whatever ties, whatever was seen, several held-out items and candidates a user."""
    given, rows = case
    users, n_items = users_of(rows), len(given[0])
    with mock.patch.multiple(kernel, USERS=4, ITEMS=16, HIDDEN_NUMBERS=1024):
        if kind == "ties":
            every, score = torch.tensor(given), dense(torch.tensor(given))
        else:
            scorer = ModelScorer(build_model(Model(name="neumf", factors=3, layers=(4, 2)), 9, n_items), n_items)
            every, score = scorer.scores(users.users), model_scores(scorer)
        histograms = {"all": Histogram(), "held_out": Histogram(), "first": Histogram()}
        table = rank_users("model", score, users, longest, histograms)
    flat, counted = whole_ranks("model", every, users, longest)
    for name in ("score", "full_rank", "greater", "equal"):
        assert table.column(name).combine_chunks().flatten().to_pylist() == flat[name], name
    assert table.column("top").to_pylist() == flat["top"]
    assert [histogram.as_json() for histogram in histograms.values()] == counted


def test_a_held_out_item_that_was_seen_comes_last_as_it_did() -> None:
    """prepare never makes one; if it did, its rank would not be that of a hit."""
    users = users_of([{"seen": [2], "held": {2: [0]}}])
    scores = torch.tensor([[1.0, 2.0, 9.0, 0.0]])
    (row,) = rank_users("any", dense(scores), users, 4).to_pylist()
    flat, _ = whole_ranks("any", scores, users, 4)
    assert (row["score"], row["full_rank"], row["top"]) == (flat["score"], flat["full_rank"], flat["top"][0])


def test_scores_that_are_not_numbers_are_refused_wherever_they_are() -> None:
    users = users_of([{"seen": [], "held": {1: []}}])
    for odd in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scores that are not finite"):
            rank_users("model", dense(torch.tensor([[0.0, 1.0, odd]])), users, 1)


def test_a_million_items_are_ranked_within_a_few_blocks() -> None:
    """64 users x 1,000,000 items would be 256 MB at once, of scores alone; the figures are those of a full sort."""
    n_items, rng = 1_000_000, np.random.default_rng(1)
    seen = [sorted(set(rng.integers(0, n_items // 2, 20).tolist())) for _ in range(64)]
    rows = [
        {"seen": seen[user], "held": {n_items - 1 - user: rng.integers(0, n_items, 5).tolist()}} for user in range(64)
    ]
    users = replace(users_of(rows), users=Users(torch.arange(64)))
    falling = torch.arange(n_items).flip(0).float()
    als, factors = DotScorer(torch.stack([falling, falling], 1)), torch.ones(64, 2)
    popular = PopularityScorer(np.arange(n_items)[::-1])
    scorers: dict[str, Score] = {
        "model": model_scores(ModelScorer(MF(64, n_items, 2, biases=False), n_items)),
        "popularity": lambda block: popularity_scores(popular, len(block.users)),
        "als": lambda block: by_item(n_items, partial(als.of, factors)),
    }
    most = 0

    def watched(score: Score) -> Score:
        def blocks(scores: Scores) -> Iterator[torch.Tensor]:
            nonlocal most
            for block in scores.blocks():
                yield block
                most = max(most, psutil.Process().memory_info().rss)

        return lambda block: replace(score(block), blocks=partial(blocks, score(block)))

    before = psutil.Process().memory_info().rss
    for name, score in scorers.items():
        table = rank_users(name, watched(score), users, 10)
        if name != "model":
            wanted = [[n_items - user - len(items)] for user, items in enumerate(seen)]
            assert table.column("full_rank").to_pylist() == wanted
    assert 0 < most < before + 64 * 2**20


def test_what_was_seen_is_not_in_the_way() -> None:
    """Item 3 is beaten by 0, 1 and 2; the user has seen 0 and 1."""
    users = users_of([{"seen": [0, 1], "held": {3: [2]}}])
    (row,) = rank_users("any", dense(torch.tensor([[9.0, 8.0, 7.0, 6.0]])), users, 4).to_pylist()
    assert (row["full_rank"], row["top"]) == ([2], [2, 3])


def test_a_score_that_is_not_a_number_is_refused() -> None:
    """Nothing is greater than NaN: the held-out item would be first."""
    users = users_of([{"seen": [], "held": {1: []}}])
    with pytest.raises(ValueError, match="model gives held-out items scores that are not finite"):
        rank_users("model", dense(torch.tensor([[0.0, float("nan")]])), users, 1)


def test_histograms_count_unseen_held_out_and_first() -> None:
    users = users_of([{"seen": [0], "held": {1: []}}, {"seen": [], "held": {0: []}}])
    histograms = {"all": Histogram(), "held_out": Histogram(), "first": Histogram()}
    scores = torch.tensor([[9.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    rank_users("model", dense(scores), users, 2, histograms)
    total = {name: sum(histogram.counts.values()) for name, histogram in histograms.items()}
    assert total == {"all": 5, "held_out": 2, "first": 2}
    values = on_common_bins(histograms, 64)
    assert values["edges"][0] <= 1.0
    assert values["edges"][-1] > 5.0
    assert values["first"][-1] == 1  # 5.0, the second user's best; the 9.0 of the first has been seen.


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60).map(sorted), st.integers(1, 7), st.integers(1, 9))
@budget(deadline=None)
def test_blocks_do_not_depend_on_batches(files: list[int], size: int, batch_rows: int) -> None:
    table = pa.table({"_file": pa.array(files, pa.int64()), "row": pa.array(range(len(files)))})
    whole, cut = (
        [(file, block.column("row").to_pylist()) for file, block in blocks(table.to_batches(rows), size)]
        for rows in (None, batch_rows)
    )
    assert cut == whole
    assert [row for _, rows in whole for row in rows] == list(range(len(files)))
    assert all(len(rows) <= size and {files[row] for row in rows} == {file} for file, rows in whole)


# ---- the bootstrap -----------------------------------------------------------------------------------------


def test_weights_are_poisson() -> None:
    """P(w) = e⁻¹ / w!; 400,000 draws: three standard errors."""
    weights = poisson_weights(1, np.arange(400), 1000)
    assert weights.shape == (1000, 400)
    assert weights.mean() == pytest.approx(1, abs=3 / 400_000**0.5)
    assert weights.var() == pytest.approx(1, abs=3 * 3**0.5 / 400_000**0.5)
    factorial = 1.0
    for w in range(6):
        factorial *= max(1, w)
        share = np.exp(-1) / factorial
        assert (weights == w).mean() == pytest.approx(share, abs=3 * (share / 400_000) ** 0.5)


def test_weights_of_users_and_replicates_are_independent() -> None:
    weights = poisson_weights(1, np.arange(200), 1000)
    between_users = np.corrcoef(weights.T) - np.eye(200)
    assert np.abs(between_users).max() < 5 / 1000**0.5
    between_replicates = np.corrcoef(poisson_weights(1, np.arange(1000), 200)) - np.eye(200)
    assert np.abs(between_replicates).max() < 5 / 1000**0.5


def test_a_weight_depends_on_the_user_alone() -> None:
    users = np.array([7, 3, 2**31 - 1])
    together = poisson_weights(1, users, 50)
    for place, user in enumerate(users):
        assert poisson_weights(1, np.array([user]), 50)[:, 0].tolist() == together[:, place].tolist()
    assert (poisson_weights(2, users, 50) != together).any()


def replicated(columns: np.ndarray, seed: int, replicates: int = 999) -> np.ndarray:
    """(B, M) bootstrap means of columns (U, M)."""
    weights = poisson_weights(seed, np.arange(len(columns)), replicates)
    return (weights @ columns) / weights.sum(1, keepdims=True)


def test_intervals_are_as_wide_as_theory_says() -> None:
    """Of a mean of 500 users with standard deviation 1: ± 1.96 / √500, the mean within."""
    draws = np.random.default_rng(1).normal(3, 1, (500, 40))
    draws = (draws - draws.mean(0)) / draws.std(0) + 3
    for column in replicated(draws, 1).T:
        low, high = interval(column) or (0, 0)
        assert low < 3 < high
        assert high - low == pytest.approx(2 * 1.96 / 500**0.5, rel=0.15)


def test_p_is_uniform_where_there_is_no_difference() -> None:
    """400 pairs of scorers that hit at random with the same chance: p is below 5 %, 20 %, 50 % and 80 % about so often.
    The bound is four standard errors of a share of 400."""
    rng = np.random.default_rng(2)
    pairs = rng.random((300, 400)) ** 2 - rng.random((300, 400)) ** 2
    p = np.array([p_value(column) for column in replicated(pairs, 3).T])
    for level in (0.05, 0.2, 0.5, 0.8):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / 400) ** 0.5)


def test_a_planted_difference_is_found() -> None:
    """0.1 standard deviations between two scorers of 3,000 users whose own spread is ten times that of the difference:
    only a paired test sees it."""
    rng = np.random.default_rng(4)
    skill = rng.normal(0, 1, 3000)
    better, worse = skill + rng.normal(0.01, 0.1, 3000), skill + rng.normal(0, 0.1, 3000)
    difference = replicated((better - worse)[:, None], 1)[:, 0]
    low, high = interval(difference) or (0, 0)
    assert 0 < low < high
    assert (p_value(difference) or 1) < 0.01
    apart = replicated(np.column_stack([better, worse]), 1)
    assert interval(apart[:, 0])[0] < interval(apart[:, 1])[1]  # type: ignore[index]


def test_p_by_hand() -> None:
    """9 replicates, one of them not above 0: 2 (1 + 1) / (9 + 1)."""
    assert p_value(np.array([-1.0, *[1.0] * 8])) == 2 * (1 + 1) / (9 + 1)
    assert p_value(np.zeros(9)) == 1
    assert p_value(np.array([])) is None
    assert interval(np.array([])) is None


# ---- sums of a file ----------------------------------------------------------------------------------------

JUNE, JULY = 1_750_000_000_000_000, 1_752_000_000_000_000
COUNTS = np.array([50, 30, 10, 5, 3, 1, 1, 0])


def ranks_table(scorer: str, users: int, several: bool, seed: int = 1) -> pa.Table:
    """Users with one or up to three held-out items, ranked at random."""
    rng = np.random.default_rng(seed)
    held = [sorted(rng.permutation(len(COUNTS))[: 1 + several * (user % 3)].tolist()) for user in range(users)]
    rank = np.random.default_rng(abs(hash(scorer)) % 2**32 if scorer != "model" else seed)
    rows = [
        {
            "user_idx": user * 3,
            "scorer": scorer,
            "seen_items": (user * 7) % 600,
            "item_idx": items,
            "timestamp": [JUNE if item % 2 else JULY for item in items],
            "rating": [float(item % 5 + 1) for item in items],
            "score": [float(item % 4) for item in items],
            "full_rank": (rank.permutation(30)[: len(items)] + 1).tolist(),
            "candidates": [20] * len(items),
            "greater": rank.integers(0, 10, len(items)).tolist(),
            "equal": rank.integers(0, 10, len(items)).tolist(),
            "top": rank.permutation(len(COUNTS))[:5].tolist(),
        }
        for user, items in enumerate(held)
    ]
    return pa.Table.from_pylist(rows, schema=RANKS.schema)


def spec_of(**changes: Any) -> FiguresPass:
    deciles = PopularityDeciles.of(*np.unique(COUNTS, return_counts=True))
    found: dict[str, Any] = {
        "files": (), "stats_files": (), "deciles": deciles, "ks": (5, 10), "lead_k": 10, "explicit": False,
        "segments": (*KINDS, *UNITS[:-1]), "seed": 1, "replicates": 20,
    }  # fmt: skip
    return FiguresPass(**{**found, **changes})


@pytest.mark.parametrize("several", [False, True])
def test_segments_leave_nobody_out(several: bool) -> None:
    """Every held-out item is in exactly one segment of a kind: with one a user, the users add up, and the mean over
    segments weighed by users is the mean over all."""
    ranks = Ranks.of(ranks_table("model", 200, several))
    sums = file_sums({"model": ranks}, COUNTS, spec_of())
    kinds = (*KINDS, *UNITS[:-1])
    report = by_segment(sums, kinds, spec_of().deciles)
    assert list(report) == list(kinds)
    for kind, rows in report.items():
        users = sum(row["users"] for row in rows)
        if kind == "activity" or not several:
            assert users == 200
            for metric in ("hr@10", "ndcg@10"):
                mean = sum(row["users"] * row["full"][metric] for row in rows) / users
                assert mean == pytest.approx(of_scorer(sums, "model")["full"][metric])
        else:
            pairs = {
                (user, code)
                for user, code in zip(
                    np.repeat(ranks.user, np.diff(ranks.offsets)).tolist(),
                    segments.codes_of(
                        kind,
                        np.zeros(len(ranks.flat["item_idx"]), dtype=np.int64),
                        COUNTS[ranks.flat["item_idx"].astype(np.int64)],
                        ranks.flat["timestamp"].astype(np.int64),
                        spec_of().deciles,
                    ).tolist(),
                    strict=True,
                )
            }
            assert users == len(pairs) > 200


def test_a_segment_by_hand() -> None:
    """One user, items 0 (rank 3, July) and 1 (rank 12, June) and 2 (rank 7, July): July's HR@10 is 1, June's 0."""
    table = ranks_table("model", 1, False).to_pylist()[0]
    table |= {"item_idx": [0, 1, 2], "timestamp": [JULY, JUNE, JULY], "full_rank": [3, 12, 7]}
    table |= {name: [1, 1, 1] for name in ("rating", "score", "candidates", "greater", "equal")}
    ranks = Ranks.of(pa.Table.from_pylist([table], schema=RANKS.schema))
    months = by_segment(file_sums({"model": ranks}, COUNTS, spec_of()), ("month",), spec_of().deciles)["month"]
    assert [row["name"] for row in months] == ["2025-06", "2025-07"]
    assert [row["users"] for row in months] == [1, 1]
    assert [row["full"]["hr@10"] for row in months] == [0, 1]
    wanted = (1 / np.log2(4) + 1 / np.log2(8)) / (1 / np.log2(2) + 1 / np.log2(3))
    assert [row["full"]["ndcg@10"] for row in months] == pytest.approx([0, wanted])


def test_replicates_are_weighted_sums_and_the_first_is_plain() -> None:
    ranks = Ranks.of(ranks_table("model", 50, True))
    sums = file_sums({"model": ranks}, COUNTS, spec_of())
    hits = (np.minimum.reduceat(ranks.flat["full_rank"], ranks.offsets[:-1]) <= 10).astype(float)
    found = sums["model/full/hr@10"]
    assert found[0] == hits.sum()
    assert found[1:].tolist() == pytest.approx((poisson_weights(1, ranks.user, 20) @ hits).tolist())
    assert sums["model/full/n"][0] == 50
    assert all(len(values) == 1 for values in file_sums({"model": ranks}, COUNTS, spec_of(replicates=0)).values())


def test_ratings_are_of_the_model_alone() -> None:
    """MSE over held-out rows, not over users."""
    tables = {name: ranks_table(name, 40, True) for name in ("model", "popularity")}
    ranks = {name: Ranks.of(table, rated=name == "model") for name, table in tables.items()}
    sums = file_sums(ranks, COUNTS, spec_of(explicit=True))
    error = ranks["model"].flat["score"] - ranks["model"].flat["rating"]
    assert of_scorer(sums, "model")["rating"] == pytest.approx(
        {"mse": (error**2).mean(), "rmse": (error**2).mean() ** 0.5, "mae": np.abs(error).mean()}
    )
    low, high = of_scorer(sums, "model")["intervals"]["rating"]["mse"]
    assert low < (error**2).mean() < high
    assert "rating" not in of_scorer(sums, "popularity")


def test_comparisons_are_paired() -> None:
    """The model against itself is no difference, in every replicate; against another they are its means' difference."""
    ranks = {name: Ranks.of(ranks_table("model", 60, False)) for name in ("model", "twin")}
    ranks["other"] = Ranks.of(ranks_table("popularity", 60, False))
    sums = file_sums(ranks, COUNTS, spec_of())
    found = comparisons(sums, ["twin", "other"])
    for row in found:
        if row["with"] == "twin":
            assert (row["difference"], row["interval"], row["p"]) == (0, [0, 0], 1)
            continue
        mine, theirs = (of_scorer(sums, name)[row["protocol"]][row["metric"]] for name in ("model", "other"))
        assert row["difference"] == pytest.approx(mine - theirs)
    assert {(row["protocol"], row["metric"]) for row in found} >= {("full", "hr@10"), ("candidates", "auc")}


def test_scorers_of_a_file_must_have_ranked_the_same_users() -> None:
    ranks = {"model": Ranks.of(ranks_table("model", 9, False)), "other": Ranks.of(ranks_table("model", 8, False))}
    with pytest.raises(ValueError, match="other ranked 8 users, others 9"):
        file_sums(ranks, COUNTS, spec_of())


def test_flat_names() -> None:
    report = {"full": {"hr@10": 1.0}, "lists": {"gini@10": 0.5}, "baselines": {"ease": {"candidates": {"auc": 0.7}}}}
    assert flat_metrics(report) == {"full.hr@10": 1.0, "lists.gini@10": 0.5, "ease.candidates.auc": 0.7}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[FiguresPass, str]:
    """Five files of ranks of two scorers, and the item statistics."""
    folder, table = tmp_path_factory.mktemp("ranks"), {}
    for scorer in ("model", "popularity"):
        table[scorer] = ranks_table(scorer, 100, True)
    files = []
    for number in range(5):
        rows = pa.concat_tables([table[scorer].slice(number * 20, 20) for scorer in table])
        path = f"{folder}/{write_parquet(rows, str(folder), f'part-{number}.parquet').path}"
        files.append(tuple((scorer, scorer, path) for scorer in table))
    stats = pa.table({"item_idx": pa.array(range(len(COUNTS)), pa.int32()), "train_count": pa.array(COUNTS)})
    path = f"{folder}/{write_parquet(stats, str(folder), 'stats.parquet').path}"
    return spec_of(files=tuple(files), stats_files=(path,)), path


def test_sums_have_the_same_bits_with_any_number_of_partitions(
    spark: SparkSession, stored: tuple[FiguresPass, str]
) -> None:
    spec, _ = stored
    one, four = (sum_up(spark, spec, partitions) for partitions in (1, 4))
    assert {name: sums.tobytes() for name, sums in one.items()} == {n: sums.tobytes() for n, sums in four.items()}
    parts = [file_sums(read_ranks(file), COUNTS, spec) for file in spec.files]
    for name, sums in one.items():
        wanted = np.sum([part[name] for part in parts if name in part], axis=0)
        assert sums.tolist() == pytest.approx(wanted.tolist()), name
    assert one["model/full/n"][0] == one["popularity/full/n"][0] == 100


def test_another_run_is_one_more_scorer(spark: SparkSession, stored: tuple[FiguresPass, str]) -> None:
    spec, _ = stored
    paths = [file[0][2] for file in spec.files]
    sums = sum_up(spark, with_other(spec, "neumf-1", paths), 2)
    assert sums["neumf-1/full/mrr"].tobytes() == sums["model/full/mrr"].tobytes()
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        with_other(spec, "neumf-1", paths[:-1])


def test_lists_of_all_users(spark: SparkSession, stored: tuple[FiguresPass, str]) -> None:
    """Coverage, novelty, Gini and popularity bias against counting in NumPy."""
    spec, stats = stored
    ranks = spark.read.parquet(*[file[0][2] for file in spec.files])
    frame = spark.read.parquet(stats)
    popularity = np.unique(train_counts([stats]), return_counts=True)
    assert popularity[0].tolist() == [0, 1, 3, 5, 10, 30, 50]
    assert popularity[1].tolist() == [1, 2, 1, 1, 1, 1, 1]
    found = list_metrics(ranks, frame, (2, 5), popularity)
    for scorer, k in (("model", 2), ("model", 5), ("popularity", 2)):
        shown = np.bincount(
            [item for top in ranks_table(scorer, 100, True).column("top").to_pylist() for item in top[:k]],
            minlength=len(COUNTS),
        )
        assert shown.sum() == 100 * k
        assert found[scorer][f"coverage@{k}"] == (shown > 0).mean()
        bits = -np.log2(np.maximum(COUNTS, 1) / COUNTS.sum())
        assert found[scorer][f"novelty@{k}"] == pytest.approx((bits * shown).sum() / shown.sum())
        pairs = np.abs(shown[:, None] - shown[None]).sum()
        assert found[scorer][f"gini@{k}"] == pytest.approx(pairs / (2 * len(COUNTS) * shown.sum()))
        bias = ((COUNTS * shown).sum() / shown.sum()) / ((COUNTS**2).sum() / COUNTS.sum())
        assert found[scorer][f"popularity_bias@{k}"] == pytest.approx(bias)


# ---- segments ----------------------------------------------------------------------------------------------


def test_deciles_hold_a_tenth_of_the_interactions() -> None:
    """50 of 100 are the first item's: deciles 2 to 5 begin within it and are empty. Then 30 (from 50 on: decile 6), 10
    (80: 9), 5, 3, 1, 1 and 0 (90 and more: 10)."""
    deciles = PopularityDeciles.of(*np.unique(COUNTS, return_counts=True))
    assert (deciles.lowest, deciles.highest, deciles.numbers) == ((50, 30, 10, 0), (50, 30, 10, 5), (1, 6, 9, 10))
    assert deciles.codes(COUNTS).tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert deciles.codes(np.array([51, 49, 29, 9])).tolist() == [0, 1, 2, 3]
    assert [deciles.name(code) for code in (0, 3)] == ["decile 1, items with 50", "decile 10, items with 0–5"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_every_item_has_a_decile(counts: list[int]) -> None:
    c = np.array(counts)
    deciles = PopularityDeciles.of(*np.unique(c, return_counts=True))
    codes = deciles.codes(c)
    assert codes.min() >= 0
    assert codes.max() < len(deciles.lowest)
    for count, code in zip(counts, codes.tolist(), strict=True):
        before = int(c[c > count].sum()) * 10 // max(1, int(c.sum()))
        assert deciles.numbers[code] == min(10, before + 1)


def test_names_of_segments() -> None:
    codes = segments.activity_codes(np.array([0, 4, 5, 19, 20, 499, 500, 10**6]))
    assert [segments.activity_name(code) for code in codes.tolist()] == [
        "0–4 items", "0–4 items", "5–19 items", "5–19 items", "20–49 items", "200–499 items", "500+ items", "500+ items"
    ]  # fmt: skip
    times = np.array([0, JUNE, JULY, -1])
    wanted = {
        "day": ["1970-01-01", "2025-06-15", "2025-07-08", "1969-12-31"],
        "week": ["1969-12-29", "2025-06-09", "2025-07-07", "1969-12-29"],
        "month": ["1970-01", "2025-06", "2025-07", "1969-12"],
        "year": ["1970", "2025", "2025", "1969"],
    }
    for unit, names in wanted.items():
        codes = codes_of(unit, times, times, times, spec_of().deciles)
        assert [name_of(unit, code, spec_of().deciles) for code in codes.tolist()] == names


# ---- histograms --------------------------------------------------------------------------------------------

floats = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(floats, max_size=20), min_size=1, max_size=6), st.randoms())
@budget(deadline=None)
def test_a_histogram_is_a_function_of_its_values(parts: list[list[float]], random: Any) -> None:
    """In one go, part by part, or as merged parts in any order."""
    whole, one_by_one, merged = Histogram(), Histogram(), Histogram()
    whole.add(np.array([value for part in parts for value in part], dtype=np.float32))
    for part in parts:
        one_by_one.add(np.array(part, dtype=np.float32))
    random.shuffle(parts)
    for part in parts:
        other = Histogram()
        other.add(np.array(part, dtype=np.float32))
        merged.merge(Histogram.from_json(other.as_json()))
    assert whole.as_json() == one_by_one.as_json() == merged.as_json()


@given(st.lists(floats, min_size=1, max_size=300), st.integers(2, 70))
@budget(deadline=None)
def test_bins_are_few_and_hold_every_value(values: list[float], bins: int) -> None:
    histogram = Histogram()
    histogram.add(np.array(values, dtype=np.float32))
    assert len(histogram.counts) <= BINS
    found = on_common_bins({"a": histogram, "none": Histogram()}, bins)
    edges = np.array(found["edges"])
    assert len(edges) <= bins + 1
    # The last edge is open here, and closed in NumPy.
    wanted, _ = np.histogram(np.array(values, dtype=np.float32), np.append(edges[:-1], edges[-1] * (1 + 1e-12) + 1e-12))
    assert found["a"] == wanted.tolist()
    assert sum(found["none"]) == 0


def test_nothing_to_count() -> None:
    histogram = Histogram()
    histogram.add(np.array([-np.inf, np.nan], dtype=np.float32))
    assert on_common_bins({"all": histogram}, 64) == {}
