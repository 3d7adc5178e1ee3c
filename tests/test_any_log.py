"""prepare on logs it does not control: formats, bad rows, filters, splits, side tables, futures, faults. Each law is
checked on the tables that were stored, against arithmetic on the log itself.
"""

from __future__ import annotations

import bz2
import csv
import datetime as dt
import gzip
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts, gateway
from ncf_dist.ancestry import DIGESTS
from ncf_dist.config import Config, Input, Split
from ncf_dist.errors import InputError, NcfError
from ncf_dist.lake import Lake
from ncf_dist.prepare import filters, source
from ncf_dist.prepare.forget import NOBODY
from ncf_dist.prepare.id_types import IdTypes
from ncf_dist.prepare.interactions import LATE
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.prepare.profile import PROFILE
from ncf_dist.prepare.run_inputs import RunInputs
from ncf_dist.prepare.side_tables import write_side_tables
from ncf_dist.prepare.splits import Cutoff, SplitRule, value_at
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.sampling import Purpose, hash64, negatives_of, prefix, weighted_gaps
from tests.nights import Night, run

ROOT = Path(__file__).parent.parent
TRAIN, VALIDATION, TEST = contracts.TRAIN_SPLIT, contracts.VALIDATION_SPLIT, contracts.TEST_SPLIT
SECOND = 1_000_000
DAY = 86_400
SEED = 3
Row = tuple[str, str, float, int]
NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
LAW = settings(deadline=None, max_examples=100)


def some_log(users: int = 30, items: int = 40, seed: int = 1, start: int = 10**9) -> list[Row]:
    """(user, item, rating, seconds), each pair once; ids beyond ASCII; a day has about three rows, at its hours."""
    draw = random.Random(seed)
    pairs = [(f"u{u}é", f"i,{i}") for u in range(users) for i in draw.sample(range(items), draw.randint(1, items // 2))]
    return [(u, i, draw.randint(1, 10) / 2, start + draw.randrange(0, len(pairs) * 8, 1) * 3600) for u, i in pairs]


LOG = some_log()


def as_csv(rows: list[Any], quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator="\n").writerows([("u", "i", "r", "t"), *rows])
    return out.getvalue().encode()


def csv_log(folder: Path, rows: list[Any], name: str = "log.csv") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(as_csv(rows))
    return str(folder / name)


def config(root: Path, path: str, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": path, "format": "csv", "columns": NAMED},
        "negatives": {"per_positive": 1, "draws": 1, "candidates": 5},
        "layout": {"min_files": 2, "world_sizes": [1, 2]},
        "spark": {"shuffle_partitions": 2},
        "seed": SEED,
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values if isinstance(values, dict) else values
    return Config.model_validate(tree)


def night_of(session: SparkSession, root: Path, rows: list[Any], ds: str = "2026-01-01", **sections: Any) -> Night:
    return run(config(root, csv_log(root / "raw", rows), **sections), ds)


def stored(night: Night) -> dict[tuple[str, str], tuple[float, int, int]]:
    """(user_id, item_id) → rating, seconds, split."""
    users, items = ({idx: key for key, idx in night.index(side).items()} for side in ("user", "item"))
    return {(users[u], items[i]): (rating, t // SECOND, split) for u, i, rating, t, split in night.rows("interactions")}


def assert_sound(night: Night) -> None:
    """The laws every night keeps, whatever its config."""
    rows = night.outcome.extra["rows"]
    assert rows["input"] == rows["accepted"] + rows["duplicates"] + sum(rows["quarantined"].values())
    kept = rows["accepted"] - sum(rows.get("filtered", {}).values())
    pairs = [[row[:2] for row in night.rows(name)] for name in ("train", "validation", "test")]
    together = [pair for part in pairs for pair in part]
    assert len(together) == len(set(together)) == kept - _without_negatives(night)
    assert set(together) <= {row[:2] for row in night.rows("interactions")}
    for side in ("user", "item"):
        index = night.index(side)
        assert sorted(index.values()) == list(range(len(index)))


def _without_negatives(night: Night) -> int:
    seen, n_items = night.items_by_user(TRAIN), len(night.index("item"))
    return sum(len(items) for items in seen.values() if len(items) == n_items and "rating" not in night.train_rows[0])


# ---- one log, eight ways -----------------------------------------------------------------------------------


def _parquet(rows: list[Row], folder: Path) -> bytes:
    u, i, r, t = (list(column) for column in zip(*rows, strict=True))
    times = pa.array(t, pa.timestamp("s")).cast(pa.timestamp("ns", "UTC"))
    table = pa.table({"t": times, "i": pa.array(i).dictionary_encode(), "r": pa.array(r, pa.float64()), "u": u})
    pq.write_table(table, folder / "x", row_group_size=100)
    data = (folder / "x").read_bytes()
    (folder / "x").unlink()
    return data


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue())


def _json(rows: list[Row], time: Callable[[int], Any]) -> bytes:
    return "".join(
        json.dumps({"u": u, "x": None, "i": i, "r": r, "t": time(t)}, ensure_ascii=n % 2 == 0) + "\n"
        for n, (u, i, r, t) in enumerate(rows)
    ).encode()


def _iso(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.timezone(dt.timedelta(hours=2))).isoformat()


WAYS: dict[str, tuple[str, Callable[[list[Row], Path], bytes], dict[str, Any]]] = {
    "csv": ("log.csv", lambda rows, _: as_csv(rows), {}),
    "csv, quoted, latin-1, bz2": (
        "log.csv.bz2",
        lambda rows, _: bz2.compress(as_csv(rows, csv.QUOTE_ALL).decode().replace("\n", "\r\n").encode("latin-1")),
        {"encoding": "latin-1"},
    ),
    "csv, milliseconds, zstd": (
        "log.csv.zst", lambda rows, _: _zstd(as_csv([(u, i, r, t * 1000) for u, i, r, t in rows])), {"time_unit": "ms"},
    ),
    "tsv": (
        "log.tsv",
        lambda rows, _: "".join(f"{t}\t{i}\t{u}\t{r}\n" for u, i, r, t in rows).encode(),
        {"format": "tsv", "columns": {"user": 2, "item": 1, "rating": 3, "timestamp": 0}},
    ),
    "::, microseconds, no final line end": (
        "log.txt",
        lambda rows, _: "\n".join(f"{u}::{i}::{r}::{t * SECOND}" for u, i, r, t in rows).encode(),
        {"format": "tsv", "separator": "::", "time_unit": "us",
         "columns": {"user": 0, "item": 1, "rating": 2, "timestamp": 3}},
    ),
    "json lines": ("log.jsonl", lambda rows, _: _json(rows, str), {"format": "jsonl"}),
    "json lines, ISO times with a zone, gzip": (
        "log.jsonl.gz", lambda rows, _: gzip.compress(_json(rows, _iso)), {"format": "jsonl", "time_unit": "iso"},
    ),
    "parquet": ("log.parquet", _parquet, {"format": "parquet"}),
}  # fmt: skip
PARTITIONS = {"tsv": 1, "json lines": 8, "parquet": 40}
"""Of Spark's shuffles, where they are not two, as for the night that these ways are compared with. 40 are more than
there are users."""


@pytest.fixture(scope="module")
def base(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Night:
    night = night_of(spark, tmp_path_factory.mktemp("base"), LOG)
    assert_sound(night)
    return night


def shuffled(spark: SparkSession, settings: Config, partitions: int) -> Night:
    """A night whose shuffles have so many partitions; afterwards the session's have as many as before."""
    usual = spark.conf.get("spark.sql.shuffle.partitions")
    more = settings.model_dump(by_alias=True) | {"spark": {"shuffle_partitions": partitions}}
    try:
        return run(Config.model_validate(more))
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", str(usual))


def assert_same_tables(night: Night, other: Night) -> None:
    """Every table, byte for byte; but for the quarantine, which names files and places."""
    assert night.manifest.facts["rows"] == other.manifest.facts["rows"]
    for name, table in night.manifest.tables.items():
        if name != "quarantine":
            assert table == other.manifest.tables[name], name


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_one_log_gives_the_same_bytes_in_eight_ways(
    base: Night, spark: SparkSession, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order, cut into two files and into units of two kilobytes, and with other partitions, too."""
    monkeypatch.setattr(source, "UNIT_BYTES", 2_000)
    name, write, options = WAYS[way]
    rows = random.Random(4).sample(LOG, len(LOG))
    for part in (0, 1):
        folder = tmp_path / "raw" / f"{part}"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(write(rows[part::2], folder))
    night = shuffled(spark, config(tmp_path, str(tmp_path / "raw"), input=options), PARTITIONS.get(way, 2))
    assert_same_tables(base, night)


# ---- faults ------------------------------------------------------------------------------------------------

FAULTS = """
import json, os, sys
from pathlib import Path

import psutil

path, root = Path(sys.argv[1]), Path(sys.argv[2])

def first(mark):
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def strike(place):
    # Once a place: the first task that gets there dies. In the last one the next that gets there takes its executor
    # with it, the JVM above the Python worker.
    if first(root / f"struck-{place}"):
        os._exit(9)
    if place == "layout" and first(root / "killed"):
        next(p for p in psutil.Process().parents() if p.name() == "java").kill()

from ncf_dist.prepare import ingest, layout, user_tables
from ncf_dist import spark_io

def dying(module, name, place):
    whole = getattr(module, name)
    def run(*args, **kwargs):
        strike(place)
        return whole(*args, **kwargs)
    setattr(module, name, run)

dying(ingest, "read_one", "read")
dying(user_tables, "deduplicate", "users")
dying(layout, "runs_of", "layout")

from ncf_dist.config import Config
from ncf_dist.prepare.pipeline import prepare

config = Config.model_validate_json(path.read_text())
with spark_io.spark_session("faults", config.spark) as spark:
    spark.sparkContext.setLogLevel("OFF")
    prepare(config, "2026-01-01")
assert len(list(root.glob("struck-*"))) == 3 and (root / "killed").exists()
"""


@pytest.mark.soak
@pytest.mark.parametrize("partitions", [40, 200])
def test_more_partitions_than_users_change_no_byte(
    base: Night, spark: SparkSession, tmp_path: Path, partitions: int
) -> None:
    """One, eight and 40 are among the eight ways."""
    log = csv_log(tmp_path / "raw", LOG)
    assert_same_tables(base, shuffled(spark, config(tmp_path, log), partitions))


@pytest.mark.slow
@pytest.mark.parametrize("executors", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_killed_tasks_and_executors_change_no_byte(base: Night, tmp_path: Path, executors: int) -> None:
    """A Python worker dies in each of the three passes, and then an executor, with the shuffle files it had written:
    where it is the only one, with all of them."""
    master = {"master": f"local-cluster[{executors},{2 // executors},1024]", "executor_memory": "1g"}
    settings = config(tmp_path, csv_log(tmp_path / "raw", LOG), spark=master)
    (tmp_path / "config.json").write_text(settings.model_dump_json(by_alias=True))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK", "PYSPARK"))}
    spark = {"SPARK_HOME": str(Path(pyspark.__file__).parent), "SPARK_WORKER_DIR": str(tmp_path / "workers")}
    # The executors' JVMs live for seconds, too.
    quick = f"{gateway.QUICK} -Dspark.executor.defaultJavaOptions={gateway.QUICK}"
    env |= {"PYTHONPATH": str(ROOT), "SPARK_SUBMIT_OPTS": quick, **spark}
    command = [sys.executable, "-c", FAULTS, str(tmp_path / "config.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = Lake(settings.paths.lake).stage("2026-01-01", "prepare").newest()
    for name, table in base.manifest.tables.items():
        if name != "quarantine":
            assert table == manifest.tables[name], name
    for fact in (DIGESTS, PROFILE):
        assert base.manifest.facts[fact] == manifest.facts[fact], "counted once, however often a task ran"


# ---- bad rows ----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, str]] = {
    "short": ("7,8,3", "too few fields"),
    "long": ("7,8,3,4,5", "too many fields"),
    "wrong type": ("seven,8,3,4", "user id is not an integer"),
    "empty id": ("7,,3,4", "empty item id"),
    "not a number": ("7,8,NaN,4", "rating is not finite"),
    "infinite": ("7,8,Infinity,4", "rating is not finite"),
    "out of range": ("7,8,5.5,4", "rating is out of range"),
    "negative time": ("7,8,3,-4", "timestamp is negative"),
    "implausible time": ("7,8,3,1700000000000", "timestamp is after the year 2199"),
    "wrong charset": ("7,8\udcff,3,4", "text is not in the charset"),
    "oversized": ("7,8,3," + "4" * 300, "line is too long"),
    "null key": ("NULL,8,3,4", "user id is null"),
}


def spoiled(root: Path, bad_each: int, late: int = 0) -> tuple[Path, int, Counter[str]]:
    """(path, rows, bad rows by reason) of a log of 1,200 rows."""
    bad = [KINDS[kind] for kind in KINDS for _ in range(bad_each)]
    good = [f"{n % 40},{n // 40},{n % 5 + 1},{10**9 + n}" for n in range(1_200 - len(bad) - late)]
    future = [(f"{n},3,4,{1_767_225_600 + n}", LATE) for n in range(late)]  # from 2026-01-01 00:00 UTC on
    lines = random.Random(2).sample([*good, *(line for line, _ in (*bad, *future))], 1_200)
    path = root / "log.csv"
    path.write_bytes("\n".join(["u,i,r,t", *lines]).encode(errors="surrogateescape"))
    return path, 1_200, Counter(reason for _, reason in (*bad, *future))


STRICT = {"user_type": "int", "item_type": "int", "rating_range": [1, 5], "max_line_bytes": 200}


def test_every_kind_of_bad_row_at_one_percent_is_in_the_quarantine(spark: SparkSession, tmp_path: Path) -> None:
    """12 kinds, one each: 1 % of 1,200 rows."""
    path, rows, reasons = spoiled(tmp_path, 1)
    night = run(config(tmp_path, str(path), input=STRICT))
    assert night.outcome.extra["rows"] == {
        "input": rows, "accepted": rows - 12, "duplicates": 0, "quarantined": dict(reasons)
    }  # fmt: skip
    assert_sound(night)
    lines = path.read_bytes().split(b"\n")
    starts = np.cumsum([0, *[len(line) + 1 for line in lines]])
    found = {place: (reason, raw) for _, place, reason, raw in night.rows("quarantine")}
    assert len(found) == 12
    for bad, reason in KINDS.values():
        raw = bad.encode(errors="surrogateescape")
        assert found[starts[lines.index(raw)]] == (reason, raw.decode(errors="replace"))


def test_line_breaks_in_fields_give_one_row_each_wherever_the_log_is_cut(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes that hold whole lines of the log, in ranges that begin inside them: some are read again, no half is a row.
    The item table has such notes too."""
    monkeypatch.setattr(source, "UNIT_BYTES", 3_000)
    lines = [f'{n % 40},{n // 40},4,{10**9 + n},"as\n9999,501,5,1710000000,fine\nsaid ""{n}"""' for n in range(400)]
    (tmp_path / "log.csv").write_text("\n".join(["u,i,r,t,note", *lines]))
    (tmp_path / "items.csv").write_text("id,title\n" + "".join(f'{n},"Film\n{n},""x"""\n' for n in range(10)) * 30)
    items = {"path": str(tmp_path / "items.csv"), "id": "id", "title": "title"}
    night = run(config(tmp_path, str(tmp_path / "log.csv"), input={"items": items}))
    assert night.outcome.extra["rows"] == {"input": 400, "accepted": 400, "duplicates": 0, "quarantined": {}}
    assert set(night.index("user")) == {str(n) for n in range(40)}
    assert {row[2] for row in night.rows("items")} == {f'Film\n{n},"x"' for n in range(10)}
    assert_sound(night)


def test_at_two_percent_nothing_but_the_quarantine_is_written(spark: SparkSession, tmp_path: Path) -> None:
    path, rows, reasons = spoiled(tmp_path, 2)
    settings = config(tmp_path, str(path), input=STRICT)
    with pytest.raises(InputError, match=f"24 of {rows:,} rows \\(2.0%\\)") as error:
        prepare(settings, "2026-01-01")
    assert error.value.exit_code == 3
    runs = tmp_path / "lake" / "runs" / "2026-01-01" / "prepare"
    [left] = runs.iterdir()
    assert {p.name for p in left.iterdir()} == {"quarantine"}
    table = [row for file in (left / "quarantine").iterdir() for row in pq.ParquetFile(file).read().to_pylist()]
    assert Counter(row["reason"] for row in table) == reasons


# ---- time --------------------------------------------------------------------------------------------------


def test_rows_from_the_future_change_no_byte_of_the_tables(base: Night, spark: SparkSession, tmp_path: Path) -> None:
    """More rows from ds on than from before it: a night sees what happened before it, and is no error."""
    midnight = 1_767_225_600
    future = [(f"new{n}", f"new{n % 7}", 5.0, midnight + n) for n in range(2 * len(LOG))]
    night = night_of(spark, tmp_path, random.Random(1).sample([*LOG, *future], len(LOG) + len(future)))
    assert night.outcome.extra["rows"]["quarantined"] == {LATE: len(future)}
    for name, table in base.manifest.tables.items():
        if name != "quarantine":
            assert table == night.manifest.tables[name], name


def test_a_log_that_only_has_a_future_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"all \d+ rows .* are from 1999-01-01 on; .*check --ds, input.until"):
        night_of(spark, tmp_path, LOG, ds="1999-01-01")


@pytest.mark.slow
@pytest.mark.parametrize("n_nights", [3, pytest.param(40, marks=pytest.mark.soak)])
def test_nights_of_a_growing_log(spark: SparkSession, tmp_path: Path, n_nights: int) -> None:
    """Each night some old and new users and items: no index changes, none is missing, none is given twice; a night
    made again in another lake, from the same nights before it, has the same bytes."""
    start = int(dt.datetime(2025, 12, 1, tzinfo=dt.timezone.utc).timestamp())
    draw, log, nights = random.Random(5), list[Row](), list[Night]()
    indexes: dict[str, dict[str, int]] = {"user": {}, "item": {}}
    for day in range(n_nights):
        for _ in range(30):
            user, item = draw.randrange(10 + 3 * day), draw.randrange(10 + 2 * day)
            log.append((f"u{user}", f"i{item}", 4.0, start + day * DAY + draw.randrange(DAY)))
        ds = (dt.date(2025, 12, 2) + dt.timedelta(days=day)).isoformat()
        night = night_of(spark, tmp_path, random.Random(day).sample(log, len(log)), ds=ds)
        for side, before in indexes.items():
            found = night.index(side)
            assert found.items() >= before.items()
            assert sorted(found.values()) == list(range(len(found)))
            assert found.keys() == {row[("user", "item").index(side)] for row in log}
            indexes[side] = found
        nights.append(night)
    assert len(indexes["user"]) > 2 * n_nights
    again, (first, second) = tmp_path / "again", (night.manifest.ds for night in nights[:2])
    shutil.copytree(tmp_path / "lake/runs" / first, again / "lake/runs" / first)
    path = csv_log(again / "raw", [row for row in log if row[3] < _midnight(second)])
    assert_same_tables(nights[1], run(config(again, path), second))


def _midnight(ds: str) -> int:
    return int(dt.datetime.fromisoformat(ds).replace(tzinfo=dt.timezone.utc).timestamp())


# ---- filters -----------------------------------------------------------------------------------------------


def core_by_hand(pairs: set[tuple[str, str]], k: int) -> set[tuple[str, str]]:
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = {(u, i) for u, i in pairs if users[u] >= k and items[i] >= k}
        if kept == pairs:
            return pairs
        pairs = kept


def test_filters_leave_out_what_they_name_and_count_it(spark: SparkSession, tmp_path: Path) -> None:
    """In order: the latest row of a pair stands; since, deny, min_rating; then the cap; then the core."""
    draw = random.Random(9)
    again = [(u, i, draw.randint(1, 10) / 2, t + draw.choice([-DAY, DAY])) for u, i, _, t in LOG[::4]]
    rows = [*LOG, *again]
    since, deny = dt.date(2001, 9, 20), LOG[0][1]
    night = night_of(
        spark, tmp_path, rows,
        input={"since": since, "deny_items": [deny], "min_rating": 2, "max_user_interactions": 9, "k_core": 3},
    )  # fmt: skip
    latest: dict[tuple[str, str], tuple[int, float]] = {}
    for u, i, r, t in rows:
        latest[u, i] = max(latest.get((u, i), (-1, 0.0)), (t, r))
    left, out = dict(latest), Counter[str]()
    for name, bad in {
        "before since": lambda u, i, t, r: t < _midnight(str(since)),
        "in deny_items": lambda u, i, t, r: i == deny,
        "below min_rating": lambda u, i, t, r: r < 2,
    }.items():
        gone = [pair for pair, (t, r) in left.items() if bad(*pair, t, r)]
        out[name] = len(gone)
        left = {pair: value for pair, value in left.items() if pair not in gone}
    by_user: dict[str, list[int]] = defaultdict(list)
    for (u, _), (t, _) in left.items():
        by_user[u].append(t)
    out["over max_user_interactions"] = sum(max(0, len(times) - 9) for times in by_user.values())
    got = stored(night)
    report = night.outcome.extra["rows"]
    assert report["accepted"] == len(latest)
    assert report["duplicates"] == len(rows) - len(latest)
    core = report["filtered"]["below k_core"]
    assert report["filtered"] == {**{name: n for name, n in out.items() if n}, "below k_core": core}
    assert all(out.values())
    assert len(got) == len(left) - out["over max_user_interactions"] - core
    assert all((t, rating) == left[pair] for pair, (rating, t, _) in got.items())
    assert core_by_hand(set(got), 3) == set(got) != set()
    assert set(night.index("item")) == {item for _, item in got}
    assert_sound(night)


Pairs = set[tuple[str, str]]
PAIRS = given(
    pairs=st.sets(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1), k=st.integers(2, 4)
)
WHOLE = set(itertools.product("abc", "uvw"))
CHAIN = set(zip("abcd", "uvwx", strict=True)) | set(zip("bcd", "uvw", strict=True))
"""Without its ends it has new ends, and so on: nothing of it is in the core of 2."""


def assert_core(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, pairs: Pairs, k: int) -> None:
    rows = spark.createDataFrame(sorted(pairs), "user_id string, item_id string")
    kept, size = filters.k_core(Workspace(spark, str(tmp_path_factory.mktemp("core"))), rows, len(pairs), k)
    assert {tuple(row) for row in kept.collect()} == core_by_hand(pairs, k)
    assert size == len(core_by_hand(pairs, k))


@settings(deadline=None, max_examples=2)
@example(pairs=WHOLE | {("a", "z"), ("f", "u")}, k=3)
@example(pairs=CHAIN, k=2)
@PAIRS
def test_the_core_is_the_fixed_point(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, pairs: Pairs, k: int
) -> None:
    assert_core(spark, tmp_path_factory, pairs, k)


@pytest.mark.soak
@settings(deadline=None, max_examples=60)
@PAIRS
def test_the_core_of_many_logs_is_the_fixed_point(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, pairs: Pairs, k: int
) -> None:
    assert_core(spark, tmp_path_factory, pairs, k)


def test_the_cap_keeps_a_users_latest_rows(spark: SparkSession) -> None:
    rows = [("a", f"i{n}", n // 3) for n in range(12)] + [("b", "x", 1)]
    frame = spark.createDataFrame(rows, "user_id string, item_id string, timestamp long")
    kept = [tuple(row) for row in filters.cap_users(frame, 5, SEED).collect()]
    assert sorted(t for u, _, t in kept if u == "a") == [2, 2, 3, 3, 3], "of time 2, two of three: a hash says which"
    assert [row for row in kept if row[0] == "b"] == [("b", "x", 1)]
    shuffled = frame.orderBy(F.rand(1)).repartition(3)
    assert sorted(map(tuple, filters.cap_users(shuffled, 5, SEED).collect())) == sorted(kept)


def test_only_allowed_items_and_numbers_where_ids_are_numbers(spark: SparkSession, tmp_path: Path) -> None:
    rows = [(u, i, 1, 1) for u in (1, 2) for i in (10, 20, 30)]
    typed = {"user_type": "int", "item_type": "int", "allow_items": [10, 30]}
    night = night_of(spark, tmp_path, rows, input=typed)
    assert set(night.index("item")) == {10, 30}
    assert night.outcome.extra["rows"]["filtered"] == {"not in allow_items": 2}
    with pytest.raises(NcfError, match=r"input.deny_items holds \['x'\], .*needed integers"):
        night_of(spark, tmp_path, rows, input={**typed, "deny_items": ["x"]})


# ---- splits ------------------------------------------------------------------------------------------------


def test_a_temporal_split_by_share_cuts_one_moment(spark: SparkSession, tmp_path: Path) -> None:
    """Times are whole days here, so that the cut falls within ties; the shares are exact all the same."""
    rows = [(u, i, r, t // (40 * DAY) * 40 * DAY) for u, i, r, t in LOG]
    night = night_of(spark, tmp_path, rows, split={"strategy": "temporal"})
    got = stored(night)
    n = len(rows)
    n_test = round(n * 0.2)
    sizes = Counter(split for _, _, split in got.values())
    assert sizes == {TEST: n_test, VALIDATION: round((n - n_test) * 0.1), TRAIN: n - n_test - round((n - n_test) * 0.1)}
    times = {code: [t for _, t, split in got.values() if split == code] for code in (TRAIN, VALIDATION, TEST)}
    assert max(times[TRAIN]) <= min(times[VALIDATION]) <= max(times[VALIDATION]) <= min(times[TEST])
    cut = min(times[TEST])
    assert cut in times[VALIDATION] or cut in times[TRAIN], "the example has no tie at the cut"
    users, items = night.index("user"), night.index("item")
    tie = {code: [hash64(SEED, int(Purpose.TIME_TIE), users[u], items[i])
                  for (u, i), (_, t, split) in got.items() if t == cut and split == code]
           for code in (VALIDATION, TEST)}  # fmt: skip
    assert max(tie[VALIDATION]) < min(tie[TEST])
    assert night.manifest.facts["test_cutoff"] == dt.datetime.fromtimestamp(cut, dt.timezone.utc).isoformat()[:19]
    tied = {u for (u, _), (_, t, _) in got.items() if t in (cut, min(times[VALIDATION]))}
    assert 0 < night.manifest.facts["tied_users"] <= len(tied)
    assert_sound(night)


def test_a_temporal_split_by_date(spark: SparkSession, tmp_path: Path) -> None:
    split = {"strategy": "temporal", "validation_from": "2001-10-01", "test_from": "2001-10-20"}
    night = night_of(spark, tmp_path, LOG, split=split)
    for _, t, code in stored(night).values():
        day = dt.datetime.fromtimestamp(t, dt.timezone.utc).date().isoformat()
        assert code == (TEST if day >= "2001-10-20" else VALIDATION if day >= "2001-10-01" else TRAIN)
    assert all(night.manifest.facts[name] > 0 for name in ("train", "validation", "test"))


@pytest.fixture(scope="module")
def varied(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """A night of settings that have nothing to do with each other."""
    folder = tmp_path_factory.mktemp("varied")
    (folder / "users.jsonl").write_text('{"user_id": "u0é"}\n{"user_id": "nobody"}\n')
    return night_of(
        spark, folder, LOG,
        input={"users": {"path": str(folder / "users.jsonl"), "format": "jsonl"}},
        split={"strategy": "random", "test_fraction": 0.3},
        negatives={"alpha": 0.5, "per_positive": 2},
    )  # fmt: skip


def test_a_random_split_follows_the_hash_and_nothing_else(varied: Night) -> None:
    for u, i, _, _, code in varied.rows("interactions"):
        place = ((hash64(SEED, int(Purpose.SPLIT), u, i) >> 11) + 2**52) / 2**53
        assert code == (TEST if place < 0.3 else VALIDATION if place < 0.3 + 0.7 * 0.1 else TRAIN)
    assert 0.2 < varied.manifest.facts["test"] / len(LOG) < 0.4


def test_none_trains_on_everything_and_explicit_feedback_keeps_the_ratings(spark: SparkSession, tmp_path: Path) -> None:
    night = night_of(
        spark, tmp_path, LOG, split={"strategy": "none", "validation": False}, input={"feedback": "explicit"}
    )
    assert night.rows("validation") == night.rows("test") == []
    users, items = night.index("user"), night.index("item")
    assert sorted(night.rows("train")) == sorted((users[u], items[i], r) for u, i, r, _ in LOG)
    assert night.manifest.table(contracts.train(1, 1, explicit=True)).rows == len(LOG)


def test_given_files_and_candidates(spark: SparkSession, tmp_path: Path) -> None:
    """Test rows are those of the test file, even where train repeats one; candidates are the given ones without the
    positive; an item that is only a candidate gets an index; validation is each user's latest train row."""
    train = [(u, i, 4, 10 * n) for u in (1, 2) for n, i in enumerate((10, 20, 30))] + [(3, 10, 4, 5), (1, 40, 4, 99)]
    test = [(1, 40, 5, 7), (2, 50, 5, 8)]
    csv_log(tmp_path / "raw", test, "test.csv")
    (tmp_path / "negatives").write_text("(1,40)\t50\t60\t40\t60\n(2,50)\t10\t60\n")
    night = night_of(
        spark, tmp_path, train,
        input={"user_type": "int", "item_type": "int"},
        split={"strategy": "files", "test": str(tmp_path / "raw/test.csv"), "candidates": str(tmp_path / "negatives")},
    )  # fmt: skip
    users, items = night.index("user"), night.index("item")
    assert set(items) == {10, 20, 30, 40, 50, 60}
    assert {(u, i): set(c) for u, i, _, c in night.rows("test")} == {
        (users[1], items[40]): {items[50], items[60]},
        (users[2], items[50]): {items[10], items[60]},
    }
    assert {row[:2] for row in night.rows("validation")} == {(users[1], items[30]), (users[2], items[30])}
    assert night.outcome.extra["rows"] == {"input": 10, "accepted": 9, "duplicates": 1, "quarantined": {}}
    assert_sound(night)
    (tmp_path / "negatives").write_text("1,40\t50\n")
    with pytest.raises(InputError, match=r"the line at byte 0 of .* is no candidate list; needed `\(user,item\)`"):
        prepare(night.config, "2026-01-02")


Rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 4)), min_size=1, unique_by=lambda r: r[:2]
)


def codes(rule: SplitRule, rows: list[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    rows = sorted(rows)
    user, item, time = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]])
    code, _ = rule(user, item, time, np.zeros(len(user), dtype=np.int8), offsets)
    return dict(zip([row[:2] for row in rows], code.tolist(), strict=True))


@LAW
@given(Rows, st.integers(1, 3))
def test_leave_k_out_takes_the_latest_k_and_the_k_before(rows: list[tuple[int, int, int]], k: int) -> None:
    rule = SplitRule(Split(strategy="leave-k-out", k=k, min_interactions=2 * k + 1), SEED)
    found = codes(rule, rows)
    for user in {u for u, _, _ in rows}:
        mine = [(t, hash64(SEED, int(Purpose.TIME_TIE), u, i), (u, i)) for u, i, t in rows if u == user]
        order = [pair for _, _, pair in sorted(mine, reverse=True)]
        held = len(order) >= 2 * k + 1
        expected = {pair: (TEST if n < k else VALIDATION if n < 2 * k else TRAIN) if held else TRAIN
                    for n, pair in enumerate(order)}  # fmt: skip
        assert {pair: found[pair] for pair in order} == expected
    without = SplitRule(Split(strategy="leave-k-out", k=k, min_interactions=2 * k + 1, validation=False), SEED)
    assert codes(without, rows) == {p: TRAIN if code == VALIDATION else code for p, code in found.items()}


@LAW
@given(Rows, st.integers(0, 4), st.integers(-(2**63), 2**63 - 1))
def test_nothing_in_train_is_later_than_the_cutoff(rows: list[tuple[int, int, int]], time: int, tie: int) -> None:
    rule = SplitRule(Split(strategy="temporal"), SEED, test=Cutoff(time, tie))
    found = codes(rule, rows)
    for u, i, t in rows:
        later = (t, hash64(SEED, int(Purpose.TIME_TIE), u, i)) >= (time, tie)
        assert found[u, i] == (TEST if later else TRAIN)


LONGS = given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), min_size=1), place=st.integers(0, 2**20)
)
NEIGHBOURS = [2**63 - 1, -(2**63), -1, 0, 2**48, 2**48 - 1, 2**32, 2**16 + 1, 2**16, 3, 3]
"""Of either sign, and in the same or in neighbouring counts of each of the four passes."""


def assert_value(spark: SparkSession, values: list[int], place: int) -> None:
    frame, position = spark.createDataFrame([(value,) for value in values], "v long"), place % len(values)
    assert value_at(frame, F.col("v"), position) == sorted(values)[position]


@settings(deadline=None, max_examples=2)
@example(values=NEIGHBOURS, place=0)
@example(values=NEIGHBOURS, place=6)
@LONGS
def test_the_value_at_a_position_is_that_of_a_sort(spark: SparkSession, values: list[int], place: int) -> None:
    assert_value(spark, values, place)


@pytest.mark.soak
@settings(deadline=None, max_examples=60)
@LONGS
def test_the_value_at_many_positions_is_that_of_a_sort(spark: SparkSession, values: list[int], place: int) -> None:
    assert_value(spark, values, place)


# ---- weighted negatives ------------------------------------------------------------------------------------


def test_weighted_negatives_follow_train_popularity(varied: Night) -> None:
    night = varied
    n_items = len(night.index("item"))
    counts = Counter(item for _, item, *_, split in night.rows("interactions") if split == TRAIN)
    power = [max(1, counts[item]) ** 0.5 for item in range(n_items)]
    weights = dict(night.rows("item_weights"))
    for item in range(n_items):
        assert weights[item] == pytest.approx(power[item] / sum(power) * 2**36, rel=1e-5)
    seen = night.items_by_user(TRAIN)
    weight = np.array([weights[item] for item in range(n_items)])
    offsets_of = {user: np.array([0, len(items)]) for user, items in seen.items()}
    own = {user: np.array(sorted(items), dtype=np.int64) for user, items in seen.items()}
    gaps_of = {user: weighted_gaps(own[user], offsets_of[user], weight) for user in seen}
    one = np.zeros(1, dtype=np.int64)
    for row in night.train_rows:
        user, item = row["user_idx"], row["item_idx"]
        (gaps, weighted), offsets = gaps_of[user], offsets_of[user]
        key = prefix(SEED, one + user, one + item)
        for slot in range(2):
            [expected] = negatives_of(key, 0, slot, one, gaps, offsets, n_items, weighted=weighted)
            assert row[contracts.negative_column(0, slot)] == expected
            assert expected not in seen[user]


# ---- side tables -------------------------------------------------------------------------------------------


def test_side_tables_are_typed_and_checked_against_the_index(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "users.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"user_id": "u0é", "age": 31, "vip": True},
                {"user_id": "u1é", "age": "old", "vip": "no"},
                {"user_id": "nobody", "age": 5},
                {"age": 6},
            )
        )
    )
    (tmp_path / "items.csv").write_text('key,name,year\n"i,0","Tea, for two",1999.5\n"i,1",,\n"i,0",Zulu,1\n')
    night = night_of(
        spark, tmp_path, LOG,
        input={
            "users": {"path": str(tmp_path / "users.jsonl"), "format": "jsonl", "columns": {
                "age": {"from": "age", "type": "int"}, "vip": {"from": "vip", "type": "bool"}}},
            "items": {"path": str(tmp_path / "items.csv"), "format": "csv", "id": "key", "title": "name",
                      "columns": {"year": {"from": "year", "type": "float"}}},
        },
    )  # fmt: skip
    users, items = night.index("user"), night.index("item")
    people = {row[1]: row[2:] for row in night.rows("users")}
    assert len(people) == len(users)
    assert people["u0é"] == (31, True)
    assert people["u1é"] == (None, False)
    assert people["u2é"] == (None, None)
    assert night.rows("unseen_users") == [("nobody",)], "a known user who never came is kept for those who serve them"
    catalogue = {row[1]: row[2:] for row in night.rows("items")}
    assert len(catalogue) == len(items)
    assert catalogue["i,0"] == ("Tea, for two", 1999.5)
    assert catalogue["i,1"] == ("i,1", None), "without a title an item shows its id"
    facts = night.manifest.facts
    assert facts["side_users"] == {
        "rows": 4, "unusable": 1, "repeated": 0, "unknown": 1, "without": len(users) - 2, "bad_values": 1
    }  # fmt: skip
    assert facts["side_items"]["repeated"] == 1
    (tmp_path / "items.csv").write_text("key,name,year\n")
    alone = night.config.input.model_copy(update={"users": None})
    found, ids = RunInputs.find(night.config), IdTypes(pa.string(), pa.string())
    indexes: Any = SimpleNamespace(users=None, items=None)
    with pytest.raises(InputError, match="input.items .* has no row with a usable id"):
        write_side_tables(Workspace(spark, str(tmp_path)), alone, found, indexes, ids, NOBODY)


def test_a_table_of_users_may_hold_ids_alone(varied: Night) -> None:
    """Enough to give what is popular to customers who never came."""
    assert varied.rows("unseen_users") == [("nobody",)]
    assert sorted(row[1] for row in varied.rows("users")) == sorted(varied.index("user"))


# ---- the config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Input, {"feedback": "explicit", "min_rating": 3}, "input.min_rating is 3.0 with feedback explicit"),
        (Input, {"feedback": "explicit", "format": "csv"}, "input.columns.rating is not set"),
        (Input, {"since": "2020-01-02", "until": "2020-01-01"}, "needed an earlier since"),
        (Input, {"rating_range": [5, 1]}, "needed .lowest, highest."),
        (Split, {"strategy": "leave-one-out", "k": 2}, "set split.strategy=leave-k-out"),
        (Split, {"strategy": "leave-k-out", "k": 2, "min_interactions": 4}, "needed at least 2 k . 1 = 5"),
        (Split, {"strategy": "files"}, "needed the test file"),
        (Split, {"test": "x"}, "needed the test file for `files`, and none otherwise"),
        (Split, {"candidates": "x"}, "it needs strategy files"),
        (Split, {"test_from": "2020-01-01"}, "split.test_from is for strategy temporal"),
        (Split, {"strategy": "temporal", "test_from": "2020-01-01", "validation_from": "2020-01-01"}, "a day before"),
    ],
)
def test_settings_that_do_not_fit_together(section: type[Any], values: dict[str, Any], message: str) -> None:
    path = {"path": "x"} if section is Input else {}
    with pytest.raises(ValueError, match=message):
        section.model_validate(path | values)


def test_sections_that_do_not_fit_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not go with split.strategy files"):
        config(tmp_path, "x", input={"k_core": 2}, split={"strategy": "files", "test": "y"})
    with pytest.raises(ValueError, match="negatives.alpha is 0.5 with train.negatives online"):
        config(tmp_path, "x", negatives={"alpha": 0.5}, train={"negatives": "online"})
    with pytest.raises(ValueError, match="needed the column of the times"):
        config(tmp_path, "x", input={"columns": {"user": "u", "item": "i"}}, split={"strategy": "temporal"})
