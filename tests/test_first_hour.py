"""A night as a person sees it: on a terminal, in a place that is odd in every way at once; and then what README and
docs/ say one can do with what it has made."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from ncf_dist import demo, last_line
from ncf_dist.config import load_config
from tests.snippets import Block, check, documented, spark_in
from tests.test_line import LAUNCHER, ROOT

DS = "2026-01-31"
ODD_HOST = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
"""A machine of a name that nothing resolves."""
GATE_S = 300


@dataclass(frozen=True)
class Seen:
    """What a night left: its folder, exit code, the last line of stdout, and what was on the terminal."""

    folder: Path
    code: int
    line: str
    screen: str


class Terminal:
    """A terminal of 120 columns; `screen` is all that was written to it so far."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Nobody has the other end any more.
                return
            if not data:
                return
            self.written += data

    @property
    def screen(self) -> str:
        return self.written.decode(errors="replace")

    def close(self) -> None:
        """To be called when those who write have ended."""
        os.close(self.slave)
        self._reader.join(timeout=60)
        os.close(self.master)


def odd_place(folder: Path) -> Path:
    """A config in a folder with a space, an umlaut and modules of Python's and ours, which neither driver nor Spark's
    workers nor ranks must take."""
    for module in ("random.py", "psutil.py", "ncf_dist/__init__.py"):
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_text("raise SystemExit('taken from the working folder')\n")
    rows = [f"{u}::{i}::5::{u * i}\n" for u in range(1, 30) for i in range(u % 3, 20)]
    (folder / "ratings.dat").write_text("".join(rows))
    tree = {
        "paths": {"lake": "lake/demo", "work": "wörk"},
        "input": {"path": "ratings.dat"},
        "negatives": {"draws": 2, "candidates": 5},
        "model": {"name": "gmf", "factors": 4},
        "loader": {"backend": "arrow"},
        "train": {"ranks": 2, "batch_size": 64, "epochs": 2},
        "publish": {"require": ["users", "evaluated"]},
        "spark": {"master": "local[1]", "driver_memory": "1g", "shuffle_partitions": 1},
    }
    (folder / "line.yaml").write_text(json.dumps(tree))
    return folder


def gate(folder: Path) -> tuple[Path, Path]:
    """(a Python for Spark's workers that waits for a file before it becomes one, that file): so that a stage of Spark
    lasts until it was seen."""
    python, opened = folder / "waiting python", folder / "opened"
    python.write_text(
        f"#!/bin/bash\nend=$((SECONDS + {GATE_S}))\n"
        f"while [[ ! -e '{opened}' && $SECONDS -lt $end ]]; do sleep 0.1; done\n"
        f"exec '{ROOT}/.venv/bin/python' \"$@\"\n"
    )
    python.chmod(0o755)
    return python, opened


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """nightly on a terminal, in a POSIX locale, on a host whose name does not resolve."""
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("spark-submit.sh needs .venv; run make install")
    beside = tmp_path_factory.mktemp("first")
    folder = odd_place(beside / "Übung lake")
    python, opened = gate(beside)
    host = ODD_HOST if subprocess.run([*ODD_HOST, "true"], capture_output=True).returncode == 0 else ()
    odd = {"SPARK_LOCAL_HOSTNAME": "no-such-host.invalid", "SPARK_LOCAL_IP": "no-such-host.invalid", "LC_ALL": "POSIX"}
    terminal = Terminal()
    with subprocess.Popen(
        [*host, LAUNCHER, "nightly", "--config", "line.yaml", "--ds", DS],
        cwd=folder,
        env={**os.environ, **odd, "PYSPARK_PYTHON": str(python), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        text=True,
    ) as process:
        while process.poll() is None and "[Stage " not in terminal.screen:
            time.sleep(0.05)
        opened.touch()
        out, _ = process.communicate(timeout=500)
    terminal.close()
    return Seen(folder, process.returncode, out.splitlines()[-1] if out else "", terminal.screen)


def test_a_night_in_an_odd_place_is_published(night: Seen) -> None:
    assert night.code == 0, night.screen[-5000:]
    made = {path.parent.parent.name for path in night.folder.glob(f"lake/demo/runs/{DS}/*/*/manifest.json")}
    assert made == {"prepare", "train", "evaluate", "score"}
    assert (night.folder / "lake/demo/recommendations/latest.json").exists()


def test_its_line_is_short_and_names_the_rest(night: Seen) -> None:
    assert len(night.line.encode()) < 1000
    report, whole = json.loads(night.line), last_line.read(night.line)
    assert report["runs"].keys() == {"prepare", "train", "evaluate", "score"}
    assert all((Path(report["lake"]) / path / "manifest.json").exists() for path in report["runs"].values())
    assert report["outputs"] == {"recommendations": str(night.folder / "lake/demo/recommendations")}
    assert {"full.ndcg@10", "full.hr@10"} <= report["metrics"].keys()
    assert len(whole["metrics"]) > len(report["metrics"])
    assert whole["outputs"].keys() >= {"train", "bundle", "report", "recommendations"}
    assert whole["comparisons"][0].keys() >= {"difference", "interval"}


def test_a_person_sees_how_far_it_is(night: Seen) -> None:
    """Spark's bar and the training's, which go back to the beginning of their line."""
    assert re.search(r"\[Stage \d+:[=>]* +\(\d+ \+ \d+\) / \d+\]", night.screen)
    assert re.search(r"\repoch 1 of 2: +\d+%\|.*step", night.screen), night.screen[-5000:]
    assert re.search(r"epoch 2 of 2: loss [.\d]+, ndcg@10 [.\d]+( \(best\))?, [.\d]+( [kM])? samples/s, ", night.screen)
    for bad in ("Traceback", "Exception", "taken from the working folder"):
        assert bad not in night.screen


def test_log_lines_carry_the_date(night: Seen) -> None:
    lines = [line for line in re.split(r"[\r\n]+", night.screen) if re.search(r" (INFO|WARNING|ERROR|WARN) ", line)]
    assert len(lines) > 10
    assert all(re.match(r"(\x1b\[\w+)*\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)


def test_the_demo_ends_with_the_report(night: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(night.folder)
    *_, published, report = demo.show(load_config("line.yaml")).splitlines()
    assert published.startswith("published: ")
    assert Path(report.removeprefix("report: ")).name == "report.html"
    assert Path(report.removeprefix("report: ")).exists()


# ---- the documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", documented(), ids=str)
def test_what_the_documents_say_works_as_printed(block: Block, night: Seen, spark: SparkSession) -> None:
    with spark_in(spark, night.folder):
        check(block, night.folder, {"spark": spark})
