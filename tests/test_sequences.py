"""The tables of order that prepare makes: windows of each user's train items and what each user did last. Each is
what plain Python makes of the table `interactions`, and its bytes follow from the log and the config alone.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
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
from ncf_dist.gaps import gap_code
from ncf_dist.prepare import sequences
from ncf_dist.prepare.sequences import InOrder, window_rows
from ncf_dist.prepare.splits import SplitRule
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


def in_order(interactions: list[tuple[Any, ...]]) -> dict[int, list[tuple[int, int, int]]]:
    """Of each user (item, microseconds, split), oldest first; equal times by the hash."""
    users: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for user, item, _, time, split in interactions:
        users[user].append((time, hash64(SEED, int(Purpose.TIME_TIE), user, item), item, split))
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


# ---- the pass over users, without Spark --------------------------------------------------------------------

N_ITEMS = 30
LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, N_ITEMS - 1), st.integers(1, 5), st.integers(0, 40)),
    min_size=1,
    max_size=120,
)


def passed(rows: list[Row], length: int, batch: int = 1000) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """(the statistics of the pass, its tables by name), rows in batches of `batch`."""
    user, item, rating, time = (np.array(column) for column in zip(*sorted(rows, key=lambda r: r[0]), strict=True))
    columns = {
        "user_idx": user.astype(np.int32),
        "item_idx": item.astype(np.int32),
        "rating": rating.astype(np.float32),
        "timestamp": time * SECOND,
        "part": np.zeros(len(user), dtype=np.int8),
    }
    batches = pa.table(columns).to_batches(batch)
    with tempfile.TemporaryDirectory() as folder:
        spec = UserPass(
            run=folder,
            staging=f"{folder}/staging",
            n_items=N_ITEMS,
            users_per_file=2,
            rule=SplitRule(Split(), SEED),
            negatives=Negatives(per_positive=1, draws=1, candidates=2),
            seed=SEED,
            sequences=Sequences(length=length),
        )
        [stats] = [json.loads(out.column(0)[0].as_py()) for out in user_pass(spec)(batches)]
        names = {"recent": "recent", "interactions": "interactions", "windows": "staging-windows"}
        tables = {
            name: pa.concat_tables([pq.read_table(f"{folder}/{path}/{file['path']}") for file in stats["files"][name]])
            for name, path in names.items()
            if stats["files"].get(name)
        }
    return stats, tables


def rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


@settings(deadline=None, max_examples=25)
@given(LOGS, st.integers(1, 7), st.integers(1, 50), st.randoms(use_true_random=False))
def test_the_pass_writes_what_plain_python_makes(rows: list[Row], length: int, batch: int, draw: Any) -> None:
    stats, tables = passed(rows, length)
    users = in_order(rows_of(tables["interactions"]))
    train = {
        user: [(item, time) for item, time, split in mine if split == TRAIN] for user, mine in sorted(users.items())
    }
    windows = plain_windows(train, length)
    assert decoded([row[:-1] for row in rows_of(tables["windows"])] if "windows" in tables else []) == windows
    assert rows_of(tables["recent"]) == [
        (user, *map(list, zip(*plain_recent(users[user], length), strict=True))) for user in sorted(users)
    ]
    counts = stats["counts"]
    assert counts.get("windows", 0) == sum(stats["buckets"]["windows"]) == len(windows)
    assert counts["window_targets"] == sum(size - 1 for _, _, size, _, _ in windows)
    assert counts["users_without_windows"] == len(users) - len({user for user, *_ in windows})
    assert passed(draw.sample(rows, len(rows)), length, batch)[0] == stats, "no byte follows from the order of the log"


# ---- nights ------------------------------------------------------------------------------------------------

LENGTH = 4
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


def config(root: Path, files: list[list[Row]], **sections: Any) -> Config:
    """files: the rows of each."""
    (root / "raw").mkdir(parents=True)
    for number, rows in enumerate(files):
        (root / "raw" / f"{number}.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": str(root / "raw")},
        "negatives": {"per_positive": 1, "draws": 1, "candidates": 5},
        "sequences": {"length": LENGTH},
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
    variants: dict[str, tuple[list[list[Row]], dict[str, Any]]] = {
        "as it is": ([LOG], {}),
        "shuffled, in three files, more partitions than files": (
            [shuffled[n::3] for n in range(3)], {"spark": {"shuffle_partitions": 13}},
        ),
        "without": ([LOG], {"sequences": {"length": 0}}),
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


def test_order_files_and_partitions_change_no_byte(nights: Nights) -> None:
    first, other = nights("as it is"), nights("shuffled, in three files, more partitions than files")
    assert first.manifest.run_key != other.manifest.run_key
    assert first.manifest.facts == other.manifest.facts
    assert first.manifest.tables == other.manifest.tables


def test_no_other_table_knows_of_them(nights: Nights) -> None:
    """A night without the tables of order has the same bytes in all others, and the same facts."""
    night, without = nights("as it is"), nights("without")
    more = {"sequences", "recent"}
    assert set(night.manifest.tables) == set(without.manifest.tables) | more
    assert {n: t for n, t in night.manifest.tables.items() if n not in more} == without.manifest.tables
    assert {n: f for n, f in night.manifest.facts.items() if n != "sequences"} == without.manifest.facts
