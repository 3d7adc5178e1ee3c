"""The hash sampler: the same draw in every engine, negatives and candidates exact and uniform."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import sampling
from ncf_dist.sampling import (
    Purpose,
    Weighted,
    candidates,
    code,
    hash64,
    hash64_column,
    negatives,
    negatives_of,
    prefix,
    seen_gaps,
    unseen_items,
    unseen_total,
    weighted_gaps,
)

IntArray = npt.NDArray[np.int64]
INT64 = st.integers(-(2**63), 2**63 - 1)
MILLION = 1_000_000
law = settings(deadline=None, max_examples=50)


def int64s(rows: int, seed: int = 1) -> IntArray:
    """Random numbers over all of int64, the extremes among them."""
    info = np.iinfo(np.int64)
    drawn = np.random.default_rng(seed).integers(info.min, info.max, rows, dtype=np.int64, endpoint=True)
    drawn[:5] = info.min, -1, 0, 1, info.max
    return drawn


def p_value(observed: Sequence[int] | IntArray, scale: float = 1.0) -> float:
    """Chance of counts at least this uneven under a uniform draw; `scale` corrects a variance that is not
    Poisson's."""
    counts = torch.tensor(np.asarray(observed), dtype=torch.float64)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum() * scale
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), chi_square / 2))


@dataclass(frozen=True)
class Users:
    """What each user has seen, in the form that the sampler takes."""

    sets: list[set[int]]
    n_items: int

    @property
    def seen(self) -> IntArray:
        return np.array([item for seen in self.sets for item in sorted(seen)], dtype=np.int64)

    @property
    def offsets(self) -> IntArray:
        return np.concatenate([[0], np.cumsum([len(seen) for seen in self.sets])]).astype(np.int64)

    @property
    def row(self) -> IntArray:
        return np.repeat(np.arange(len(self.sets)), [len(seen) for seen in self.sets]).astype(np.int64)

    def unseen(self, row: int) -> list[int]:
        return sorted(set(range(self.n_items)) - self.sets[row])

    @property
    def parts(self) -> tuple[IntArray, IntArray, IntArray, IntArray, int]:
        """item, row, seen, offsets, n_items of one positive for each seen pair."""
        return self.seen, self.row, self.seen, self.offsets, self.n_items


@st.composite
def catalogues(draw: st.DrawFn, unseen: int = 1) -> Users:
    """Up to eight users of a small catalogue, who leave at least `unseen` items; some leave exactly that many."""
    n_items = draw(st.integers(unseen + 1, 30))
    everything = st.permutations(range(n_items))
    sizes = st.one_of(st.integers(0, n_items - unseen), st.just(n_items - unseen))
    users = draw(st.lists(st.tuples(everything, sizes), min_size=1, max_size=8))
    return Users([set(items[:size]) for items, size in users], n_items)


# ---- one hash in four engines ------------------------------------------------------------------------------


def test_the_hash_is_what_stored_tables_were_made_with() -> None:
    """Spark's xxhash64 of the same BIGINTs. Other numbers here would change every split and negative."""
    assert hash64(0) == -5252525462095825812
    assert hash64(1) == -7001672635703045582
    assert hash64(-1) == 3858142552250413010
    assert hash64(2**63 - 1) == -3246596055638297850
    assert hash64(1, 2, 3) == 4904562767517797033


def test_numpy_and_torch_agree_on_a_million_draws() -> None:
    a, b = int64s(MILLION, 1), int64s(MILLION, 2)
    assert np.array_equal(hash64(7, a, b), hash64(7, torch.from_numpy(a), torch.from_numpy(b)).numpy())
    assert np.array_equal(hash64(a) % 1_000_003, (hash64(torch.from_numpy(a)) % 1_000_003).numpy())


@law
@given(st.lists(INT64, min_size=1, max_size=4))
def test_python_integers_and_numpy_agree(parts: list[int]) -> None:
    assert hash64(*parts) == hash64(*[np.array([part]) for part in parts])[0]
    assert hash64(*parts) == hash64(*[np.int64(part) for part in parts])


@law
@given(INT64, INT64, INT64)
def test_a_common_prefix_can_be_hashed_once(a: int, b: int, c: int) -> None:
    assert hash64(a, b, c) == hash64(c, seed=hash64(a, b))


def test_spark_agrees_on_a_million_draws(spark: SparkSession) -> None:
    """SQL against NumPy, over all of BIGINT and on its extremes."""
    mixed = spark.range(MILLION).select((F.col("id") - 5_000).alias("a"), F.xxhash64("id").alias("b"))
    extremes = [(a, b) for a in int64s(5).tolist() for b in int64s(5).tolist()]
    frame = mixed.union(spark.createDataFrame(extremes, mixed.schema))
    frame = frame.select(
        "a", "b", hash64_column(9, F.col("a"), F.col("b")).alias("ours"), F.xxhash64(F.lit(9).cast("long"), "a", "b")
    )

    def compare(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            a, b, ours, theirs = (column.to_numpy() for column in batch.columns)
            same = (ours == theirs) & (ours == hash64(9, a, b))
            yield pa.RecordBatch.from_pydict({"rows": [len(a)], "same": [int(same.sum())]})

    total = frame.mapInArrow(compare, "rows long, same long").agg(F.sum("rows"), F.sum("same")).collect()[0]
    assert tuple(total) == (MILLION + 25, MILLION + 25)


def test_spark_hashes_an_int_column_as_a_bigint(spark: SparkSession) -> None:
    found = spark.range(3).select(hash64_column(Purpose.NEGATIVE, F.col("id").cast("int"))).collect()
    assert [row[0] for row in found] == [hash64(int(Purpose.NEGATIVE), n) for n in range(3)]


def test_no_two_choices_share_a_stream() -> None:
    assert len(set(Purpose)) == len(Purpose.__members__)
    keys = [code(draw, slot) for draw in range(20) for slot in range(20)]
    assert len(set(keys)) == len(keys)


# ---- negatives ---------------------------------------------------------------------------------------------


@law
@given(catalogues())
def test_the_unseen_item_of_rank_r_is_the_rth_of_the_sorted_rest(users: Users) -> None:
    gaps = seen_gaps(users.seen, users.offsets, users.n_items + 1)
    for row in range(len(users.sets)):
        expected = users.unseen(row)
        rank = np.arange(len(expected))
        args = rank, np.full_like(rank, row), gaps, users.offsets, users.n_items + 1
        assert sampling.unseen_items(*args).tolist() == expected


@law
@given(catalogues(), st.integers(1, 2**31), st.integers(0, 9), st.integers(0, 9))
def test_a_negative_was_never_seen(users: Users, seed: int, draw: int, slot: int) -> None:
    found = negatives(seed, draw, slot, users.row + 1000, *users.parts)
    assert all(item in users.unseen(row) for row, item in zip(users.row.tolist(), found.tolist(), strict=True))


@law
@given(catalogues())
def test_a_negative_is_the_unseen_item_at_hash_mod_unseen(users: Users) -> None:
    found = negatives(5, 2, 1, users.row, *users.parts)
    for row, item, negative in zip(users.row.tolist(), users.seen.tolist(), found.tolist(), strict=True):
        rest = users.unseen(row)
        key = hash64(5, int(Purpose.NEGATIVE), row, item, code(2, 1))
        assert negative == rest[key % len(rest)]


@law
@given(catalogues(), st.randoms(use_true_random=False))
def test_a_negative_depends_on_its_user_and_item_alone(users: Users, random: Any) -> None:
    """Whatever the order of users, and whoever else is in the block."""

    def drawn(order: list[int]) -> dict[tuple[int, int], int]:
        block = Users([users.sets[user] for user in order], users.n_items)
        user = np.array(order, dtype=np.int64)[block.row]
        found = negatives(3, 0, 0, user, *block.parts)
        return dict(zip(zip(user.tolist(), block.seen.tolist(), strict=True), found.tolist(), strict=True))

    everybody = list(range(len(users.sets)))
    shuffled = random.sample(everybody, len(everybody))
    assert drawn(everybody) == drawn(shuffled)
    assert drawn(everybody).items() >= drawn(shuffled[:1]).items()


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_negatives_are_uniform_over_what_the_user_has_not_seen(seed: int) -> None:
    """100,000 draws for one positive over 40 draws of 2,500 slots, 37 items to choose from."""
    users = Users([{0, 7, 49}, set(range(2, 15))], 50)
    one = np.ones(1, dtype=np.int64)
    key = sampling.prefix(seed, np.repeat(one, 2500), np.repeat(2 * one, 2500))
    gaps = seen_gaps(users.seen, users.offsets, users.n_items + 1)
    slots = np.arange(2500)
    found = np.concatenate(
        [
            negatives_of(key, 0, (draw << 32) | slots, np.repeat(one, 2500), gaps, users.offsets, users.n_items)
            for draw in range(40)
        ]
    )
    counts = np.bincount(found, minlength=users.n_items)
    assert counts[list(users.sets[1])].sum() == 0
    assert p_value(counts[users.unseen(1)]) > 0.01


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_negatives_of_many_positives_are_uniform_too(seed: int) -> None:
    """One draw each for 100,000 users who have seen item 0 of 20."""
    users = Users([{0}] * 100_000, 20)
    found = negatives(seed, 0, 0, users.row, *users.parts)
    assert p_value(np.bincount(found, minlength=20)[1:]) > 0.01
    again = negatives(seed, 1, 0, users.row, *users.parts)
    pairs = np.bincount(found * 20 + again, minlength=400).reshape(20, 20)[1:, 1:]
    assert p_value(pairs.ravel()) > 0.01


def test_torch_draws_the_same_million_negatives() -> None:
    rng = np.random.default_rng(4)
    n_items, users = 2000, 500
    sets = [set(rng.choice(n_items, size, replace=False).tolist()) for size in rng.integers(0, n_items, users)]
    block = Users([*sets, set(range(n_items)) - {3}], n_items)
    row = rng.integers(0, users + 1, MILLION)
    item = rng.integers(0, n_items, MILLION)
    gaps = seen_gaps(block.seen, block.offsets, n_items + 1)
    key = sampling.prefix(1, row, item)
    ours = negatives_of(key, 3, 2, row, gaps, block.offsets, n_items)
    key_t = sampling.prefix(1, torch.from_numpy(row), torch.from_numpy(item))
    row_t, gaps_t, offsets_t = (torch.from_numpy(part) for part in (row, gaps, block.offsets))
    theirs = negatives_of(key_t, 3, 2, row_t, gaps_t, offsets_t, n_items, torch.searchsorted)
    assert theirs.dtype == torch.int64
    assert np.array_equal(ours, theirs.numpy())


def test_a_user_who_has_seen_everything_has_no_negatives() -> None:
    users = Users([{0, 1, 2}, {0}], 3)
    with pytest.raises(ValueError, match="seen the whole catalogue has no negatives; leave such users out"):
        negatives(1, 0, 0, users.row, *users.parts)
    others = users.row == 1
    found = negatives(1, 0, 0, users.row[others], users.seen[others], users.row[others], *users.parts[2:])
    assert set(found.tolist()) <= {1, 2}


# ---- candidates --------------------------------------------------------------------------------------------


@law
@given(catalogues(unseen=0), st.integers(1, 2**31), st.integers(1, 12))
def test_candidates_are_distinct_unseen_and_as_many_as_there_are(users: Users, seed: int, k: int) -> None:
    values, offsets = candidates(seed, k, users.row, *users.parts)
    assert len(offsets) == len(users.row) + 1
    for row, start, end in zip(users.row.tolist(), offsets[:-1], offsets[1:], strict=True):
        found, rest = values[start:end].tolist(), users.unseen(row)
        assert len(set(found)) == len(found) == min(k, len(rest))
        assert set(found) <= set(rest)
        if len(rest) <= k:
            assert sorted(found) == rest


@law
@given(catalogues(unseen=0))
def test_candidates_of_a_positive_do_not_depend_on_the_others(users: Users) -> None:
    values, offsets = candidates(1, 5, users.row, *users.parts)
    for n in range(len(users.row)):
        one = slice(n, n + 1)
        alone, _ = candidates(1, 5, users.row[one], users.seen[one], users.row[one], *users.parts[2:])
        assert alone.tolist() == values[offsets[n] : offsets[n + 1]].tolist()


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("k", "n_items"), [(1, 12), (4, 12), (10, 12), (5, 101)])
def test_every_unseen_item_is_as_likely_a_candidate_as_any_other(seed: int, k: int, n_items: int) -> None:
    """k of m unseen, without replacement: a count's variance is (1 - k/m) m/(m-1) of what chi-square assumes."""
    users = Users([{0}] * 20_000, n_items)
    values, _ = candidates(seed, k, users.row, *users.parts)
    m = n_items - 1
    counts = np.bincount(values, minlength=n_items)[1:]
    assert counts.sum() == 20_000 * k
    assert p_value(counts, scale=1 / ((1 - k / m) * m / (m - 1))) > 0.01


def test_pairs_of_candidates_are_uniform() -> None:
    """Floyd's algorithm gives each of the 10 pairs of 5 unseen items alike, not only each item."""
    users = Users([{0}] * 50_000, 6)
    values, _ = candidates(1, 2, users.row, *users.parts)
    pairs = np.sort(values.reshape(-1, 2), axis=1)
    _, counts = np.unique(pairs[:, 0] * 6 + pairs[:, 1], return_counts=True)
    assert len(counts) == 5 * 4 / 2
    assert p_value(counts) > 0.01


def test_candidates_and_negatives_are_different_streams() -> None:
    users = Users([{0}] * 2000, 1001)
    same = negatives(1, 0, 0, users.row, *users.parts) == candidates(1, 1, users.row, *users.parts)[0]
    assert same.mean() < 10 / 1000


def test_the_p_value_is_that_of_the_chi_square_table() -> None:
    """df 1: chi-square 6.635 has p = 0.01. Counts 50 ± x: 2 x² / 50 = 6.635."""
    x = (6.635 * 50 / 2) ** 0.5
    assert p_value(np.array([50 - x, 50 + x])) == pytest.approx(0.01, rel=1e-3)


def test_candidates_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users([set(range(n % 7)) for n in range(50)], 30)
    drawn = [(1, 9, np.arange(50), np.full(50, 29), np.arange(50), users.seen, users.offsets, 30)] * 2
    whole = candidates(*drawn[0])
    monkeypatch.setattr(sampling, "_CANDIDATES_AT_ONCE", 20)
    for found, expected in zip(candidates(*drawn[1]), whole, strict=True):
        assert found.tolist() == expected.tolist()


# ---- weighted negatives ------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(1, 5), min_size=9, max_size=9)


@law
@given(st.lists(st.sets(st.integers(0, 8), max_size=8), min_size=1, max_size=4), WEIGHTS)
def test_a_weighted_rank_falls_on_the_item_that_owns_it(sets: list[set[int]], weights: list[int]) -> None:
    """Each unseen item written as often as it weighs, in one line: rank r is the r-th entry."""
    users = Users(sets, 9)
    weight = np.array(weights)
    gaps, weighted = weighted_gaps(users.seen, users.offsets, weight)
    total = unseen_total(users.offsets, 9, weighted)
    for row, seen in enumerate(sets):
        line = [item for item in range(9) if item not in seen for _ in range(weights[item])]
        assert total[row] == len(line)
        rank = np.arange(len(line))
        found = unseen_items(
            rank, np.full(len(line), row), gaps, users.offsets, int(weight.sum()) + 1, weighted=weighted
        )
        assert found.tolist() == line


@law
@given(st.lists(st.sets(st.integers(0, 8), max_size=8), min_size=1, max_size=4), st.integers(1, 2**40))
def test_weights_of_one_are_uniform(sets: list[set[int]], seed: int) -> None:
    users = Users(sets, 9)
    row = np.repeat(np.arange(len(sets)), 5)
    key = prefix(seed, row, np.tile(np.arange(5), len(sets)))
    gaps, weighted = weighted_gaps(users.seen, users.offsets, np.ones(9, dtype=np.int64))
    plain = negatives_of(key, 1, 2, row, seen_gaps(users.seen, users.offsets, 10), users.offsets, 9)
    assert negatives_of(key, 1, 2, row, gaps, users.offsets, 9, weighted=weighted).tolist() == plain.tolist()


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_weighted_negatives_come_as_often_as_they_weigh(seed: int) -> None:
    """200 unseen items that weigh 1..200; counts over weight are even."""
    n_items, draws = 210, 200_000
    seen, offsets = np.arange(10), np.array([0, 10])
    weights = np.concatenate([np.full(10, 10**6), np.arange(1, 201)])
    gaps, weighted = weighted_gaps(seen, offsets, weights)
    row = np.zeros(draws, dtype=np.int64)
    found = negatives_of(prefix(seed, row, np.arange(draws)), 0, 0, row, gaps, offsets, n_items, weighted=weighted)
    assert found.min() >= 10
    counts = torch.tensor(np.bincount(found, minlength=n_items)[10:], dtype=torch.float64)
    expected = torch.arange(1, 201, dtype=torch.float64) * draws / (200 * 201 / 2)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert float(torch.special.gammaincc(torch.tensor(199 / 2, dtype=torch.float64), chi_square / 2)) > 0.01


def test_torch_draws_the_same_weighted_negatives() -> None:
    users = Users([set(range(0, 900, 3)), {5}, set()], 1000)
    weights = np.random.default_rng(1).integers(1, 10**6, 1000)
    gaps, weighted = weighted_gaps(users.seen, users.offsets, weights)
    row = np.arange(30_000) % 3
    key = prefix(7, row, np.arange(30_000))
    expected = negatives_of(key, 3, 1, row, gaps, users.offsets, 1000, weighted=weighted)
    in_torch = Weighted(*[torch.from_numpy(part) for part in weighted])
    found = negatives_of(
        torch.from_numpy(key), 3, 1, torch.from_numpy(row), torch.from_numpy(gaps), torch.from_numpy(users.offsets),
        1000, torch.searchsorted, in_torch,
    )  # fmt: skip
    assert found.tolist() == expected.tolist()


def test_weights_that_would_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="2 users x weight 4,611,686,018,427,387,905 do not fit 63 bits"):
        weighted_gaps(np.empty(0, dtype=np.int64), np.array([0, 0, 0]), np.array([2**62]))
