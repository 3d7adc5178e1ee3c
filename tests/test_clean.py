"""The job clean: what goes, what stays because somebody needs it, and a lake that is whole at every moment."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import DeltaTable

from ncf_dist import cli
from ncf_dist import config as settings
from ncf_dist.ancestry import DIGESTS
from ncf_dist.bundle import read_bundle, version_of
from ncf_dist.clean import checkpoint, removal
from ncf_dist.clean.keep import what_stays
from ncf_dist.clean.pipeline import clean, forecast, forget
from ncf_dist.clean.runs import removals
from ncf_dist.clean.versions import Published
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.files import sizes
from ncf_dist.inputs import ids_digest
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish.log import DeltaLog, digest
from ncf_dist.publish.pipeline import repair
from ncf_dist.rollback.pipeline import rollback
from ncf_dist.runs.leaderboard import leaderboard
from ncf_dist.stage import LINE, Outcome
from ncf_dist.status.nights import last_nights
from tests.published import SEEN, Night, Row, good

FIRST = dt.date(2026, 1, 1)
AT_ONCE = {"days": 0, "nights": 3, "versions": 3, "published": 5}


def day(number: int) -> str:
    return (FIRST + dt.timedelta(days=number)).isoformat()


def published(root: Path, number: int) -> Night:
    """The night of that number, made and published."""
    night = Night(root, day(number))
    night.prepare()
    night.score(good(f"m{number}"), model_version=f"m{number}")
    assert night.publish()[0] == "done"
    return night


Stock = Callable[[Path, int], Night]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """stock(root, n) → the last of the nights 0 to n - 1, all published, in a lake under root. They are made once, and
    copied for each test."""
    made: list[Night] = []  # Each has a lake with one night more.

    def last_of(root: Path, count: int) -> Night:
        while len(made) < count:
            folder = tmp_path_factory.mktemp("stock")
            if made:
                made[-1].copied(folder)
            made.append(published(folder, len(made)))
        return made[count - 1].copied(root)

    return last_of


def kept(night: Night, **retention: Any) -> Config:
    """The night's config with these settings of retention."""
    found = settings.Retention.model_validate({**AT_ONCE, **retention})
    return night.config.model_copy(update={"retention": found})


def cleaned(night: Night, **retention: Any) -> Outcome:
    return clean(kept(night, **retention), night.ds)


def below(path: Path) -> int:
    return sum(size.bytes for size in sizes(str(path)).values())


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def runs_of(night: Night, stage: str) -> list[str]:
    """The nights that have something of this stage."""
    return sorted(found.parent.name for found in Path(night.lake.root, "runs").glob(f"*/{stage}"))


def files_of(night: Night, number: int) -> list[str]:
    """Published files of the night of that number, whatever version needs them."""
    return names(night.table / f"ds={day(number)}")


def readable(night: Night, *versions: int) -> set[Path]:
    """The files that these versions of the table have."""
    return {Path(name) for version in versions for name in DeltaTable(str(night.table), version=version).file_uris()}


# ---- what goes, and what stays -----------------------------------------------------------------------------


def test_the_latest_nights_and_versions_stay_and_the_others_go(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 10)
    outcome = cleaned(night)
    assert outcome.extra["removed"]["night"]["count"] == 5
    assert outcome.extra["removed"]["run"]["count"] == 7 * 3
    assert runs_of(night, "score") == [day(n) for n in (7, 8, 9)]
    shown = {f"ds={day(n)}/{name}" for n in range(5, 10) for name in files_of(night, n)}
    assert DeltaLog(str(night.table)).live() == shown
    assert all(files_of(night, n) for n in range(10)), "readers were shown these nights until just now"
    for number in (10, 11):
        night = published(tmp_path, number)
        cleaned(night)
    # Versions 14, 16 and 18 stay, from which an old night has gone, and those before them as they were published.
    assert set(night.table.glob("ds=*/*")) == readable(night, *range(14, 19))
    night = published(tmp_path, 12)
    cleaned(night)
    assert set(night.table.glob("ds=*/*")) == readable(night, *range(16, 21))
    assert [path.name for path in sorted(night.table.glob("ds=*"))] == [f"ds={day(n)}" for n in range(6, 13)]
    assert night.read() == sorted(good("m12"))
    assert night.publish() == ("already-done", 19)


def test_what_is_recent_stays_whatever_the_other_bounds_say(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 6)
    night.offer("m6")
    assert night.publish() == ("done", 6), "the version before it has other files"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcome = cleaned(night, days=1, nights=1, versions=1, published=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.keys() - after.keys() == set()
    assert all(after[path] == data for path, data in before.items())
    assert outcome.metrics == {"clean.bytes": 0, "clean.removed": 0}


def disk(root: Path, nights: int) -> list[int]:
    """Bytes of the lake after each night and its clean; of what jobs and gates said, ten nights stay."""
    found = []
    for number in range(nights):
        cleaned(published(root, number), records=10)
        found.append(below(root))
    return found


def assert_bounded(found: list[int]) -> None:
    third = len(found) // 3
    assert max(found[-third:]) < 1.1 * max(found[third:-third]), found


def test_disk_is_bounded_over_nights(tmp_path: Path) -> None:
    assert_bounded(disk(tmp_path, 18))


@pytest.mark.soak
def test_disk_is_bounded_over_sixty_nights(tmp_path: Path) -> None:
    found = disk(tmp_path, 60)
    print("KiB after each night:", [size // 1024 for size in found])
    assert_bounded(found)
    assert len(names(tmp_path / "lake" / "recommendations" / "_delta_log")) < 20


# ---- what somebody needs -----------------------------------------------------------------------------------


class Lakeful:
    """A lake of runs without tables, each of which clean could take for an old one."""

    def __init__(self, root: Path, nights: int = 6) -> None:
        self.night = Night(root)
        self.lake = self.night.lake
        for number in range(nights):
            base = {"ds": day(number - 1), "run_key": f"p{number - 1}"} if number else None
            self.run(number, "prepare", f"p{number}", {"index": base})
            self.run(number, "train", f"t{number}", {"prepare": f"p{number}"}, model={"name": "mf"})
            self.run(number, "evaluate", f"e{number}", {"train": f"t{number}", "prepare": f"p{number}"})
            self.run(number, "score", f"s{number}", {"train": f"t{number}", "prepare": f"p{number}"})

    def run(
        self, number: int, stage: str, key: str, inputs: dict[str, Any], name: str | None = None, **config: Any
    ) -> str:
        runs = self.lake.stage(day(number), stage)
        root = runs.begin(key)
        facts = {"model_version": f"of-{inputs.get('train')}"}
        made = Manifest(stage=stage, ds=day(number), run_key=key, root=root, config=config, inputs=inputs, facts=facts)
        runs.finish(dataclasses.replace(made, name=name))
        return root

    def left(self, *, shown: list[tuple[str, str]] | None = None, **sections: Any) -> set[str]:
        """Keys of the runs that stay. shown: in place of what is published."""
        tree = {**self.night.config.model_dump(), "retention": {**AT_ONCE, "nights": 1}}
        for name, values in sections.items():
            tree[name] = {**tree[name], **values}
        config = Config.model_validate(tree)
        kept = what_stays(self.lake, config, shown or [])
        for gone in [one for ds in self.lake.nights() for one in removals(self.lake, ds, kept, time.time(), True)]:
            gone.carry_out()
        return {
            run.run_key for ds in self.lake.nights() for stage in LINE for run in self.lake.stage(ds, stage).finished()
        }


LAST = {"p5", "t5", "e5", "s5", "p4"}
"""Of the newest night, and the index that its own extends."""


@pytest.fixture
def lakeful(tmp_path: Path) -> Lakeful:
    return Lakeful(tmp_path)


def test_the_newest_night_and_the_index_that_it_extends_stay(lakeful: Lakeful) -> None:
    assert lakeful.left() == LAST


def test_the_runs_of_the_published_night_stay_however_old_it_is(lakeful: Lakeful) -> None:
    assert lakeful.left(shown=[(day(1), "s1")]) == LAST | {"s1", "t1", "p1", "e1", "p0"}


@pytest.mark.parametrize("setting", ["train", "compare", "pretrained"])
def test_what_the_config_names_stays(lakeful: Lakeful, setting: str) -> None:
    bundle = lakeful.lake.stage(day(2), "train").run_path("t2") + "/bundle"
    of_train = LAST | {"t2", "p2", "e2", "p1"}
    if setting == "train":
        assert lakeful.left(train={"warm_start": bundle}) == of_train
    elif setting == "pretrained":
        both = {"gmf": bundle, "mlp": bundle}
        assert lakeful.left(train={"pretrained": both}, model={"name": "neumf"}) == of_train
    else:
        run = lakeful.lake.stage(day(2), "evaluate").run_path("e2")
        assert lakeful.left(evaluate={"compare": run}) == of_train


@pytest.mark.parametrize("compare", [day(2), "of-t2"])
def test_an_evaluation_to_compare_with_may_be_named_by_its_ds_or_its_model(lakeful: Lakeful, compare: str) -> None:
    assert lakeful.left(evaluate={"compare": compare}) == LAST | {"t2", "p2", "e2", "p1"}


def test_the_newest_model_of_each_kind_stays_for_a_warm_start(lakeful: Lakeful) -> None:
    lakeful.run(1, "train", "other", {"prepare": "p1"}, model={"name": "gmf"})
    lakeful.run(2, "train", "named", {"prepare": "p2"}, model={"name": "mlp"}, name="trial")
    assert lakeful.left() == LAST | {"other", "p1", "p0"}, "an experiment's is never started from"


def test_the_newest_index_stays_where_later_nights_have_only_begun(lakeful: Lakeful) -> None:
    for number in range(6, 12):
        lakeful.lake.stage(day(number), "prepare").begin("died")
    lakeful.run(12, "prepare", "trial", {"index": None}, name="trial")
    assert lakeful.left() == LAST | {"trial"}


def test_indexes_stay_as_far_as_a_model_that_has_no_digest_of_its_own(lakeful: Lakeful) -> None:
    path = lakeful.lake.stage(day(2), "train").run_path("t2")
    old = read_bundle(str(stored_bundle(Path(path), day(2), "p2")))
    assert DIGESTS not in old.facts
    assert lakeful.left(shown=[(day(2), "s2")]) == LAST | {"s2", "t2", "p2", "e2", "p1"} | {"p3", "p4"}


def stored_bundle(run: Path, ds: str, prepare: str) -> Path:
    """A card as the first versions wrote it."""
    model, sha256 = settings.Model(name="mf"), "0" * 64
    (run / "bundle").mkdir()
    card = {
        "model": model.model_dump(mode="json"),
        "model_version": version_of(model, sha256),
        "n_users": 1,
        "n_items": 1,
        "sha256": sha256,
        "facts": {"ds": ds, "prepare_run": prepare},
    }
    (run / "bundle" / "bundle.json").write_text(json.dumps(card))
    return run / "bundle"


def test_checkpoints_go_with_the_end_of_a_training_and_attempts_with_their_night(lakeful: Lakeful) -> None:
    trained = Path(lakeful.lake.stage(day(5), "train").run_path("t5"), "checkpoints", "step-000000001")
    trained.mkdir(parents=True)
    attempts = {n: Path(lakeful.lake.stage(day(n), "train").begin("died"), "checkpoints") for n in (2, 5)}
    for attempt in attempts.values():
        attempt.mkdir()
        (attempt / "tensors").write_bytes(b"t")
    lakeful.left()
    assert not trained.exists()
    assert not attempts[2].exists()
    assert (attempts[5] / "tensors").exists(), "it may be gone on with"


def test_what_jobs_said_stays_longer_than_what_they_made(tmp_path: Path) -> None:
    for number in range(8):
        night = published(tmp_path, number)
        said = tmp_path / "lake" / "runs" / night.ds / "jobs"
        said.mkdir()
        (said / "nightly.json").write_text("{}")
    cleaned(night, nights=2, records=5)
    assert runs_of(night, "score") == [day(n) for n in (6, 7)]
    assert runs_of(night, "jobs") == [day(n) for n in (3, 4, 5, 6, 7)]


def test_the_published_night_that_latest_json_names_stays_in_the_table(tmp_path: Path) -> None:
    """A night before the newest one may be what readers of latest.json see."""
    first = published(tmp_path, 0)
    latest = first.latest()
    night = [published(tmp_path, number) for number in range(1, 8)][-1]
    (night.table / "latest.json").write_text(json.dumps(latest))
    for _ in range(3):
        cleaned(night, versions=1, published=2)
    assert all((night.table / path).exists() for path in latest["files"])
    assert first.read() == sorted(good("m0"))
    assert runs_of(night, "score") == [day(n) for n in (0, 5, 6, 7)]


def test_files_that_latest_json_names_stay_though_the_log_has_others(tmp_path: Path) -> None:
    """A run was killed between its commit and latest.json."""
    night = published(tmp_path, 0)
    latest = night.latest()
    night.offer("m1")
    assert night.publish() == ("done", 1)
    (night.table / "latest.json").write_text(json.dumps(latest))
    cleaned(night, versions=1)
    assert all((night.table / path).exists() for path in latest["files"])
    night.publish()
    cleaned(night, versions=1)
    assert set(night.table.glob("ds=*/*")) == readable(night, 1)


def test_a_night_that_another_run_holds_is_passed_over_and_said(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 6)
    with night.lake.hold(day(0)):
        outcome = cleaned(night)
    assert runs_of(night, "score") == [day(n) for n in (0, 3, 4, 5)]
    assert outcome.extra["warnings"] == [f"passed over, as another run holds it: ds {day(0)}"] * 2
    assert cleaned(night).extra["warnings"] == []
    assert runs_of(night, "score") == [day(n) for n in (3, 4, 5)]


def test_staged_files_of_a_run_that_died_go(tmp_path: Path) -> None:
    night = published(tmp_path, 0)
    staged = [night.table / f"ds={ds}" / "m-part-s-0.parquet" for ds in (day(0), day(1))]
    for path in staged:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"staged")
    outcome = cleaned(night)
    assert outcome.extra["removed"] == {"file": {"count": 2, "bytes": 12}}
    assert not any(path.exists() for path in staged)
    assert not staged[1].parent.exists()
    assert night.read() == sorted(good("m0"))


# ---- the log -----------------------------------------------------------------------------------------------


def committed(night: Night, count: int, days_ago: int = 0) -> None:
    """So many more entries in the log, of thirty other nights, as `publish` would have written them."""
    log, there = night.table / "_delta_log", len(list((night.table / "_delta_log").glob("*.json")))
    actions = [json.loads(line) for line in (log / f"{0:020d}.json").read_text().splitlines()]
    info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    info["timestamp"] -= days_ago * 86_400_000
    adds = [action["add"] for action in actions if "add" in action]
    last: dict[str, list[dict[str, Any]]] = {}
    for version in range(there, there + count):
        ds, key = day(1 + version % 30), f"r{version}"
        new = [json.loads(json.dumps(add).replace(night.ds, ds).replace("-s1-", f"-{key}-")) for add in adds]
        files = {add["path"]: {"bytes": add["size"], "sha256": "0"} for add in new}
        facts = {**info, "ncf.ds": ds, "ncf.run_key": key, "ncf.files": files}
        removed = [{"path": add["path"], "dataChange": True, "deletionTimestamp": 0} for add in last.get(ds, ())]
        lines = [{"commitInfo": {**facts, "ncf.digest": digest(facts)}}, *({"add": add} for add in new)]
        lines += [{"remove": one} for one in removed]
        (log / f"{version:020d}.json").write_text("\n".join(map(json.dumps, lines)))
        last[ds] = new


def test_the_log_stays_short_after_four_hundred_commits(tmp_path: Path) -> None:
    night = published(tmp_path, 0)
    committed(night, 400)
    log = DeltaLog(str(night.table))
    before, nights = log.live(), log.nights(log.opened())
    explained = {ds: log.explain(log.opened(), ds) for ds in nights}
    old = {version: DeltaLog(str(night.table)).live(version) for version in range(391, 401)}
    cleaned(night, versions=10, published=None)
    assert len(names(night.table / "_delta_log")) == 401 + 2, "a reader may have listed the log just now"
    cleaned(night, versions=10, published=None)
    # The versions that stay, what explains the nights of the oldest of them, a checkpoint, and the file that names it.
    assert len(names(night.table / "_delta_log")) == 10 + 30 + 1 + 1
    again = DeltaLog(str(night.table))
    assert again.live() == before
    assert again.nights(again.opened()) == nights
    assert {ds: again.explain(again.opened(), ds) for ds in nights} == explained
    assert len(explained) == 31
    assert None not in explained.values()
    assert {version: again.live(version) for version in old} == old
    assert night.publish()[0] == "already-done"
    night.offer("m1")
    assert night.publish() == ("done", 401)
    assert night.read() == sorted(good("m1"))


def test_entries_stay_until_the_checkpoint_that_stands_for_them_is_old_enough(tmp_path: Path) -> None:
    night = published(tmp_path, 0)
    committed(night, 40, days_ago=30)
    log = night.table / "_delta_log"
    for _ in range(2):
        cleaned(night, days=7, versions=5, published=None)
    assert len(names(log)) == 41 + 2
    old = time.time() - 8 * 86_400
    os.utime(log / f"{36:020d}.checkpoint.parquet", (old, old))
    cleaned(night, days=7, versions=5, published=None)
    assert len(names(log)) == 5 + 30 + 1 + 1


def test_a_checkpoint_that_says_something_else_is_not_put_in_place(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = stock(tmp_path, 6)
    says = checkpoint._says
    monkeypatch.setattr(checkpoint, "_says", lambda root, version: (root, says(root, version)))
    before = names(night.table / "_delta_log")
    with pytest.raises(ContractError, match="a checkpoint of version 3 of .* does not say what the log says"):
        cleaned(night, published=None)
    assert names(night.table / "_delta_log") == before


@pytest.mark.parametrize("hint", [None, "{", '{"version": 1}'], ids=["none", "torn", "older"])
def test_a_checkpoint_that_a_killed_clean_did_not_name_is_named_by_the_next(
    stock: Stock, tmp_path: Path, hint: str | None
) -> None:
    night = stock(tmp_path, 6)
    cleaned(night, published=None)
    last = night.table / "_delta_log" / "_last_checkpoint"
    said, before, live = last.read_text(), names(last.parent), DeltaLog(str(night.table)).live()
    last.unlink() if hint is None else last.write_text(hint)
    cleaned(night, published=None)
    assert json.loads(last.read_text()) == json.loads(said)
    assert set(before) >= set(names(last.parent)) >= {f"{json.loads(said)['version']:020d}.checkpoint.parquet"}
    assert DeltaLog(str(night.table)).live() == live


def test_what_a_killed_clean_was_writing_goes_with_the_next(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 2)
    left = [night.table / name / f"x.{'0' * 32}.tmp" for name in (".", "_delta_log")]
    for path in left:
        path.write_bytes(b"half")
    cleaned(night, published=None)
    assert not any(path.exists() for path in left)


def test_a_log_with_checkpoints_of_another_kind_is_left_alone(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 6)
    other = f"{2:020d}.checkpoint.0000000001.0000000002.parquet"
    DeltaTable(str(night.table), version=2).create_checkpoint()
    log = night.table / "_delta_log"
    (log / f"{2:020d}.checkpoint.parquet").rename(log / other)
    (log / "_last_checkpoint").unlink()
    before = names(log)
    for _ in range(2):
        cleaned(night, published=None)
    assert names(log) == before


def test_a_damaged_log_is_named_and_nothing_goes(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 6)
    entry = night.table / "_delta_log" / f"{2:020d}.json"
    entry.write_bytes(entry.read_bytes()[:-40])
    before = sizes(str(tmp_path)).keys()
    with pytest.raises(ContractError, match="00000000000000000002.json of the Delta log is damaged"):
        cleaned(night)
    assert sizes(str(tmp_path)).keys() == before


def test_the_log_can_be_read_after_each_entry_that_goes(stock: Stock, tmp_path: Path) -> None:
    """A commit that took a night out must not go before the one that published it."""
    night = stock(tmp_path, 6)
    bounds = kept(night, versions=1, published=2).retention
    cleaned(night, versions=1, published=2)
    night = [published(tmp_path, number) for number in (6, 7)][-1]
    delta = DeltaLog(str(night.table))
    found = Published.open(delta, bounds, time.time())
    assert found is not None
    checkpoint.write(found, str(tmp_path))
    found = Published.open(delta, bounds, time.time())
    assert found is not None
    live, gone = delta.live(), list(checkpoint.outdated(found, time.time() + 1))
    assert [int(Path(one.path).name[:20]) for one in gone[:8]] == [0, 1, 2, 3, 6, 7, 8, 9], "4 nights, and their end"
    for entry in gone:
        entry.carry_out()
        assert DeltaLog(str(night.table)).live() == live


def test_at_no_moment_does_a_run_lack_one_that_it_was_made_from(lakeful: Lakeful) -> None:
    stays = what_stays(lakeful.lake, lakeful.night.config, [])
    stays = dataclasses.replace(stays, runs=frozenset(), nights=frozenset())
    gone = [one for ds in lakeful.lake.nights() for one in removals(lakeful.lake, ds, stays, time.time(), True)]
    assert len(gone) == 6 * 4
    for one in gone:
        one.carry_out()
        for ds in lakeful.lake.nights():
            for stage in LINE:
                for run in lakeful.lake.stage(ds, stage).finished():
                    assert all(lakeful.lake.stage(ds, a).find(str(run.inputs[a])) for a in LINE[stage].builds_on)


def test_a_run_does_not_exist_any_more_before_its_files_go(lakeful: Lakeful, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(lakeful.lake.stage(day(1), "train").run_path("t1"))
    (path / "weights").write_bytes(b"w")

    def half(name: str) -> None:
        if name != str(path):
            return os.unlink(name)
        (path / "weights").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(removal, "remove", half)
    with pytest.raises(KeyboardInterrupt):
        removal.Removal("run", str(path), 1).carry_out()
    assert lakeful.lake.stage(day(1), "train").find("t1") is None


# ---- readers -----------------------------------------------------------------------------------------------


def test_readers_lose_nothing_while_nights_are_published_and_cleaned(tmp_path: Path) -> None:
    """Each read holds on to its snapshot while two more nights are published and cleaned."""
    night, held = published(tmp_path, 0), list[tuple[int, set[Path], dict[str, Any]]]()
    for number in range(1, 16):
        held = [*held[-2:], (number, readable(night, DeltaLog(str(night.table)).opened().version()), night.latest())]
        night = published(tmp_path, number)
        cleaned(night, versions=4)
        for when, files, latest in held:
            assert all(path.exists() for path in files), (when, number)
            assert all((night.table / path).exists() for path in latest["files"]), (when, number)


# ---- the job -----------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_a_clean_then_removes(
    stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    night = stock(tmp_path, 6)
    cleaned(night)
    night = published(tmp_path, 6)
    config = tmp_path / "clean.yaml"
    tree = {**night.config.model_dump(mode="json"), "retention": {**AT_ONCE, "published": None}}
    config.write_text(yaml.safe_dump({name: tree[name] for name in ("paths", "input", "retention", "publish")}))
    before = sizes(str(night.lake.root))
    assert cli.main(["clean", "--config", str(config), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    would = json.loads(out.splitlines()[-1])
    assert sizes(str(night.lake.root)) == before
    assert would["metrics"]["clean.bytes"] > 0
    assert "would remove" in err
    assert f"run          {night.lake.root}/runs/{day(3)}/score/s1" in err
    assert cli.main(["clean", "--config", str(config)]) == 0
    did = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert did["removed"] == would["would_remove"]
    assert did["metrics"] == would["metrics"]
    assert did["status"] == "done"


def test_a_lake_without_anything_is_clean(tmp_path: Path) -> None:
    night = Night(tmp_path)
    assert cleaned(night).metrics == {"clean.bytes": 0, "clean.removed": 0}
    assert forecast(night.config, night.ds).metrics == {"clean.bytes": 0, "clean.removed": 0}


# ---- people who are to be forgotten ------------------------------------------------------------------------


def forgetting(night: Night, *people: str) -> Config:
    listed = night.root / "forget.txt"
    listed.write_text("\n".join(str(night.id(person)) for person in people))
    return night.config.model_copy(update={"input": night.config.input.model_copy(update={"forget": str(listed)})})


def without(rows: list[Row], *people: str) -> list[Row]:
    return sorted(row for row in rows if row[0] not in people)


@pytest.mark.parametrize("form", ["long", "lists"])
def test_people_who_are_to_be_forgotten_leave_every_published_night(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for number in range(3):
        night = Night(tmp_path, day(number))
        night.prepare()
        night.score(good(f"m{number}"), form=form, model_version=f"m{number}")
        night.publish()
    before = DeltaLog(str(night.table)).live()
    outcome = forget(forgetting(night, "bob", "nobody"), night.ds)
    rows = 2 if form == "long" else 1
    assert outcome.extra["forgotten_rows"] == {day(number): rows for number in range(3)}
    log = DeltaLog(str(night.table))
    assert log.opened().version() == 5
    for number in range(3):
        assert people_of(night, day(number)) == {"ann", "cat", "dan"}
        found = log.explain(log.opened(), day(number))
        assert found is not None
        assert found[1].run_key == "s1"
        assert found[1].facts["ncf.forget"] == ids_digest(["bob", "nobody"])
    assert len(log.live() & before) == 3, "files that do not name them stay as they are"
    latest = night.latest()
    assert (latest["ds"], latest["version"]) == (day(2), 5)
    assert {f"{night.table}/{path}" for path in latest["files"]} == {
        uri for uri in DeltaTable(str(night.table)).file_uris() if f"ds={day(2)}" in uri
    }
    for path, sums in latest["checksums"].items():
        data = (night.table / path).read_bytes()
        assert sums == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    said = caplog.text + json.dumps(outcome.extra) + (night.table / "_delta_log" / f"{5:020d}.json").read_text()
    assert not re.search(r"\b(bob|nobody)\b", said)
    assert forget(forgetting(night, "bob", "nobody"), night.ds).status == "already-done"
    assert DeltaLog(str(night.table)).opened().version() == 5


def people_of(night: Night, ds: str) -> set[str]:
    paths = [str(night.table / path) for path in DeltaLog(str(night.table)).live() if path.startswith(f"ds={ds}/")]
    return {user for path in paths for user in pq.ParquetFile(path).read(columns=["user_id"])["user_id"].to_pylist()}


def test_people_do_not_come_back_by_publish_rollback_or_repair(tmp_path: Path) -> None:
    night = published(tmp_path, 0)
    config = forgetting(night, "bob")
    assert forget(config, night.ds).status == "done"
    with pytest.raises(ContractError, match="does not know of the list of people to be forgotten"):
        night.publish()
    with pytest.raises(ContractError, match="people on the list of input.forget"):
        rollback(config.model_copy(update={"publish": config.publish.model_copy(update={"rollback_to": 0})}), night.ds)
    repair(config, night.ds)
    assert night.read() == without(good("m0"), "bob")
    for number in range(1, 6):
        published(tmp_path, number)
        cleaned(night, versions=2, nights=9, published=None)
    assert night.read() == without(good("m0"), "bob")
    with pytest.raises(ContractError, match="does not know of the list of people to be forgotten"):
        night.publish()
    assert not [path for path in night.table.glob(f"ds={day(0)}/*") if "bob" in str(pq.read_table(path)["user_id"])]


def test_ids_that_are_numbers_are_forgotten_and_a_night_may_lose_all_its_people(tmp_path: Path) -> None:
    for number in range(2):
        night = Night(tmp_path, day(number), numbers=True)
        night.prepare()
        night.score()
        night.publish()
    assert forget(forgetting(night, "ann", "bob"), night.ds).status == "done"
    assert {row[0] for row in night.read()} == {night.id("cat"), night.id("dan")}
    assert forget(forgetting(night, *SEEN), night.ds).status == "done"
    assert DeltaLog(str(night.table)).live() == frozenset()


def test_forgetting_needs_a_list_and_whole_files_and_passes_over_busy_nights(stock: Stock, tmp_path: Path) -> None:
    night = stock(tmp_path, 3)
    with pytest.raises(ConfigError, match="clean --forget without input.forget; needed the path of a list"):
        forget(night.config, night.ds)
    damaged = next(iter((night.table / f"ds={day(1)}").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with night.lake.hold(day(0)), pytest.raises(ContractError, match="1 published nights may still name .* damaged"):
        forget(forgetting(night, "ann", "dan"), night.ds)
    assert [people_of(night, day(n)) >= {"ann", "dan"} for n in (0, 2)] == [True, False]
    assert repair(night.config, night.ds).extra["repaired"] == [f"ds={day(1)}/{damaged.name}"]
    assert forget(forgetting(night, "ann", "dan"), night.ds).status == "done"
    assert [people_of(night, day(n)) for n in range(3)] == [{"bob", "cat"}] * 3


# ---- lakes of earlier versions -----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", sorted(Path(__file__).parent.glob("lakes/*.tar.gz")), ids=lambda path: path.name)
def test_the_lake_of_an_earlier_version_is_shown_and_cleaned(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(stored) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    config = settings.load_config("config.yaml", [f"retention.{name}={value}" for name, value in AT_ONCE.items()])
    lake, ds = Lake(config.paths.lake), "2026-01-31"
    (model,) = leaderboard(lake, ds)
    assert model.value is not None
    (shown,) = last_nights(lake, config.publish.table, 7)
    assert shown.published is not None
    before = {run.root for stage in LINE for run in lake.stage(ds, stage).finished()}
    live = DeltaLog(lake.path(config.publish.table)).live()
    for _ in range(2):
        assert clean(config, ds).status == "done"
    assert {run.root for stage in LINE for run in lake.stage(ds, stage).finished()} == before
    assert DeltaLog(lake.path(config.publish.table)).live() == live
    assert all((Path(lake.path(config.publish.table)) / path).exists() for path in live)
