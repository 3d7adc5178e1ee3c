"""Whole nights of the real line, killed (SIGKILL) at their steps and at random moments: readers see the old night or
the new one, and the same command again ends where an undisturbed night does, byte for byte."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from tests.killing import KILLED
from tests.shop import new_users, shop

ROOT = Path(__file__).parent.parent
FIRST, SECOND = "2024-05-20", "2024-05-21"
DRIVER = """
import logging, os, signal, sys

from ncf_dist.cli import main
from ncf_dist.evaluate import held_out
from ncf_dist.publish import steps
from ncf_dist.score import plan

for stage in (held_out, plan):
    stage.MIN_FILES = 4  # Of a few users: each file is a task, which loads the model.

at, told, args = int(sys.argv[1]), open(sys.argv[2], "w"), sys.argv[3:]
reached = 0

def moment(what):
    global reached
    reached += 1
    print(what, file=told, flush=True)
    if reached == at:
        os.kill(os.getpid(), signal.SIGKILL)

class Lines(logging.Handler):
    def emit(self, record):
        moment("line " + record.name)

steps.listener = lambda step: moment("step " + step)
logging.getLogger("ncf_dist").addHandler(Lines())
sys.exit(main(["nightly", *args]))
"""
"""A moment is a line of the log, or a step of a publication. The process kills itself at the one of number `at`."""


class Line:
    """A small line, whose second night is killed."""

    def __init__(self, root: Path) -> None:
        self.root, self.lake, self.kept = root, root / "lake", root / "kept"
        config = shop(root, train={"epochs": 2}, publish={"require": ["users", "evaluated"]})
        (root / "line.json").write_text(config.model_dump_json(by_alias=True))
        assert self.nightly(FIRST)[0] == 0
        new_users(config)
        shutil.copytree(self.lake, self.kept)
        self.old = self.seen()

    def nightly(self, ds: str, at: int = 0, delay: float | None = None) -> tuple[int, list[str], float]:
        """(exit code, the moments that were reached, seconds)"""
        told, start = self.root / "told", time.monotonic()
        command = [sys.executable, "-c", DRIVER, str(at), str(told), "--config", str(self.root / "line.json")]
        with (self.root / "stderr").open("w") as stderr:
            process = subprocess.Popen([*command, "--ds", ds], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode, told.read_text().splitlines(), time.monotonic() - start

    def again(self) -> None:
        """The second night has not begun."""
        shutil.rmtree(self.lake)
        shutil.copytree(self.kept, self.lake)

    def seen(self) -> dict[str, Any]:
        """Of each night, and of latest.json, what a reader gets: files and their digests."""
        table = self.lake / "recommendations"
        names = DeltaTable(str(table)).file_uris()
        latest = json.loads((table / "latest.json").read_text())
        paths = {name.split("/recommendations/")[1] for name in names} | set(latest["files"])
        digests = {path: hashlib.sha256((table / path).read_bytes()).hexdigest() for path in sorted(paths)}
        assert all(digests[path] == of["sha256"] for path, of in latest["checksums"].items())
        return {"digests": digests, "latest": latest}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return Line(tmp_path_factory.mktemp("line"))


def chosen(moments: list[str], most: int) -> list[int]:
    """Numbers of moments: every step of the publication, and lines spread evenly over the night."""
    steps = [number for number, what in enumerate(moments, 1) if what.startswith("step")]
    lines = [number for number, what in enumerate(moments, 1) if what.startswith("line")]
    return sorted({*steps, *lines[:: -(-len(lines) // most)]})


@pytest.mark.soak
def test_a_night_that_is_killed_at_a_step_converges(line: Line) -> None:
    line.again()
    code, moments, took = line.nightly(SECOND)
    assert code == 0, (line.root / "stderr").read_text()[-3000:]
    new = line.seen()
    assert new["latest"]["ds"] == SECOND
    at = chosen(moments, 16)
    rng = random.Random(5)
    kills: list[dict[str, Any]] = [{"at": number} for number in at]
    kills += [{"delay": rng.uniform(0.1, 0.9) * took} for _ in range(6)]
    assert len(at) >= 20, moments
    for kill in kills:
        line.again()
        code, reached, _ = line.nightly(SECOND, **kill)
        assert code == KILLED, (kill, code)
        seen = line.seen()
        assert seen["digests"] in (line.old["digests"], new["digests"]), (kill, reached[-1:])
        assert seen["latest"] in (line.old["latest"], new["latest"]), (kill, reached[-1:])
        assert line.nightly(SECOND)[0] == 0, (kill, (line.root / "stderr").read_text()[-3000:])
        assert line.seen() == new, (kill, reached[-1:])
    print(f"{len(kills)} nights were killed, at {[moments[number - 1] for number in at]} and 6 random moments")
