"""A lake in S3: one winner where one is needed, a lock that outlives nobody, and a store that has bad days."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ncf_dist import files, locks, retries
from ncf_dist.config import Paths
from ncf_dist.doctor import places
from ncf_dist.errors import BusyRun, ConfigError, StaleRun
from ncf_dist.lake import Lake
from ncf_dist.prepare import streams
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.source import plan
from ncf_dist.train import checkpoints
from tests.s3 import KEY, SECRET, Store, Stored, forget_clients, served

pytest.importorskip("s3fs")

DS = "2026-01-31"


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with served() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store whose bad days end with the test, and a process that has not tried anything again yet."""
    monkeypatch.setattr(retries, "OURS", retries.Retries())
    server.requests.clear()
    yield server
    server.fail_every, server.delay_s, server.conditions, server.hook, server.clock = 0, 0.0, True, None, time.time


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, store: Store) -> str:
    """A file's path in each kind of store that lets one writer win."""
    return {
        "folder": f"{tmp_path}/x",
        "memory": f"memory://{store.prefix}/{time.time_ns()}",
        "s3": f"{store.root}/x{time.time_ns()}",
    }[request.param]


# ---- one winner ------------------------------------------------------------------------------------------------------


def test_create_and_replace_have_one_winner(place: str) -> None:
    first = files.create(place, b"one")
    assert first is not None
    assert files.create(place, b"two") is None
    assert files.read_tagged(place)[:2] == (b"one", first)
    second = files.replace(place, b"two", first)
    assert second not in (None, first)
    assert files.replace(place, b"three", first) is None
    assert files.read_bytes(place) == b"two"
    files.remove(place)
    assert files.replace(place, b"three", str(second)) is None
    assert not files.exists(place)
    with pytest.raises(FileNotFoundError):
        files.read_tagged(place)


def one_creates(pool: ThreadPoolExecutor, path: str) -> str:
    """Eight at once create a file: one is told so, and it is that one's. Returns its tag."""
    tags = list(pool.map(lambda who: files.create(path, b"%d" % who), range(8)))
    [tag] = filter(None, tags)
    assert files.read_bytes(path) == b"%d" % tags.index(tag)
    return tag


def test_of_eight_at_once_one_creates_and_one_replaces(place: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            path = f"{place}-{number}"
            tag = one_creates(pool, path)
            if place.startswith("memory"):
                continue  # Of threads; it lives in one process.
            tags = list(pool.map(lambda who, path=path, tag=tag: files.replace(path, b"new %d" % who, tag), range(8)))
            [tag] = filter(None, tags)
            assert files.read_bytes(path) == b"new %d" % tags.index(tag)


def test_a_put_whose_answer_was_lost_has_won(store: Store) -> None:
    path = f"{store.root}/lost"
    store.lose = "/lost"
    tag = files.create(path, b"mine")
    assert tag is not None
    assert not store.lose
    assert files.create(path, b"other") is None
    store.lose = "/lost"
    assert files.replace(path, b"mine again", tag) is not None
    assert retries.OURS.taken == 2


# ---- what a store is asked -------------------------------------------------------------------------------------------


def test_files_in_s3_are_as_they_are_in_a_folder(store: Store, tmp_path: Path) -> None:
    said = []
    for root in (str(tmp_path), store.root + "/same"):
        for name in ("a/one", "a/b/two", "a/b/three"):
            files.make_dirs(f"{root}/a/b")
            files.write_atomic(f"{root}/{name}", name.encode() * 3)
        files.write_verified(f"{root}/a/b/three", b"3")
        found: list[Any] = [
            files.list_names(f"{root}/a"),
            files.list_names(f"{root}/none"),
            files.exists(f"{root}/a/b"),
        ]
        found += [{name: size.bytes for name, size in files.sizes(f"{root}/a").items()}]
        with files.open_read(f"{root}/a/one") as file:
            file.seek(2)
            found += [file.read(3), file.read(), file.seek(-2, os.SEEK_END), file.read(9), file.read(1)]
        found += [files.read_bytes(f"{root}/a/one", 1, 4), files.exists(f"{root}/a/on")]
        files.remove(f"{root}/a/b")
        found += [files.list_names(f"{root}/a"), files.exists(f"{root}/a/b/two")]
        said.append(found)
    assert said[0] == said[1]


def test_nothing_is_remembered_of_a_listing(store: Store) -> None:
    folder = f"{store.root}/seen"
    files.write_bytes(f"{folder}/a", b"1")
    assert files.list_names(folder) == ["a"]
    assert not files.exists(f"{folder}/b")
    store.objects[f"{store.prefix}/seen/b"] = Stored(b"2", "tag", time.time())  # Another process's.
    assert files.exists(f"{folder}/b")
    assert files.list_names(folder) == ["a", "b"]


def test_an_object_for_a_folder_is_none_of_its_files(store: Store) -> None:
    folder = f"{store.root}/marked"
    store.objects[f"{store.prefix}/marked/"] = Stored(b"", "tag", time.time())
    assert files.list_names(folder) == []
    assert files.sizes(folder) == {}
    files.write_bytes(f"{folder}/a", b"1")
    assert files.list_names(folder) == ["a"]
    assert [*files.sizes(folder)] == ["a"]


def test_a_large_file_goes_in_parts_and_comes_back_whole(store: Store) -> None:
    data = os.urandom(2**20) * 120
    files.write_verified(f"{store.root}/large", data)
    assert not store.uploads
    assert any("uploadId" in path for _, path in store.requests)
    assert store.data("large") == data


def test_ranges_are_read_and_little_more(store: Store) -> None:
    data = os.urandom(3 * files.RANGE_BYTES)
    files.write_bytes(f"{store.root}/ranges", data)
    sent = store.bytes_sent
    with files.open_read(f"{store.root}/ranges") as file:
        file.seek(files.RANGE_BYTES + 5)
        assert file.read(100) == data[files.RANGE_BYTES + 5 :][:100]
    assert store.bytes_sent - sent <= files.RANGE_BYTES + 1000


def test_a_fingerprint_sees_a_rewrite_of_the_same_size(store: Store) -> None:
    path = f"{store.root}/log.csv"
    files.write_bytes(path, b"a,b,1\n")
    before = files.fingerprint([path])
    assert files.fingerprint([path]) == before
    files.write_bytes(path, b"a,b,2\n")
    assert files.fingerprint([path]) != before


# ---- bad days --------------------------------------------------------------------------------------------------------


def test_every_fifth_request_refused_is_tried_again_and_counted(store: Store) -> None:
    store.fail_every = 5
    for number in range(20):
        files.write_bytes(f"{store.root}/many/{number:02d}", b"%d" % number)
    assert [int(files.read_bytes(f"{store.root}/many/{name}")) for name in files.list_names(f"{store.root}/many")] == [
        *range(20)
    ]
    refused = len(store.requests) // 5
    assert retries.OURS.taken == refused > 5


def test_what_does_not_pass_is_not_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_bytes(f"{store.root}/not-there")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    forget_clients()
    with pytest.raises(PermissionError):
        files.read_bytes(f"{store.root}/x")
    forget_clients()
    assert retries.OURS.taken == 0


def test_a_store_that_stays_away_ends_within_the_budget(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "OURS", retries.Retries(budget_s=0.5))
    store.fail_every = 1
    for _ in range(3):
        with pytest.raises(OSError, match="Service Unavailable|SlowDown"):
            files.read_bytes(f"{store.root}/x")
    assert 1 <= retries.OURS.taken <= 9


# ---- input and checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["log", "log/*.csv*", "log/b.csv", ["log/a.csv", "log/z.csv.gz"]])
def test_a_log_in_s3_is_found_and_read_as_one_in_a_folder_is(store: Store, tmp_path: Path, given: Any) -> None:
    rows = b"".join(b"%d,%d\n" % (number, number % 7) for number in range(20_000))
    for name in ("a.csv", "b.csv", "_hidden.csv", "z.csv.gz"):
        data = gzip.compress(rows) if name.endswith("gz") else rows
        (tmp_path / "log").mkdir(exist_ok=True)
        (tmp_path / "log" / name).write_bytes(data)
        files.write_bytes(f"{store.root}/input/log/{name}", data)
    said = []
    for root in (str(tmp_path), f"{store.root}/input"):
        paths = [f"{root}/{each}" for each in ([given] if isinstance(given, str) else given)]
        found = find_files(paths, FORMATS["csv"], "csv")
        texts = []
        for path in found.paths:
            with streams.opened(path) as stream:
                if not path.endswith("gz"):
                    stream.seek(70_001)
                texts.append(stream.read(50))
        names = [path.removeprefix(root) for path in (*found.paths, *found.left_out)]
        said.append((names, texts, [range_of.end for unit in plan(found.paths, "text") for range_of in unit]))
    assert said[0] == said[1]


def test_checkpoints_in_s3_are_whole_or_passed_over(store: Store) -> None:
    folder = f"{store.root}/checkpoints"
    for step in (1, 2, 3):
        checkpoints.save(folder, step, {"w": torch.full((4,), float(step))}, {"step": step})
    assert files.list_names(folder) == ["step-000000002", "step-000000003"]
    found = checkpoints.latest(folder)
    assert found is not None
    assert found.progress == {"step": 3}
    assert found.tensors["w"].tolist() == [3.0] * 4
    files.remove(f"{folder}/step-000000003/SHA256SUMS")  # Killed before its end.
    found = checkpoints.latest(folder)
    assert found is not None
    assert found.progress == {"step": 2}
    name = f"{store.prefix}/checkpoints/step-000000002/tensors.safetensors"
    store.objects[name] = Stored(store.objects[name].data[:-1] + b"x", "tag", time.time())
    assert checkpoints.latest(folder) is None


def test_what_a_store_keeps_otherwise_than_it_was_given_is_noticed(store: Store) -> None:
    def damage(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/kept"):
            store.objects[f"{store.prefix}/kept"].data = b"other"

    store.hook = damage
    with pytest.raises(OSError, match="was written with SHA-256"):
        files.write_verified(f"{store.root}/kept", b"given")


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_notices_a_store_that_ignores_conditions(store: Store, tmp_path: Path) -> None:
    paths = Paths(lake=f"{store.root}/doctor", work=str(tmp_path))
    assert places.lake(paths).status == "ok"
    store.conditions = False
    check = places.lake(paths)
    assert check.status == "fail"
    assert "ignores conditions" in check.detail
    assert store.names("doctor") == []


# ---- the lock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.2)
    monkeypatch.setattr(locks, "POLL_S", 0.05)


@pytest.mark.usefixtures("quick")
def test_a_live_owner_keeps_others_away_and_gives_back(store: Store) -> None:
    lake = Lake(f"{store.root}/live")
    with lake.hold(DS):
        with (
            pytest.raises(BusyRun, match=f"another run \\(process {os.getpid()} on .*\\) holds ds {DS}"),
            lake.hold(DS),
        ):
            pass
        with lake.hold("2026-02-01"):
            pass
        locks.confirm()
    with lake.hold(DS):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


@pytest.mark.usefixtures("quick")
def test_a_lock_that_has_grown_old_is_taken_over_and_its_owner_stops(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(f"{store.root}/old")
    with lake.hold(DS):
        monkeypatch.setattr(locks.Lock, "_beat_on", lambda self: None)
        [mine] = locks._held
        mine._ended.set()  # No more heartbeats: as if this process was stopped for a while.
        mine._thread.join()
        there = time.time
        store.clock = lambda: there() + locks.DEAD_S + 5
        with locks.held(mine.path, mine.what) as theirs:
            assert theirs.owner.token != mine.owner.token
            with pytest.raises(StaleRun, match="has lost ds"):
                mine.confirm()
            theirs.confirm()
            with pytest.raises(StaleRun):
                locks.confirm()


KILLED = """
import sys, time
from ncf_dist.lake import Lake
from ncf_dist.prepare import streams
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.source import plan
from ncf_dist.train import checkpoints
with Lake(sys.argv[1]).hold(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_process_of_this_machine_that_was_killed_is_free_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "POLL_S", -1.0)  # Nobody waits: time.sleep would raise.
    lake = Lake(f"{store.root}/killed")
    with subprocess.Popen([sys.executable, "-c", KILLED, lake.root, DS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
    with lake.hold(DS):
        pass


@pytest.mark.usefixtures("quick")
def test_of_eight_that_want_a_dead_lock_one_gets_it(store: Store) -> None:
    path = f"{store.root}/dead/.lock"
    for number in range(5):
        dead = {"token": "x", "host": "elsewhere", "process": 1, "machine": "another"}
        files.write_bytes(f"{path}{number}", json.dumps(dead).encode())
    there = time.time
    store.clock = lambda: there() + locks.DEAD_S + 5
    inside, most, guard = 0, 0, threading.Lock()

    def take(path: str) -> bool:
        nonlocal inside, most
        try:
            with locks.held(path, "a lock"):
                with guard:
                    inside, most = inside + 1, max(most, inside + 1)
                time.sleep(0.05)
                with guard:
                    inside -= 1
        except BusyRun:
            return False
        return True

    for number in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(take, [f"{path}{number}"] * 8)) >= 1
    assert most == 1


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    path = files.resolve("s3://AKIAINTHEURL:SecretInTheUrl@lake/x")
    assert path == "s3://lake/x"
    with pytest.raises(ConfigError, match="s3://lake/x was given with credentials; .*AWS_ACCESS_KEY_ID") as refused:
        files.exists(path)
    assert "InTheUrl" not in str(refused.value)


def test_no_credential_is_in_a_message(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.fail_every = 3
    for number in range(9):
        files.write_bytes(f"{store.root}/quiet/{number}", b"x")
    assert retries.OURS.taken
    assert "retries so far" in caplog.text
    assert KEY not in caplog.text
    assert SECRET not in caplog.text
