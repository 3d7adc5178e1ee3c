"""A lake in S3 when things go wrong together: a run that was suspended, clocks that differ, files that are replaced."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from ncf_dist import files, locks, retries
from ncf_dist.clean.removal import Removal
from ncf_dist.clean.work import carried_out
from ncf_dist.errors import BusyRun, StaleRun
from ncf_dist.lake import Lake
from ncf_dist.manifests import MANIFEST
from tests.s3 import Refused, Store
from tests.test_s3 import DS
from tests.test_s3 import quick as quick
from tests.test_s3 import server as server
from tests.test_s3 import store as store

pytest.importorskip("s3fs")


def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(store: Store) -> None:
    path = f"{store.root}/rewritten"
    files.write_bytes(path, b"a" * 2 * files.RANGE_BYTES)
    with files.open_read(path) as file:
        assert file.read(files.RANGE_BYTES).count(b"a") == files.RANGE_BYTES
        files.write_bytes(path, b"b" * 2 * files.RANGE_BYTES)
        with pytest.raises(OSError, match="/rewritten was replaced while it was read; needed a file that stays"):
            file.read(1)
    assert retries.OURS.taken == 0


@pytest.mark.parametrize("how", ["read_bytes", "read_tagged", "write", "exists", "range"])
def test_each_request_is_tried_by_one_rule(how: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks once more for what was tried enough would try it TRIES times as often."""
    monkeypatch.setattr(retries, "LONGEST_S", 0.0)
    path, store.fail_every = f"{store.root}/x", 1
    asked = {
        "read_bytes": lambda: files.read_bytes(path),
        "read_tagged": lambda: files.read_tagged(path),
        "write": lambda: files.write_bytes(path, b"x"),
        "exists": lambda: files.exists(path),
        "range": lambda: files.read_bytes(path, 0, 1),
    }
    with pytest.raises(OSError, match="Service Unavailable|SlowDown"):
        asked[how]()
    assert len(store.requests) == retries.TRIES


@pytest.mark.usefixtures("quick")
def test_an_owner_whose_heart_beats_keeps_a_lock_that_the_clocks_of_a_store_call_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, read = Lake(f"{store.root}/clocks"), files.read_tagged
    monkeypatch.setattr(files, "read_tagged", lambda path: read(path)._replace(age_s=2 * locks.DEAD_S))
    with lake.hold(DS):
        with pytest.raises(BusyRun), lake.hold(DS):
            pass
        locks.confirm()


@pytest.mark.usefixtures("quick")
def test_nobody_waits_for_longer_than_an_owner_can_be_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the store's clocks say, and also where its answers about the lock do not hold together."""
    monkeypatch.setattr(locks, "DEAD_S", 0.5)
    read = files.read_tagged
    monkeypatch.setattr(files, "read_tagged", lambda path: read(path)._replace(age_s=0.0))
    dead = {"token": "x", "host": "elsewhere", "process": 1, "machine": "another"}
    files.write_bytes(f"{store.root}/silent", json.dumps(dead).encode())
    with locks.held(f"{store.root}/silent", "a lock"):
        pass
    monkeypatch.setattr(files, "create", lambda path, data: None)
    with pytest.raises(FileNotFoundError), locks.held(f"{store.root}/nowhere", "a lock"):
        pass


def test_a_put_that_finds_nothing_where_it_was_to_make_something_fails(store: Store) -> None:
    def nothing(method: str, path: str) -> None:
        raise Refused(404, "NoSuchKey")

    store.hook = nothing
    with pytest.raises(FileNotFoundError):
        files.create(f"{store.root}/x", b"x")
    assert files.replace(f"{store.root}/x", b"x", '"tag"') is None


def suspended_after(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Remove a file, then be stopped for minutes: awake again, another one has taken the lock."""
    files.remove(path)
    [lock] = locks._held
    files.write_bytes(lock.path, locks.Owner("theirs", "elsewhere", 1, "another").encoded())
    now = locks._now()
    monkeypatch.setattr(locks, "_now", lambda: tuple(clock + 10 * locks.DEAD_S for clock in now))


def test_who_was_suspended_removes_nothing_any_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may have finished what looked like a dead attempt, or published what nobody needed."""
    lake = Lake(f"{store.root}/suspended")
    names = [lake.path("runs", DS, "train", "key", name) for name in (MANIFEST, "x")]
    for name in names:
        files.write_bytes(name, b"{}")
    with lake.hold(DS):
        taken = [Removal("run", path, 1) for path in names]
        remove = partial(suspended_after, monkeypatch)
        monkeypatch.setattr(Removal, "carry_out", lambda removal: remove(removal.path))
        with pytest.raises(StaleRun):
            carried_out(taken)
        assert files.list_names(lake.path("runs", DS, "train", "key")) == ["x"], "the first had gone before"
        with pytest.raises(StaleRun):
            lake.stage(DS, "train").begin("key")
    assert files.exists(names[1])


def test_two_processes_of_one_number_may_try_a_lake_at_once(tmp_path: Path) -> None:
    """As the first ones of two containers."""
    lake = Lake(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: lake.check_writable(), range(1000)))
    assert files.list_names(lake.root) == []
