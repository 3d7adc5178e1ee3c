"""What is published: whole audited nights in any order, one atomic commit each."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
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
from ncf_dist.errors import BusyRun, ContractError, InputError, StaleRun
from ncf_dist.inputs import ids_digest
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo, write_parquet
from ncf_dist.publish import latest, steps, unseen
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.table import Publication, PublishedTable
from tests.published import COLUMNS, HELD_OUT, ITEMS, REQUIRED, SEEN, Night, Row, as_lists, changed, good

REPO = Path(__file__).parents[1]


@pytest.fixture
def night(tmp_path: Path) -> Night:
    night = Night(tmp_path)
    night.prepare()
    return night


# ---- the audit ---------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[list[Row], str]] = {
    "item twice": (changed(1, item_id="dates"), r"(row|offer) \d: item 'dates' twice"),
    "rank gap": (changed(3, rank=3), r"(row|offer) \d: rank 3; needed rank 2"),
    "rank from 0": (changed(2, rank=0), r"(row|offer) \d: rank 0; needed rank 1"),
    "seen in train": (changed(4, item_id="apple"), r"user_idx 2 is offered item 'apple'"),
    "seen in test": (changed(1, item_id="cheese"), r"user_idx 0 is offered item 'cheese'"),
    "score is NaN": (changed(3, score=float("nan")), r"(row|offer) \d: score nan at rank 2"),
    "score is infinite": (changed(2, score=float("inf")), r"(row|offer) \d: score inf at rank 1"),
    "score rises": (changed(5, score=1.5), r"(row|offer) \d: score 1\.5 at rank 2 is above"),
    "unknown item": (changed(6, item_id="grapes"), r"(row|offer) \d: item 'grapes'; needed an item of item_index"),
    "unknown user": ([(("eve" if r[0] == "dan" else r[0]), *r[1:]) for r in good()], r"a user is unknown to prepare"),
    "other model": (changed(7, model_version="m0"), r"(row|offer) \d: model_version 'm0'; needed 'm1'"),
    "missing user": (good()[:6], r"user_idx 3 has no row; needed every user that is due"),
    "extra user": ([*good(), ("eve", 1, "figs", 1.0, "m1", "model")], r"a user is unknown to prepare"),
    "extra row": ([*good(), ("dan", 3, "cheese", 0.1, "m1", "model")], r"(row|offer) \d: 3 rows; needed at most 2"),
    "short user": (good()[:7], r"user_idx 3 has 1 rows; needed 2: K, or all that are left"),
    "other reason": (changed(5, reason="luck"), r"(row|offer) \d: reason 'luck'; needed 'model' or 'popular'"),
    "two reasons": (changed(5, reason="popular"), r"(row|offer) \d: reason 'popular' at rank 2; needed the user's"),
    "popular in place of the model": (
        [(*r[:5], "popular" if r[0] == "cat" else "model") for r in good()],
        r"user_idx 2 has reason 'popular'; needed 'model'",
    ),
    "user in two places": ([*good(), *good()[:2]], r"user_idx 0 begins 2 times \(files part-0000\d-000.parquet, part-"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 5)])
def test_a_violation_is_named_and_nothing_is_published(night: Night, name: str, cuts: tuple[int, ...]) -> None:
    rows, message = MUTANTS[name]
    night.score(rows, cuts=cuts)
    with pytest.raises(ContractError, match=message) as caught:
        night.publish()
    text = str(caught.value)
    assert "rerun the job score" in text
    assert not any(f"'{user}'" in text for user in (*SEEN, "eve")), "messages end in logs, which hold no user ids"
    assert not night.table.exists()


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 5)])
def test_a_violation_is_named_by_its_place(night: Night, cuts: tuple[int, ...]) -> None:
    """The file and the row in it, where a person finds the user; also of a user whose rows are in two files."""
    for at in range(len(good())):
        night.score(changed(at, reason="luck"), cuts=cuts)
        with pytest.raises(ContractError) as caught:
            night.publish()
        found = re.search(r"file part-(\d+)\S*: row (\d+): reason 'luck'", str(caught.value))
        assert found is not None
        assert [0, *cuts][int(found[1])] + int(found[2]) == at


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
    with pytest.raises(ContractError, match=f"user_idx 0 is offered item {night.id('cheese')}"):
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
    with pytest.raises(ContractError, match="1 users with fewer than 2 items; needed the 0 that score counted"):
        night.publish()
    night.score(good()[:6], short_users=1, users=3)
    with pytest.raises(ContractError, match="4 users; needed the 3 that score counted"):
        night.publish()
    night.score(good()[:6], short_users=1)
    assert night.publish() == ("done", 0)


def test_a_user_is_short_only_where_nothing_is_left(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dan has seen all but apple: one row is all there is. While bread is left, one row is too few, whatever score
    counted."""
    night.score(good()[:7], short_users=1)
    with pytest.raises(ContractError, match="user_idx 3 has 1 rows; needed 2"):
        night.publish()
    monkeypatch.setitem(SEEN, "dan", [1, 2, 3, 4, 5])
    night.prepare()
    assert night.publish() == ("done", 0)


def test_a_count_that_forgets_a_user_does_not_hide_it(night: Night) -> None:
    night.score(good()[:6], users=3)
    with pytest.raises(ContractError, match="user_idx 3 has no row"):
        night.publish()


# ---- which users, which items ------------------------------------------------------------------------------


def popular(user: str, *items: str) -> list[Row]:
    return [(user, rank + 1, item, 1.0, "m1", "popular") for rank, item in enumerate(items)]


def without(*users: str) -> list[Row]:
    return [row for row in good() if row[0] not in users]


@pytest.mark.parametrize("rows_per_bucket", [1, 100])
def test_known_users_without_a_history_get_what_is_popular(
    night: Night, rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cat has test rows alone, dan no rows at all tonight, eve is of the side table and was never seen."""
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", rows_per_bucket)
    monkeypatch.setitem(SEEN, "cat", [])
    monkeypatch.setitem(HELD_OUT, "cat", [5])
    monkeypatch.setitem(SEEN, "dan", [])
    night.prepare(unseen=("eve",))
    cat, dan, eve = popular("cat", "bread", "cheese"), popular("dan", "apple", "figs"), popular("eve", "bread", "figs")
    rest = without("cat", "dan")
    for rows, message in (
        ([*good(), *eve], "user_idx 2 has reason 'model'; needed 'popular': no row of theirs was trained on"),
        ([*rest, *cat, *good()[6:], *eve], "user_idx 3 has reason 'model'; needed 'popular'"),
        ([*rest, *popular("cat", "figs", "bread"), *dan, *eve], "user_idx 2 is offered item 'figs', seen by"),
        ([*rest, *cat, *dan], "row 0 of unseen_users has no row"),
        ([*rest, *cat, *dan, *eve[:1]], "row 0 of unseen_users has 1 rows; needed 2"),
    ):
        night.score(rows, users=5)
        with pytest.raises(ContractError, match=message):
            night.publish()
    night.score([*rest, *cat, *dan, *eve], users=5)
    assert night.publish() == ("done", 0)


def test_without_a_fallback_they_get_nothing(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEEN, "dan", [])
    night.prepare(unseen=("eve",))
    night.score(without("dan") + popular("dan", "apple", "figs"), users=4, fallback_days=None)
    with pytest.raises(ContractError, match="user_idx 3 has rows; needed none"):
        night.publish()
    night.score(without("dan") + popular("eve", "apple", "figs"), users=3, fallback_days=None)
    with pytest.raises(ContractError, match="a user is unknown to prepare"):
        night.publish()
    night.score(without("dan"), users=3, fallback_days=None)
    assert night.publish() == ("done", 0)


@pytest.mark.parametrize("rows_per_bucket", [1, 100])
def test_only_active_users_where_that_is_promised(
    night: Night, rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last interactions of ann, bob, cat and dan are 0, 1, 2 and 3 days before midnight of the 31st."""
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", rows_per_bucket)
    night.prepare(unseen=("eve",))
    night.score(active_since="2026-01-29")
    with pytest.raises(
        ContractError, match="user_idx 3 has rows; needed none but for users with an interaction since 2026"
    ):
        night.publish()
    night.score(without("cat", "dan"), active_since="2026-01-29", users=3)
    with pytest.raises(ContractError, match="user_idx 2 has no row"):
        night.publish()
    night.score(without("dan"), active_since="2026-01-29", users=3)
    assert night.publish() == ("done", 0)


@pytest.mark.parametrize("rows_per_bucket", [1, 100])
@pytest.mark.parametrize(("spread", "last"), [(1, 0), (1, 5), (3, 0), (4, 7)])
def test_numbers_of_forgotten_users_are_due_nothing(
    night: Night, spread: int, last: int, rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody who is known is due something, which the numbers between and after theirs are not."""
    monkeypatch.setattr(unseen, "ROWS_PER_BUCKET", rows_per_bucket)
    night.prepare(unseen=("eve",), spread=spread, last=last)
    eve, fay = popular("eve", "bread", "figs"), popular("fay", "bread", "figs")
    for rows, message in (
        (good(), "row 0 of unseen_users has no row"),
        ([*good(), *eve, *fay], "a user is unknown to prepare"),
    ):
        night.score(rows, users=5)
        with pytest.raises(ContractError, match=message):
            night.publish()
    night.score([*good(), *eve], users=5)
    assert night.publish() == ("done", 0)


def test_item_lists_hold(night: Night) -> None:
    """Apple is not on the list of what is allowed, figs is denied; then only as many items are due as are left."""
    path = night.root / "allowed.txt"
    path.write_text("bread\ncheese\ndates\neggs\nfigs\n\nnobody's\n")
    ids = sorted(path.read_text().split("\n"))
    allow = {"path": str(path), "ids": 6, "sha256": ids_digest([text for text in ids if text])}
    deny = {"path": None, "ids": 1, "sha256": ids_digest(["figs"])}
    config, lists = {"score": {"deny_items": ["figs"]}}, {"allow_items": allow, "deny_items": deny}
    night.score(config=config, items=lists)
    with pytest.raises(
        ContractError, match=r"(row|offer) \d+: item 'figs'; needed an item that score.allow_items and score.deny"
    ):
        night.publish()
    night.score([r for r in good() if r[2] != "figs"], config=config, items=lists)
    with pytest.raises(ContractError, match=r"(row|offer) \d+: rank 2; needed rank 1"):
        night.publish()
    rows = [*without("bob", "dan")[:2], ("bob", 1, "eggs", 1.0, "m1", "model"), ("bob", 2, "bread", 0.5, "m1", "model")]
    rows += [*without("ann", "bob", "dan"), ("dan", 1, "cheese", 1.0, "m1", "model")]
    night.score(rows, config=config, items=lists, short_users=1)
    with pytest.raises(ContractError, match="user_idx 3 has 1 rows; needed 2"):
        night.publish()
    night.score([*rows, ("dan", 2, "bread", 0.5, "m1", "model")], config=config, items=lists)
    assert night.publish() == ("done", 0)
    path.write_text("bread\n")
    night.score([*rows, ("dan", 2, "bread", 0.5, "m1", "model")], key="s2", config=config, items=lists)
    with pytest.raises(ContractError, match="allowed.txt\\) has changed since score run s2; .* rerun the job score"):
        night.publish()
    path.unlink()
    with pytest.raises(ContractError, match="allowed.txt cannot be read .* rerun the job score"):
        night.publish()


# ---- lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MUTANTS if n != "user in two places"])
def test_the_rules_hold_for_lists(night: Night, name: str) -> None:
    rows, message = MUTANTS[name]
    night.score(rows, form="lists", cuts=())
    with pytest.raises(ContractError, match=message):
        night.publish()


def test_lists_are_published_a_row_a_user(night: Night) -> None:
    night.score(form="lists")
    assert night.publish() == ("done", 0)
    scan = DeltaTable(str(night.table)).scan(predicate=f"ds = '{night.ds}'")
    found = duckdb.from_arrow(scan).order("user_id").to_arrow_table().to_pylist()
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in good()]
    assert found == [{"ds": night.ds, **row} for row in as_lists(rows)]
    assert night.latest()["rows"] == len(SEEN)


def test_an_empty_list_is_refused(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEEN, "dan", list(range(len(ITEMS))))
    night.prepare()
    score = night.score(good()[:6], form="lists", short_users=1)
    contract = contracts.recommendations(night.id_type, night.id_type, "lists")
    rows = pa.Table.from_pylist([{"user_id": "dan", "items": [], "model_version": "m1"}], schema=contract.schema)
    more = write_parquet(rows, score.table_path("recommendations"), "part-00009-000.parquet")
    table = score.tables["recommendations"]
    tables = {"recommendations": TableInfo(table.path, table.schema, (*table.files, more))}
    night.lake.stage(night.ds, "score").finish(dataclasses.replace(score, tables=tables))
    with pytest.raises(ContractError, match=r"(row|offer) \d: an empty list"):
        night.publish()


@pytest.mark.parametrize("first", ["long", "lists"])
def test_a_table_of_the_other_form_is_left_alone(night: Night, first: str) -> None:
    night.score(form=first)
    night.publish()
    other = Night(night.root, "2026-02-01")
    other.prepare()
    other.score(form="lists" if first == "long" else "long")
    with pytest.raises(ContractError, match="set publish.table to a new name, or score.form to the form"):
        other.publish()
    assert {p["ds"] for p in DeltaTable(str(night.table)).partitions()} == {night.ds}


def test_a_table_from_before_there_were_reasons_is_left_alone(night: Night) -> None:
    """What to do is said; neither its nights nor its readers are touched."""
    schema = contracts.recommendations(pa.string(), pa.string()).schema
    old = schema.remove(schema.get_field_index("reason")).insert(0, pa.field("ds", pa.string(), nullable=False))
    DeltaTable.create(str(night.table), old, partition_by=["ds"])
    night.score()
    with pytest.raises(
        ContractError, match="needed .*reason string, partitioned by ds: .* publish.table to a new name"
    ):
        night.publish()
    assert DeltaTable(str(night.table)).version() == 0


# ---- files -------------------------------------------------------------------------------------------------


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
        Manifest(
            stage="score",
            ds=night.ds,
            run_key=score.run_key,
            root=score.root,
            config=score.config,
            inputs=score.inputs,
            tables=tables,
            facts=score.facts,
        )
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


# ---- any night, in any order, and the fence ---------------------------------------------------------------------


def test_an_older_ds_is_published_and_replaced_and_latest_stays(night: Night) -> None:
    """A backfill: its own partition in one commit; what is newest is what was newest."""
    older, oldest = Night(night.root, "2026-01-30"), Night(night.root, "2026-01-29")
    for each in (older, night, oldest):
        each.prepare()
        each.score()
    assert [older.publish(), night.publish()] == [("done", 0), ("done", 1)]
    latest = (night.table / "latest.json").read_bytes()
    assert oldest.publish() == ("done", 2)
    assert [older.publish(), oldest.publish(), night.publish()] == [("already-done", n) for n in (0, 2, 1)]
    older.score(good("m2"), key="s2", model_version="m2")
    assert older.publish() == ("done", 3)
    assert [each.read() for each in (oldest, older, night)] == [sorted(good(model)) for model in ("m1", "m2", "m1")]
    assert (night.table / "latest.json").read_bytes() == latest
    assert night.latest()["ds"] == "2026-01-31"


def test_a_run_that_is_published_again_takes_the_place_of_the_one_that_replaced_it(night: Night) -> None:
    replaced(night)
    assert night.publish() == ("done", 1)
    night.score()
    os.utime(night.lake.stage(night.ds, "score").run_path("s1"))
    assert night.publish() == ("done", 2)
    assert (night.read(), night.latest()["version"]) == (sorted(good("m1")), 2)


@pytest.mark.parametrize(("n_nights", "failing"), [(5, (2,)), pytest.param(10, (3, 7), marks=pytest.mark.soak)])
def test_nights_may_come_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_nights: int, failing: tuple[int, ...]
) -> None:
    """Shuffled nights, of which some fail once: all are right, and what latest.json names never goes back."""
    nights = [Night(tmp_path, f"2026-01-{day:02d}") for day in range(10, 10 + n_nights)]
    random.Random(1).shuffle(nights)
    seen = ""

    def fails(step: str) -> None:
        if step == "durable":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for version, each in enumerate(nights):
        each.prepare()
        each.score(good(f"m{each.ds}"), model_version=f"m{each.ds}")
        if version in failing:
            monkeypatch.setattr(steps, "listener", fails)
            with pytest.raises(InputError, match="nothing was committed"):
                each.publish()
            monkeypatch.undo()
            assert each.latest()["ds"] == seen
        assert each.publish() == ("done", version)
        assert each.latest()["ds"] == max(seen, each.ds)
        seen = each.latest()["ds"]
    assert all(each.read() == sorted(good(f"m{each.ds}")) for each in nights)
    assert all(each.publish()[0] == "already-done" for each in nights)


def test_a_night_that_runs_again_and_again_is_one_version(night: Night) -> None:
    night.offer("m1")
    assert night.publish() == ("done", 0)
    files = {path: path.read_bytes() for path in night.table.rglob("*") if path.is_file()}
    for _ in range(20):
        assert night.publish() == ("already-done", 0)
    assert {path: path.read_bytes() for path in night.table.rglob("*") if path.is_file()} == files


def test_a_file_that_stays_is_neither_added_nor_removed(night: Night) -> None:
    """The same run key with other bytes in its second file: a commit that named the first one twice would lose it for
    readers that go by the order of its actions."""
    night.score()
    night.publish()
    before = set(night.latest()["files"])
    night.score(changed(7, score=0.25))
    assert night.publish() == ("done", 1)
    assert night.read() == sorted(changed(7, score=0.25))
    actions = [json.loads(line) for line in (night.table / "_delta_log" / f"{1:020d}.json").open()]
    named = [action[kind]["path"] for action in actions for kind in ("add", "remove") if kind in action]
    assert len(named) == len(set(named)) == 2
    assert len(before & set(night.latest()["files"])) == 1
    assert night.publish() == ("already-done", 1)


@pytest.mark.parametrize("same", [False, True])
def test_a_publication_that_was_overtaken_after_its_fence_is_refused(
    night: Night, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """The window between looking at the log and committing: delta-rs alone would rebase it over the other one. Where
    that one changed this very ds, its run stands; a person decides."""
    first, other = Night(night.root, "2026-01-29"), Night(night.root, night.ds if same else "2026-01-30")
    for each in (first, other, night):
        each.prepare()
        each.score()
    first.publish()

    def overtaken(step: str) -> None:
        if step == "committing":
            monkeypatch.setattr(steps, "listener", lambda step: None)
            if same:
                other.score(good("m2"), key="s2", model_version="m2")
            other.publish()

    monkeypatch.setattr(steps, "listener", overtaken)
    with pytest.raises(StaleRun if same else BusyRun, match="another run changed ds" if same else "came first") as e:
        night.publish()
    assert e.value.exit_code == 5
    assert other.read() == sorted(good("m2" if same else "m1"))
    if not same:
        assert night.publish() == ("done", 2)
    assert night.latest()["ds"] == "2026-01-31"


def test_latest_names_the_newest_night_whoever_writes_it_last(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    later = Night(night.root, "2026-02-01")
    for each in (night, later):
        each.prepare()
        each.score()
    describe = latest.describe

    def overtaken(delta: DeltaLog, table: DeltaTable, ds: str) -> Any:
        answer = describe(delta, table, ds)
        monkeypatch.setattr(latest, "describe", describe)
        later.publish()
        return answer

    monkeypatch.setattr(latest, "describe", overtaken)
    assert night.publish() == ("done", 0)
    assert (night.latest()["ds"], night.latest()["version"]) == ("2026-02-01", 1)


def test_other_columns_than_the_published_ones_are_refused(night: Night) -> None:
    other = contracts.recommendations(pa.int64(), pa.string())
    night.score()
    night.publish()
    mine = PublishedTable(str(night.table), other)
    with pytest.raises(ContractError, match=r"user_id string, .*; needed .*user_id long"):
        mine.holds(_night("2026-02-01"), [])


def _night(ds: str) -> Publication:
    return Publication(ds, "s1", "m1", 2)


# ---- runs that are killed, and runs at once ----------------------------------------------------------------

RUN = """
import os, signal, sys
from ncf_dist.config import Config
from ncf_dist.publish import latest, table
from ncf_dist.publish.pipeline import publish
from ncf_dist.stage import stored
from ncf_dist.errors import NcfError

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(name):
    found = getattr(table.PublishedTable, name)
    setattr(table.PublishedTable, name, lambda *args: (found(*args), die()))

if __name__ == "__main__":
    lake, work, ds, point = sys.argv[1:]
    config = Config.model_validate({
        "paths": {"lake": lake, "work": work},
        "input": {"path": "unused"},
        "publish": {"require": ["users", "beats_popularity"]},
    })
    if point == "in copy":
        real = table.write_atomic
        calls = []
        table.write_atomic = lambda *args: (calls.append(real(*args)), len(calls) == 2 and die())
    elif point == "before latest":
        latest.write_atomic = die
    elif point == "in audit":
        from ncf_dist.publish import unseen
        unseen.Offers.check = die
    elif point in ("in a write", "in the blessing"):
        real_replace, where = os.replace, "/ds=" if point == "in a write" else "/gates/"
        os.replace = lambda old, new, **more: die() if where in str(new) else real_replace(old, new, **more)
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


def test_latest_is_written_also_by_the_night_after(night: Night) -> None:
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
                "publish": {"require": REQUIRED},
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
