"""What is published: whole audited nights, one atomic commit each, the newest never replaced by an older
one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from ncf_dist import contracts
from ncf_dist.artifacts import FileInfo, Lake, Manifest, TableInfo, write_parquet
from ncf_dist.config import Config
from ncf_dist.errors import BusyRun, ContractError, StaleRun
from ncf_dist.publish import unseen
from ncf_dist.publish.pipeline import publish
from ncf_dist.publish.table import PublishedTable

REPO = Path(__file__).parents[1]
ITEMS = ["apple", "bread", "cheese", "dates", "eggs", "figs"]
SEEN = {"ann": [0, 1], "bob": [2], "cat": [0, 5], "dan": [3, 4]}
HELD_OUT = {"ann": [2], "bob": [3], "cat": [], "dan": []}
COLUMNS = contracts.recommendations(pa.string(), pa.string()).columns
Row = tuple[Any, int, str, float, str]


def good(model: str = "m1") -> list[Row]:
    """Two unseen items a user, best first."""
    offers = {
        "ann": ["dates", "eggs"],
        "bob": ["figs", "apple"],
        "cat": ["bread", "cheese"],
        "dan": ["apple", "bread"],
    }
    return [
        (user, rank + 1, item, 1.0 - rank / 2, model)
        for user, items in offers.items()
        for rank, item in enumerate(items)
    ]


class Night:
    """A hand-made prepare run and score run of one ds."""

    def __init__(self, root: Path, ds: str = "2026-01-31", numbers: bool = False) -> None:
        self.root, self.ds, self.numbers = root, ds, numbers
        self.id_type = pa.int64() if numbers else pa.string()
        self.lake = Lake(str(root / "lake"))
        self.config = Config.model_validate(
            {"paths": {"lake": self.lake.root, "work": str(root / "work")}, "input": {"path": "unused"}}
        )

    def prepare(self) -> Manifest:
        users = {"user_id": [self.id(user) for user in SEEN], "user_idx": list(range(len(SEEN)))}
        items = {"item_id": [self.id(item) for item in ITEMS], "item_idx": list(range(len(ITEMS)))}
        history = {
            "user_idx": users["user_idx"],
            "item_idx": list(SEEN.values()),
            "test_item_idx": list(HELD_OUT.values()),
        }
        tables = {
            contracts.user_index(self.id_type): users,
            contracts.item_index(self.id_type): items,
            contracts.HISTORY: history,
        }
        return self._run("prepare", "p1", {c: [pa.table(t, schema=c.schema)] for c, t in tables.items()}, {})

    def score(
        self, rows: list[Row] | None = None, key: str = "s1", cuts: tuple[int, ...] = (4,), **facts: Any
    ) -> Manifest:
        """`cuts`: the rows at which a new file begins."""
        contract = contracts.recommendations(self.id_type, self.id_type)
        rows = [(self.id(r[0]), r[1], self.id(r[2]), *r[3:]) for r in (good() if rows is None else rows)]
        edges = [0, *cuts, len(rows)]
        parts = [rows[start:end] for start, end in itertools.pairwise(edges)]
        named = [[dict(zip(contract.columns, row, strict=True)) for row in part] for part in parts]
        tables = [pa.Table.from_pylist(part, schema=contract.schema) for part in named]
        known = {
            "k": 2,
            "users": 4,
            "short_users": 0,
            "model_version": "m1",
            "seen": "all",
            "prepare_run": "p1",
        }
        return self._run("score", key, {contract: tables}, known | facts)

    def id(self, name: str) -> Any:
        """The customer's id: a name, or a number that may be negative."""
        return sum(ord(letter) * 256**at for at, letter in enumerate(name)) - 2**31 if self.numbers else name

    def publish(self) -> tuple[str, int]:
        outcome = publish(self.config, self.ds)
        return outcome.status, outcome.extra["version"]

    @property
    def table(self) -> Path:
        return Path(self.lake.root, "recommendations")

    def latest(self) -> dict[str, Any]:
        return dict(json.loads((self.table / "latest.json").read_text()))

    def read(self, ds: str | None = None) -> list[Row]:
        """What a reader of the Delta log sees of a night."""
        scan = DeltaTable(str(self.table)).scan(predicate=f"ds = '{ds or self.ds}'")
        return sorted(
            tuple(row.values()) for row in duckdb.from_arrow(scan).select(*COLUMNS).to_arrow_table().to_pylist()
        )

    def _run(self, stage: str, key: str, tables: dict[Any, list[pa.Table]], facts: dict[str, Any]) -> Manifest:
        runs = self.lake.stage(self.ds, stage)
        run = runs.begin(key)
        written = {}
        for contract, parts in tables.items():
            files = [
                write_parquet(part, f"{run}/{contract.name}", f"part-{i:05d}-000.parquet")
                for i, part in enumerate(parts)
            ]
            written[contract.name] = TableInfo(contract.name, contract.fingerprint, tuple(files))
        return runs.finish(Manifest(stage, self.ds, key, run, {}, {}, written, facts))


@pytest.fixture
def night(tmp_path: Path) -> Night:
    night = Night(tmp_path)
    night.prepare()
    return night


def changed(row: int, **columns: Any) -> list[Row]:
    """The good rows with one of them changed."""
    rows = good()
    rows[row] = tuple(columns.get(name, value) for name, value in zip(COLUMNS, rows[row], strict=True))
    return rows


# ---- the audit ---------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[list[Row], str]] = {
    "item twice": (changed(1, item_id="dates"), r"'ann': item 'dates' twice"),
    "rank gap": (changed(3, rank=3), r"'bob': rank 3; needed rank 2"),
    "rank from 0": (changed(2, rank=0), r"'bob': rank 0; needed rank 1"),
    "seen in train": (changed(4, item_id="apple"), r"'cat' is offered item 'apple'"),
    "seen in test": (changed(1, item_id="cheese"), r"'ann' is offered item 'cheese'"),
    "score is NaN": (changed(3, score=float("nan")), r"'bob': score nan at rank 2"),
    "score is infinite": (changed(2, score=float("inf")), r"'bob': score inf at rank 1"),
    "score rises": (changed(5, score=1.5), r"'cat': score 1\.5 at rank 2 is above"),
    "unknown item": (changed(6, item_id="grapes"), r"'dan': item 'grapes'; needed an item of item_index"),
    "unknown user": ([(("eve" if r[0] == "dan" else r[0]), *r[1:]) for r in good()], r"'eve' is unknown"),
    "other model": (changed(7, model_version="m0"), r"'dan': model_version 'm0'; needed 'm1'"),
    "missing user": (good()[:6], r"3 users; user 'dan' of history has no row"),
    "extra user": ([*good(), ("eve", 1, "figs", 1.0, "m1"), ("eve", 2, "eggs", 1.0, "m1")], r"'eve' is unknown"),
    "extra row": ([*good(), ("dan", 3, "cheese", 0.1, "m1")], r"'dan': 3 rows; needed at most 2"),
    "short user": (good()[:7], r"1 of 4 users have fewer than 2 rows; needed at most the 0"),
    "user in two places": ([*good(), *good()[:2]], r"'ann' begins 2 times \(files part-0000\d-000.parquet, part-"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 5)])
def test_a_violation_is_named_and_nothing_is_published(night: Night, name: str, cuts: tuple[int, ...]) -> None:
    rows, message = MUTANTS[name]
    night.score(rows, cuts=cuts)
    with pytest.raises(ContractError, match=message) as caught:
        night.publish()
    assert "rerun the job score" in str(caught.value)
    assert not night.table.exists()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_rules_hold_across_buckets(night: Night, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", 2)
    night.score(MUTANTS[name][0])
    with pytest.raises(ContractError, match=MUTANTS[name][1]):
        night.publish()


@pytest.mark.parametrize("cuts", [(), (2, 4, 6), (1, 3, 5, 7), (1, 1, 4)])
@pytest.mark.parametrize("rows_per_bucket", [1, 3, 100])
def test_good_rows_pass_however_they_are_cut(
    night: Night, cuts: tuple[int, ...], rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", rows_per_bucket)
    night.score(cuts=cuts)
    assert night.publish() == ("done", 0)
    assert night.read() == sorted(good())
    assert list((night.root / "work").iterdir()) == []


@pytest.mark.parametrize("rows_per_bucket", [1, 100])
def test_ids_may_be_numbers(tmp_path: Path, rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", rows_per_bucket)
    night = Night(tmp_path / "a lake with 50% # marks", numbers=True)
    night.prepare()
    night.score(changed(1, item_id="cheese"))
    with pytest.raises(ContractError, match=f"user {night.id('ann')} is offered item {night.id('cheese')}"):
        night.publish()
    night.score()
    assert night.publish() == ("done", 0)
    assert night.read() == sorted((night.id(r[0]), r[1], night.id(r[2]), *r[3:]) for r in good())


def test_held_out_items_may_be_offered_when_only_train_is_masked(night: Night) -> None:
    night.score(changed(1, item_id="cheese"), seen="train")
    assert night.publish() == ("done", 0)


def test_a_user_who_has_seen_everything_needs_no_rows(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEEN, "dan", list(range(len(ITEMS))))
    night.prepare()
    night.score(good()[:6])
    with pytest.raises(ContractError, match="1 of 4 users have fewer than 2 rows"):
        night.publish()
    night.score(good()[:6], short_users=1, users=3)
    with pytest.raises(ContractError, match="4 users; needed the 3 that score counted"):
        night.publish()
    night.score(good()[:6], short_users=1)
    assert night.publish() == ("done", 0)


def test_as_many_users_may_be_short_as_score_counted(night: Night) -> None:
    night.score(good()[:7], short_users=1)
    assert night.publish() == ("done", 0)


def test_a_count_that_forgets_a_user_does_not_hide_it(night: Night) -> None:
    night.score(good()[:6], users=3)
    with pytest.raises(ContractError, match="user 'dan' of history has no row"):
        night.publish()


def test_a_damaged_file_is_refused(night: Night) -> None:
    path = Path(night.score().files("recommendations")[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ContractError, match=r"part-00001-000\.parquet: sha256 is"):
        night.publish()


def test_a_missing_file_is_refused(night: Night) -> None:
    Path(night.score().files("recommendations")[1]).unlink()
    with pytest.raises(ContractError, match=r"part-00001-000\.parquet of the manifest is gone"):
        night.publish()


def test_rows_must_be_those_of_the_manifest(night: Night) -> None:
    score = night.score()
    info = score.tables["recommendations"]
    lying = tuple(FileInfo(f.path, f.rows + 1, f.row_groups, f.bytes, f.sha256) for f in info.files)
    tables = {"recommendations": TableInfo(info.path, info.schema, lying)}
    night.lake.stage(night.ds, "score").finish(
        Manifest("score", night.ds, "s1", score.root, {}, {}, tables, score.facts)
    )
    with pytest.raises(ContractError, match="4 rows; needed 5 as the manifest says"):
        night.publish()


def test_a_score_run_of_another_prepare_run_is_refused(night: Night) -> None:
    night.score(prepare_run="p0")
    with pytest.raises(ContractError, match="made from prepare run p0, but the current one of ds 2026-01-31 is p1"):
        night.publish()


# ---- what readers see --------------------------------------------------------------------------------------


def test_every_reader_reads_the_same_rows(night: Night) -> None:
    night.score()
    night.publish()
    latest = night.latest()
    uris: Any = DeltaTable(str(night.table)).file_uris(file_pruning_predicate="ds = '2026-01-31'")
    by_pandas = pd.read_parquet(uris)[COLUMNS].itertuples(index=False, name=None)
    files = [str(night.table / path) for path in latest["files"]]
    by_duckdb = duckdb.read_parquet(files).select(*COLUMNS).fetchall()
    assert night.read() == sorted(by_duckdb) == sorted(by_pandas) == sorted(good())
    assert {k: latest[k] for k in ("ds", "version", "model_version", "run_key", "rows", "k")} == {
        "ds": "2026-01-31", "version": 0, "model_version": "m1", "run_key": "s1", "rows": 8, "k": 2
    }  # fmt: skip


def test_the_log_carries_what_readers_skip_files_by(night: Night) -> None:
    night.score()
    night.publish()
    actions = DeltaTable(str(night.table)).get_add_actions(flatten=True)
    found = {
        name: actions.column(name).to_pylist()
        for name in ("num_records", "min.user_id", "max.user_id", "min.rank", "max.rank")
    }
    assert sorted(zip(*found.values(), strict=True)) == [(4, "ann", "bob", 1, 2), (4, "cat", "dan", 1, 2)]


def test_publishing_twice_changes_nothing(night: Night) -> None:
    night.score()
    assert night.publish() == ("done", 0)
    before = {path: path.stat().st_mtime_ns for path in night.table.rglob("*") if path.is_file()}
    assert night.publish() == ("already-done", 0)
    assert {path: path.stat().st_mtime_ns for path in night.table.rglob("*") if path.is_file()} == before


def test_a_new_run_replaces_its_own_ds_only(night: Night) -> None:
    first = Night(night.root, "2026-01-30")
    first.prepare()
    first.score()
    assert first.publish() == ("done", 0)
    night.score()
    assert night.publish() == ("done", 1)
    old_files = night.latest()["files"]
    night.score(good("m2"), key="s2", model_version="m2")
    assert night.publish() == ("done", 2)
    assert (night.read(), night.read("2026-01-30")) == (sorted(good("m2")), sorted(good()))
    assert all((night.table / path).exists() for path in old_files), "a reader may still be reading the version before"
    assert night.latest()["version"] == 2


def test_different_bytes_under_one_run_key_never_overwrite_published_files(night: Night) -> None:
    night.score()
    night.publish()
    before = {path: (night.table / path).read_bytes() for path in night.latest()["files"]}
    night.score(changed(0, score=2.0))
    assert night.publish() == ("done", 1)
    assert {path: (night.table / path).read_bytes() for path in before} == before
    assert night.read() == sorted(changed(0, score=2.0))


# ---- the fence ---------------------------------------------------------------------------------------------


def test_an_older_ds_is_refused_and_a_published_one_is_left_alone(night: Night) -> None:
    older, oldest = Night(night.root, "2026-01-30"), Night(night.root, "2026-01-29")
    for each in (older, night, oldest):
        each.prepare()
        each.score()
    assert [older.publish(), night.publish()] == [("done", 0), ("done", 1)]
    with pytest.raises(StaleRun, match=r"ds 2026-01-31 is already published .* got 2026-01-29") as caught:
        oldest.publish()
    assert caught.value.exit_code == 5
    assert older.publish() == ("already-done", 0)
    older.score(good("m2"), key="s2", model_version="m2")
    with pytest.raises(StaleRun):
        older.publish()
    assert night.latest()["ds"] == "2026-01-31"


def test_a_publication_that_was_overtaken_after_its_fence_is_refused(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window between looking at the log and committing: delta-rs alone would rebase the older ds over the
    newer one.
    """
    first, older = Night(night.root, "2026-01-29"), Night(night.root, "2026-01-30")
    for each in (first, older, night):
        each.prepare()
        each.score()
    first.publish()
    fence = PublishedTable._fence

    def overtaken(self: PublishedTable, table: DeltaTable, mine: Any, files: set[str]) -> bool:
        answer = fence(self, table, mine, files)
        if mine.ds == older.ds and sys._getframe(1).f_code.co_name == "commit":
            monkeypatch.setattr(PublishedTable, "_fence", fence)
            night.publish()
        return answer

    monkeypatch.setattr(PublishedTable, "_fence", overtaken)
    with pytest.raises(BusyRun, match="came first"):
        older.publish()
    with pytest.raises(StaleRun):
        older.publish()
    assert night.latest()["ds"] == "2026-01-31"


def test_latest_names_the_newest_night_whoever_writes_it_last(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    later = Night(night.root, "2026-02-01")
    for each in (night, later):
        each.prepare()
        each.score()
    describe = PublishedTable._describe

    def overtaken(self: PublishedTable, table: DeltaTable, ds: str) -> Any:
        answer = describe(self, table, ds)
        monkeypatch.setattr(PublishedTable, "_describe", describe)
        later.publish()
        return answer

    monkeypatch.setattr(PublishedTable, "_describe", overtaken)
    assert night.publish() == ("done", 0)
    assert (night.latest()["ds"], night.latest()["version"]) == ("2026-02-01", 1)


def test_other_columns_than_the_published_ones_are_refused(night: Night) -> None:
    other = contracts.recommendations(pa.int64(), pa.string())
    night.score()
    night.publish()
    mine = PublishedTable(str(night.table), other)
    with pytest.raises(ContractError, match=r"user_id string, .*; needed .*user_id long"):
        mine.holds(_night("2026-02-01"), [])


def _night(ds: str) -> Any:
    from ncf_dist.publish.table import Night as Planned

    return Planned(ds, "s1", "m1", 2)


# ---- runs that are killed, and runs at once ----------------------------------------------------------------

RUN = """
import os, signal, sys
from ncf_dist.config import Config
from ncf_dist.publish import table
from ncf_dist.publish.pipeline import publish
from ncf_dist.errors import NcfError

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(name):
    found = getattr(table.PublishedTable, name)
    setattr(table.PublishedTable, name, lambda *args: (found(*args), die()))

if __name__ == "__main__":
    lake, work, ds, point = sys.argv[1:]
    config = Config.model_validate({"paths": {"lake": lake, "work": work}, "input": {"path": "unused"}})
    if point == "in copy":
        real = table.write_atomic
        calls = []
        table.write_atomic = lambda *args: (calls.append(real(*args)), len(calls) == 2 and die())
    elif point == "before latest":
        table.write_atomic = lambda path, data: die() if path.endswith("latest.json") else None
        from ncf_dist.artifacts import write_atomic as real
        table.write_atomic = lambda path, data: die() if path.endswith("latest.json") else real(path, data)
    elif point != "never":
        after(point)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(publish(config, ds).status)
    except NcfError as error:
        print(type(error).__name__)
"""


def start(night: Night, point: str = "never") -> subprocess.Popen[str]:
    """A process that waits for `go` and publishes (never a fork: delta-rs dies in one); it kills itself at
    `point`.
    """
    command = [sys.executable, "-c", RUN, night.lake.root, str(night.root / "work"), night.ds, point]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def go(*processes: subprocess.Popen[str]) -> None:
    """Let them publish at the same moment."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def killed(night: Night, point: str) -> bool:
    process = start(night, point)
    go(process)
    return process.wait() == -signal.SIGKILL


def replaced(night: Night) -> None:
    """m1 is published and m2 is ready to replace it."""
    night.score()
    night.publish()
    night.score(good("m2"), key="s2", model_version="m2")


@pytest.mark.parametrize(
    ("point", "committed"), [("in copy", False), ("copy", False), ("commit", True), ("before latest", True)]
)
def test_a_killed_run_leaves_one_whole_night_and_the_next_run_finishes(
    night: Night, point: str, committed: bool
) -> None:
    replaced(night)
    assert killed(night, point)
    assert night.read() == sorted(good("m2" if committed else "m1"))
    assert night.latest()["run_key"] == "s1"
    assert night.publish() == ("already-done" if committed else "done", 1)
    assert (night.latest()["run_key"], night.latest()["version"]) == ("s2", 1)
    assert night.read() == sorted(good("m2"))


def test_latest_is_mended_also_by_the_night_after(night: Night) -> None:
    replaced(night)
    assert killed(night, "commit")
    after = Night(night.root, "2026-02-01")
    after.prepare()
    after.score()
    assert after.publish() == ("done", 2)
    assert after.latest()["ds"] == "2026-02-01"


@pytest.mark.parametrize("delay_ms", [30, 60, 90, 120])
def test_readers_see_old_or_new_when_a_run_is_killed_at_any_time(night: Night, delay_ms: int) -> None:
    replaced(night)
    process = start(night)
    go(process)
    time.sleep(delay_ms / 1000)
    process.kill()
    process.wait()
    found = night.read()
    assert found in (sorted(good("m1")), sorted(good("m2")))
    assert night.publish()[1] == 1
    assert night.read() == sorted(good("m2"))
    assert night.latest()["run_key"] == "s2"


def test_of_publishers_at_once_one_wins_and_the_rest_are_told(night: Night) -> None:
    """Four nights at once: the log is a chain of whole nights, and the newest one that was published is what
    latest.json names.
    """
    nights = [Night(night.root, f"2026-02-0{day}") for day in (1, 2, 3, 4)]
    for each in nights:
        each.prepare()
        each.score()
    processes = [start(each) for each in nights]
    go(*processes)
    answers = [process.communicate()[0].strip() for process in processes]
    assert set(answers) <= {"done", "BusyRun", "StaleRun"}
    done = [each.ds for each, answer in zip(nights, answers, strict=True) if answer == "done"]
    assert done
    assert {p["ds"] for p in DeltaTable(str(night.table)).partitions()} == set(done)
    assert nights[0].latest()["ds"] == max(done)
    assert all(Night(night.root, ds).read() == sorted(good()) for ds in done)


def test_stale_leftovers_are_swept_and_fresh_ones_are_not(night: Night) -> None:
    night.score()
    night.publish()
    old = night.table / "_delta_log" / f"{1:020d}.json#1"
    fresh = night.table / "_delta_log" / f"{1:020d}.json#2"
    for path in (old, fresh):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert night.publish() == ("already-done", 0)
    assert (old.exists(), fresh.exists()) == (False, True)
    night.score(good("m2"), key="s2", model_version="m2")
    assert night.publish() == ("done", 1)
    assert night.read() == sorted(good("m2"))


def test_the_job_prints_one_line_for_the_scheduler(night: Night) -> None:
    night.score()
    path = night.root / "conf.yaml"
    path.write_text(
        json.dumps(
            {
                "paths": {"lake": night.lake.root, "work": str(night.root / "work")},
                "input": {"path": "unused"},
            }
        )
    )
    command = [sys.executable, str(REPO / "jobs" / "publish.py"), "--config", str(path), "--ds", night.ds]

    def run() -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(REPO)}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    first, second = run(), run()
    assert (first.returncode, second.returncode) == (0, 0)
    report = json.loads(first.stdout.splitlines()[-1])
    assert (report["status"], report["version"], report["outputs"]) == (
        "done",
        0,
        {"recommendations": str(night.table)},
    )
    assert "version 0, 8 rows" in first.stderr
    assert "already published" in second.stderr
    assert json.loads(second.stdout.splitlines()[-1])["status"] == "already-done"
