"""The job prepare, on a small log that has everything a real one has: the tables are what a reader of the log would
work out by hand, and their bytes follow from the log and the config alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
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
from ncf_dist.ancestry import DIGESTS, digest_of
from ncf_dist.config import Config, Layout, Negatives, Split
from ncf_dist.errors import ContractError, InputError
from ncf_dist.inputs import Listing
from ncf_dist.lake import Lake
from ncf_dist.manifests import read_manifest
from ncf_dist.prepare import index, layout
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import select_files
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.prepare.splits import SplitRule
from ncf_dist.prepare.user_blocks import Block, deduplicate, whole_users
from ncf_dist.prepare.user_files import order_bucket
from ncf_dist.prepare.user_tables import UserPass, user_pass
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import Purpose, hash64, negatives
from tests.nights import Night, run

law = settings(deadline=None, max_examples=40)
BEFORE_FIRST = "2025-12-31"
FIRST, SECOND = "2026-01-01", "2026-01-02"
SECOND_US = 1_000_000
SEED, PER_POSITIVE, DRAWS, CANDIDATES, ROWS_PER_FILE = 3, 2, 2, 12, 50
TRAIN, VALIDATION, TEST = contracts.TRAIN_SPLIT, contracts.VALIDATION_SPLIT, contracts.TEST_SPLIT
Row = tuple[int, int, int, int]
Fields = tuple[str, ...]

# ---- the log -----------------------------------------------------------------------------------------------

ITEMS = [5 * n + 3 for n in range(40)]
ONLY_IN_TEST = 9999
UNTITLED = ITEMS[7]
TITLES = {item: f"Title {item} (1999)" for item in [*ITEMS, ONLY_IN_TEST] if item != UNTITLED} | {
    ITEMS[0]: "Amélie, or: what's next? (2001)",
    ITEMS[1]: '"Quoted", and more',
    77777: "Nobody has seen it",
}
BAD: dict[Fields, str] = {
    ("1", "2", "3"): "too few fields",
    ("",): "too few fields",
    ("1", "2", "3", "4", "5"): "too many fields",
    ("", "2", "3", "4"): "empty user id",
    ("1", " ", "3", "4"): "empty item id",
    ("one", "2", "3", "4"): "user id is not an integer",
    ("1.5", "2", "3", "4"): "user id is not an integer",
    ("9223372036854775808", "2", "3", "4"): "user id is not an integer",
    ("x" * 1500, "2", "3", "4"): "user id is not an integer",
    ("caf\udce9", "2", "3", "4"): "text is not in the charset",  # the byte E9, which is not UTF-8
    ("1", "B002", "3", "4"): "item id is not an integer",
    ("1", "2", "good", "4"): "rating is not a number",
    ("1", "2", "", "4"): "rating is not a number",
    ("1", "2", "5d", "4"): "rating is not a number",
    ("1", "2", "0x1p3", "4"): "rating is not a number",
    ("1", "2", "NaN", "4"): "rating is not finite",
    ("1", "2", "1e39", "4"): "rating is not finite",
    ("1", "2", "-Infinity", "4"): "rating is not finite",
    ("1", "2", "3", "noon"): "timestamp is not an integer",
    ("1", "2", "3", "4.5.6"): "timestamp is not an integer",
    ("1", "2", "3", "-1"): "timestamp is negative",
}


def good_rows() -> list[Row]:
    """(user, item, rating, time): times within a minute, so that most users have ties; repeats of one row in ten."""
    draw = random.Random(1)
    sizes = [1, 2, 3, 38, 40, *[draw.randint(4, 20) for _ in range(15)]]
    rows = [
        (1000 - 7 * user, item, draw.randint(1, 5), draw.randint(0, 60))
        for user, size in enumerate(sizes)
        for item in draw.sample(ITEMS, size)
    ]
    again = [(user, item, draw.randint(1, 5), t + draw.randint(-1, 1)) for user, item, _, t in rows[::10] if t]
    return [*rows, *again, (1000 - 7 * 9, ONLY_IN_TEST, 5, 10**9)]


GOOD = good_rows()
DISTINCT = len({(user, item) for user, item, _, _ in GOOD})
SEPARATORS = {"movielens-dat": "::", "movielens-tsv": "\t", "movielens-csv": ","}


def lines(separator: str, rows: list[Row] = GOOD) -> list[str]:
    """The log, its good and bad lines mixed."""
    fields = [tuple(map(str, row)) for row in rows] + list(BAD)
    return [separator.join(line) for line in random.Random(2).sample(fields, len(fields))]


def shown(separator: str, fields: Fields) -> str:
    """A bad line in the quarantine: 1,000 characters of it, readable."""
    return separator.join(fields)[:1000].replace("\udce9", "\ufffd")


def write_log(folder: Path, name: str, rows: list[str], end: str = "\n") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(row + end for row in rows).encode(errors="surrogateescape"))
    return path


def write_dat(folder: Path, rows: list[Row] = GOOD) -> tuple[Path, Path]:
    """A folder as GroupLens packs it; (input.path, input.items)."""
    write_log(folder, "ratings.dat", lines("::", rows))
    write_log(folder, "users.dat", ["1::F::1::10::48067"])
    titles = folder / "movies.dat"
    titles.write_text("".join(f"{item}::{title}::Drama\n" for item, title in TITLES.items()), encoding="ISO-8859-1")
    return folder, titles


def write_shuffled_tsv(folder: Path) -> tuple[Path, Path]:
    """The same lines in another order, in three files, one with the line ends of Windows."""
    rows = random.Random(5).sample(lines("\t"), len(lines("\t")))
    for n, name in enumerate(["z.tsv", "u.data", "deep/er.tsv"]):
        write_log(folder, name, rows[n::3], end="\r\n" if n == 1 else "\n")
    titles = folder / "u.item"
    titles.write_text("".join(f"{item}|{title}|x|\n" for item, title in TITLES.items()), encoding="ISO-8859-1")
    return folder, titles


def write_csv(folder: Path) -> tuple[Path, Path]:
    path = write_log(folder, "ratings.csv", ["userId,movieId,rating,timestamp", *lines(",")])
    quoted = [f'{item},"{title.replace(chr(34), chr(34) * 2)}",Drama' for item, title in TITLES.items()]
    return path, write_log(folder, "movies.csv", ["movieId,title,genres", *quoted])


# ---- the line ----------------------------------------------------------------------------------------------


def small(root: Path, path: Path, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": str(path), "max_bad_fraction": 0.5},
        "negatives": {"per_positive": PER_POSITIVE, "draws": DRAWS, "candidates": CANDIDATES},
        "layout": {"min_files": 4, "rows_per_file": ROWS_PER_FILE},
        "spark": {"shuffle_partitions": 2},
        "seed": SEED,
    }
    for name, values in sections.items():
        tree[name] = tree[name] | values
    return Config.model_validate(tree)


Writer = Callable[[Path], tuple[Path, Path]]
Nights = Callable[[str], Night]
VARIANTS: dict[str, tuple[Writer, str, int]] = {
    "as it is": (write_dat, "movielens-dat", 2),
    "shuffled, in three files with tabs, one partition": (write_shuffled_tsv, "movielens-tsv", 1),
    "with commas, more partitions than files": (write_csv, "movielens-csv", 13),
}


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """The finished run of a variant of the log, made when first asked for."""
    made: dict[str, Night] = {}

    def night(variant: str) -> Night:
        if variant not in made:
            write, form, partitions = VARIANTS[variant]
            root = tmp_path_factory.mktemp("night")
            path, titles = write(root / "raw")
            source = {"format": form, "items": str(titles)}
            made[variant] = run(small(root, path, input=source, spark={"shuffle_partitions": partitions}))
        return made[variant]

    return night


@pytest.fixture
def night(nights: Nights) -> Night:
    return nights("as it is")


# ---- every row is accounted for ----------------------------------------------------------------------------


def test_input_is_accepted_plus_duplicates_plus_quarantined(night: Night) -> None:
    rows = night.outcome.extra["rows"]
    assert rows == {
        "input": len(GOOD) + len(BAD),
        "accepted": DISTINCT,
        "duplicates": len(GOOD) - DISTINCT,
        "quarantined": dict(Counter(BAD.values())),
    }
    assert rows["input"] == rows["accepted"] + rows["duplicates"] + sum(rows["quarantined"].values())
    assert len(GOOD) > DISTINCT
    assert len(night.rows("interactions")) == DISTINCT


def test_every_bad_line_is_kept_with_its_file_and_the_first_thing_wrong_with_it(night: Night) -> None:
    found = night.rows("quarantine")
    [file] = {row[0] for row in found}
    assert file == f"{night.config.input.path}/ratings.dat"
    data = Path(file).read_bytes()
    for _, place, reason, raw in found:
        line = data[place:].split(b"\n")[0]
        assert place == 0 or data[place - 1 : place] == b"\n"
        assert line.decode(errors="replace")[:1000] == raw
        assert reason == BAD[tuple(line.decode(errors="surrogateescape").split("::"))]
    assert len(found) == len(BAD)


def test_train_validation_and_test_are_the_accepted_rows_and_disjoint(night: Night) -> None:
    positives = {name: [row[:2] for row in night.rows(name)] for name in ("train", "validation", "test")}
    ratings = {row[:2]: row[2] for row in night.rows("interactions")}
    assert all(row[2] == ratings[row[:2]] for name in ("validation", "test") for row in night.rows(name))
    together = [pair for pairs in positives.values() for pair in pairs]
    assert len(together) == len(set(together)) == DISTINCT
    assert set(together) == {row[:2] for row in night.rows("interactions")}
    facts = night.manifest.facts
    assert {name: len(pairs) for name, pairs in positives.items()} == {name: facts[name] for name in positives}


# ---- what a reader of the log would work out by hand -------------------------------------------------------


def by_hand(rows: list[Row], user_idx: dict[int, int], item_idx: dict[int, int]) -> list[tuple[Any, ...]]:
    """The interactions table: latest, then highest of repeats; test the latest, validation the one before."""
    kept: dict[tuple[int, int], tuple[int, int]] = {}
    for user, item, rating, time in rows:
        pair = (user_idx[user], item_idx[item])
        kept[pair] = max(kept.get(pair, (-1, -1)), (time, rating))
    table = []
    for user in {user for user, _ in kept}:
        order = sorted(
            (time, hash64(SEED, int(Purpose.TIME_TIE), user, item), item)
            for (other, item), (time, _) in kept.items()
            if other == user
        )
        split = {order[-1][2]: TEST, order[-2][2]: VALIDATION} if len(order) >= 3 else {}
        table += [
            (user, item, float(kept[user, item][1]), time * SECOND_US, split.get(item, TRAIN))
            for time, _, item in order
        ]
    return sorted(table)


def test_interactions_are_what_one_works_out_by_hand(night: Night) -> None:
    assert night.rows("interactions") == by_hand(GOOD, night.index("user"), night.index("item"))


def test_users_with_too_few_items_keep_them_in_train(night: Night) -> None:
    held_out = {user for user, *_ in night.rows("test")}
    assert held_out == {user for user, *_ in night.rows("validation")}
    per_user = Counter(user for user, *_ in night.rows("interactions"))
    assert held_out == {user for user, items in per_user.items() if items >= 3}
    assert sorted(per_user.values())[:3] == [1, 2, 3]


def test_history_is_train_and_validation_and_apart_from_them_test(night: Night) -> None:
    seen, test = night.items_by_user(TRAIN, VALIDATION), night.items_by_user(TEST)
    assert night.rows("history") == [(user, sorted(seen[user]), sorted(test[user])) for user in sorted(seen)]


def test_item_stats_count_train_and_validation_of_every_item(night: Night) -> None:
    counts = Counter(item for _, item, _, _, split in night.rows("interactions") if split != TEST)
    items = night.index("item")
    assert night.rows("item_stats") == [(item, counts[item]) for item in range(len(items))]
    assert counts[items[ONLY_IN_TEST]] == 0


@pytest.mark.parametrize(("side", "ids"), [("user", {r[0] for r in GOOD}), ("item", {r[1] for r in GOOD})])
def test_an_index_is_dense_and_holds_every_accepted_id_once(night: Night, side: str, ids: set[int]) -> None:
    rows = night.rows(f"{side}_index")
    assert {key for key, _ in rows} == ids
    assert sorted(number for _, number in rows) == list(range(len(ids)))


def test_titles_are_kept_as_they_came_and_an_item_without_one_shows_its_id(night: Night) -> None:
    items = night.index("item")
    assert night.rows("items") == [
        (number, item, TITLES.get(item, str(item))) for item, number in sorted(items.items(), key=lambda pair: pair[1])
    ]
    assert (items[UNTITLED], UNTITLED, str(UNTITLED)) in night.rows("items")


def test_no_negative_is_in_the_users_train_items(night: Night) -> None:
    seen, n_items = night.items_by_user(TRAIN), len(night.index("item"))
    drawn = [contracts.negative_column(d, s) for d in range(DRAWS) for s in range(PER_POSITIVE)]
    for row in night.train_rows:
        negative = {row[column] for column in drawn}
        assert not negative & seen[row["user_idx"]]
        assert all(0 <= item < n_items for item in negative)


def test_negatives_are_those_of_the_sampler(night: Night) -> None:
    rows, n_items = sorted(night.train_rows, key=lambda r: (r["user_idx"], r["item_idx"])), len(night.index("item"))
    user, item = (np.array([row[c] for row in rows]) for c in ("user_idx", "item_idx"))
    _, row, counts = np.unique(user, return_inverse=True, return_counts=True)
    for draw in range(DRAWS):
        for slot in range(PER_POSITIVE):
            offsets = np.concatenate([[0], np.cumsum(counts)])
            expected = negatives(SEED, draw, slot, user, item, row, item, offsets, n_items)
            assert [r[contracts.negative_column(draw, slot)] for r in rows] == expected.tolist()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_candidates_are_distinct_and_never_interacted_with(night: Night, name: str) -> None:
    everything, n_items, short = night.items_by_user(TRAIN, VALIDATION, TEST), len(night.index("item")), 0
    for user, _, _, found in night.rows(name):
        unseen = n_items - len(everything[user])
        assert len(found) == len(set(found)) == min(CANDIDATES, unseen)
        assert not set(found) & everything[user]
        short += unseen < CANDIDATES
    assert short == night.manifest.facts[f"{name}_short_candidates"] > 0


# ---- layout ------------------------------------------------------------------------------------------------


def test_train_files_are_equal_one_row_group_each_and_in_hashed_order(night: Night) -> None:
    tables, paths = night.stored("train"), night.manifest.files("train")
    total = sum(table.num_rows for table in tables)
    assert len(tables) == math.ceil(total / ROWS_PER_FILE / 8) * 8 > 4, "a multiple of 8 ranks"
    sizes = {table.num_rows for table in tables}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= ROWS_PER_FILE
    assert [pq.ParquetFile(path).metadata.num_row_groups for path in paths] == [1] * len(paths)
    user, item = (np.concatenate([table[c].to_numpy() for table in tables]) for c in ("user_idx", "item_idx"))
    order = hash64(SEED, int(Purpose.TRAIN_ORDER), user.astype(np.int64), item.astype(np.int64))
    assert (np.diff(order) >= 0).all()


def test_the_run_holds_what_its_manifest_lists_and_nothing_else(night: Night) -> None:
    root = Path(night.manifest.root)
    listed = {Path(path) for name in night.manifest.tables for path in night.manifest.files(name)}
    assert {path for path in root.rglob("*") if path.is_file()} == listed | {root / "manifest.json"}
    for name, table in night.manifest.tables.items():
        for path, file in zip(night.manifest.files(name), table.files, strict=True):
            data = Path(path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
            assert pq.ParquetFile(path).metadata.num_rows == file.rows


def test_every_table_fits_its_contract_and_is_sorted_by_its_key(night: Night) -> None:
    made = (
        contracts.user_index(pa.int64()),
        contracts.item_index(pa.int64()),
        contracts.items(pa.int64()),
        contracts.INTERACTIONS,
        contracts.HISTORY,
        contracts.VALIDATION,
        contracts.TEST,
        contracts.ITEM_STATS,
        contracts.QUARANTINE,
        contracts.train(PER_POSITIVE, DRAWS),
    )
    assert {contract.name for contract in made} == set(night.manifest.tables)
    for contract in made:
        night.manifest.table(contract)
        for table in night.stored(contract.name):
            assert table.schema.equals(contract.schema)
            keys = list(zip(*[table[name].to_pylist() for name in contract.key], strict=True))
            if contract.name != "train":
                assert keys == sorted(set(keys))


# ---- the same bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_order_files_partitions_and_format_change_no_byte(nights: Nights, variant: str) -> None:
    """Except in the quarantine, which names the file and quotes the line."""
    first, other = nights("as it is"), nights(variant)
    assert first.manifest.run_key != other.manifest.run_key
    assert first.manifest.facts == other.manifest.facts
    for name, table in first.manifest.tables.items():
        if name != "quarantine":
            assert table == other.manifest.tables[name], name
    separator = SEPARATORS[other.config.input.format]
    assert sorted((reason, raw) for _, _, reason, raw in other.rows("quarantine")) == sorted(
        (reason, shown(separator, fields)) for fields, reason in BAD.items()
    )


# ---- night after night -------------------------------------------------------------------------------------


def test_a_second_night_keeps_every_index_and_appends(night: Night) -> None:
    """The log has grown by old and new users and items, new ids on both sides of the old ones."""
    before = dict(night.manifest.tables)
    grown = [(1, 1, 5, 70), (1, ITEMS[0], 4, 71), (5000, 1, 3, 72), (1000, 9000, 2, 73), (1000, 2, 2, 74)]
    folder = Path(night.config.paths.lake).parent / "grown"
    path, _ = write_dat(folder, [*GOOD, *grown])
    after = run(small(folder.parent, path), SECOND)
    assert after.outcome.status == "done"
    for side, new in (("user", {1, 5000}), ("item", {1, 2, 9000})):
        old, found = night.index(side), after.index(side)
        assert found.items() >= old.items()
        assert {found[key] for key in new} == set(range(len(old), len(old) + len(new)))
        assert found.keys() == old.keys() | new
        said = after.manifest.facts[DIGESTS][f"{side}s"]
        assert said == digest_of(after.manifest.files(f"{side}_index"), len(found)), "added up while it was written"
        assert night.manifest.facts[DIGESTS][f"{side}s"] == digest_of(after.manifest.files(f"{side}_index"), len(old))
    assert after.rows("interactions") == by_hand([*GOOD, *grown], after.index("user"), after.index("item"))

    for config, ds, made in ((after.config, SECOND, after), (night.config, FIRST, night)):
        replay = prepare(config, ds)
        assert replay.status == "already-done"
        assert (replay.run_key, replay.outputs, replay.extra) == (
            made.outcome.run_key,
            made.outcome.outputs,
            made.outcome.extra,
        )
    assert read_manifest(night.manifest.root).tables == before

    prepare(night.config, BEFORE_FIRST)
    assert prepare(night.config, FIRST).status == "already-done", "a night made up for later renumbered a later one"


def test_an_index_extends_another_by_the_new_keys_alone(spark: SparkSession) -> None:
    def extended(keys: list[str], old: dict[str, int]) -> dict[str, int]:
        frame = spark.createDataFrame([(key,) for key in keys], "item_id string")
        table = spark.createDataFrame(list(old.items()), "item_id string, item_idx int")
        longer, size = index.extend_index(spark, frame, table, len(old), "item_id", "item_idx")
        rows = longer.collect()
        assert size == len(rows)
        assert len(rows) == len(dict(rows))
        return {row["item_id"]: row["item_idx"] for row in rows}

    old = {"b": 1, "a": 0}
    found = extended(["z", "a", "", "é", "z"], old)
    assert found.items() >= old.items()
    assert {found[key] for key in ("", "z", "é")} == {2, 3, 4}


def test_new_keys_are_numbered_by_bucket_and_in_a_bucket_by_value(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order they come in; with 3 buckets for 50 keys, so that there is an order to keep."""
    monkeypatch.setattr(index, "BUCKETS", 3)
    keys = spark.createDataFrame([(key,) for key in random.Random(1).sample(range(50), 50)], "item_id long")
    found = dict(map(tuple, index.extend_index(spark, keys, None, 0, "item_id", "item_idx")[0].collect()))
    order = sorted(range(50), key=lambda key: (hash64(key) % 3, key))
    assert found == {key: number for number, key in enumerate(order)}


def test_more_keys_than_an_int32_counts_are_refused(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "INT32_MAX", 3)
    old = spark.range(2).selectExpr("id as user_id", "int(id) as user_idx")
    index.extend_index(spark, spark.range(3).selectExpr("id as user_id"), old, 2, "user_id", "user_idx")
    with pytest.raises(InputError, match="user_idx: 4 distinct user_id do not fit int32; needed at most 3"):
        index.extend_index(spark, spark.range(4).selectExpr("id as user_id"), old, 2, "user_id", "user_idx")


# ---- input that cannot be used -----------------------------------------------------------------------------


def refused(config: Config) -> str:
    """The message; a refused run leaves nothing that a later job could take for a run."""
    with pytest.raises(InputError) as error:
        prepare(config, FIRST)
    with pytest.raises(ContractError, match="run the job prepare first"):
        Lake(config.paths.lake).stage(FIRST, "prepare").newest()
    return str(error.value)


def test_too_many_bad_rows_exit_with_all_of_them_to_look_at(spark: SparkSession, tmp_path: Path) -> None:
    """The same log passes at its own share of bad rows (the night above allows more) and fails just below."""
    path, _ = write_dat(tmp_path / "raw")
    share = len(BAD) / (len(GOOD) + len(BAD))
    message = refused(small(tmp_path, path, input={"max_bad_fraction": share - 1e-6}))
    assert f"{len(BAD)} of {len(GOOD) + len(BAD)} rows ({share:.1%})" in message
    assert ("raise input.max_bad_fraction" in message) == (share < 1 / 2), "where most rows fit, so does the config"
    assert "'timestamp is negative': 1" in message
    folder = Path(message.rpartition(" are in ")[2])
    stored = [row for file in folder.iterdir() for row in pq.ParquetFile(file).read().to_pylist()]
    assert Counter(row["reason"] for row in stored) == Counter(BAD.values())


def test_another_format_shows_a_line_and_what_was_needed(spark: SparkSession, tmp_path: Path) -> None:
    path = write_log(tmp_path, "ratings.dat", ["1\t2\t3\t4"] * 3)
    message = refused(small(tmp_path, path, input={"max_bad_fraction": 0.01}))
    assert "3 of 3 rows (100.0%)" in message
    assert "'too few fields': 3" in message
    assert f"byte 0 of {path} (too few fields); needed lines like '1::1193::5::978300760'" in message
    assert "1\t2\t3\t4" not in message, "what a row holds names a person: it is in the quarantine"
    assert "set input.format" in message


@pytest.mark.parametrize(
    ("name", "rows", "form"),
    [("ratings.dat", [], "movielens-dat"), ("ratings.csv", ["userId,movieId,rating,timestamp"], "movielens-csv")],
)
def test_a_log_without_rows_is_refused(
    spark: SparkSession, tmp_path: Path, name: str, rows: list[str], form: str
) -> None:
    path = write_log(tmp_path, name, rows)
    assert f"{name} is empty (0 rows)" in refused(small(tmp_path, path, input={"format": form}))


def test_a_log_without_positives_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = write_log(tmp_path, "ratings.dat", ["1::2::3::4", "1::3::2::5"])
    message = refused(small(tmp_path, path, input={"min_rating": 3.5}))
    assert "has no row left (2 rows read, {'below min_rating': 2} left out); needed at least one" in message


def test_a_missing_log_and_a_folder_of_other_files_are_refused(tmp_path: Path) -> None:
    assert "matches no file" in refused(small(tmp_path, tmp_path / "nowhere"))
    for name in ("movies.csv", "readme.txt", "users.dat"):
        write_log(tmp_path / "raw", name, ["x"])
    message = refused(small(tmp_path, tmp_path / "raw"))
    assert "input folder holds movies.csv, readme.txt, users.dat: no file of format movielens-dat" in message
    assert "needed *.dat: set input.path to the ratings file, or input.format" in message


def test_the_smallest_log_has_every_table_and_counts_what_min_rating_leaves_out(
    spark: SparkSession, tmp_path: Path
) -> None:
    """One user who has seen the whole catalogue of one item: nothing to train on, and no error."""
    path = write_log(tmp_path, "ratings.dat", ["7::8::4::1", "7::9::1::2"])
    night = run(small(tmp_path, path, input={"min_rating": 4}))
    assert night.outcome.extra["rows"] == {
        "input": 2,
        "accepted": 2,
        "duplicates": 0,
        "quarantined": {},
        "filtered": {"below min_rating": 1},
    }
    (warning,) = night.outcome.extra["warnings"]
    assert "2 of 2 rows are from before 1995" in warning, "whoever reads the last line alone must see it"
    assert night.rows("interactions") == [(0, 0, 4.0, SECOND_US, TRAIN)]
    assert night.rows("history") == [(0, [0], [])]
    assert night.rows("item_stats") == [(0, 1)]
    assert [night.rows(name) for name in ("train", "validation", "test", "quarantine")] == [[], [], [], []]
    assert night.manifest.facts["users_without_negatives"] == 1
    assert "items" not in night.manifest.tables


# ---- steps: parse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "names", "expected"),
    [
        ("movielens-dat", ["ratings.dat", "users.dat", "movies.dat", "README"], ["ratings.dat"]),
        ("movielens-dat", ["b.dat", "a.dat"], ["b.dat", "a.dat"]),
        ("movielens-tsv", ["u.data", "u.item", "u1.base", "more.tsv"], ["u.data", "more.tsv"]),
        ("movielens-csv", ["ratings.csv", "movies.csv", "links.csv", "tags.csv"], ["ratings.csv"]),
        ("movielens-dat", ["a.dat.gz", "movies.dat.gz", "b.zip"], ["a.dat.gz"]),
        ("movielens-dat", ["ratings.dat", "tags.dat", "movies.dat", "allbut.pl"], ["ratings.dat"]),
        ("movielens-csv", ["genome-scores.csv", "genome-tags.csv", "RATINGS.CSV", "README.txt"], ["RATINGS.CSV"]),
        ("csv", ["jan.csv", "FEB.CSV", "mar.Csv.GZ", "apr.tsv"], ["jan.csv", "FEB.CSV", "mar.Csv.GZ"]),
        (
            "parquet",
            ["a.parquet.gzip", "b.snappy.parquet", "c.PARQUET", "d.parquet.crc"],
            ["a.parquet.gzip", "b.snappy.parquet", "c.PARQUET"],
        ),
        ("tsv", ["log.txt", "README.txt"], ["log.txt"]),
    ],
)
def test_of_a_folder_the_files_of_the_format_are_read(form: str, names: list[str], expected: list[str]) -> None:
    found = select_files(Listing("raw", "folder", tuple(f"raw/{name}" for name in names)), FORMATS[form], form)
    assert found == [f"raw/{name}" for name in expected]


# ---- steps: one pass over users ----------------------------------------------------------------------------

N_ITEMS = 9
LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, N_ITEMS - 1), st.sampled_from([0.0, 1.0, 4.5]), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)
Event = tuple[int, int, float, int]


def columns(rows: list[Event]) -> dict[str, np.ndarray]:
    """As Spark hands them over: ascending in user_idx, otherwise in the order they came."""
    user, item, rating, time = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    return {
        "user_idx": np.array(user, dtype=np.int32),
        "item_idx": np.array(item, dtype=np.int32),
        "rating": np.array(rating, dtype=np.float32),
        "timestamp": np.array(time, dtype=np.int64),
        "part": np.zeros(len(user), dtype=np.int8),
    }


def events(block: Block) -> list[tuple[int, int, float, int]]:
    parts = (block.user, block.item, block.rating, block.timestamp)
    return list(zip(*[part.tolist() for part in parts], strict=True))


@law
@given(LOGS)
def test_of_duplicates_the_latest_wins_then_the_highest_rating(rows: list[Event]) -> None:
    best: dict[tuple[int, int], tuple[int, float]] = {}
    for user, item, rating, time in rows:
        best[user, item] = max(best.get((user, item), (-1, 0.0)), (time, rating))
    block = deduplicate(columns(rows), N_ITEMS)
    assert events(block) == [(u, i, rating, time) for (u, i), (time, rating) in sorted(best.items())]
    assert [block.user[a:b].tolist() for a, b in pairwise(block.offsets)] == [
        [user] * sum(u == user for u, _ in best) for user in sorted({u for u, _ in best})
    ]


def test_duplicates_worked_example() -> None:
    rows = [(0, 1, 5.0, 10), (0, 1, 1.0, 20), (0, 2, 2.0, 30), (0, 2, 4.0, 30), (0, 2, 3.0, 30)]
    assert events(deduplicate(columns(rows), N_ITEMS)) == [(0, 1, 1.0, 20), (0, 2, 4.0, 30)]


def splits(rows: list[Event], seed: int = SEED) -> tuple[dict[tuple[int, int], int], int]:
    block = deduplicate(columns(rows), N_ITEMS)
    split, tied = block.split(SplitRule(Split(), seed))
    return dict(zip([(user, item) for user, item, _, _ in events(block)], split.tolist(), strict=True)), tied


def test_leave_one_out_worked_example() -> None:
    """User 0's latest is item 3, before it item 1; user 1 has too few; of user 2's last two, tied, the hash decides."""
    rows = [(0, 1, 1.0, 20), (0, 2, 1.0, 10), (0, 3, 1.0, 30), (1, 1, 1.0, 5), (1, 2, 1.0, 6)]
    tie = {item: hash64(SEED, int(Purpose.TIME_TIE), 2, item) for item in (5, 6)}
    later, earlier = sorted(tie, key=tie.__getitem__, reverse=True)
    split, tied = splits([*rows, (2, 4, 1.0, 1), (2, 5, 1.0, 9), (2, 6, 1.0, 9)])
    assert split == {
        (0, 1): VALIDATION,
        (0, 2): TRAIN,
        (0, 3): TEST,
        (1, 1): TRAIN,
        (1, 2): TRAIN,
        (2, 4): TRAIN,
        (2, later): TEST,
        (2, earlier): VALIDATION,
    }
    assert tied == 1


def test_which_of_equal_times_is_held_out_follows_the_seed() -> None:
    rows = [(0, item, 1.0, 7) for item in range(N_ITEMS)]
    held_out = {max(splits(rows, seed)[0].items(), key=lambda pair: pair[1])[0] for seed in range(1, 40)}
    assert len(held_out) > N_ITEMS // 2


@law
@given(LOGS, st.randoms(use_true_random=False))
def test_no_train_row_is_later_than_validation_and_none_of_these_than_test(rows: list[Event], random: Any) -> None:
    split, _ = splits(rows)
    assert split == splits(random.sample(rows, len(rows)))[0]
    time = {(user, item): t for user, item, _, t in events(deduplicate(columns(rows), N_ITEMS))}
    for user in {user for user, _ in split}:
        mine = {pair: code for pair, code in split.items() if pair[0] == user}
        held_out = sorted(code for code in mine.values() if code != TRAIN)
        assert held_out == ([VALIDATION, TEST] if len(mine) >= 3 else [])
        for earlier, later in ((TRAIN, VALIDATION), (VALIDATION, TEST), (TRAIN, TEST)):
            before, after = ([time[p] for p, code in mine.items() if code == which] for which in (earlier, later))
            assert not before or not after or max(before) <= min(after)


def batches(rows: dict[str, np.ndarray], cuts: list[int]) -> Iterator[pa.RecordBatch]:
    ends = sorted({0, len(rows["user_idx"]), *cuts})
    for start, end in pairwise(ends):
        yield pa.RecordBatch.from_pydict({name: values[start:end] for name, values in rows.items()})
        yield pa.RecordBatch.from_pydict({name: values[:0] for name, values in rows.items()})


@law
@given(LOGS, st.integers(1, 12), st.data())
def test_whole_users_cut_no_user_and_lose_no_row(rows: list[Event], block_rows: int, data: st.DataObject) -> None:
    whole = columns(rows)
    cuts = data.draw(st.lists(st.integers(0, len(rows))))
    blocks = list(whole_users(batches(whole, cuts), block_rows))
    for name, values in whole.items():
        assert np.concatenate([block[name] for block in blocks]).tolist() == values.tolist()
    users = [set(block["user_idx"].tolist()) for block in blocks]
    assert sum(map(len, users)) == len(set().union(*users))
    assert len(blocks) >= min(len(users), len(rows) // (block_rows + max(Counter(r[0] for r in rows).values())))


def passed(rows: list[Event], cuts: list[int], **changes: Any) -> tuple[dict[str, Any], dict[str, list[pa.Table]]]:
    """Run the pass in this process; (its statistics, its tables)."""
    with tempfile.TemporaryDirectory() as run:
        rule = SplitRule(Split(min_interactions=changes.pop("min_interactions", 3)), SEED)
        options: dict[str, Any] = {"n_items": N_ITEMS, "users_per_file": 2, "rule": rule, "seed": SEED}
        drawn = Negatives(per_positive=1, draws=1, candidates=4)
        spec = UserPass(run=run, staging=f"{run}/staging", negatives=drawn, **(options | changes))
        [batch] = user_pass(spec)(batches(columns(rows), cuts))
        stats = json.loads(batch.column("stats")[0].as_py())
        tables = {
            name: [pq.ParquetFile(f"{run}/{name}/{file['path']}").read() for file in files]
            for name, files in stats["files"].items()
        }
    return stats, tables


@settings(deadline=None, max_examples=15)
@given(LOGS, st.data())
def test_how_users_reach_the_pass_changes_no_byte_of_its_files(rows: list[Event], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(rows))))
    shuffled = data.draw(st.permutations(rows))
    assert passed(rows, [])[0] == passed(list(shuffled), cuts)[0]


def test_a_user_who_has_seen_everything_has_no_train_rows_and_is_counted() -> None:
    rows = [(0, item, 1.0, item) for item in range(3)] + [(1, 0, 1.0, 0)]
    stats, tables = passed(rows, [], n_items=3, min_interactions=4)
    assert stats["counts"]["users_without_negatives"] == 1
    assert [(row["user_idx"], row["item_idx"]) for row in tables["staging"][0].to_pylist()] == [(1, 0)]
    assert sum(table.num_rows for table in tables["interactions"]) == 3 + 1
    assert sum(stats["buckets"]["staging"]) == stats["counts"]["train"] == 1


def test_files_hold_ranges_of_users() -> None:
    _, tables = passed([(user, 0, 1.0, 0) for user in (0, 1, 2, 4, 5)], [], users_per_file=2)
    assert [table["user_idx"].to_pylist() for table in tables["history"]] == [[0, 1], [2], [4, 5]]


# ---- steps: layout -----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 100), st.sampled_from([(1,), (1, 2, 4, 8), (3, 4)]))
def test_files_share_the_rows_evenly(rows: int, rows_per_file: int, min_files: int, world: tuple[int, ...]) -> None:
    files = layout.file_count(rows, Layout(rows_per_file=rows_per_file, min_files=min_files, world_sizes=world))
    assert files == rows or all(files % size == 0 for size in world) or rows == 0
    sizes = np.diff(layout.boundaries(rows, files))
    assert sizes.sum() == rows
    assert sizes.max() - sizes.min() <= 1
    assert sizes.max() <= rows_per_file
    assert files >= min(min_files, max(1, rows))
    assert sizes.min() > 0 or rows == 0


def test_order_buckets_ascend_with_the_hash() -> None:
    hashes = np.array([-(2**63), -1, 0, 2**63 - 1])
    assert order_bucket(hashes).tolist() == [0, 2047, 2048, 4095]


@pytest.mark.parametrize(
    "buckets",
    [{0: 1, 7: 50, 8: 1, 9: 2, 4095: 46}, {2048: 100}, dict.fromkeys(range(0, 4096, 41), 1)],
    ids=["few", "one", "many"],
)
def test_a_bucket_may_lie_in_many_files(spark: SparkSession, tmp_path: Path, buckets: dict[int, int]) -> None:
    """100 rows whose hashes fall into these buckets, in 7 files of 14 or 15."""
    width, rows, contract = 2**64 // 4096, sum(buckets.values()), contracts.train(1, 1)
    hashes = [
        -(2**63) + bucket * width + random.Random(bucket).randrange(width)
        for bucket, size in buckets.items()
        for _ in range(size)
    ]
    staged = [(n % 5, n, 0, order) for n, order in enumerate(hashes)]
    frame = spark.createDataFrame(
        random.Random(1).sample(staged, rows), "user_idx int, item_idx int, neg_0_0 int, order_hash long"
    )
    counts = np.bincount(order_bucket(np.array(hashes)), minlength=4096)
    assert {n: int(size) for n, size in enumerate(counts) if size} == buckets
    table = layout.write_in_hashed_order(
        Workspace(spark, str(tmp_path)),
        frame,
        counts,
        contract,
        Layout(min_files=1, rows_per_file=15, world_sizes=(1,)),
    )
    assert [file.rows for file in table.files] == [14, 14, 14, 15, 14, 14, 15]
    stored = [pq.ParquetFile(tmp_path / "train" / file.path).read().to_pylist() for file in table.files]
    found = [(row["user_idx"], row["item_idx"]) for file in stored for row in file]
    assert found == [row[:2] for row in sorted(staged, key=lambda row: (row[3], *row[:2]))]
