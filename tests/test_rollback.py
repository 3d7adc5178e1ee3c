"""A rollback makes an earlier version's files readers' again, says what it undoes, and what was undone stays undone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from ncf_dist import cli
from ncf_dist.errors import ContractError, InputError, NcfError, StaleRun
from ncf_dist.inputs import ids_digest
from ncf_dist.publish import steps
from ncf_dist.publish.log import DeltaLog
from ncf_dist.rollback.pipeline import rollback
from tests.published import Night, good


def rows(model: str) -> list[Any]:
    return sorted(good(model))


@pytest.fixture
def night(made: Night, tmp_path: Path) -> Night:
    return made.copied(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Night:
    """2026-01-30 is published by m1, 2026-01-31 by m1 and then by m2 and m3: versions 0 to 3."""
    root = tmp_path_factory.mktemp("made")
    before, night = Night(root, "2026-01-30"), Night(root)
    for each in (before, night):
        each.prepare()
    before.offer("m1")
    assert before.publish() == ("done", 0)
    for version, model in enumerate(("m1", "m2", "m3"), 1):
        night.offer(model)
        assert night.publish() == ("done", version)
    return night


def entry(night: Night, version: int) -> Any:
    found = DeltaLog(str(night.table)).entry(version)
    assert found is not None
    return found


def refused(night: Night, kind: type[NcfError], match: str, to: int | str = "PREVIOUS") -> NcfError:
    """Nothing that readers see has changed."""
    before = (night.read(), (night.table / "latest.json").read_bytes(), DeltaTable(str(night.table)).version())
    with pytest.raises(kind, match=match) as caught:
        night.rollback(to)
    assert (night.read(), (night.table / "latest.json").read_bytes(), DeltaTable(str(night.table)).version()) == before
    return caught.value


def test_the_last_publication_is_undone_and_said_to_be(night: Night) -> None:
    outcome = night.rollback()
    assert (outcome.status, outcome.run_key) == ("done", "s2")
    assert outcome.extra == {"version": 4, "undone": ["s3"]}
    assert (night.read(), night.read("2026-01-30")) == (rows("m2"), rows("m1"))
    latest = night.latest()
    assert {name: latest[name] for name in ("ds", "version", "run_key", "model_version", "rows", "model_users")} == {
        "ds": night.ds, "version": 4, "run_key": "s2", "model_version": "m2", "rows": 8, "model_users": 4
    }  # fmt: skip
    made = entry(night, 4)
    assert (made.undoes, made.restores) == ([{"version": 3, "run_key": "s3"}], 2)
    assert made.files == entry(night, 2).files
    assert DeltaLog(str(night.table)).undone() == {(night.ds, "s3")}


def test_a_second_run_finds_it_done(night: Night) -> None:
    """So a rollback that was killed after its commit is finished by the same command, and never goes a step too far."""
    night.rollback()
    (night.table / "latest.json").unlink()
    outcome = night.rollback()
    assert (outcome.status, outcome.extra) == ("already-done", {"version": 4, "undone": ["s3"]})
    assert (night.read(), night.latest()["run_key"]) == (rows("m2"), "s2")
    night.rollback(1)
    assert night.rollback(1).status == "already-done"
    assert night.read() == rows("m1")
    assert DeltaLog(str(night.table)).undone() == {(night.ds, "s2"), (night.ds, "s3")}


def test_going_back_two_versions_undoes_both(night: Night) -> None:
    assert night.rollback(1).extra == {"version": 4, "undone": ["s2", "s3"]}
    assert night.read() == rows("m1")
    assert entry(night, 4).restores == 1


def test_what_is_undone_is_refused_until_it_is_overridden(night: Night) -> None:
    night.rollback()
    with pytest.raises(
        StaleRun, match=r"run s3 of ds .* was taken back by the rollback of version 4; .* --override"
    ) as e:
        night.publish()
    assert (e.value.exit_code, e.value.status) == (5, "refused")
    refused(night, StaleRun, "run s3 of ds .*, which version 3 has, was itself undone", to=3)
    night.sections["gates"] = {"overrides": {"undone": "it was right"}}
    night.config = night.configured()
    assert night.publish() == ("done", 5)
    del night.sections["gates"]
    assert night.read() == rows("m3")
    assert entry(night, 5).facts["ncf.overrides"] == {"undone": "it was right"}
    assert DeltaLog(str(night.table)).undone() == frozenset()
    night.config = night.configured()
    assert night.publish() == ("already-done", 5)
    assert night.rollback().run_key == "s2"
    with pytest.raises(StaleRun):
        night.publish()


def test_what_is_undone_stays_so_however_many_commits_come_after(night: Night) -> None:
    """Each carries the list on, so that the log may lose its older entries."""
    night.rollback()
    later = Night(night.root, "2026-02-01")
    later.prepare()
    for model in ("m1", "m2"):
        later.offer(model)
        later.publish()
    assert entry(night, 6).facts["ncf.undone"] == [[night.ds, "s3"]]
    with pytest.raises(StaleRun):
        night.publish()
    later.rollback()
    assert DeltaLog(str(night.table)).undone() == {(night.ds, "s3"), (later.ds, "s2")}


def test_another_run_is_published_after_a_rollback_and_undone_again(night: Night) -> None:
    """The run before it is the one that the rollback went back to, not one that was undone."""
    night.rollback()
    night.offer("m4")
    assert night.publish() == ("done", 5)
    assert night.rollback().extra == {"version": 6, "undone": ["s4"]}
    assert night.read() == rows("m2")


def test_without_an_earlier_run_the_partition_goes_and_latest_goes_back(night: Night) -> None:
    later = Night(night.root, "2026-02-01")
    later.prepare()
    later.offer("m1")
    assert later.publish() == ("done", 4)
    assert later.latest()["ds"] == later.ds
    outcome = later.rollback()
    assert (outcome.status, outcome.run_key, outcome.extra) == ("done", None, {"version": 5, "undone": ["s1"]})
    assert (later.read(), night.read()) == ([], rows("m3"))
    assert {p["ds"] for p in DeltaTable(str(night.table)).partitions()} == {night.ds, "2026-01-30"}
    assert (later.latest()["ds"], later.latest()["version"]) == (night.ds, 3)
    assert later.rollback().status == "already-done"
    with pytest.raises(StaleRun):
        later.publish()
    later.offer("m2")
    assert later.publish() == ("done", 6)
    assert later.latest()["ds"] == later.ds


def test_an_older_night_goes_back_and_latest_stays(night: Night) -> None:
    before, latest = Night(night.root, "2026-01-30"), night.latest()
    assert before.rollback(0).status == "already-done"
    assert before.rollback().run_key is None
    assert (night.latest(), before.read(), night.read()) == (latest, [], rows("m3"))


def test_a_table_without_nights_has_no_latest(tmp_path: Path) -> None:
    night = Night(tmp_path)
    night.prepare()
    night.offer("m1")
    night.publish()
    night.rollback()
    assert not (night.table / "latest.json").exists()
    assert night.rollback().status == "already-done"
    night.offer("m2")
    assert night.publish() == ("done", 2)
    assert night.latest()["run_key"] == "s2"


@pytest.mark.parametrize("to", [4, 99])
def test_a_version_that_is_not_earlier_is_refused(night: Night, to: int) -> None:
    refused(night, InputError, rf"--to is version {to}; .* those of ds .* are 1 \(run s1\), 2 \(run s2\), 3", to=to)


def test_a_night_that_is_not_there_is_refused(night: Night) -> None:
    for each in (Night(night.root, "2026-01-15"), Night(night.root / "elsewhere")):
        with pytest.raises(InputError, match="is not published|has no published night"):
            each.rollback()
    assert DeltaTable(str(night.table)).version() == 3


@pytest.mark.parametrize("damage", ["gone", "short", "flipped"])
def test_a_version_whose_files_are_damaged_is_refused(night: Night, damage: str) -> None:
    path = night.table / next(iter(entry(night, 2).files))
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "short" else whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    refused(night, ContractError, f"{path.name} of version 2 is damaged")
    assert night.rollback(1).status == "done"
    path.write_bytes(whole)


def test_a_version_that_the_log_has_lost_is_refused(night: Night) -> None:
    DeltaTable(str(night.table)).create_checkpoint()
    for version in (0, 1):
        (night.table / "_delta_log" / f"{version:020d}.json").unlink()
    refused(night, ContractError, r"does not reach back to version 1 any more .* needed one of 2 \(run s2\), 3", to=1)
    assert night.rollback(2).status == "done"
    assert night.read() == rows("m2")


def test_where_earlier_runs_were_cleaned_away_the_night_stays(night: Night) -> None:
    """It may have had one: only a night that is known to have had none goes."""
    later = Night(night.root, "2026-02-01")
    later.prepare()
    later.offer("m1")
    assert later.publish() == ("done", 4)
    DeltaTable(str(night.table), version=3).create_checkpoint()
    for version in range(3):
        (night.table / "_delta_log" / f"{version:020d}.json").unlink()
    refused(night, ContractError, "what ds 2026-01-31 was before version 3 is not known any more")
    assert later.rollback().run_key is None
    assert later.read() == []


def test_files_that_somebody_else_rewrote_are_undone_by_their_version_only(night: Night) -> None:
    DeltaTable(str(night.table)).restore(1)
    refused(night, ContractError, "are of no commit of ours .* name the version with --to")
    assert night.rollback(2).status == "done"
    assert night.read() == rows("m2")


# ---- people who are forgotten ----------------------------------------------------------------------------------------


def listing(night: Night, *users: str) -> str:
    """The list of input.forget, which the night's config names from now on; its digest."""
    path = night.root / "forget.txt"
    path.write_text("\n".join(users))
    night._made_with(input={"path": "unused", "forget": str(path)})
    return ids_digest(sorted(users))


def test_nobody_who_is_forgotten_comes_back(night: Night) -> None:
    listing(night, "nobody", "zoe")
    assert night.rollback().status == "done", "who was in neither does not matter"
    listing(night, "dan", "zoe")
    error = refused(night, ContractError, r"version 1 of ds .* \(run s1\) has rows of people on the list", to=1)
    assert "clean --forget" in str(error)
    assert "dan" not in str(error)


def test_where_people_were_forgotten_their_list_is_needed(night: Night) -> None:
    """Of a version that was made before: its run knew of no list, or of another one."""
    digest = listing(night, "zoe")
    night.prepare(forget=digest)
    night.offer("m4")
    assert night.publish() == ("done", 4)
    del night.sections["input"]
    refused(night, ContractError, "people were forgotten in ds 2026-01-31 since version 3 .* set input.forget")
    listing(night, "zoe")
    assert night.rollback().run_key == "s3"


def test_a_run_that_knows_no_list_does_not_replace_one_that_does(night: Night) -> None:
    digest = listing(night, "zoe")
    night.prepare(forget=digest)
    night.offer("m4")
    assert night.publish() == ("done", 4)
    night.prepare(forget=ids_digest(["an older list"]))
    night.offer("m5")
    with pytest.raises(ContractError, match="run s5 .* does not know of the list of people to be forgotten"):
        night.publish()
    night.prepare(forget=listing(night, "zoe", "abe"))
    night.offer("m6")
    assert night.publish() == ("done", 5)


# ---- the job ---------------------------------------------------------------------------------------------------------


def test_the_command_line(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    conf = night.root / "conf.yaml"
    conf.write_text(night.config.model_dump_json(by_alias=True))

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        code = cli.run_job("rollback", rollback, ["--config", str(conf), "--ds", night.ds, *more])
        return code, dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    assert run("--to", "NEXT")[0] == 2
    code, report = run()
    assert (code, report["status"], report["version"], report["undone"]) == (0, "done", 4, ["s3"])
    code, report = run("--to", "1")
    assert (code, report["run_key"], report["undone"]) == (0, "s1", ["s2", "s3"])
    assert run("--to", "1")[1]["status"] == "already-done"
    code, report = run("--to", "2")
    assert (code, report["status"]) == (5, "refused")


def test_a_rollback_that_was_overtaken_changes_nothing(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(step: str) -> None:
        if step == "committing":
            monkeypatch.setattr(steps, "listener", lambda step: None)
            night.offer("m4")
            night.publish()

    monkeypatch.setattr(steps, "listener", overtaken)
    with pytest.raises(StaleRun, match="another run changed ds 2026-01-31"):
        night.rollback()
    assert night.read() == rows("m4")
    assert not os.path.exists(night.table / "_delta_log" / f"{5:020d}.json")
