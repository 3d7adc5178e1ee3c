"""A job that is asked to stop saves what it can, says so in its last line, exits 75 and leaves no process: the real
launcher, real signals, every stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock
from pyspark.sql import SparkSession

from ncf_dist.cli import JOBS
from ncf_dist.config import Config, load_config
from ncf_dist.errors import ExitCode
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.score.pipeline import score
from ncf_dist.train.pipeline import train
from tests.test_line import LAUNCHER, ROOT, checkerboard

DS = "2026-01-02"
MARK = "NCF_TEST_MARK"
PATIENCE_S = 300.0
"""For a machine that is busy with other things; nothing here waits that long on an idle one."""


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("spark-submit.sh needs .venv; run make install")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config beside its log."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "ratings.dat").write_text("\n".join(checkerboard()) + "\n")
    tree = {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "fetch": {"to": str(folder / "raw"), "users": 50, "items": 60, "mean_ratings_per_user": 6},
        "input": {"path": str(folder / "ratings.dat")},
        "negatives": {"draws": 2, "candidates": 10},
        "model": {"name": "gmf", "factors": 4},
        "loader": {"backend": "arrow"},
        "train": {"batch_size": 32, "lr": 0.05, "epochs": 40, "patience": 40},
        "spark": {"master": "local[1]", "driver_memory": "1g", "shuffle_partitions": 1},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def config(line: Path) -> Config:
    return load_config(line)


@pytest.fixture(scope="module")
def prepared(config: Config, spark: SparkSession) -> str:
    return prepare(config, DS).status


@pytest.fixture(scope="module")
def trained(line: Path, prepared: str) -> str:
    """By a run of its own: what scoring and evaluation need."""
    return train(load_config(line, ["train.launcher=none", "train.epochs=1"]), DS).status


class Job:
    """A job in a session of its own, with a mark in the environment that all its processes inherit."""

    def __init__(self, line: Path, job: str, *args: str, before: tuple[str, ...] = (), **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*before, LAUNCHER, job, "--config", str(line), "--ds", DS, *args],
            env={**os.environ, MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=(line.parent / f"{job}-{self.mark}.log").open("wb"),
            start_new_session=True,
        )
        self.log = line.parent / f"{job}-{self.mark}.log"

    def wait_for(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def wait_for_log(self, words: str) -> None:
        self.wait_for(lambda: words in self.log.read_text())

    def listens(self) -> bool:
        """Python has begun and has its handler of SIGTERM."""
        status = dict(row.split(":\t", 1) for row in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return status["Name"].startswith("python") and bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)

    def left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def open_to_others(self) -> list[str]:
        """Where processes of the job listen that is not loopback."""
        found = []
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                found += [f"{ip} {process.cmdline()}" for ip in listening if not ip.endswith(("127.0.0.1", "::1"))]
        return found

    def end(self) -> tuple[int, dict[str, Any]]:
        """(exit code, last line of stdout); nothing of the job may be left by then."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        left = self.left()
        assert not left, [process.cmdline() for process in left]
        log = self.log.read_text()
        assert "Exception while sending command" not in log, log[-5000:]
        assert out, log[-3000:]
        return self.process.returncode, json.loads(out.decode().splitlines()[-1])

    def must_be_preempted(self, job: str) -> dict[str, Any]:
        code, report = self.end()
        assert (code, report["job"], report["status"]) == (ExitCode.PREEMPTED, job, "failed"), report
        return report


@contextlib.contextmanager
def killed_after(job: Job) -> Iterator[Job]:
    """A test that fails must not leave what it was looking for."""
    try:
        yield job
    finally:
        for process in job.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        job.process.wait()


def lock_is_free(config: Config) -> bool:
    with FileLock(Path(config.paths.lake) / "runs" / DS / ".lock", timeout=0):
        return True


# ---- training -----------------------------------------------------------------------------------------------

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def first_in_its_namespace(job: Job) -> int:
    """The process that is number 1 there, by the number that it has here."""
    return psutil.Process(job.process.pid).children()[0].pid


def saved_steps(config: Config, before: frozenset[Path] = frozenset()) -> frozenset[Path]:
    return frozenset(Path(config.paths.lake).glob(f"runs/{DS}/train/*/checkpoints/step-*")) - before


SIGNALS: dict[str, Callable[[Job], None]] = {
    "SIGTERM to the process": lambda job: os.kill(job.process.pid, signal.SIGTERM),
    "SIGTERM to the group": lambda job: os.killpg(job.process.pid, signal.SIGTERM),
    "SIGINT to the process": lambda job: os.kill(job.process.pid, signal.SIGINT),
    "SIGINT to the group": lambda job: os.killpg(job.process.pid, signal.SIGINT),
    "SIGTERM to process number 1": lambda job: os.kill(first_in_its_namespace(job), signal.SIGTERM),
}
TRAININGS = [
    # The others send each signal, and send one in each way.
    pytest.param(how, marks=[pytest.mark.soak] if how == "SIGINT to the process" else [])
    for how in SIGNALS
]


@pytest.mark.parametrize("how", TRAININGS)
def test_training_saves_and_the_same_command_goes_on(line: Path, config: Config, prepared: str, how: str) -> None:
    """The signal comes once a step was saved, with at least 2,000 saved steps to go, of the 66 of each epoch; the next
    run saves less often.
    One of these trainings has two ranks, which agree on when to stop."""
    program: tuple[str, ...] = ()
    if how.endswith("number 1"):
        program = NAMESPACE
        if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
            pytest.skip("this user may not make a PID namespace (unshare --pid --fork --mount-proc)")
    before = saved_steps(config)
    ranks = 1 + (how == "SIGTERM to the group")
    run = ("--set", f"train.lr=0.0{5 + list(SIGNALS).index(how)}1", "--set", f"train.ranks={ranks}")
    with killed_after(Job(line, "train", *run, "--set", "train.checkpoint_steps=1", before=program)) as job:
        job.wait_for(lambda: saved_steps(config, before))
        SIGNALS[how](job)
        report = job.must_be_preempted("train")
        assert "stopped as asked after update " in report["error"]
        assert "asked to stop: the ranks save a checkpoint and end" in job.log.read_text()
    assert lock_is_free(config)
    if how == "SIGTERM to the process":
        with killed_after(Job(line, "train", *run)) as job:
            code, report = job.end()
            assert (code, report["status"]) == (0, "done")
            assert "going on from" in job.log.read_text()


# ---- the other stages ---------------------------------------------------------------------------------------


@pytest.fixture
def stuck(tmp_path: Path) -> tuple[Path, Path]:
    """(a Python for Spark's workers that never becomes one, the file that it makes when it is started). Spark holds a
    lock while it waits for it, so its JVM cannot end by itself and has to be killed once its time is over."""
    python, started = tmp_path / "python", tmp_path / "started"
    python.write_text(f"#!/bin/bash\ntouch {started}\nexec sleep 100000\n")
    python.chmod(0o755)
    return python, started


@pytest.fixture
def silent(tmp_path: Path) -> tuple[Path, Path]:
    """(a Python whose workers take a task and never answer, the file that the first one makes). The JVM ends by
    itself."""
    python, started = tmp_path / "silent/python", tmp_path / "silent/started"
    python.parent.mkdir()
    # Spark takes modules of such names alone.
    (python.parent / "pyspark_silent.py").write_text(
        f"import pathlib, time\ndef main(*_):\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(100_000)\n"
    )
    start = f"exec {sys.executable} -m pyspark.daemon pyspark_silent"
    python.write_text(f"#!/bin/bash\nexport PYTHONPATH={python.parent}:$PYTHONPATH\n{start}\n")
    python.chmod(0o755)
    return python, started


ASKED = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
WAITING = [
    # Evaluate and score wait as the night below does, which the suite stops in evaluate.
    pytest.param(job, name, marks=[] if job in ("fetch", "prepare") and name == "SIGTERM" else [pytest.mark.soak])
    for job in ("fetch", "prepare", "evaluate", "score")
    for name in ASKED
]


@pytest.mark.parametrize(("job", "name"), WAITING)
def test_a_stage_that_waits_for_spark_ends(
    line: Path,
    config: Config,
    trained: str,
    stuck: tuple[Path, Path],
    silent: tuple[Path, Path],
    job: str,
    name: str,
) -> None:
    """The driver waits in a read of a socket for an answer that never comes: of a worker, or, as in the night below, of
    a Python that never becomes one."""
    python, started = silent if name == "SIGTERM" else stuck
    more = {"prepare": ("--set", "seed=99"), "fetch": ()}.get(job, ("--set", "train.epochs=1"))
    with killed_after(Job(line, job, *more, PYSPARK_PYTHON=str(python))) as running:
        running.wait_for(started.exists)
        running.wait_for(lambda: len(running.left()) >= 3)  # The driver, its JVM, and the worker, or what is none.
        assert not running.open_to_others()
        running.process.send_signal(ASKED[name])
        report = running.must_be_preempted(job)
        assert f"was stopped by {name}" in report["error"]
        assert "run the same command again" in report["error"]
    assert lock_is_free(config)
    assert {path.name for path in line.parent.glob("raw/*")} <= {".lock"}, "fetch left nothing"
    assert len(list(line.parent.glob(f"lake/runs/*/{job}/*/manifest.json"))) == (job == "prepare")


# ---- a whole night -------------------------------------------------------------------------------------------

ONE_EPOCH = "train.epochs=1"
"""With it a night finds prepared and trained what the fixtures made."""
NIGHTS = [
    pytest.param(stage, name, marks=[] if (stage, name) == ("evaluate", "SIGINT") else [pytest.mark.soak])
    for stage in ("prepare", "train", "evaluate", "score", "publish")
    for name in ASKED
]


def done_before(line: Path, stage: str) -> None:
    """Make what a night is to find done before `stage`, beside what `trained` has made."""
    config = load_config(line, [ONE_EPOCH])
    if stage in ("score", "publish"):
        evaluate(config, DS)
    if stage == "publish":
        score(config, DS)


def finished(line: Path, stage: str) -> set[Path]:
    return set(line.parent.glob(f"lake/runs/{DS}/{stage}/*/manifest.json"))


@pytest.mark.parametrize(("stage", "name"), NIGHTS)
def test_a_night_ends_in_whichever_stage_it_is(
    line: Path, config: Config, trained: str, stuck: tuple[Path, Path], stage: str, name: str
) -> None:
    """Stages that use Spark wait for it; training has 40 epochs before it; publication may be faster than we are."""
    python, started = stuck
    done_before(line, stage)
    before, saved = finished(line, stage), saved_steps(config)
    more = {
        "prepare": ("seed=77", ONE_EPOCH),
        "train": (f"train.lr=0.0{1 + list(ASKED).index(name)}7", "train.checkpoint_steps=1"),
    }.get(stage, (ONE_EPOCH,))
    arguments = [word for setting in more for word in ("--set", setting)]
    with killed_after(Job(line, "nightly", *arguments, PYSPARK_PYTHON=str(python))) as running:
        running.wait_for_log(f"/5 {stage} ──")
        if stage == "train":
            running.wait_for(lambda: saved_steps(config, saved))
        elif stage != "publish":
            running.wait_for(started.exists)
        running.process.send_signal(ASKED[name])
        code, report = running.end()
    if stage == "publish" and code == ExitCode.DONE:
        return
    assert (code, report["job"], report["status"]) == (ExitCode.PREEMPTED, "nightly", "failed"), report
    assert ("stopped as asked" if stage == "train" else f"was stopped by {name}") in report["error"]
    assert (Path(report["lake"]) / report["details"]).exists()
    assert finished(line, stage) == before, "nothing half made counts"
    assert lock_is_free(config)


@pytest.mark.parametrize(("job", "number"), [*((job, signal.SIGTERM) for job in JOBS), ("publish", signal.SIGINT)])
def test_a_job_that_has_hardly_begun_ends(line: Path, job: str, number: int) -> None:
    """While it imports, before it has read its config: a request is noted and not lost."""
    with killed_after(Job(line, job)) as running:
        running.wait_for(running.listens)
        running.process.send_signal(number)
        report = running.must_be_preempted(job)
        assert f"stopped by {signal.Signals(number).name}" in report["error"]
