"""Publication to a lake in S3 by real processes: of two at once one wins, and one that is killed leaves the old night
or the new one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncf_dist import files, locks
from ncf_dist.config import Retention
from ncf_dist.errors import ExitCode
from ncf_dist.publish.log import DeltaLog
from tests.killing import KILLED, Killer, Run, killer
from tests.published import Night, good
from tests.s3 import KEY, SECRET, TOKEN, Store, served

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


def races(store: Store, publishers: Killer, root: Path, rounds: int) -> int:
    """Each round two publishers of two nights meet right before their commits, so that both have looked at the same
    version; how often one won and the other was told."""
    nights = [night_at(store, f"race-{rounds}", root, f"2026-01-{day}") for day in (30, 31)]
    won = 0
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for night in nights:
                night.offer(f"m{number}")
            meeting = (folder, len(nights))
            runs = [Run("publish", night.config, night.ds, "committing", meeting=meeting) for night in nights]
            codes = publishers.at_once(runs)[0]
        assert sorted(codes) == [ExitCode.DONE, ExitCode.BUSY_OR_STALE], f"round {number}"
        won += 1
        for night in nights:  # The loser comes again.
            assert night.publish()[0] in ("done", "already-done")
            assert model_shown(night)[0] == f"m{number}"
        assert model_shown(nights[1])[1] == f"m{number}"
    return won


def test_of_two_publishers_one_wins(store: Store, publishers: Killer, tmp_path: Path) -> None:
    assert races(store, publishers, tmp_path, 2) == 2


@pytest.mark.soak
def test_of_two_publishers_one_wins_25_times(store: Store, publishers: Killer, tmp_path: Path) -> None:
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
    store: Store, publishers: Killer, tmp_path: Path, step: str
) -> None:
    assert killed_at(store, publishers, tmp_path, f"kill-{step}", step) == KILLED


@pytest.mark.soak
def test_a_publication_that_is_killed_at_20_points(store: Store, publishers: Killer, tmp_path: Path) -> None:
    dice, killed = random.Random(7), 0
    for step in STEPS:
        killed += killed_at(store, publishers, tmp_path, f"every-{step}", step) == KILLED
    assert killed == len(STEPS)
    for number in range(20 - len(STEPS)):
        killed_at(store, publishers, tmp_path, f"moment-{number}", delay=dice.uniform(0, 2.0))


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


# ---- credentials -----------------------------------------------------------------------------------------------------

FORMS = ("token", "profile", "wrong")


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.soak) for form in FORMS[1:])])
def test_credentials_are_in_no_file_log_or_line(store: Store, tmp_path: Path, form: str) -> None:
    night = night_at(store, f"credentials-{form}", tmp_path)
    night.score(good())
    config = tmp_path / "line.yaml"
    config.write_text(json.dumps(night.config.model_dump(mode="json", exclude_defaults=True)))
    known = {
        name: value for name, value in os.environ.items() if not name.startswith("AWS_") or name == "AWS_ENDPOINT_URL"
    }
    keys = {"AWS_ACCESS_KEY_ID": KEY if form != "wrong" else "AKIANOBODYKNOWSIT", "AWS_SECRET_ACCESS_KEY": SECRET}
    if form == "profile":
        (tmp_path / "aws").write_text(f"[night]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
        keys = {"AWS_PROFILE": "night", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws")}
    store.fail_every = 5 if form == "token" else 0
    done = subprocess.run(
        [sys.executable, "-m", "ncf_dist.cli", "publish", "--config", str(config), "--ds", DS],
        env={
            **known,
            **keys,
            "AWS_SESSION_TOKEN": TOKEN,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": "eu-west-1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    store.fail_every = 0
    assert done.returncode == (3 if form == "wrong" else 0), done.stderr
    assert ("retries" in json.loads(done.stdout.splitlines()[-1])) == (form == "token")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "aws"]
    texts = [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in written)]
    texts += [store.data(name) for name in store.names()]
    for secret in (KEY, SECRET, TOKEN, "AKIANOBODYKNOWSIT"):
        assert not [text for text in texts if secret.encode() in text]
