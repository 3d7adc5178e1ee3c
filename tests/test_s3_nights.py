"""Whole nights of the demo, by its command, with the lake in a store on a bad day: they publish what a local night
does, and the last line says how often the store was asked again. Each prints what became of it (`pytest -s`).

test_s3_line.py has a smaller line of which every tenth request is refused, in the suite.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncf_dist.demo import read_latest
from ncf_dist.files import read_bytes
from tests.s3 import TOKEN, Store, served
from tests.test_s3_credentials import found_in

pytest.importorskip("s3fs")
pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent
DS = "2023-07-01"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with served() as server:
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
        yield server


@dataclass
class Demo:
    """The demo's line on this machine, started in a folder of its own."""

    folder: Path

    def run(self, job: str, lake: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, last line, log) of a job whose lake is there."""
        tree = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
        raw = self.folder / "raw"
        tree["paths"] = {"lake": lake, "work": str(self.folder / "work")}
        tree["fetch"] |= {"to": str(raw)}
        tree["input"] |= {"path": str(raw / "ratings.dat"), "items": str(raw / "movies.dat")}
        (self.folder / "demo.yaml").write_text(yaml.safe_dump(tree))
        done = subprocess.run(
            [sys.executable, "-m", "ncf_dist.cli", job, "--config", "demo.yaml", "--ds", DS],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr

    def published(self, lake: str) -> list[str]:
        table = f"{lake}/recommendations"
        return sorted(hashlib.sha256(read_bytes(f"{table}/{file}")).hexdigest() for file in read_latest(table).files)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def near(demo: Demo) -> list[str]:
    """What a local night publishes."""
    lake = str(demo.folder / "lake")
    for job in ("fetch", "nightly"):
        code, _, log = demo.run(job, lake)
        assert code == 0, log
    return demo.published(lake)


@pytest.mark.parametrize(("every", "away_s"), [(5, 0.0), (0, 0.2), (5, 0.2)], ids=["503", "far", "503-and-far"])
def test_a_night_passes_and_says_how_often_it_asked_again(
    store: Store, demo: Demo, near: list[str], every: int, away_s: float
) -> None:
    lake = f"{store.root}/lake"
    store.fail_every, store.delay_s = every, away_s
    try:
        code, line, log = demo.run("nightly", lake)
    finally:
        store.fail_every, store.delay_s = 0, 0.0
    asked = len(store.requests)
    refused, retries = asked // every if every else 0, line.get("retries", 0)
    print(
        f"a night in S3, every {every}th request refused, {away_s * 1000:.0f} ms away: {line['status']} in "
        f"{line['seconds']:.0f} s, {asked} requests, {refused} refused, {retries} retries said"
    )
    assert (code, line["status"]) == (0, "done"), log
    assert demo.published(lake) == near
    # delta-rs asks again by itself, and does not say how often.
    assert refused * 0.9 <= retries <= refused
    assert ("retries so far" in log) == (retries > 0)
    texts = {"the log": log.encode()} | {name: store.data(name) for name in store.names()}
    texts |= {str(path): path.read_bytes() for path in demo.folder.rglob("*") if path.is_file()}
    assert found_in(texts) == []
