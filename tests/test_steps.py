"""Publish, its repair and rollback, killed at every step that they have and at any moment, and with a disk that fails
there: readers see the old night or the new one, and the same command again ends where an undisturbed run does."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from ncf_dist.clean.pipeline import clean
from ncf_dist.config import Config
from ncf_dist.errors import InputError
from ncf_dist.publish import steps
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.pipeline import publish, repair
from ncf_dist.rollback.pipeline import rollback
from ncf_dist.stage import Outcome
from tests.killing import KILLED, Killer, killer, shown, steps_named_in
from tests.published import Night, Row, good

JOBS: dict[str, Callable[[Config, str], Outcome]] = {"publish": publish, "repair": repair, "rollback": rollback}


@pytest.fixture(scope="module")
def kills() -> Iterator[Killer]:
    modules = {"publish": "publish", "repair": "publish", "rollback": "rollback", "clean": "clean"}
    with killer(*(f"ncf_dist.{module}.pipeline:{job}" for job, module in modules.items())) as made:
        yield made


# ---- the scenes ----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A lake, and a job that changes what readers see of its night. before: None where readers get errors."""

    night: Night
    job: str
    before: list[Row] | None
    after: list[Row]

    def run(self) -> Outcome:
        return JOBS[self.job](self.night.config, self.night.ds)


def published(root: Path, *models: str, ds: str = "2026-01-31") -> Night:
    """2026-01-30 is published by m1, and `ds` by each model in turn."""
    before, night = Night(root, "2026-01-30"), Night(root, ds)
    for each in (before, night):
        each.prepare()
    before.offer("m1")
    before.publish()
    for model in models:
        night.offer(model)
        night.publish()
    return night


def first(root: Path) -> Scene:
    """The first night of a table."""
    night = Night(root)
    night.prepare()
    night.offer("m1")
    return Scene(night, "publish", [], sorted(good("m1")))


def replaces(root: Path) -> Scene:
    """Another run of a ds; beside it lie files that runs before it have left."""
    night = published(root, "m1")
    old = time.time() - 30 * 86_400
    for name in ("_delta_log/00000000000000000009.json#1", "ds=2026-01-15/m0-part-0-s0-00.parquet"):
        (night.table / name).parent.mkdir(exist_ok=True)
        (night.table / name).write_bytes(b"")
        os.utime(night.table / name, (old, old))
    os.utime(night.table / "ds=2026-01-15", (old, old))
    night.offer("m2")
    return Scene(night, "publish", sorted(good("m1")), sorted(good("m2")))


def repairs(root: Path) -> Scene:
    """The same run again, with a folder in place of one of its files and the other one gone."""
    night = published(root, "m1")
    one, other = (night.table / path for path in night.latest()["files"])
    one.unlink()
    one.mkdir()
    other.unlink()
    return Scene(night, "publish", None, sorted(good("m1")))


def goes_back(root: Path) -> Scene:
    return Scene(published(root, "m1", "m2"), "rollback", sorted(good("m2")), sorted(good("m1")))


def goes(root: Path) -> Scene:
    """The newest ds goes, so that latest.json moves back."""
    return Scene(published(root, "m1"), "rollback", sorted(good("m1")), [])


SCENES = {scene.__name__: scene for scene in (first, replaces, repairs, goes_back, goes)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Scene, list[tuple[str, Any]]]]:
    """Each scene as it is before its job, and what a copy of it did."""
    made: dict[str, Any] = {}
    for name, scene in SCENES.items():
        root = tmp_path_factory.mktemp(name)
        kept = scene(root / "kept")
        shutil.copytree(kept.night.root, root / "whole")
        made[name] = (kept, recorded(kept))
        put_back(root / "whole", kept)
    return made


def put_back(whole: Path, scene: Scene) -> Scene:
    """The scene as it was when it was copied to `whole`."""
    shutil.rmtree(scene.night.root)
    shutil.copytree(whole, scene.night.root)
    return scene


@pytest.fixture
def scene(request: pytest.FixtureRequest, scenes: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(a function that gives the scene with everything as it was, what its job does)."""
    kept, did = scenes[request.param]

    def again() -> Scene:
        return put_back(kept.night.root.with_name("whole"), kept)

    yield again, did
    again()


# ---- the list is complete ------------------------------------------------------------------------------------------

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_TEMPORARY = re.compile(r"\.tmp$")
_listening: list[tuple[str, list[tuple[str, Any]]]] = []


def _hear(event: str, args: tuple[Any, ...]) -> None:
    """What Python does to files below the folder that somebody is listening for (an audit hook cannot be taken off)."""
    if not _listening or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        return
    path = str(args[1] if event == "os.rename" else args[0])
    writes = event != "open" or (isinstance(args[2], int) and args[2] & _WRITES)
    root, heard = _listening[-1]
    if not writes or not path.startswith(root) or _TEMPORARY.search(path):
        return
    if event == "os.mkdir" and os.path.exists(path):
        return
    heard.append((event, os.path.relpath(path, root)))


@functools.cache
def _hook() -> None:
    sys.addaudithook(_hear)


def recorded(scene: Scene) -> list[tuple[str, Any]]:
    """Every step and every change below the table, in order."""
    _hook()
    heard: list[tuple[str, Any]] = []
    before, steps.listener = steps.listener, lambda step: heard.append(("step", step))
    _listening.append((str(scene.night.table), heard))
    try:
        scene.run()
    finally:
        _listening.pop()
        steps.listener = before
    return heard


@pytest.mark.parametrize("name", SCENES)
def test_between_two_changes_there_is_a_step(scenes: dict[str, Any], name: str) -> None:
    """Folders above a folder, and the entry that a folder in a file's place had, are made or go with it."""
    last: tuple[str, str] | None = None
    for kind, what in scenes[name][1]:
        if kind == "step":
            last = None
            continue
        together = last is not None and (last[0] == kind == "os.mkdir" or kind in ("os.rmdir", "shutil.rmtree"))
        assert last is None or together, f"{last} and then {(kind, what)} without a step between"
        last = (kind, what)


def test_every_step_is_reached_and_every_name_is_on_the_list(scenes: dict[str, Any]) -> None:
    named = steps_named_in("publish", "rollback")
    assert named == set(steps.STEPS)
    assert {step for _, did in scenes.values() for kind, step in did if kind == "step"} == named


# ---- what readers see, and where it ends ---------------------------------------------------------------------------


def seen(night: Night) -> list[Row]:
    return night.read() if DeltaTable.is_deltatable(str(night.table)) else []


def whole(night: Night) -> None:
    """latest.json names whole files of one commit, or there is none."""
    if (night.table / "latest.json").exists():
        latest = night.latest()
        assert {path: (night.table / path).stat().st_size for path in latest["files"]} == {
            path: each["bytes"] for path, each in latest["checksums"].items()
        }


def end(night: Night) -> tuple[Any, ...]:
    """Where a run ends: the rows, the files of every night, latest.json, and nothing left over."""
    delta = DeltaLog(str(night.table))
    left = [path.name for path in night.table.rglob("*") if ".tmp" in path.name or "#" in path.name]
    latest = (night.table / "latest.json").read_text() if (night.table / "latest.json").exists() else None
    return seen(night), sorted(delta.live()), delta.undone(), latest, left


def each(did: list[tuple[str, Any]]) -> list[tuple[str, int]]:
    """Each step once, where it comes last."""
    return list({step: (step, nth) for step, nth in shown(did)}.values())


@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_kill_at_a_step_leaves_old_or_new_and_the_next_run_ends_the_same(scene: Any, kills: Killer) -> None:
    killed_at(scene, kills, each)


@pytest.mark.soak
@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_kill_at_every_step_leaves_old_or_new_and_the_next_run_ends_the_same(scene: Any, kills: Killer) -> None:
    killed_at(scene, kills, shown)


def killed_at(scene: Any, kills: Killer, chosen: Callable[[Any], list[tuple[str, int]]]) -> None:
    again, did = scene
    undisturbed = again()
    undisturbed.run()
    wanted = end(undisturbed.night)
    committed = False
    for step, nth in chosen(did):
        one = again()
        assert kills.run(one.job, one.night.config, one.night.ds, step, nth)[0] == KILLED, step
        committed |= step == "committed"
        if one.before is not None or committed:
            assert seen(one.night) == (one.after if committed else one.before), step
            whole(one.night)
        one.run()
        assert end(one.night) == wanted, step


def at_random(root: Path, kills: Killer, rounds: int, seed: int) -> dict[str, int]:
    """Each round publishes another run, or takes the last one back, and is killed at a random moment; then the same
    command runs to its end. Every 20 rounds another table begins, so that its log stays short."""
    rng, counts, longest = random.Random(seed), {"old": 0, "new": 0, "over": 0}, 0.0
    for number in range(rounds):
        if number % 20 == 0:
            shutil.rmtree(root, ignore_errors=True)
            night, job = unread(published(root, "m0")), "rollback"
        if not longest:
            longest = kills.run("publish", night.config, night.ds)[1]
        job = "rollback" if number % 3 == 2 and job == "publish" else "publish"
        before = night.read()
        if job == "publish":
            night.offer(f"m{number + 1}")
        code, took = kills.run(job, night.config, night.ds, delay=rng.uniform(0, longest))
        assert code in (0, KILLED)
        now = night.read()
        whole(night)
        JOBS[job](night.config, night.ds)
        final = night.read()
        assert now in (before, final)
        assert final != before
        assert final in [sorted(good(f"m{each}")) for each in range(number + 2)]
        assert night.latest()["model_version"] == final[0][4]
        counts["over" if code == 0 else "old" if now == before else "new"] += 1
        longest = max(longest, took) if code == 0 else longest
    return counts


def unread(night: Night) -> Night:
    """Nobody reads its files before the commit: a canary changes nothing, and takes a fifth of the time."""
    night._made_with(gates={"canary": None})
    return night


def test_a_kill_at_any_moment_leaves_old_or_new(tmp_path: Path, kills: Killer) -> None:
    assert sum(at_random(tmp_path / "lake", kills, 100, 1).values()) == 100


@pytest.mark.soak
def test_kills_at_many_moments_leave_old_or_new(tmp_path: Path, kills: Killer) -> None:
    counts = at_random(tmp_path / "lake", kills, 2_000, 2)
    print(counts)
    assert min(counts["old"], counts["new"]) > 50


def killed_cleans(tmp_path: Path, kills: Killer, every: int) -> int:
    """How many changes a clean makes. Killed before each of them, or each `every`-th, it leaves what readers see, also
    in every version that is to stay, and the next clean ends the same."""
    night = published(tmp_path / "lake", "m1", "m2", "m3", "m4")
    retention = {"versions": 2, "days": 0, "nights": 1, "published": None}
    config = Config.model_validate({**night.config.model_dump(), "retention": retention})
    shutil.copytree(night.root, tmp_path / "whole")
    clean(config, night.ds)
    wanted, number = (end(night), files_of(night)), 1
    while True:
        shutil.rmtree(night.root)
        shutil.copytree(tmp_path / "whole", night.root)
        code, _ = kills.run("clean", config, night.ds, "any change", number)
        assert code in (0, KILLED)
        whole(night)
        delta = DeltaLog(str(night.table))
        assert night.read() == sorted(good("m4"))
        for version in (3, 4):
            assert all((night.table / path).is_file() for path in delta.live(version))
        if code == 0:
            return number
        clean(config, night.ds)
        assert (end(night), files_of(night)) == wanted, number
        number += every


def test_a_clean_that_is_killed_leaves_a_whole_lake(tmp_path: Path, kills: Killer) -> None:
    assert killed_cleans(tmp_path, kills, 16) > 50


@pytest.mark.soak
def test_a_clean_that_is_killed_before_any_change_leaves_a_whole_lake(tmp_path: Path, kills: Killer) -> None:
    assert killed_cleans(tmp_path, kills, 1) > 50


def files_of(night: Night) -> list[str]:
    """The files of all nights and versions, and what names the newest checkpoint."""
    found = [*night.table.glob("ds=*/*.parquet"), *night.table.glob("_delta_log/_last*")]
    return sorted(str(path.relative_to(night.table)) for path in found)


# ---- disks ---------------------------------------------------------------------------------------------------------

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)


@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_disk_that_fails_at_a_step_is_said_and_the_next_run_ends_the_same(
    scene: Any, scenes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a job in the last scene that reaches it."""
    last = {(kept.job, step): kept for kept, did in scenes.values() for step, _ in each(did)}
    one = scene[0]()
    failing_at(scene, monkeypatch, lambda did: [at for at in each(did) if last[one.job, at[0]] is one])


@pytest.mark.soak
@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_disk_that_fails_at_every_step_is_said_and_the_next_run_ends_the_same(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(scene, monkeypatch, shown)


def failing_at(scene: Any, monkeypatch: pytest.MonkeyPatch, chosen: Callable[[Any], list[tuple[str, int]]]) -> None:
    """Each step has one of the errors, in turn; tests/test_publish_damage.py has all of them at the calls."""
    again, did = scene
    undisturbed = again()
    undisturbed.run()
    wanted = end(undisturbed.night)
    for number, (step, nth) in enumerate(chosen(did)):
        one, code = again(), CODES[number % len(CODES)]
        path = str(one.night.table / "file")
        left = [nth]

        def fails(name: str, step: str = step, code: int = code, path: str = path, left: list[int] = left) -> None:
            left[0] -= name == step
            if name == step and not left[0]:
                raise OSError(code, os.strerror(code), path)

        with monkeypatch.context() as patch:
            patch.setattr(steps, "listener", fails)
            if step == "swept":
                one.run()  # What is left over is swept up another time.
            else:
                with pytest.raises(InputError, match=f"{os.strerror(code)}.*{re.escape(path)}"):
                    one.run()
        if one.before is not None:
            assert seen(one.night) in (one.before, one.after)
        one.run()
        assert end(one.night)[:-1] == wanted[:-1], step
