"""Publication to a lake in S3 by real processes: of two at once one wins, and one that is killed leaves the old night
or the new one. Each campaign prints what became of it (`pytest -s`)."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ncf_dist import files, locks
from ncf_dist.config import Retention
from ncf_dist.doctor import places
from ncf_dist.errors import ExitCode
from ncf_dist.publish.log import DeltaLog
from tests.killing import KILLED, Killer, Run, killer
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
def publishers(store: Store) -> Iterator[Killer]:
    with killer("ncf_dist.publish.pipeline:publish") as made:
        yield made


def night_at(store: Store, name: str, root: Path, ds: str = DS) -> Night:
    night = Night(root, ds, lake=f"{store.root}/{name}")
    night.prepare()
    return night


def model_shown(night: Night) -> tuple[str | None, str | None]:
    """The model of the night by the Delta log, whose files all hold that model's rows, and by latest.json."""
    log = DeltaLog(f"{night.lake.root}/recommendations")
    table, latest = log.open(), log.latest()
    shown = log.explain(table, night.ds) if table is not None else None
    model = str(shown[1].facts["ncf.model_version"]) if shown else None
    if table is not None:
        for path, _ in log.nights(table).get(night.ds, []):
            rows = pq.ParquetFile(io.BytesIO(files.read_bytes(f"{log.root}/{path}"))).read(["model_version"])
            assert set(rows["model_version"].to_pylist()) == {model}
    return (
        model,
        json.loads(files.read_bytes(f"{log.root}/latest.json"))["model_version"] if latest is not None else None,
    )


# ---- races -----------------------------------------------------------------------------------------------------------


def raced(publishers: Killer, nights: list[Night], model: str) -> list[int]:
    """The exit codes of two publishers of two nights that meet right before their commits, so that both have looked at
    the same version."""
    with tempfile.TemporaryDirectory() as folder:
        for night in nights:
            night.offer(model)
        runs = [Run("publish", night.config, night.ds, "committing", meeting=(folder, 2)) for night in nights]
        return publishers.at_once(runs)[0]


def races(store: Store, publishers: Killer, root: Path, rounds: int) -> Counter[str]:
    """How often one won, and the other was told that it had not; the loser comes again."""
    nights = [night_at(store, f"race-{rounds}", root, f"2026-01-{day}") for day in (30, 31)]
    said = Counter[str](races=rounds)
    for number in range(rounds):
        codes = raced(publishers, nights, f"m{number}")
        assert sorted(codes) == [ExitCode.DONE, ExitCode.BUSY_OR_STALE], f"round {number}"
        for night, code in zip(nights, codes, strict=True):
            won = model_shown(night)[0] == f"m{number}"
            assert won == (code == ExitCode.DONE)
            said["winners" if won else "told to come again"] += 1
            assert night.publish()[0] == ("already-done" if won else "done")
            assert model_shown(night)[0] == f"m{number}"
        assert model_shown(nights[1])[1] == f"m{number}"
    print(f"two publishers to a lake in S3: {dict(said)}")
    return said


def test_of_two_publishers_one_wins(store: Store, publishers: Killer, tmp_path: Path) -> None:
    assert races(store, publishers, tmp_path, 2)["winners"] == 2


@pytest.mark.soak
def test_of_two_publishers_one_wins_25_times(store: Store, publishers: Killer, tmp_path: Path) -> None:
    assert races(store, publishers, tmp_path, 25) == {"races": 25, "winners": 25, "told to come again": 25}


def races_without_conditions(store: Store, publishers: Killer, root: Path, rounds: int) -> Counter[str]:
    """Where a store ignores conditions, both may be told that they have won, and one of them has lost its night: so
    doctor refuses the store, each time that it is asked."""
    nights = [night_at(store, f"unconditional-{rounds}", root, f"2026-01-{day}") for day in (30, 31)]
    for night in nights:
        night.offer("m")
        assert night.publish()[0] == "done"
    said = Counter[str](races=rounds)
    store.conditions = False
    try:
        for number in range(rounds):
            check = places.lake(nights[0].config.paths)
            said["noticed by doctor"] += check.status == "fail" and "ignores conditions" in check.detail
            codes = raced(publishers, nights, f"m{number}")
            seen = [model_shown(night)[0] == f"m{number}" for night in nights]
            said["both told that they won"] += codes == [ExitCode.DONE] * 2
            said["a night lost"] += codes == [ExitCode.DONE] * 2 and not all(seen)
    finally:
        store.conditions = True
    print(f"two publishers to a store that ignores conditions: {dict(said)}")
    return said


def test_a_store_that_lets_both_publishers_win_is_noticed_by_doctor(
    store: Store, publishers: Killer, tmp_path: Path
) -> None:
    assert races_without_conditions(store, publishers, tmp_path, 1)["noticed by doctor"] == 1
    assert places.lake(Night(tmp_path, lake=f"{store.root}/unconditional-1").config.paths).status == "ok"


@pytest.mark.soak
def test_a_store_that_lets_both_publishers_win_is_noticed_25_times(
    store: Store, publishers: Killer, tmp_path: Path
) -> None:
    said = races_without_conditions(store, publishers, tmp_path, 25)
    assert said["noticed by doctor"] == 25
    assert said["a night lost"] > 0, "else these races would show nothing"


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed_at(
    store: Store, publisher: Killer, root: Path, name: str, step: str = "", delay: float | None = None
) -> str:
    """Publish m2 over m1, killed; readers see one of them whole, and the same command finishes it. Returns which one,
    or that it had ended by then."""
    night = night_at(store, name, root)
    night.offer("m1")
    assert night.publish()[0] == "done"
    night.offer("m2")
    code, _ = publisher.run("publish", night.config, DS, step, delay=delay)
    assert code == KILLED or (code == ExitCode.DONE and delay is not None)
    by_log, by_latest = model_shown(night)
    assert by_log == ("m2" if step in STEPS[STEPS.index("committed") :] else "m1") or delay is not None
    assert {by_log, by_latest} <= {"m1", "m2"}
    assert night.publish()[0] in ("done", "already-done")
    assert model_shown(night) == ("m2", "m2")
    return {"m1": "old", "m2": "new"}[str(by_log)] if code == KILLED else "ended before"


@pytest.mark.parametrize("step", ["staged", "committing", "committed"])
def test_a_publication_that_is_killed_leaves_the_old_night_or_the_new_one(
    store: Store, publishers: Killer, tmp_path: Path, step: str
) -> None:
    assert killed_at(store, publishers, tmp_path, f"kill-{step}", step) == ("new" if step == "committed" else "old")


@pytest.mark.soak
def test_a_publication_that_is_killed_at_20_points(store: Store, publishers: Killer, tmp_path: Path) -> None:
    """At each of its steps, and at random moments of one that is as slow as they are far apart."""
    dice, seen = random.Random(7), Counter[str]()
    for step in STEPS:
        seen[killed_at(store, publishers, tmp_path, f"every-{step}", step)] += 1
    assert sum(seen.values()) - seen["ended before"] == len(STEPS)
    while (killed := seen["old"] + seen["new"]) < 20 and seen["ended before"] < 20:
        seen[killed_at(store, publishers, tmp_path, f"moment-{seen.total()}", delay=dice.uniform(0, 2.0))] += 1
    print(f"publications to a lake in S3, killed at {killed} points: {dict(seen)}")
    assert killed == 20


def test_a_commit_whose_answer_was_lost_is_known_to_have_been_made(store: Store, tmp_path: Path) -> None:
    night = night_at(store, "lost", tmp_path)
    for number in (1, 2):  # The commit that makes the table, and one that changes it.
        night.offer(f"m{number}")
        store.lose = f"_delta_log/{number - 1:020d}.json"
        assert night.publish()[0] == "done"
        assert not store.lose
        assert model_shown(night) == (f"m{number}", f"m{number}")


# ---- clean -----------------------------------------------------------------------------------------------------------


CLEAN = """
import json, sys
from ncf_dist.clean.pipeline import clean
from ncf_dist.config import Config
print(json.dumps(clean(Config.model_validate_json(sys.argv[1]), sys.argv[2]).extra["warnings"]))
"""


def warnings_of_clean(night: Night) -> list[str]:
    """By a process of its own: delta-rs keeps the interpreter while it reads a table's history, and this one's has to
    answer for the store."""
    config = night.config.model_dump_json(by_alias=True)
    done = subprocess.run([sys.executable, "-c", CLEAN, config, DS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_clean_removes_what_no_version_needs_and_never_without_its_lock(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.5)
    night = night_at(store, "clean", tmp_path)
    for model in ("m1", "m2", "m3"):
        night.offer(model)
        night.publish()
    retention = Retention(days=0, nights=3, versions=1, published=5)
    night.config = night.config.model_copy(update={"retention": retention})
    before = len(store.names("clean/recommendations/ds="))
    with night.lake.hold(DS):
        assert "passed over" in warnings_of_clean(night)[0]
        assert len(store.names("clean/recommendations/ds=")) == before
    assert warnings_of_clean(night) == []
    assert len(store.names("clean/recommendations/ds=")) == before / 3
    assert model_shown(night) == ("m3", "m3")


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
