"""What is published stays whole, or is said not to be: damaged files, a damaged log, full disks, and what killed runs
leave."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from ncf_dist import cli, scratch
from ncf_dist.errors import ContractError, InputError
from ncf_dist.publish import latest, pipeline, table
from ncf_dist.publish import log as delta_log
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.pipeline import publish
from ncf_dist.publish.table import PublishedTable
from tests.published import Night, good
from tests.test_publish import killed, replaced


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """Two nights are published, the later one twice: versions 0 to 2."""
    before, night = Night(tmp_path, "2026-01-30"), Night(tmp_path)
    for each in (before, night):
        each.prepare()
    before.score()
    assert before.publish() == ("done", 0)
    replaced(night)
    assert night.publish() == ("done", 2)
    return night


def deep(night: Night) -> Night:
    night.config = night.configured(verify="deep")
    return night


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a byte changed, a piece lost, the end lost, a piece too many, or nothing left."""
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    return (data[:at], data[:at] + rng.randbytes(3) + data[at:], b"")[kind - 3]


# ---- published files ---------------------------------------------------------------------------------------


def damaged_files(night: Night, rounds: int, seed: int) -> None:
    """Each round damages one or two published files; all are noticed, and are the same bytes again."""
    rng, files = random.Random(seed), [night.table / path for path in night.latest()["files"]]
    whole = {path: path.read_bytes() for path in files}
    latest = night.latest()
    for _ in range(rounds):
        bad = rng.sample(files, rng.randint(1, 2))
        for path in bad:
            path.unlink() if rng.random() < 0.2 else path.write_bytes(mutate(whole[path], rng))
        outcome = publish(night.config, night.ds)
        assert (outcome.status, outcome.extra["version"]) == ("done", 2)
        assert sorted(outcome.extra["repaired"]) == sorted(str(path.relative_to(night.table)) for path in bad)
        assert {path: path.read_bytes() for path in files} == whole
    assert night.latest() == latest
    assert night.publish() == ("already-done", 2)
    assert night.read() == sorted(good("m2"))


def test_damaged_files_are_noticed_and_repaired(night: Night) -> None:
    damaged_files(deep(night), 25, 1)


@pytest.mark.soak
def test_many_damaged_files_are_noticed_and_repaired(night: Night) -> None:
    damaged_files(deep(night), 2_000, 2)


def test_a_quick_look_sees_what_is_gone_and_what_has_another_size(night: Night) -> None:
    first, second = (night.table / path for path in night.latest()["files"])
    whole = second.read_bytes()
    first.unlink()
    second.write_bytes(whole[:-1])
    assert publish(night.config, night.ds).extra["repaired"] == night.latest()["files"]
    second.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    assert night.publish() == ("already-done", 2), "the bytes are not read"
    assert publish(deep(night).config, night.ds).extra["repaired"] == night.latest()["files"][1:]
    assert second.read_bytes() == whole


def test_a_folder_that_is_gone_and_a_folder_in_a_files_place_are_repaired(night: Night) -> None:
    before = night.read()
    shutil.rmtree(night.table / f"ds={night.ds}")
    assert night.publish()[0] == "done"
    assert night.read() == before
    file = night.table / night.latest()["files"][0]
    file.unlink()
    file.mkdir()
    assert night.publish()[0] == "done"
    assert night.read() == before


def test_what_cannot_be_repaired_is_named_and_the_rest_is(night: Night) -> None:
    run = night.lake.stage(night.ds, "score").newest()
    first, second = (night.table / path for path in night.latest()["files"])
    whole = second.read_bytes()
    sources = {path.rsplit("-000", 1)[0].rsplit("/", 1)[1]: Path(path) for path in run.files("recommendations")}
    source = next(path for stem, path in sources.items() if f"-{stem}-" in first.name)
    source.write_bytes(b"")
    for path in (first, second):
        path.write_bytes(b"PAR1")
    said = rf"{first.name}: it has 4 bytes, needed .*{source.name}: sha256 is .* remove {run.root} and rerun the jobs"
    with pytest.raises(ContractError, match="1 published files are damaged.*" + said):
        night.publish()
    assert second.read_bytes() == whole


def test_log_and_latest_carry_sizes_and_digests(night: Night) -> None:
    latest = night.latest()
    found = {
        path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path in latest["files"]
        for data in [(night.table / path).read_bytes()]
    }
    assert latest["checksums"] == found
    entry = DeltaLog(str(night.table)).entry(2)
    assert entry is not None
    assert entry.checksums == found


def test_the_command_line_asks_for_a_deep_look(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    conf = night.root / "conf.yaml"
    conf.write_text(night.config.model_dump_json(by_alias=True))
    path = night.table / night.latest()["files"][0]
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    args = ["--config", str(conf), "--ds", night.ds]
    assert cli.run_job("publish", publish, args) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "already-done"
    assert cli.run_job("publish", publish, [*args, "--verify", "deep"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["repaired"] == night.latest()["files"][:1]
    assert cli.run_job("publish", publish, [*args, "--verify", "thorough"]) == 2
    assert "publish.verify is 'thorough'" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


# ---- the log -----------------------------------------------------------------------------------------------


def entry(night: Night, version: int) -> Path:
    return night.table / "_delta_log" / f"{version:020d}.json"


def damaged_logs(night: Night, rounds: int, seed: int) -> dict[str, int]:
    """Each round damages an entry of the log and publishes tonight again or the next night: an error that says so, or
    every night of the log as it was."""
    rng, whole, outcomes = random.Random(seed), night.root / "whole", {"refused": 0, "published": 0}
    after = Night(night.root, "2026-02-01")
    after.prepare()
    after.score()
    shutil.copytree(night.table, whole)
    for _ in range(rounds):
        path, each = entry(night, rng.randrange(3)), rng.choice((night, after))
        path.write_bytes(mutate(path.read_bytes(), rng))
        try:
            each.publish()
        except ContractError:
            outcomes["refused"] += 1
        else:
            outcomes["published"] += 1
            assert each.read() == sorted(good("m2" if each is night else "m1"))
            assert night.read("2026-01-30") == sorted(good())
        shutil.rmtree(night.table)
        shutil.copytree(whole, night.table)
    return outcomes


def test_a_damaged_log_is_an_error_that_says_so_or_does_no_harm(night: Night) -> None:
    assert damaged_logs(night, 40, 1)["refused"] > 10


@pytest.mark.soak
def test_a_log_damaged_in_many_ways_is_an_error_that_says_so_or_does_no_harm(night: Night) -> None:
    assert damaged_logs(night, 2_000, 2)["refused"] > 500


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_damaged_entry_is_named_with_the_remedy(night: Night, version: int) -> None:
    path = entry(night, version)
    whole = path.read_bytes()
    for data in (b"", b"\0" * 100, whole[: len(whole) // 2], whole.replace(b'"size":', b'"size":1'), b"[1]", b"{}\n"):
        path.write_bytes(data)
        with pytest.raises(
            ContractError, match=f"entry {path} of the Delta log is damaged .*: put the entry back"
        ) as e:
            night.publish()
        assert ("remove it and latest.json and publish its night again" in str(e.value)) == (version == 2)
        assert str(night.table) in str(e.value)
    path.write_bytes(whole)
    assert night.publish() == ("already-done", 2)


# What is changed in the newest entry, which stays JSON: (what is looked for, what takes its place, what is said).
LIES = {
    "a file is not removed": (
        b'{"remove":{"path":"ds=',
        b'{"remove":{"path":"d5=',
        "the log as a whole shows other files",
    ),
    "a count": (
        b'"ncf.model_users":"4"',
        b'"ncf.model_users":"9"',
        "what it says about itself is not what was written",
    ),
    "a digest": (b'"sha256":"', b'"sha256":"0', "what it says about itself is not what was written"),
    "a size": (b'"size":', b'"size":1', "the files that it adds are not the ones that it says it adds"),
    "another night": (b'"ds":"2026-01-31"', b'"ds":"2026-01-21"', "needed ds 2026-01-31"),
    "no rows": (b'\\"numRecords\\": 4', b'\\"numRecords\\": null', "rows; needed ds"),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_log_is_held_to_what_was_written(night: Night, lie: str) -> None:
    old, new, said = LIES[lie]
    whole = entry(night, 2).read_bytes()
    assert old in whole
    entry(night, 2).write_bytes(whole.replace(old, new))
    with pytest.raises(ContractError, match=f"entry .*2.json of the Delta log is damaged .*{said}"):
        night.publish()


def test_a_gap_in_the_log_is_an_error(night: Night) -> None:
    entry(night, 1).unlink()
    with pytest.raises(ContractError, match="_delta_log cannot be read .*gap.*: put the entry back"):
        night.publish()


def test_the_remedies_work(night: Night) -> None:
    entry(night, 2).write_bytes(b"")
    with pytest.raises(ContractError):
        night.publish()
    entry(night, 2).unlink()
    with pytest.raises(ContractError, match="it is gone: latest.json names version 2, the log ends at 1"):
        night.publish()
    (night.table / "latest.json").unlink()
    assert night.publish() == ("done", 2)
    assert night.read() == sorted(good("m2"))
    shutil.rmtree(night.table / "_delta_log")
    with pytest.raises(ContractError, match="latest.json names version 2, and there is no log"):
        night.publish()
    night.table.rename(night.root / "aside")
    assert night.publish() == ("done", 0)


def test_a_panic_of_delta_rs_is_an_error_and_an_interrupt_is_not(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 makes them."""

    for error, wanted in (
        (PanicException("index out of bounds"), ContractError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*_: object, error: BaseException = error, **__: object) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(delta_log, "DeltaTable", fail)
            with pytest.raises(wanted):
                night.publish()


# ---- disks -------------------------------------------------------------------------------------------------


def nth_write(number: int) -> Callable[[pytest.MonkeyPatch, OSError], None]:
    """The write of that number fails: two files are copied, then comes latest.json."""

    def fault(patch: pytest.MonkeyPatch, error: OSError) -> None:
        real, calls = table.write_atomic, list[str]()

        def write(path: str, data: bytes) -> None:
            calls.append(path)
            if len(calls) == number:
                raise error
            real(path, data)

        for module in (table, latest):
            patch.setattr(module, "write_atomic", write)

    return fault


def at(owner: Any, name: str, after: bool = False) -> Callable[[pytest.MonkeyPatch, OSError], None]:
    """A call fails, before or after it has done its work."""

    def fault(patch: pytest.MonkeyPatch, error: OSError) -> None:
        real = getattr(owner, name)

        def fail(*args: Any, **kwargs: Any) -> None:
            if after:
                real(*args, **kwargs)
            raise error

        patch.setattr(owner, name, fail)

    return fault


STEPS = {
    "making the folder": at(table, "make_dirs"),
    "the first file": nth_write(1),
    "the second file": nth_write(2),
    "its list of names": at(table, "sync"),
    "before the commit": at(PublishedTable, "_write"),
    "after the commit": at(PublishedTable, "_write", after=True),
    "the log's names": at(DeltaLog, "sync"),
    "latest.json": nth_write(3),
}
COMMITTED = ("after the commit", "the log's names", "latest.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fails_leaves_one_night_and_says_which(
    tmp_path: Path, step: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = Night(tmp_path)
    night.prepare()
    replaced(night)
    with monkeypatch.context() as patch:
        STEPS[step](patch, OSError(code, os.strerror(code)))
        with pytest.raises(InputError, match=rf"publishing ds {night.ds} stopped: .*{os.strerror(code)}") as caught:
            night.publish()
    committed = step in COMMITTED
    said = "version 1 is committed and Delta readers see it, while latest.json still names version 0"
    assert (said if committed else "nothing was committed, so readers see what they saw before") in str(caught.value)
    assert "run this again, which finishes it" in str(caught.value)
    assert night.read() == sorted(good("m2" if committed else "m1"))
    assert night.latest()["version"] == 0
    assert night.publish() == ("already-done" if committed else "done", 1)
    assert (night.latest()["version"], night.read()) == (1, sorted(good("m2")))
    assert [path for path in night.root.rglob("*") if path.suffix == ".tmp" or ".json#" in path.name] == []


@pytest.mark.parametrize("size", [0, 600, 1_500])
def test_a_full_disk_leaves_the_old_night(tmp_path: Path, size: int) -> None:
    """The kernel lets no file grow beyond `size` bytes: scratch, a copy or the log's entry does not fit."""
    night = Night(tmp_path)
    night.prepare()
    replaced(night)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(InputError, match="nothing was committed"):
            night.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (night.read(), night.latest()["version"]) == (sorted(good("m1")), 0)
    assert night.publish() == ("done", 1)
    assert [path.name for path in night.root.rglob("*") if path.suffix == ".tmp" or ".json#" in path.name] == []
    assert list((night.root / "work").iterdir()) == []


# ---- what killed runs leave --------------------------------------------------------------------------------


def aged(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * 86_400,) * 2)


def test_scratch_and_half_written_files_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    night = Night(tmp_path)
    night.prepare()
    replaced(night)
    assert killed(night, "in audit")
    assert [path.name.startswith("publish-") for path in (tmp_path / "work").iterdir()] == [True]
    assert killed(night, "in a write")
    assert len(list(night.table.rglob(f"*{scratch.TEMPORARY}"))) == 1
    assert killed(night, "in the blessing")
    assert len(list((tmp_path / "lake/runs").rglob(f"*{scratch.TEMPORARY}"))) == 1
    assert night.publish() == ("done", 1)
    assert list((tmp_path / "work").iterdir()) == []
    assert list((tmp_path / "lake").rglob(f"*{scratch.TEMPORARY}")) == []


def test_files_that_were_staged_and_never_published_go_after_a_day(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file that any version needs, however old, nor one that a run may be about to commit."""
    needed = set(night.table.rglob("*.parquet"))
    night.score(good("m3"), key="s3", model_version="m3")
    assert killed(night, "copy")
    staged = sorted({*night.table.rglob("*.parquet")} - needed)
    assert len(staged) == 2
    for path in [*needed, staged[0]]:
        aged(path, 30)
    lonely = night.table / "ds=2026-01-15"
    lonely.mkdir()
    (lonely / "m0-part-0-s0-00.parquet").write_bytes(b"")
    aged(lonely / "m0-part-0-s0-00.parquet", 30)
    aged(lonely, 30)
    night.score(good("m4"), key="s4", model_version="m4")
    with monkeypatch.context() as patch:
        patch.setattr("ncf_dist.publish.leftovers._ever_added", lambda delta: None)
        assert night.publish() == ("done", 3)
    assert staged[0].exists(), "a log without its first entries does not say what nobody needs"
    assert night.publish() == ("already-done", 3)
    assert all(path.exists() for path in needed)
    assert [path.exists() for path in staged] == [False, True]
    assert not lonely.exists()
    assert DeltaTable(str(night.table), version=0).version() == 0


def test_a_run_without_its_log_s_beginning_removes_nothing(night: Night) -> None:
    from ncf_dist.publish.leftovers import _ever_added

    delta = DeltaLog(str(night.table))
    found = _ever_added(delta)
    assert found == {str(path.relative_to(night.table)) for path in night.table.rglob("*.parquet")}
    (night.table / "latest.json").write_text("{")
    assert _ever_added(delta) is None


# ---- modes -------------------------------------------------------------------------------------------------


def test_what_is_published_has_the_modes_that_were_asked_for(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, folders and the log's entry, which delta-rs writes."""
    conf = night.root / "conf.yaml"
    conf.write_text(night.config.model_dump_json(by_alias=True))
    night.score(good("m3"), key="s3", model_version="m3")
    before, known = os.umask(0o022), set(night.table.rglob("*"))
    try:
        args = ["--config", str(conf), "--ds", night.ds, "--set", 'publish.table="new"', "--set", 'paths.umask="027"']
        assert cli.run_job("publish", publish, args) == 0, capsys.readouterr().out
        assert cli.run_job("publish", publish, [*args, "--set", "paths.umask=27"]) == 2
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (night.table.parent / "new").rglob("*")}
    assert {mode for name, mode in modes.items() if "." in name} == {0o640}
    assert {mode for name, mode in modes.items() if "." not in name} == {0o750}
    assert len(modes) == 2 + 2 + 1 + 1, "two files, their folder, the log, its entry, latest.json"
    assert set(night.table.rglob("*")) == known


# ---- publish --repair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "torn", "of another night"])
def test_latest_is_made_anew_from_the_log(night: Night, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    conf, path = night.root / "conf.yaml", night.table / "latest.json"
    conf.write_text(night.config.model_dump_json(by_alias=True))
    whole = path.read_bytes()
    args = ["--config", str(conf), "--repair"]
    assert cli.run_job("publish", publish, args) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "already-done"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:100] if damage == "torn" else whole.replace(b'"version": 2', b'"version": 1'))
    assert cli.run_job("publish", publish, args) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["status"], report["version"], report["repaired"]) == ("done", 2, ["latest.json"])
    assert path.read_bytes() == whole


def test_every_night_is_repaired_and_what_cannot_be_is_named(night: Night) -> None:
    files = {path: path.read_bytes() for path in night.table.rglob("*.parquet")}
    seen = [night.table / path for path in DeltaLog(str(night.table)).live()]
    for path in seen:
        path.write_bytes(b"PAR1")
    outcome = pipeline.repair(night.config, "2026-12-31")
    assert sorted(outcome.extra["repaired"]) == sorted(str(path.relative_to(night.table)) for path in seen)
    assert {path: path.read_bytes() for path in files} == files
    shutil.rmtree(night.lake.stage("2026-01-30", "score").root)
    lost = next(path for path in seen if "2026-01-30" in str(path))
    lost.unlink()
    with pytest.raises(ContractError, match=f"{lost.name}: it is gone .*run the line again for ds 2026-01-30"):
        pipeline.repair(night.config, "2026-12-31")


def test_there_is_nothing_to_repair_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no published night"):
        pipeline.repair(Night(tmp_path).config, "2026-01-31")
