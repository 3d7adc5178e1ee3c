"""The job clean and clean --forget, killed at every step and at any moment: readers lose nothing, the lake stays whole,
and the next clean ends where an undisturbed one does."""

from __future__ import annotations

import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from ncf_dist import config as settings
from ncf_dist.clean import steps
from ncf_dist.clean.pipeline import clean, forget
from ncf_dist.config import Config
from ncf_dist.files import sizes
from ncf_dist.publish import steps as of_publish
from ncf_dist.publish.log import DeltaLog
from ncf_dist.stage import LINE, Outcome
from tests.killing import KILLED, Killer, killer, shown, steps_named_in
from tests.published import Night, Row, good

JOBS: dict[str, Callable[[Config, str], Outcome]] = {"clean": clean, "forget": forget}
NIGHTS = tuple(f"2026-01-{day:02d}" for day in range(1, 9))
RETENTION = {"days": 0, "nights": 3, "versions": 3, "published": 5}


class Killed(BaseException):
    """What a process that is killed does: nothing more."""


@dataclass
class Scene:
    """A lake, a job, and what readers see of its last night before and after."""

    night: Night
    config: Config
    job: str
    before: list[Row]
    after: list[Row]

    def run(self) -> Outcome:
        return JOBS[self.job](self.config, self.night.ds)


def made(root: Path) -> Night:
    """Eight published nights, cleaned after the sixth, with one of everything that clean removes."""
    for number, ds in enumerate(NIGHTS):
        night = Night(root, ds)
        night.prepare()
        night.score(good(f"m{number}"), model_version=f"m{number}")
        night.publish()
        if number == 5:
            clean(retained(night), ds)
    Path(night.lake.stage(NIGHTS[4], "train").begin("died"), "tensors").write_bytes(b"t")
    checkpoint = Path(night.lake.stage(NIGHTS[7], "train").run_path("t1"), "checkpoints", "step-1")
    for path in (checkpoint, night.table / f"ds={NIGHTS[6]}" / "staged.parquet"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return night


def retained(night: Night) -> Config:
    return night.config.model_copy(update={"retention": settings.Retention.model_validate(RETENTION)})


def cleans(root: Path) -> Scene:
    night, last = made(root), sorted(good("m7"))
    return Scene(night, retained(night), "clean", last, last)


def forgets(root: Path) -> Scene:
    night, listed = made(root), root / "forget.txt"
    listed.write_text("bob\n")
    known = night.config.input.model_copy(update={"forget": str(listed)})
    last = sorted(good("m7"))
    config = night.config.model_copy(update={"input": known})
    return Scene(night, config, "forget", last, [row for row in last if row[0] != "bob"])


SCENES = {scene.__name__: scene for scene in (cleans, forgets)}


@pytest.fixture(scope="module")
def kills() -> Iterator[Killer]:
    with killer(*(f"ncf_dist.clean.pipeline:{job}" for job in JOBS)) as server:
        yield server


@dataclass
class Again:
    """A scene that can be had as it was, again and again. did: its steps; end: where it ends."""

    kept: Scene
    archive: Path
    did: list[tuple[str, int]]
    end: set[str]

    def again(self) -> Scene:
        shutil.rmtree(self.kept.night.root)
        with tarfile.open(self.archive) as archive:
            archive.extractall(self.kept.night.root, filter="data")
        return self.kept


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Again]:
    found = {}
    for name, scene in SCENES.items():
        root = tmp_path_factory.mktemp(name)
        kept, archive = scene(root / "kept"), root / "kept.tar"
        with tarfile.open(archive, "w") as out:
            out.add(kept.night.root, ".")
        did = shown(heard(kept))
        kept.run()
        found[name] = Again(kept, archive, did, end(kept))
    return found


def heard(scene: Scene) -> list[tuple[str, Any]]:
    """The steps of its job."""
    found: list[tuple[str, Any]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(of_publish, "listener", lambda step: found.append(("step", step)))
        scene.run()
    return found


def end(scene: Scene) -> set[str]:
    """Names of what is left of runs and of the published table's files."""
    runs, table = (sizes(f"{scene.night.lake.root}/{name}") for name in ("runs", "recommendations"))
    return {n for n in runs if not n.endswith(".lock")} | {n for n in table if "_delta_log" not in n}


def whole(scene: Scene, committed: bool = True) -> None:
    """Readers see every version that stays, and no finished run lacks one that it was made from."""
    night = scene.night
    assert night.read() in ((scene.after,) if committed else (scene.before, scene.after))
    log = DeltaLog(str(night.table))
    newest = log.opened().version()
    for version in range(newest - RETENTION["versions"] + 1, newest + 1):
        names = DeltaTable(str(night.table), version=version).file_uris()
        assert all(Path(name).exists() for name in names), version
    assert all((night.table / path).exists() for path in night.latest()["files"])
    for ds in night.lake.nights():
        for stage in LINE:
            for run in night.lake.stage(ds, stage).finished():
                for above in LINE[stage].builds_on:
                    assert night.lake.stage(ds, above).find(str(run.inputs[above])), f"{stage} of {ds} lacks {above}"


def test_every_step_is_reached_and_every_name_is_on_the_list(scenes: dict[str, Again]) -> None:
    named = steps_named_in("clean")
    assert named == set(steps.STEPS)
    assert {step for scene in scenes.values() for step, _ in scene.did} >= named


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENES)
def test_a_clean_that_ends_at_any_step_leaves_a_whole_lake_and_the_next_one_ends_the_same(
    scenes: dict[str, Again], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(scenes[name].did) > 20
    for step, nth in scenes[name].did:
        scene, left = scenes[name].again(), [nth]

        def dies(reached: str, step: str = step, left: list[int] = left) -> None:
            left[0] -= reached == step
            if reached == step and not left[0]:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(of_publish, "listener", dies)
            with pytest.raises(Killed):
                scene.run()
        whole(scene, committed=False)
        scene.run()
        whole(scene)
        scene.run()
        assert end(scene) == scenes[name].end, (step, nth)


def some(did: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Each step once, wherever it comes last."""
    return list({step: (step, nth) for step, nth in did}.values())


@pytest.mark.parametrize("name", SCENES)
def test_a_process_that_is_killed_at_a_step_leaves_a_whole_lake(
    scenes: dict[str, Again], kills: Killer, name: str
) -> None:
    for step, nth in some(scenes[name].did):
        scene = scenes[name].again()
        assert kills.run(scene.job, scene.config, scene.night.ds, step, nth)[0] == KILLED, step
        whole(scene, committed=False)
        scene.run()
        whole(scene)


def at_random(scenes: dict[str, Again], kills: Killer, rounds: int, seed: int) -> int:
    """How many of the rounds, each killed at a random moment, were killed before their end."""
    rng, killed = random.Random(seed), 0
    longest = {name: kills.run(s.job, s.config, s.night.ds)[1] for name in SCENES for s in [scenes[name].again()]}
    for number in range(rounds):
        name = ("cleans", "forgets")[number % 2]
        scene = scenes[name].again()
        code, _ = kills.run(scene.job, scene.config, scene.night.ds, delay=rng.uniform(0, longest[name]))
        assert code in (0, KILLED)
        killed += code == KILLED
        whole(scene, committed=False)
        scene.run()
        whole(scene)
        scene.run()
        assert end(scene) == scenes[name].end
    return killed


def test_a_kill_at_any_moment_leaves_a_whole_lake(scenes: dict[str, Again], kills: Killer) -> None:
    at_random(scenes, kills, 10, 1)


@pytest.mark.soak
def test_kills_at_many_moments_leave_a_whole_lake(scenes: dict[str, Again], kills: Killer) -> None:
    killed = at_random(scenes, kills, 300, 2)
    print(f"{killed} of 300 were killed before their end")
    assert killed > 100
