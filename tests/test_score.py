"""The job score over a hand-made night: who is ranked, over which items, by what, in which form; what it would take;
and what refuses a table that was scored wrongly."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts, demo, engines, last_line, spark_io
from ncf_dist.bundle import read_bundle, save_bundle
from ncf_dist.cli import run_job
from ncf_dist.config import Config, Model, Score, load_config
from ncf_dist.errors import ConfigError, ContractError, GateRefused, InputError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF
from ncf_dist.parquet import read_table, write_parquet, write_parts
from ncf_dist.publish.pipeline import publish
from ncf_dist.score import pipeline, ranker
from ncf_dist.score.forecasting import Forecast
from ncf_dist.score.items import ItemLists
from ncf_dist.score.pipeline import forecast, score
from ncf_dist.score.popular import Popular
from ncf_dist.score.spec import ScorePass
from ncf_dist.score.task_rows import in_files, in_tasks
from ncf_dist.scoring import Lists
from ncf_dist.spark_io import Pass, on_executor, spark_session
from ncf_dist.stage import Outcome

DS = "2026-01-31"
SCORE_PASS = "ncf_dist.score.ranker:score_pass"
DAY = 86_400 * 10**6
MIDNIGHT = int(np.datetime64(DS, "us").astype(int))
ITEMS, K = 40, 5
TRAINED, HELD_OUT_ONLY, GONE = range(30), range(30, 34), range(34, 38)
INDEXED = len(TRAINED) + len(HELD_OUT_ONLY) + len(GONE)
NEW = ["new-a", "new-b"]
GLUTTON = 7
"""Has seen all but 3 items."""
USER, ITEM = "u{:02}".format, 1000
"""Customer's ids: u00, u01, …; 1000, 1001, …"""


def seen_by(user: int) -> tuple[list[int], list[int]]:
    """(train and validation items, test items), by item_idx."""
    if user in GONE:
        return [], []
    if user == GLUTTON:
        return list(range(ITEMS - 4)), [ITEMS - 4]
    drawn = np.random.default_rng(user).choice(ITEMS, 9, replace=False).tolist()
    return ([], drawn[:2]) if user in HELD_OUT_ONLY else (sorted(drawn[:8]), drawn[8:])


def everything_seen(user: int) -> set[int]:
    return {item for items in seen_by(user) for item in items}


def last_day(user: int) -> int:
    """Days before ds of a user's last interaction."""
    return user % 10 + 1


FACTORS = 64
"""bfloat16 products are made of wide factors only."""


UNUSED = {"input": {"path": "unused"}}


class Line:
    """A lake with a finished prepare run and a trained model, made without either job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake = folder, Lake(str(folder / "lake"))
        rows = [
            (user, item, split, MIDNIGHT - (last_day(user) + place) * DAY)
            for user in range(INDEXED)
            for split, items in zip((0, 2), seen_by(user), strict=True)
            for place, item in enumerate(items)
        ]
        user, item, split, time = (list(column) for column in zip(*rows, strict=True))
        with_rows = [*TRAINED, *HELD_OUT_ONLY]
        tables: dict[Any, list[Any]] = {
            contracts.user_index(pa.string()): [[USER(u) for u in range(INDEXED)], range(INDEXED)],
            contracts.item_index(pa.int64()): [range(ITEM, ITEM + ITEMS), range(ITEMS)],
            contracts.HISTORY: [with_rows, *([seen_by(u)[part] for u in with_rows] for part in (0, 1))],
            contracts.INTERACTIONS: [user, item, [1.0] * len(user), time, split],
            contracts.unseen_users(pa.string()): [NEW],
        }
        self.interactions = rows
        self.install("p1", tables)
        torch.manual_seed(1)
        self.train("t1")

    def install(self, key: str, tables: dict[Any, list[Any]]) -> None:
        runs = self.lake.stage(DS, "prepare")
        run, infos = runs.begin(key), {}
        for contract, columns in tables.items():
            arrays = [pa.array(list(c), f.type) for c, f in zip(columns, contract.schema, strict=True)]
            infos[contract.name] = write_parts([pa.table(arrays, schema=contract.schema)], run, contract)
        runs.finish(Manifest(stage="prepare", ds=DS, run_key=key, root=run, config=UNUSED, inputs={}, tables=infos))

    def train(self, key: str) -> GMF:
        model = GMF(INDEXED, ITEMS, FACTORS)
        for table in (model.user, model.item, model.output):
            torch.nn.init.normal_(table.weight)
        runs = self.lake.stage(DS, "train")
        run = runs.begin(key)
        save_bundle(f"{run}/bundle", model, Model(name="gmf", factors=FACTORS), INDEXED, ITEMS, {})
        runs.finish(Manifest(stage="train", ds=DS, run_key=key, root=run, config={}, inputs={"prepare": "p1"}))
        self.model = model
        return model

    def config(self, **section: Any) -> Config:
        table = section.pop("table", "recommendations")
        return Config.model_validate(
            {
                "paths": {"lake": self.lake.root, "work": str(self.folder / "work")},
                **UNUSED,
                "score": {"k": K, "tasks": 2, **section},
                "publish": {"table": table, "require": ["users", "beats_popularity"]},
                "spark": {"master": "local[2]", "shuffle_partitions": 2},
            }
        )

    def scored(self, **section: Any) -> dict[str, list[dict[str, Any]]]:
        """Score; each user's rows in the order of the table."""
        run = self.last = self.lake.stage(DS, "score").load(str(score(self.config(**section), DS).run_key))
        tables = [contracts.in_long_form(read_table(path)) for path in run.files("recommendations")]
        found: dict[str, list[dict[str, Any]]] = {}
        for row in pa.concat_tables(tables).to_pylist():
            found.setdefault(row["user_id"], []).append(row)
        return found

    @property
    def facts(self) -> Any:
        return self.last.facts

    def best(self, user: int, may: set[int]) -> list[tuple[int, float]]:
        """(item id, score) by the model's own forward, best first."""
        with torch.no_grad():
            scores = self.model(torch.tensor([user]), torch.arange(ITEMS)).tolist()
        left = sorted(may - everything_seen(user), key=lambda item: (-scores[item], item))
        return [(ITEM + item, scores[item]) for item in left[:K]]

    def popular(self, user: int | None, may: set[int], days: int = 30) -> list[tuple[int, float]]:
        recent, total = np.zeros(ITEMS), np.zeros(ITEMS)
        for _, item, _, time in self.interactions:
            total[item] += 1
            recent[item] += time >= MIDNIGHT - days * DAY
        left = may - (everything_seen(user) if user is not None else set())
        order = sorted(left, key=lambda item: (-recent[item], -total[item], item))[:K]
        return [(ITEM + item, recent[item]) for item in order]


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Line:
    return Line(tmp_path_factory.mktemp("score"))


@pytest.fixture(scope="module")
def table(line: Line) -> dict[str, list[dict[str, Any]]]:
    return line.scored()


def offers(rows: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    # Terms of up to 10 are added: a sum near 0 is rounded as they are.
    return [(row["item_id"], pytest.approx(row["score"], rel=1e-5, abs=1e-6)) for row in rows]


def refused(line: Line, **section: Any) -> str:
    """What the audit says of tonight's table."""
    with pytest.raises(ContractError) as caught:
        publish(line.config(table="mutants", **section), DS)
    return str(caught.value)


# ---- who gets what -----------------------------------------------------------------------------------------


def test_everybody_known_gets_what_they_should(line: Line, table: dict[str, list[dict[str, Any]]]) -> None:
    """Against a full sort of the model's own scores, and of counts for those it knows nothing of."""
    every = set(range(ITEMS))
    assert set(table) == {*map(USER, range(INDEXED)), *NEW}
    for user in TRAINED:
        assert offers(table[USER(user)]) == line.best(user, every), user
        assert {row["reason"] for row in table[USER(user)]} == {"model"}
    for name, user in [*((USER(u), u) for u in [*HELD_OUT_ONLY, *GONE]), *((name, None) for name in NEW)]:
        assert offers(table[name]) == line.popular(user, every), name
        assert {row["reason"] for row in table[name]} == {"popular"}
    assert len(table[USER(GLUTTON)]) == 3
    assert all([row["rank"] for row in rows] == list(range(1, len(rows) + 1)) for rows in table.values())


def test_what_was_done_is_counted(line: Line, table: dict[str, list[dict[str, Any]]]) -> None:
    everybody = INDEXED + len(NEW)
    outcome = score(line.config(), DS)
    assert outcome.status == "already-done"
    assert {name: outcome.metrics[f"score.{name}"] for name in ("users", "popular_users", "short_users", "rows")} == {
        "users": everybody,
        "popular_users": len(HELD_OUT_ONLY) + len(GONE) + len(NEW),
        "short_users": 1,
        "rows": (everybody - 1) * K + 3,
    }
    assert outcome.metrics["score.pairs"] == len(TRAINED) * ITEMS
    how = line.facts["products"]
    assert (how["mode"], how["precision"], how["executors"]) == (os.environ["MKL_CBWR"], "fp32", [how["bits"]])
    assert publish(line.config(), DS).status == "done"


def test_without_a_fallback_only_users_with_a_history(line: Line) -> None:
    found = line.scored(fallback_days=None)
    assert set(found) == {USER(user) for user in TRAINED}
    assert line.facts["users"] == len(TRAINED)
    assert publish(line.config(table="no fallback", fallback_days=None), DS).status == "done"


def test_products_may_be_rounded(
    line: Line, table: dict[str, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    """bf16 has 8 bits: scores differ by some thousandths of the largest, and users' best items are mostly the same."""
    with caplog.at_level(logging.WARNING, "ncf_dist"):
        found = line.scored(precision="bf16")
    ours, wanted = ([rows[0]["score"] for _, rows in sorted(t.items()) if len(rows) == K] for t in (found, table))
    there = engines.rounds(FACTORS + 1)
    assert (ours != wanted) == there, "a processor without such products gives float32's very bits, and it is said"
    assert ("score.precision is bf16, and the executors have no such products" in caplog.text) == (not there)
    assert line.facts["products"]["precision"] == ("bf16" if there else "fp32")
    assert ours == pytest.approx(wanted, abs=0.05 * max(wanted))
    assert {name: rows[0]["reason"] for name, rows in found.items()} == {n: r[0]["reason"] for n, r in table.items()}


def test_the_fallback_looks_back_as_far_as_it_is_told(line: Line) -> None:
    """Two days hold a few interactions only: the rest of a list is by all of them."""
    found = line.scored(fallback_days=2)
    assert offers(found["new-a"]) == line.popular(None, set(range(ITEMS)), days=2)
    assert offers(found["new-a"]) != line.popular(None, set(range(ITEMS)))


@pytest.mark.parametrize("since", [4, "2026-01-27"])
def test_only_active_users(line: Line, since: Any) -> None:
    """Users whose last interaction is 1 to 4 days before midnight; of those without rows nobody."""
    found = line.scored(active_since=since)
    assert set(found) == {USER(user) for user in [*TRAINED, *HELD_OUT_ONLY] if last_day(user) <= 4}
    assert {row["reason"] for rows in found.values() for row in rows} == {"model", "popular"}
    assert line.facts["active_since"] == "2026-01-27"
    assert publish(line.config(table="active", active_since=since), DS).status == "done"


def test_where_nobody_was_active_the_old_night_stays(line: Line, table: dict[str, list[dict[str, Any]]]) -> None:
    """A log that stopped: nobody is ranked, and nothing of that is published."""
    assert line.scored(active_since=DS) == {}
    assert line.facts["users"] == 0
    assert publish(line.config(table="stopped"), DS).status == "done"
    latest = Path(line.lake.root, "stopped", "latest.json")
    before = latest.read_bytes()
    with pytest.raises(GateRefused, match=f"ds {DS} is not published and what is published stays: rows: .* 0 rows"):
        publish(line.config(table="stopped", active_since=DS), DS)
    assert latest.read_bytes() == before
    assert json.loads(before)["rows"] == sum(map(len, table.values()))


def test_item_lists(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Items 1000 to 1019 are allowed, of which 1003 and 1004 are denied. 2 ids of the file are of no item."""
    path = tmp_path / "allowed.txt"
    path.write_bytes(("\ufeff" + "\r\n".join([*map(str, range(ITEM, ITEM + 20)), "", "tea", "7"])).encode())
    lists = {"allow_items": str(path), "deny_items": [1003, "1004"]}
    with caplog.at_level(logging.WARNING, "ncf_dist"):
        found = line.scored(**lists)
    may = set(range(20)) - {3, 4}
    for user in TRAINED:
        assert offers(found.get(USER(user), [])) == line.best(user, may), user
    assert offers(found["new-b"]) == line.popular(None, may)
    assert USER(GLUTTON) not in found, "a user for whom nothing is left has no row"
    items = line.facts["items"]
    assert (items["eligible"], items["allow_items"]["unknown"], items["deny_items"]["unknown"]) == (18, 2, 0)
    assert "score.allow_items: 2 of 22 ids are of no item in the catalogue" in caplog.text
    assert publish(line.config(table="listed", **lists), DS).status == "done"
    before = line.last.run_key
    path.write_text("1001\n")
    line.scored(**lists)
    assert line.last.run_key != before, "another list is another run"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"allow_items": ["tea"]}, "leave no item .allow_items: 1 ids, 1 unknown.; needed at least one"),
        ({"allow_items": [1001], "deny_items": [1001]}, "leave no item"),
        ({"deny_items": "nowhere.txt"}, "nowhere.txt cannot be read .* needed a text file with one id a line"),
    ],
)
def test_lists_that_leave_nothing_are_refused(line: Line, lists: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(line.config(**lists), DS)


def test_active_users_need_times(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("paths: {lake: lake}\ninput: {path: log.csv, format: csv}\nscore: {active_since: 30}\n")
    with pytest.raises(ConfigError, match="score.active_since is 30 and input.columns.timestamp is not set"):
        load_config(path)


# ---- popularity --------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=5),
    st.sets(st.integers(0, 11)),
    st.integers(1, 14),
)
@budget(max_examples=200, deadline=None)
def test_popular_is_the_head_of_a_full_sort(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[tuple[int, int]],
    seen: list[set[int]],
    denied: set[int],
    k: int,
) -> None:
    n = len(counts)
    eligible = np.array(sorted(set(range(n)) - denied), dtype=np.int64)
    rows = [(item, recent, recent + older) for item, (recent, older) in enumerate(counts) if recent + older]
    columns = [[row[at] for row in rows] for at in range(3)]
    folder = str(tmp_path_factory.mktemp("popular"))
    schema = contracts.POPULARITY.schema
    write_parquet(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema), folder, "p")  # noqa: B905
    masked = [sorted(item for item in items if item < n) for items in seen]
    flat = np.array([item for items in masked for item in items], dtype=np.int64)
    lists = Lists(flat, np.cumsum([0, *map(len, masked)], dtype=np.int64))
    values, items = Popular.read([f"{folder}/p"], n, eligible if denied else None).top(lists, k)
    any_recent = any(recent for recent, _ in counts)
    for user, hidden in enumerate(masked):
        may = set(range(n)) - set(hidden) - denied
        order = sorted(may, key=lambda i: (-counts[i][0], -sum(counts[i]), i))[:k]
        offered = values[user] != -np.inf
        assert items[user][offered].tolist() == order
        assert values[user][offered].tolist() == [counts[i][0] if any_recent else sum(counts[i]) for i in order]


# ---- the same bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "ways"),
    [
        pytest.param("long", ((2, 512), (1, 1), (8, 3), (32, 7)), id="long"),
        pytest.param("long", ((2, 512), (200, 7)), id="long, 200 tasks", marks=pytest.mark.soak),
        pytest.param("lists", ((1, 512), (8, 3)), id="lists"),
    ],
)
def test_the_same_bytes_for_any_number_of_tasks_and_any_block(
    line: Line, form: str, ways: tuple[tuple[int, int], ...]
) -> None:
    """Of 32 tasks most have no file: the table has 6 of them."""
    wanted = None
    for tasks, block in ways:
        run = line.lake.stage(DS, "score")
        done = run.load(str(score(line.config(form=form, tasks=tasks, users_per_block=block), DS).run_key))
        found = [(info.path, info.sha256) for info in done.tables["recommendations"].files]
        (Path(done.root) / "manifest.json").unlink()  # Else the next one finds it done.
        wanted = wanted or found
        assert found == wanted, (tasks, block)
    assert wanted is not None
    assert len(wanted) > 5


@pytest.mark.parametrize(("files", "tasks"), [(16, 16), (16, 5), (7, 20)])
def test_files_are_dealt_evenly(spark: SparkSession, files: int, tasks: int) -> None:
    """Nobody waits for a task with three files while another has none; and a file is in one task, in order."""
    users = spark.range(400).selectExpr(
        "concat('u', id) as user_id", "cast(if(id < 320, id, -1) as int) as user_idx", "array(1) as item_idx",
        "array(2) as test_item_idx", "true as by_model",
    )  # fmt: skip
    placed = in_tasks(in_files(users, files, 320), tasks).select(F.spark_partition_id().alias("task"), "_file")
    rows = [(row["task"], row["_file"]) for row in placed.collect()]
    owners = set(rows)
    assert len(rows) == 400
    assert {file for _, file in owners} == set(range(files))
    assert len(owners) == files, "a file in two tasks"
    assert max(Counter(task for task, _ in owners).values()) == -(-files // tasks)
    for task in {task for task, _ in owners}:
        mine = [file for found, file in rows if found == task]
        assert mine == sorted(mine)


# ---- forms and readers -------------------------------------------------------------------------------------


def test_lists_hold_the_same_as_rows(line: Line, table: dict[str, list[dict[str, Any]]]) -> None:
    assert line.scored(form="lists") == table
    config = line.config(form="lists", table="lists")
    publish(config, DS)
    files = DeltaTable(line.lake.path("lists")).file_uris()
    stored = pa.concat_tables([read_table(path) for path in files])
    assert stored.column_names == ["user_id", "items", "model_version"]
    assert len(stored) == len(table)
    assert not any(field.nullable for field in [*stored.schema, *stored.schema.field("items").type.value_type])
    assert "1. 10" in demo.show(config)


def test_every_reader_sees_the_night(line: Line, spark: SparkSession, table: dict[str, list[dict[str, Any]]]) -> None:
    """ds is in the files' paths, as Delta has it: the snippets of README show it as a column."""
    line.scored()
    publish(line.config(table="read"), DS)
    root = line.lake.path("read")
    wanted = [row["item_id"] for row in table["u03"]]
    columns = ["ds", *contracts.recommendations(pa.string(), pa.int64()).columns]
    uris: Any = DeltaTable(root).file_uris(file_pruning_predicate=f"ds = '{DS}'")
    by_pandas = pd.read_parquet(uris)
    by_pandas = by_pandas[by_pandas.user_id == "u03"].sort_values("rank")
    files = [f"{root}/{name}" for name in json.loads((Path(root) / "latest.json").read_text())["files"]]
    by_duckdb = duckdb.read_parquet(files, hive_partitioning=True).filter("user_id = 'u03'").order("rank").df()
    by_spark = spark.read.option("basePath", root).parquet(*files).where("user_id = 'u03'").orderBy("rank").toPandas()
    delta = duckdb.from_arrow(DeltaTable(root).scan()).filter("user_id = 'u03'").order("rank").df()
    assert list(delta.columns) == columns
    for found in (by_pandas, by_duckdb, by_spark, delta):
        assert set(found.columns) == set(columns)
        assert found["item_id"].tolist() == wanted
        assert {str(day)[:10] for day in found["ds"]} == {DS}


def test_demo_shows_users_without_a_history(line: Line) -> None:
    line.scored(active_since="2026-01-22")
    config = line.config(table="shown", active_since="2026-01-22")
    publish(config, DS)
    assert "liked: 10" in demo.show(config)


# ---- what refuses a wrong table ----------------------------------------------------------------------------


def replace_pass(monkeypatch: pytest.MonkeyPatch, make: Callable[[ScorePass], Pass]) -> None:
    """Run what `make` makes of the spec on the executors, in place of the score pass."""

    def planted(entry: str, *given: Any) -> Pass:
        return make(*given) if entry == SCORE_PASS else on_executor(entry, *given)

    monkeypatch.setattr(pipeline, "on_executor", planted)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, mutate: Callable[[Any], Any]) -> None:
    """Run the score pass on the executors with `name` of its module changed."""

    def planted(spec: ScorePass) -> Pass:
        def run(batches: Any) -> Iterator[pa.RecordBatch]:
            from ncf_dist.score import ranker

            real = getattr(ranker, name)
            setattr(ranker, name, mutate(real))
            try:
                yield from ranker.score_pass(spec)(batches)
            finally:
                setattr(ranker, name, real)

        return run

    replace_pass(monkeypatch, planted)


def test_mutant_mask_off_is_refused_by_both(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is masked: the model's best items are among them that were seen. score's own check sees it, and so does
    the audit where there is no such check."""

    def off(real: Any) -> Any:
        def unmasked(batch: pa.RecordBatch, columns: Any) -> Any:
            found = real(batch, columns)
            return type(found)(found.values[:0], np.zeros_like(found.offsets))

        return unmasked

    plant(monkeypatch, "seen_lists", off)
    with pytest.raises(ContractError, match="the recommendations of .* are not what the model gmf-.* says"):
        score(line.config(k=4), DS)
    monkeypatch.setattr(pipeline, "check_written", lambda *args: None)
    score(line.config(k=4), DS)
    assert "seen by item_idx or test_item_idx of history" in refused(line, k=4)


def test_mutant_item_map_off_by_one_is_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(real: Any) -> Any:
        def moved(files: Any) -> Any:
            ids = real(files)
            return ids.take(pa.array(np.roll(np.arange(len(ids)), 1)))

        return moved

    plant(monkeypatch, "read_item_ids", shifted)
    with pytest.raises(ContractError, match=r"item \d+ has score .* the model gives this pair"):
        score(line.config(k=3), DS)
    monkeypatch.setattr(pipeline, "check_written", lambda *args: None)
    score(line.config(k=3), DS)
    assert "seen by item_idx or test_item_idx of history" in refused(line, k=3)


def test_mutant_wrong_model_is_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of another model under this one's name: no rule of the table is broken, only the scores are wrong."""

    def other(real: Any) -> Any:
        def loaded(bundle: Any) -> Any:
            import torch

            model = real(bundle)
            model.item.weight = torch.nn.Parameter(model.item.weight.flip(0), requires_grad=False)
            return model

        return loaded

    plant(monkeypatch, "load_model", other)
    with pytest.raises(ContractError, match="users are not what the model .* needed its own scores: rerun"):
        score(line.config(k=2), DS)
    monkeypatch.setattr(pipeline, "check_written", lambda *args: None)
    score(line.config(k=2), DS)
    assert publish(line.config(k=2, table="mutant"), DS).status == "done", "the audit alone cannot see this one"


def test_mutant_wrong_version_is_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(spec: ScorePass) -> Pass:
        return on_executor(SCORE_PASS, replace(spec, bundle=replace(spec.bundle, model_version="gmf-0")))

    replace_pass(monkeypatch, renamed)
    score(line.config(k=1), DS)
    assert "model_version 'gmf-0'; needed 'gmf-" in refused(line, k=1)


def test_mutant_lists_ignored_are_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"deny_items": list(range(ITEM, ITEM + 20))}

    def ignoring(spec: ScorePass) -> Pass:
        return on_executor(SCORE_PASS, replace(spec, lists=ItemLists()))

    replace_pass(monkeypatch, ignoring)
    monkeypatch.setattr(pipeline, "check_written", lambda *args: None)
    score(line.config(**lists), DS)
    assert "needed an item that score.allow_items and score.deny_items permit" in refused(line, **lists)


def test_mutant_inactive_users_are_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.users_to_rank

    def everybody(spark: Any, prepare: Any, bundle: Any, config: Score, ds: str) -> Any:
        return real(spark, prepare, bundle, config.model_copy(update={"active_since": None}), ds)

    monkeypatch.setattr(pipeline, "users_to_rank", everybody)
    score(line.config(active_since=3), DS)
    assert "a user is unknown to prepare; needed one who is due" in refused(line, active_since=3)


# ---- memory ------------------------------------------------------------------------------------------------


def some_rows(n_users: int, files: int) -> pa.RecordBatch:
    none = pa.array([[]] * n_users, pa.list_(pa.int32()))
    return pa.RecordBatch.from_pydict(
        {
            "_file": pa.array([user * files // n_users for user in range(n_users)], pa.int32()),
            "user_id": pa.array([USER(user) for user in range(n_users)]),
            "user_idx": pa.array(range(n_users), pa.int32()),
            "item_idx": none,
            "test_item_idx": none,
            "by_model": pa.array([True] * n_users),
        }
    )


def test_a_task_holds_one_files_rows(line: Line, tmp_path: Path) -> None:
    """A file is on disk before the rows of the one after the next are asked for, and its rows are let go."""
    bundle = read_bundle(line.lake.stage(DS, "train").newest().root + "/bundle")
    items = tuple(line.lake.stage(DS, "prepare").newest().files("item_index"))
    contract = contracts.recommendations(pa.string(), pa.int64())
    spec = ScorePass(bundle, items, contract, str(tmp_path), Score(k=K), ItemLists())
    rows, files = some_rows(30, 5), 5
    on_disk = []

    def batches() -> Iterator[pa.RecordBatch]:
        for file in range(files):
            yield rows.slice(file * 6, 6)
            on_disk.append(len(list(tmp_path.glob("*.parquet"))))

    (stats,) = ranker.score_pass(spec)(batches())
    assert on_disk == [0, 1, 2, 3, 4]
    found = json.loads(stats.column("stats")[0].as_py())
    assert len(found["files"]) == files
    assert found["memory"] > 0


def test_a_batch_of_long_histories_ends_by_its_bytes(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 lists of 1,000 int32: 4 MB, in batches of about 64 KB."""
    monkeypatch.setattr(spark_io, "BATCH_BYTES", 2**16)
    line = Config.model_validate({"paths": {"lake": "l"}, "input": {"path": "p"}})

    def sizes(batches: Any) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_pydict({"rows": [batch.num_rows]})

    try:
        with spark_session("bytes", line.spark, 4096) as session:
            lists = session.range(1000).selectExpr("id", "sequence(1, 1000) as item_idx").repartition(1)
            rows = [row["rows"] for row in lists.mapInArrow(sizes, "rows long").collect()]
    finally:
        monkeypatch.undo()
        with spark_session("bytes", line.spark):
            pass
    assert sum(rows) == 1000
    assert max(rows) <= 2 * 2**16 / 4000


def test_the_device_is_the_one_that_spark_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA the CPU, whatever Spark says; outside of a task as well."""
    assert ranker.assigned_device() == torch.device("cpu")

    class Context:
        def resources(self) -> Any:
            return {"gpu": type("Gpu", (), {"addresses": ["3"]})}

    monkeypatch.setattr(ranker.TaskContext, "get", lambda: Context())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranker.assigned_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranker.assigned_device() == torch.device("cuda", 3)


# ---- what it would take ------------------------------------------------------------------------------------


def test_a_forecast_by_hand() -> None:
    """Two tasks did 600 users x 100 items in 3 s of scoring each: 20,000 pairs/s a slot. 10,000 users in 4 tasks on 2
    slots are 2 waves of 2,500 users: 2 x 2,500 x 100 / 20,000 + 0.25 s to load again = 25.25 s, after 5 + 7 + (9 - 4) s
    and 0.5 s to load."""
    task = {
        "counts": {"users": 600, "pairs": 60_000, "table_bytes": 600 * 80},
        "seconds": {"load": 0.5, "score": 2.5, "write": 0.5},
        "memory": 10**6,
        "flops": 16.0,
        "task_s": 4.0,
        "reload_s": 0.25,
    }
    idle = {
        "counts": {},
        "seconds": {"load": 0.0, "score": 0.0, "write": 0.0},
        "memory": 5,
        "flops": 16.0,
        "task_s": 9.0,
    }
    found = Forecast.of(
        [task, task, idle], model_users=10_000, popular_users=50, items=120, eligible=100, slots=2, tasks=4,
        start_s={"session": 5.0, "reading": 7.0}, probe_s=9.0,
    )  # fmt: skip
    assert found.metrics == {
        "forecast.users": 10_050,
        "forecast.popular_users": 50,
        "forecast.pairs": 1_000_000,
        "forecast.flops": 16e6,
        "forecast.pairs_per_s": 20_000,
        "forecast.slots": 2,
        "forecast.tasks": 4,
        "forecast.memory_bytes": 10**6 + 3 * 10_050 * 80 // 4,
        "forecast.start_s": 17.5,
        "forecast.scoring_s": 25.25,
        "forecast.seconds": 42.75,
    }


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = line.config(k=9)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(json.loads(config.model_dump_json(by_alias=True))))

    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in Path(line.lake.root).rglob("*"))

    before = state()
    code = run_job("score", score, ["--config", str(path), "--ds", DS, "--dry-run"], dry_run=forecast)
    assert code == 0
    assert state() == before
    out, err = capsys.readouterr()
    report = last_line.read(out.splitlines()[-1])
    assert (report["status"], report["outputs"], report["run_key"]) == ("done", {}, None)
    found = report["metrics"]
    # Each pair of a GMF with 8 factors is 8 multiplications and 8 additions.
    assert found["forecast.pairs"] == len(TRAINED) * ITEMS
    assert found["forecast.flops"] == len(TRAINED) * ITEMS * 2 * FACTORS
    assert found["forecast.users"] == INDEXED + len(NEW)
    assert found["forecast.slots"] == 2
    assert found["forecast.seconds"] > found["forecast.start_s"] > 0
    assert found["forecast.memory_bytes"] > 50 * 2**20
    for words in ("pairs/s a slot", "memory a worker", "nothing was written", f"{len(TRAINED) * ITEMS:,}"):
        assert words in err


def test_only_score_has_a_dry_run(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: Config, ds: str) -> Outcome:
        raise AssertionError("nothing must run")

    assert run_job("publish", job, ["--config", "c.yaml", "--dry-run"]) == 2
    assert "unrecognized arguments: --dry-run" in capsys.readouterr().out
