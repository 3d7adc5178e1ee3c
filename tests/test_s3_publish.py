"""Publication to a lake in S3 by real processes: of two at once one wins, and one that is killed leaves the old night
or the new one."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncf_dist import files
from ncf_dist.errors import ExitCode
from ncf_dist.publish.log import DeltaLog
from tests.killing import KILLED, Killer, killer
from tests.published import Night, good
from tests.s3 import Store, served

pytest.importorskip("s3fs")

DS = "2026-01-31"
STEPS = ("begun", "audited", "staged", "durable", "committing", "committed", "logged", "described", "settled")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def publishers(store: Store) -> Iterator[list[Killer]]:
    with killer("ncf_dist.publish.pipeline:publish") as one, killer("ncf_dist.publish.pipeline:publish") as other:
        yield [one, other]


def night_at(store: Store, name: str, root: Path, ds: str = DS) -> Night:
    night = Night(root, ds, lake=f"{store.root}/{name}")
    night.prepare()
    return night


def model_shown(night: Night) -> tuple[str | None, str | None]:
    """The model of the night by the Delta log, and by latest.json."""
    log = DeltaLog(f"{night.lake.root}/recommendations")
    table, latest = log.open(), log.latest()
    shown = log.explain(table, night.ds) if table is not None else None
    if table is not None:
        for path, _ in log.nights(table).get(night.ds, []):
            assert files.exists(f"{log.root}/{path}")
    return (
        str(shown[1].facts["ncf.model_version"]) if shown else None,
        json.loads(files.read_bytes(f"{log.root}/latest.json"))["model_version"] if latest is not None else None,
    )


# ---- races -----------------------------------------------------------------------------------------------------------


def races(store: Store, publishers: list[Killer], root: Path, rounds: int) -> int:
    """Each round two publishers of two nights meet right before their commits, so that both have looked at the same
    version; how often one won and the other was told."""
    nights = [night_at(store, f"race-{rounds}", root, f"2026-01-{day}") for day in (30, 31)]
    won = 0
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for night, publisher in zip(nights, publishers, strict=True):
                night.offer(f"m{number}")
                publisher.ask("publish", night.config, night.ds, "committing", meeting=(folder, 2))
            codes = sorted(publisher.answer()[0] for publisher in publishers)
        assert codes == [ExitCode.DONE, ExitCode.BUSY_OR_STALE], f"round {number}"
        won += 1
        for night in nights:  # The loser comes again.
            assert night.publish()[0] in ("done", "already-done")
            assert model_shown(night)[0] == f"m{number}"
        assert model_shown(nights[1])[1] == f"m{number}"
    return won


def test_of_two_publishers_one_wins(store: Store, publishers: list[Killer], tmp_path: Path) -> None:
    assert races(store, publishers, tmp_path, 2) == 2


@pytest.mark.soak
def test_of_two_publishers_one_wins_25_times(store: Store, publishers: list[Killer], tmp_path: Path) -> None:
    assert races(store, publishers, tmp_path, 25) == 25


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed_at(
    store: Store, publisher: Killer, root: Path, name: str, step: str = "", delay: float | None = None
) -> int:
    """Publish m2 over m1, killed; readers see one of them whole, and the same command finishes it. Returns the exit
    code of the first."""
    night = night_at(store, name, root)
    night.offer("m1")
    assert night.publish()[0] == "done"
    night.offer("m2")
    code, _ = publisher.run("publish", night.config, DS, step, delay=delay)
    by_log, by_latest = model_shown(night)
    assert by_log == ("m2" if step in STEPS[STEPS.index("committed") :] else "m1") or delay is not None
    assert {by_log, by_latest} <= {"m1", "m2"}
    assert night.publish()[0] in ("done", "already-done")
    assert model_shown(night) == ("m2", "m2")
    return code


@pytest.mark.parametrize("step", ["staged", "committing", "committed"])
def test_a_publication_that_is_killed_leaves_the_old_night_or_the_new_one(
    store: Store, publishers: list[Killer], tmp_path: Path, step: str
) -> None:
    assert killed_at(store, publishers[0], tmp_path, f"kill-{step}", step) == KILLED


@pytest.mark.soak
def test_a_publication_that_is_killed_at_20_points(store: Store, publishers: list[Killer], tmp_path: Path) -> None:
    dice, killed = random.Random(7), 0
    for step in STEPS:
        killed += killed_at(store, publishers[0], tmp_path, f"every-{step}", step) == KILLED
    assert killed == len(STEPS)
    for number in range(20 - len(STEPS)):
        killed_at(store, publishers[0], tmp_path, f"moment-{number}", delay=dice.uniform(0, 2.0))


# ---- a bad night -----------------------------------------------------------------------------------------------------


def test_a_far_store_that_refuses_requests_is_published_to(store: Store, tmp_path: Path) -> None:
    night = night_at(store, "far", tmp_path)
    night.score(good())
    store.fail_every, store.delay_s = 5, 0.02
    try:
        assert night.publish()[0] == "done"
    finally:
        store.fail_every, store.delay_s = 0, 0.0
    assert model_shown(night) == ("m1", "m1")
