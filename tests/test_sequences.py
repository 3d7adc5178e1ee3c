"""The tables of order that prepare makes: windows of each user's train items and what each user did last. Each is
what plain Python makes of the table `interactions`, and its bytes follow from the log and the config alone.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import combinations, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist import contracts
from ncf_dist.config import Config, Negatives, Sequences, Split
from ncf_dist.errors import InputError
from ncf_dist.gaps import gap_code
from ncf_dist.prepare import filters, next_items, sequences
from ncf_dist.prepare.interactions import RowSpec
from ncf_dist.prepare.next_items import Pairs
from ncf_dist.prepare.sequences import InOrder, window_rows
from ncf_dist.prepare.source import Source
from ncf_dist.prepare.splits import Cutoff, SplitRule, temporal_rule
from ncf_dist.prepare.user_tables import UserPass, user_pass
from ncf_dist.sampling import Purpose, hash64
from tests.nights import Night, run

LAW = settings(deadline=None, max_examples=60)
SEED, SECOND = 3, 1_000_000
TRAIN, VALIDATION, TEST = contracts.TRAIN_SPLIT, contracts.VALIDATION_SPLIT, contracts.TEST_SPLIT
Row = tuple[int, int, int, int]
"""user, item, rating, seconds"""
Window = tuple[int, int, int, list[int], list[int]]
"""user_idx, window, length, items, gaps: what is past the length too"""


# ---- what plain Python makes of interactions ---------------------------------------------------------------


def tie_hash(user: int, item: int) -> int:
    return int(hash64(SEED, int(Purpose.TIME_TIE), user, item))


def in_order(
    interactions: list[tuple[Any, ...]], tie: Callable[[int, int], int] = tie_hash
) -> dict[int, list[tuple[int, int, int]]]:
    """Of each user (item, microseconds, split), oldest first; equal times by what `tie` says of user and item."""
    users: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for user, item, _, time, split in interactions:
        users[user].append((time, tie(user, item), item, split))
    return {user: [(item, time, split) for time, _, item, split in sorted(rows)] for user, rows in users.items()}


def plain_windows(train: dict[int, list[tuple[int, int]]], length: int) -> list[Window]:
    """train: of each user (item, microseconds), oldest first."""
    found = []
    for user, rows in train.items():
        window = 0
        while len(rows) > 1:
            part = rows[-length - 1 :]
            gaps = [0, *[int(gap_code(np.array(b - a))) for (_, a), (_, b) in pairwise(part)]]
            rest = [0] * (length + 1 - len(part))
            found.append((user, window, len(part), [item for item, _ in part] + rest, gaps + rest))
            rows, window = rows[: len(rows) - len(part) + 1], window + 1
    return found


def plain_recent(rows: list[tuple[int, int, int]], length: int) -> list[tuple[int, int, int]]:
    kept: set[tuple[int, int, int]] = set()
    for splits in ({TRAIN}, {TRAIN, VALIDATION}, {TRAIN, VALIDATION, TEST}):
        kept |= set([row for row in rows if row[2] in splits][-length:])
    return [row for row in rows if row in kept]


def plain_pairs(train: dict[int, list[tuple[int, int]]], steps: int) -> dict[tuple[int, int], int]:
    """(item, next item) → weight."""
    weights: Counter[tuple[int, int]] = Counter()
    for rows in train.values():
        for (earlier, (a, _)), (later, (b, _)) in combinations(enumerate(rows), 2):
            if later - earlier <= steps:
                weights[a, b] += 2520 // (later - earlier)
    return dict(weights)


def decoded(rows: list[tuple[Any, ...]]) -> list[Window]:
    return [
        (user, window, size, np.frombuffer(items, "<i4").tolist(), np.frombuffer(gaps, np.uint8).tolist())
        for user, window, size, items, gaps in rows
    ]


# ---- the laws of windows, without Spark --------------------------------------------------------------------


def train_of(sizes: list[int], step: int) -> tuple[InOrder, dict[int, list[tuple[int, int]]]]:
    """(rows of users of these sizes, the same by user): items and gaps in time are all different."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    place = np.arange(offsets[-1])
    users, time = 10 + 3 * np.arange(len(sizes)), place * place * step
    rows = InOrder(users, 1000 + place, time, np.zeros(len(place), dtype=np.int8), offsets)
    by_user = {
        int(user): list(zip(rows.item[a:b].tolist(), time[a:b].tolist(), strict=True))
        for user, (a, b) in zip(users, pairwise(offsets), strict=True)
    }
    return rows, by_user


def made(rows: InOrder, length: int) -> list[Window]:
    parts = [pa.table(columns, schema=sequences.staged_windows(length)) for _, columns in window_rows(rows, length, 1)]
    return decoded([tuple(row.values())[:-1] for part in parts for row in part.to_pylist()])


@LAW
@given(st.lists(st.integers(0, 23), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 40))
def test_every_train_item_but_a_users_first_is_a_target_once(sizes: list[int], length: int, cells: int) -> None:
    """However few windows are made at a time; and a target has up to `length` items before it, never more."""
    rows, train = train_of(sizes, 7 * SECOND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "CELLS", cells)
        found = made(rows, length)
    assert found == plain_windows(train, length)
    targets = Counter(item for *_, size, items, _ in found for item in items[1:size])
    assert targets == Counter(item for items in train.values() for item, _ in items[1:])
    assert all(2 <= size <= length + 1 for _, _, size, _, _ in found)


def test_windows_worked_example() -> None:
    """8 items, looking back on 3; times are 0, 1, 4, 9, … seconds: 49 - 36 = 13 seconds between the last two."""
    rows, _ = train_of([8, 1], SECOND)
    code = {n: int(gap_code(np.array(n * SECOND))) for n in range(14)}
    assert made(rows, 3) == [
        (10, 0, 4, [1004, 1005, 1006, 1007], [0, code[9], code[11], code[13]]),
        (10, 1, 4, [1001, 1002, 1003, 1004], [0, code[3], code[5], code[7]]),
        (10, 2, 2, [1000, 1001, 0, 0], [0, code[1], 0, 0]),
    ]


@LAW
@given(st.lists(st.lists(st.sampled_from([TRAIN, VALIDATION, TEST]), max_size=14), min_size=1), st.integers(1, 6))
def test_recent_is_the_latest_of_train_of_train_and_validation_and_of_all(codes: list[list[int]], length: int) -> None:
    rows, train = train_of([len(of_user) for of_user in codes], 1)
    split = np.array([code for of_user in codes for code in of_user], dtype=np.int8)
    found = sequences.recent(InOrder(rows.users, rows.item, rows.timestamp, split, rows.offsets), length)
    assert found.users.tolist() == rows.users.tolist()
    parts = list(zip(found.item.tolist(), found.timestamp.tolist(), found.split.tolist(), strict=True))
    assert [parts[a:b] for a, b in pairwise(found.offsets)] == [
        plain_recent([(item, time, code) for (item, time), code in zip(mine, of_user, strict=True)], length)
        for mine, of_user in zip(train.values(), codes, strict=True)
    ]


# ---- what follows what, without Spark ----------------------------------------------------------------------


def following(rows: InOrder, steps: int, n_items: int) -> dict[tuple[int, int], int]:
    pairs = Pairs()
    for each in next_items.following(rows.item, rows.row, steps, n_items):
        assert not pairs.add(*each)
    pair, weight = pairs.take()
    assert (np.diff(pair) > 0).all()
    return {(int(p) // n_items, int(p) % n_items): int(w) for p, w in zip(pair, weight, strict=True)}


@LAW
@given(st.lists(st.lists(st.integers(0, 6), max_size=14, unique=True), min_size=1), st.integers(1, 10))
def test_pairs_are_what_counting_them_gives(users: list[list[int]], steps: int) -> None:
    """Items 0 to 6 of a catalogue of 7, in every order: no pair crosses users."""
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in users])]).astype(np.int64)
    item = np.array([item for items in users for item in items], dtype=np.int64)
    rows = InOrder(np.arange(len(users)), item, item * 0, np.zeros(len(item), dtype=np.int8), offsets)
    train = {user: [(item, 0) for item in items] for user, items in enumerate(users)}
    assert following(rows, steps, 7) == plain_pairs(train, steps)


def test_pairs_worked_example() -> None:
    """3 after 1 is 2520, 2 after 1 is 2520 / 2; the second user takes 1 and 2 at once: 2520 more."""
    none = np.zeros(5, dtype=np.int64)
    rows = InOrder(np.arange(2), np.array([1, 3, 2, 1, 2]), none, none.astype(np.int8), np.array([0, 3, 5]))
    assert following(rows, 10, 4) == {(1, 3): 2520, (3, 2): 2520, (1, 2): 1260 + 2520}


Pair = tuple[int, int, int]
"""item, next item, weight"""


def pairs_of(slices: pa.Table, n_items: int) -> list[Pair]:
    found = []
    for row in slices.to_pylist():
        apart, weights = (np.frombuffer(row[name], "<i8") for name in ("pairs", "weights"))
        found += [
            (p // n_items, p % n_items, w) for p, w in zip(np.cumsum(apart).tolist(), weights.tolist(), strict=True)
        ]
    return found


@LAW
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 3)), max_size=40), max_size=6),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 30),
)
def test_items_are_added_up_whole_whatever_is_held_at_a_time(
    flushes: list[list[Pair]], per_file: int, cut: int, limit: int, batch: int
) -> None:
    """Pairs of a catalogue of 9 items, cut into slices and sorted by their first item, as Spark sends them."""
    tables, expected = [], Counter[tuple[int, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_items, "SLICE_PAIRS", cut)
        for flush in flushes:
            for a, b, weight in flush:
                expected[a, b] += weight
            held = Pairs()
            held.add(*(np.array(c, dtype=np.int64) for c in ([9 * a + b for a, b, _ in flush], [w for *_, w in flush])))
            pair, weights = held.take()
            tables.append(next_items.slices(pair, weights, 9, per_file))
            assert [9 * a + b for a, b, _ in pairs_of(tables[-1], 9)] == pair.tolist()
    sent = pa.concat_tables([next_items.SLICE.empty_table(), *tables])
    for row in sent.to_pylist():
        items = np.cumsum(np.frombuffer(row["pairs"], "<i8")) // 9
        assert items[0] == row["item_idx"]
        assert items[0] // per_file == items[-1] // per_file, "a slice is of one file"
        assert len(items) <= cut
    blocks = list(next_items.whole_items(sent.sort_by("item_idx").to_batches(batch), 9, limit))
    found = [(int(p) // 9, int(p) % 9, int(w)) for pair, weight in blocks for p, w in zip(pair, weight, strict=True)]
    assert found == [(a, b, weight) for (a, b), weight in sorted(expected.items())]
    of_block = [set(pair // 9) for pair, _ in blocks]
    assert sum(map(len, of_block)) == len(set().union(*of_block)), "an item was cut"


@LAW
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), max_size=6), st.integers(1, 5))
def test_the_heaviest_are_kept_and_of_equal_ones_the_first(weights: list[list[int]], keep: int) -> None:
    item = np.array([a for a, of_item in enumerate(weights) for _ in of_item], dtype=np.int64)
    weight = np.array([w for of_item in weights for w in of_item], dtype=np.int64)
    kept = [(int(item[at]), int(weight[at]), int(at)) for at in next_items.heaviest(item, weight, keep)]
    rows = sorted(zip(item.tolist(), (-weight).tolist(), range(len(item)), strict=True))
    assert kept == [(a, -w, at) for _, of_item in groupby(rows, lambda r: r[0]) for a, w, at in list(of_item)[:keep]]


# ---- the pass over users, without Spark --------------------------------------------------------------------

N_ITEMS = 30
LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, N_ITEMS - 1), st.integers(1, 5), st.integers(0, 9)),
    min_size=1,
    max_size=120,
)


Placed = tuple[Row, int]
"""A row and its place in the log."""


def passed(rows: list[Placed], length: int, ties: Any, batch: int = 1000) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """(the statistics of the pass, its tables by name), rows in batches of `batch`."""
    by_user = sorted(rows, key=lambda row: row[0][0])
    user, item, rating, time, place = (np.array(c) for c in zip(*[(*row, at) for row, at in by_user], strict=True))
    columns = {
        "user_idx": user.astype(np.int32),
        "item_idx": item.astype(np.int32),
        "rating": rating.astype(np.float32),
        "timestamp": time * SECOND,
        "part": np.zeros(len(user), dtype=np.int8),
    }
    if ties == "file":
        columns["place"] = place
    batches = pa.table(columns).to_batches(batch)
    with tempfile.TemporaryDirectory() as folder:
        spec = UserPass(
            run=folder,
            staging=f"{folder}/staging",
            n_items=N_ITEMS,
            users_per_file=2,
            rule=SplitRule(Split(ties=ties), SEED),
            negatives=Negatives(per_positive=1, draws=1, candidates=2),
            seed=SEED,
            sequences=Sequences(length=length, steps=3),
        )
        [stats] = [json.loads(out.column(0)[0].as_py()) for out in user_pass(spec)(batches)]
        names = {name: name for name in ("recent", "interactions")}
        names |= {name: f"staging-{name}" for name in ("windows", "pairs")}
        tables = {
            name: pa.concat_tables([pq.read_table(f"{folder}/{path}/{file['path']}") for file in stats["files"][name]])
            for name, path in names.items()
            if stats["files"].get(name)
        }
    return stats, tables


def places(log: list[Row]) -> dict[tuple[int, int], int]:
    """(user, item) → where in the log the row that is kept is: of repeats the latest, then the highest rating, then
    the last."""
    best: dict[tuple[int, int], tuple[int, int, int]] = {}
    for place, (user, item, rating, time) in enumerate(log):
        best[user, item] = max(best.get((user, item), (-1, 0, 0)), (time, rating, place))
    return {pair: place for pair, (*_, place) in best.items()}


def rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


@settings(deadline=None, max_examples=25)
@given(
    LOGS, st.sampled_from(["hash", "file"]), st.integers(1, 7), st.integers(1, 50), st.randoms(use_true_random=False)
)
def test_the_pass_writes_what_plain_python_makes(log: list[Row], ties: str, length: int, batch: int, draw: Any) -> None:
    rows = list(zip(log, range(len(log)), strict=True))
    stats, tables = passed(rows, length, ties)
    users = in_order(rows_of(tables["interactions"]), tie_hash if ties == "hash" else lambda *pair: places(log)[pair])
    assert {(user, item, time // SECOND) for user, mine in users.items() for item, time, _ in mine} == {
        log[place][:2] + log[place][3:] for place in places(log).values()
    }
    for mine in users.values():
        assert [split for *_, split in mine] == [TRAIN] * (len(mine) - 2) + [VALIDATION, TEST] or len(mine) < 3
    train = {
        user: [(item, time) for item, time, split in mine if split == TRAIN] for user, mine in sorted(users.items())
    }
    windows = plain_windows(train, length)
    assert decoded([row[:-1] for row in rows_of(tables["windows"])] if "windows" in tables else []) == windows
    assert rows_of(tables["recent"]) == [
        (user, *map(list, zip(*plain_recent(users[user], length), strict=True))) for user in sorted(users)
    ]
    pairs: Counter[tuple[int, int]] = Counter()
    for a, b, weight in pairs_of(tables["pairs"], N_ITEMS) if "pairs" in tables else []:
        pairs[a, b] += weight
    assert pairs == plain_pairs(train, 3)
    counts = stats["counts"]
    assert counts.get("windows", 0) == sum(stats["buckets"]["windows"]) == len(windows)
    assert counts["window_targets"] == sum(size - 1 for _, _, size, _, _ in windows)
    assert counts["users_without_windows"] == len(users) - len({user for user, *_ in windows})
    again, _ = passed(draw.sample(rows, len(rows)), length, ties, batch)
    assert again == stats, "a byte follows from how rows came"


# ---- nights ------------------------------------------------------------------------------------------------

LENGTH, NEXT = 4, 6
ITEMS = [5 * n + 3 for n in range(40)]


def some_log() -> list[Row]:
    """Times within two minutes, so that most users have ties; repeats of one row in ten."""
    draw = random.Random(1)
    sizes = [1, 2, 3, 38, 40, *[draw.randint(3, 20) for _ in range(25)]]
    rows = [
        (1000 - 7 * user, item, draw.randint(1, 5), 10**9 + draw.randint(0, 120))
        for user, size in enumerate(sizes)
        for item in draw.sample(ITEMS, size)
    ]
    return [*rows, *[(user, item, draw.randint(1, 5), t + draw.randint(-1, 1)) for user, item, _, t in rows[::10]]]


LOG = some_log()
FORGOTTEN = sorted({row[0] for row in LOG})[3:6]


def config(root: Path, files: list[list[Row]], **sections: Any) -> Config:
    """files: the rows of each."""
    (root / "raw").mkdir(parents=True)
    for number, rows in enumerate(files):
        (root / "raw" / f"{number}.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": str(root / "raw")},
        "negatives": {"per_positive": 1, "draws": 1, "candidates": 5},
        "sequences": {"length": LENGTH, "next_items": NEXT},
        "layout": {"min_files": 2, "world_sizes": [1, 2], "rows_per_file": 100},
        "spark": {"shuffle_partitions": 2},
        "seed": SEED,
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Config.model_validate(tree)


Nights = Callable[[str], Night]


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """The finished run of a variant, made when first asked for."""
    shuffled = random.Random(5).sample(LOG, len(LOG))
    forget = tmp_path_factory.mktemp("forget") / "users.txt"
    forget.write_text("".join(f"{user}\n" for user in FORGOTTEN))
    variants: dict[str, tuple[list[list[Row]], dict[str, Any]]] = {
        "as it is": ([LOG], {}),
        "shuffled, in three files, more partitions than files": (
            [shuffled[n::3] for n in range(3)], {"spark": {"shuffle_partitions": 13}},
        ),
        "ties as in the file, without some users": (
            [LOG[:200], LOG[200:]],
            {"split": {"ties": "file"}, "input": {"forget": str(forget)}, "spark": {"shuffle_partitions": 5}},
        ),
        "without": ([LOG], {"sequences": {"length": 0, "next_items": 400}}),
    }  # fmt: skip
    done: dict[str, Night] = {}

    def night(variant: str) -> Night:
        if variant not in done:
            files, sections = variants[variant]
            done[variant] = run(config(tmp_path_factory.mktemp("night"), files, **sections))
        return done[variant]

    return night


def test_sequences_are_the_windows_of_train_rows(nights: Nights) -> None:
    night = nights("as it is")
    users = in_order(night.rows("interactions"))
    train = {user: [(item, time) for item, time, split in rows if split == TRAIN] for user, rows in users.items()}
    windows = plain_windows(train, LENGTH)
    assert sorted(decoded(night.rows("sequences"))) == sorted(windows)
    assert night.manifest.facts["sequences"] == {
        "rows": len(windows),
        "targets": night.manifest.facts["train"] + night.manifest.facts["users_without_negatives"] * 40
        - sum(len(rows) > 0 for rows in train.values()),
        "users_without": sum(len(rows) < 2 for rows in train.values()),
        "length": LENGTH,
    }  # fmt: skip


def test_sequences_are_laid_out_as_train_rows_are(nights: Nights) -> None:
    """In hashed order, in equal files of one row group, each for as many items as rows_per_file says."""
    night = nights("as it is")
    contract, tables = contracts.sequences(LENGTH), night.stored("sequences")
    night.manifest.table(contract)
    assert all(table.schema.equals(contract.schema) for table in tables)
    sizes = [table.num_rows for table in tables]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 100 // LENGTH
    assert [pq.ParquetFile(path).num_row_groups for path in night.manifest.files("sequences")] == [1] * len(sizes)
    assert len(sizes) % 2 == 0, "a multiple of the ranks"
    user, window = (np.concatenate([t[c].to_numpy() for t in tables]).astype(np.int64) for c in contract.key)
    assert (np.diff(hash64(SEED, int(Purpose.WINDOW_ORDER), user, window)) > 0).all()


def test_recent_holds_every_user(nights: Nights) -> None:
    night = nights("as it is")
    night.manifest.table(contracts.RECENT)
    users = in_order(night.rows("interactions"))
    assert night.rows("recent") == [
        (user, *map(list, zip(*plain_recent(users[user], LENGTH), strict=True))) for user in sorted(users)
    ]


def test_next_items_are_the_heaviest_of_what_follows_an_item_in_train_rows(nights: Nights) -> None:
    night = nights("as it is")
    night.manifest.table(contracts.NEXT_ITEMS)
    users = in_order(night.rows("interactions"))
    train = {user: [(item, time) for item, time, split in rows if split == TRAIN] for user, rows in users.items()}
    pairs = plain_pairs(train, 10)
    follows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (a, b), weight in pairs.items():
        follows[a].append((-weight, b))
    kept = [(a, b, -weight) for a in sorted(follows) for weight, b in sorted(follows[a])[:NEXT]]
    assert night.rows("next_items") == kept
    assert len(kept) < len(pairs)
    rows = Counter(item for items in train.values() for item, _ in items)
    totals = [(a, rows[a], -sum(weight for weight, _ in follows[a])) for a in range(len(night.index("item")))]
    assert night.rows("next_totals") == totals, "of what was cut, too, and of items that nobody has trained on"


def test_order_files_and_partitions_change_no_byte(nights: Nights) -> None:
    first, other = nights("as it is"), nights("shuffled, in three files, more partitions than files")
    assert first.manifest.run_key != other.manifest.run_key
    assert first.manifest.facts == other.manifest.facts
    assert first.manifest.tables == other.manifest.tables


def test_no_other_table_knows_of_them(nights: Nights) -> None:
    """A night without the tables of order has the same bytes in all others, and the same facts."""
    night, without = nights("as it is"), nights("without")
    more = {"sequences", "recent", "next_items", "next_totals"}
    assert set(night.manifest.tables) == set(without.manifest.tables) | more
    assert {n: t for n, t in night.manifest.tables.items() if n not in more} == without.manifest.tables
    assert {n: f for n, f in night.manifest.facts.items() if n != "sequences"} == without.manifest.facts


# ---- equal times in the order of the log -------------------------------------------------------------------


def test_with_ties_of_the_file_a_users_order_is_that_of_a_stable_sort_of_the_log_by_time(nights: Nights) -> None:
    """And users to be forgotten are in no table of order."""
    night, rows = nights("ties as in the file, without some users"), [row for row in LOG if row[0] not in FORGOTTEN]
    user, item = night.index("user"), night.index("item")
    kept = [rows[place] for place in sorted(places(rows).values())]
    expected: dict[int, list[int]] = defaultdict(list)
    for row in sorted(kept, key=lambda row: row[3]):
        expected[user[row[0]]].append(item[row[1]])
    found = {u: [i for i, *_ in mine] for u, mine in in_order(
        night.rows("interactions"), lambda u, i: expected[u].index(i)).items()}  # fmt: skip
    assert found == expected
    splits = {(u, i): split for u, i, _, _, split in night.rows("interactions")}
    for u, mine in expected.items():
        codes = [TRAIN] * (len(mine) - 2) + [VALIDATION, TEST] if len(mine) >= 3 else [TRAIN] * len(mine)
        assert [splits[u, i] for i in mine] == codes
    train = {u: [i for i in mine if splits[u, i] == TRAIN] for u, mine in expected.items()}
    windows = sorted(decoded(night.rows("sequences")))
    assert [row[:4] for row in windows] == [
        row[:4] for row in sorted(plain_windows({u: [(i, 0) for i in mine] for u, mine in train.items()}, LENGTH))
    ]
    latest = [
        (u, [i for i, *_ in plain_recent([(i, 0, splits[u, i]) for i in mine], LENGTH)])
        for u, mine in sorted(expected.items())
    ]
    assert [row[:2] for row in night.rows("recent")] == latest
    assert len(night.index("user")) == len({row[0] for row in rows}) < len({row[0] for row in LOG})


def test_ties_change_neither_what_is_read_nor_what_is_a_duplicate(nights: Nights) -> None:
    night = nights("ties as in the file, without some users")
    rows = [row for row in LOG if row[0] not in FORGOTTEN]
    assert night.manifest.facts["rows"] == {
        "input": len(LOG),
        "accepted": len(places(rows)),
        "duplicates": len(rows) - len(places(rows)),
        "quarantined": {},
        "forgotten": len(LOG) - len(rows),
    }
    users, items = ({number: key for key, number in night.index(side).items()} for side in ("user", "item"))
    found = {(users[u], items[i], rating, time // SECOND) for u, i, rating, time, _ in night.rows("interactions")}
    assert found == {rows[place] for place in places(rows).values()}


def test_filters_and_a_temporal_cut_follow_the_places_of_rows(spark: SparkSession, tmp_path: Path) -> None:
    """Of two repeats the later stays; of a user's equal times the last rows; a cut through equal times is by place."""
    log = [(1, 10, 0), (1, 11, 1), (1, 10, 2), (1, 12, 3), (2, 10, 4), (2, 13, 5)]
    frame = spark.createDataFrame(
        [(user, item, 3.0, 7, 0, place) for user, item, place in log],
        "user_id long, item_id long, rating float, timestamp long, part int, place long",
    )
    kept = filters.unique(frame)
    assert sorted(row["place"] for row in kept.collect()) == [1, 2, 3, 4, 5]
    assert sorted(row["place"] for row in filters.cap_users(kept, 2, SEED).collect()) == [2, 3, 4, 5]
    rule = SplitRule(Split(strategy="temporal", ties="file", test_fraction=0.4, validation=False), SEED)
    cut = temporal_rule(rule, kept, kept.withColumnsRenamed({"user_id": "user_idx", "item_id": "item_idx"}), 5).test
    assert cut == Cutoff(7, 4), "two of the five rows are held out: those at places 4 and 5"


def test_order_needs_times_or_the_order_of_the_file(tmp_path: Path) -> None:
    timeless = {"format": "csv", "columns": {"user": "u", "item": "i"}}
    with pytest.raises(ValueError, match=r"needed the column of the times, or split\.ties=file"):
        config(tmp_path, [LOG], input=timeless)
    assert config(tmp_path / "file", [LOG], input=timeless, split={"ties": "file"}).sequences.length == LENGTH
    assert config(tmp_path / "none", [LOG], input=timeless, sequences={"length": 0}).split.ties == "hash"


def test_more_files_than_places_can_name_are_refused() -> None:
    source = Source(("x",) * (2**18 + 1), "text", (), ())
    spec = partial(RowSpec, source, pa.int64(), pa.int64(), "s", 0, None, "")
    assert not spec().places
    with pytest.raises(InputError, match=r"262,145 files; needed at most 262,144: join files, or set split\.ties=hash"):
        spec(places=True)
