"""What every attempt at a night leaves, however it ends; and what log lines say they are of."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import attempts, logs
from ncf_dist.attempts import Record
from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.errors import ContractError, GateRefused, InputError, Preempted
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.nightly import pipeline
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.stage import Outcome
from tests.test_cli import DS, ROOT, Shell, shell

__all__ = ["shell"]  # A fixture.

Stages = dict[str, Callable[..., Outcome]]


def made(name: str, status: str = "done", **extra: Any) -> Callable[..., Outcome]:
    """A stage that has made a table of two files."""

    def stage(config: Config, ds: str, given: Any = None) -> Outcome:
        logging.getLogger("ncf_dist.test").info("at work")
        files = tuple(FileInfo(f"{n}.parquet", 5, 1, 100, "d") for n in range(2))
        root = Lake(config.paths.lake).stage(ds, name).run_path(f"{name}-key")
        run = Manifest(
            stage=name, ds=ds, run_key=f"{name}-key", root=root, config={}, inputs={"log": "digest"},
            tables={"rows": TableInfo("rows", "s", files)}, metrics={f"{name}.figure": 1.5},
        )  # fmt: skip
        return Outcome.of(run, status, **extra)

    return stage


def fails(error: BaseException) -> Callable[..., Outcome]:
    def stage(config: Config, ds: str, given: Any = None) -> Outcome:
        raise error

    return stage


@pytest.fixture
def run(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """run(stages) → the record of a nightly that has these."""

    def run(stages: Stages) -> Record:
        monkeypatch.setattr(pipeline, "STAGES", stages)
        monkeypatch.setattr(pipeline, "check_ahead", lambda *_: None)
        shell.run(nightly, job="nightly")
        return recorded(shell)[-1]

    return run


def recorded(shell: Shell) -> list[Record]:
    return attempts.read(Lake(str(shell.lake)), DS)


def test_the_schema_in_the_package_is_the_one_that_is_written() -> None:
    assert Path(attempts.__file__).with_name("attempts.schema.json").read_text() == attempts.schema()


def test_an_attempt_says_what_it_made_of_what(shell: Shell, run: Callable[..., Record]) -> None:
    judged = {"users": {"value": 4, "bound": 2, "outcome": "passed"}}
    record = run(
        {
            "prepare": made("prepare", "already-done", warnings=["few rows"]),
            "score": made("score", model_version="mf-1"),
            "publish": made("publish", version=3, gates=judged),
        }
    )
    assert (record.job, record.ds, record.outcome, record.exit_code, record.error) == ("nightly", DS, "done", 0, None)
    assert (record.model_version, record.table_version, record.gates) == ("mf-1", 3, judged)
    assert record.metrics == {f"{name}.figure": 1.5 for name in ("prepare", "score", "publish")}
    assert record.warnings == ["few rows"]
    assert record.run_key == "publish-key"
    assert {name: stage.status for name, stage in record.stages.items()} == {
        "prepare": "already-done",
        "score": "done",
        "publish": "done",
    }
    stage = record.stages["score"]
    assert (stage.run_key, stage.run) == ("score-key", f"runs/{DS}/score/score-key")
    assert (stage.rows, stage.bytes, stage.inputs) == ({"rows": 10}, {"rows": 200}, {"log": "digest"})
    assert stage.seconds is not None
    assert stage.peak_memory_bytes is not None
    assert stage.peak_memory_bytes > 10**7, "this very process"
    assert record.code == attempts.code()
    assert record.ended is not None
    assert record.ended >= record.began
    assert len(record.code.lock or "") == len(record.code.sha256) == 64


@pytest.mark.parametrize(
    ("error", "outcome", "stage", "code"),
    [
        (GateRefused("worse", gates={"users": {"outcome": "refused"}}), "refused", "refused", 4),
        (InputError("no log"), "failed", "failed", 3),
        (Preempted("stopped"), "failed", "failed", 75),
        (ZeroDivisionError("by us"), "failed", "failed", 1),
    ],
)
def test_an_attempt_that_fails_says_how_far_it_came(
    run: Callable[..., Record], error: Exception, outcome: str, stage: str, code: int
) -> None:
    record = run({"prepare": made("prepare"), "train": fails(error), "score": made("score")})
    assert (record.outcome, record.exit_code) == (outcome, code)
    assert str(error) in str(record.error)
    assert {name: found.status for name, found in record.stages.items()} == {"prepare": "done", "train": stage}
    assert bool(record.gates) == isinstance(error, GateRefused)


def test_a_job_by_itself_is_one_stage(shell: Shell) -> None:
    shell.run(made("train"), job="train")
    [record] = recorded(shell)
    assert (record.job, record.outcome, list(record.stages)) == ("train", "done", ["train"])
    assert record.stages["train"].rows == {"rows": 10}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["done", "refused", "failed", "killed"]), min_size=1, max_size=6))
def test_whatever_is_begun_ends_or_is_found_lost(tmp_path_factory: pytest.TempPathFactory, ends: list[str]) -> None:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    for end in ends:
        attempt = attempts._begin(lake, DS, "nightly", None, attempts.Listeners({}))
        if end == "done":
            attempt.ended(Outcome("done"))
        elif end != "killed":
            error = GateRefused("x") if end == "refused" else ContractError("x")
            attempt.failed(error.exit_code, error)
    attempts._begin(lake, DS, "nightly", None, attempts.Listeners({}))
    *before, own = attempts.read(lake, DS)
    assert [record.outcome for record in before] == ["lost" if end == "killed" else end for end in ends]
    assert own.outcome == "running"
    assert all(record.ended for record in before)


KILLED = """
import os, signal, sys
from ncf_dist.cli import run_job
from ncf_dist.nightly import pipeline
from tests.test_attempts import made
def killed(config, ds, given=None):
    os.kill(os.getpid(), signal.SIGKILL)
pipeline.STAGES = {"prepare": made("prepare"), "train": killed}
pipeline.check_ahead = lambda *_: None
run_job("nightly", pipeline.nightly, sys.argv[1:])
"""


def test_an_attempt_that_was_killed_is_closed_by_the_next(shell: Shell, run: Callable[..., Record]) -> None:
    """A real process: what is on disk at its death says how far it was."""
    command = [sys.executable, "-c", KILLED, "--config", str(shell.conf), "--ds", DS]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    assert ended.returncode == -signal.SIGKILL
    [left] = recorded(shell)
    assert (left.outcome, left.ended) == ("running", None)
    run({"prepare": made("prepare")})
    lost, own = recorded(shell)
    assert (lost.attempt, lost.outcome, own.outcome) == (left.attempt, "lost", "done")
    assert {name: stage.status for name, stage in lost.stages.items()} == {"prepare": "done", "train": "running"}


def test_a_file_that_cannot_be_written_or_read_stops_no_night(
    shell: Shell, run: Callable[..., Record], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shell.lake / "runs" / DS / "attempts"
    folder.mkdir(parents=True)
    (folder / "0.json").write_text("{")
    assert run({"prepare": made("prepare")}).outcome == "done"
    assert "0.json cannot be read" in caplog.text
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("no folder")
    code, _ = shell.run(nightly, job="nightly")
    assert code == 0
    assert "cannot be written" in caplog.text


# ---- log lines -----------------------------------------------------------------------------------------------


def lines(shell: Shell, *more: str) -> list[str]:
    """What a real nightly says on stderr whose log is not there."""
    command = [sys.executable, str(ROOT / "jobs" / "nightly.py"), "--config", str(shell.conf), "--ds", DS, *more]
    return subprocess.run(command, capture_output=True, text=True).stderr.splitlines()


def test_lines_say_which_night_stage_and_attempt_they_are_of(shell: Shell) -> None:
    said = lines(shell)
    [record] = recorded(shell)
    [stage] = [line for line in said if "1/5 prepare" in line]
    assert f" INFO ncf_dist.nightly.pipeline [{DS} {record.attempt}]: ── 1/5 prepare" in stage
    [error] = [line for line in said if " ERROR " in line]
    assert f" ERROR ncf_dist.cli [{DS} prepare {record.attempt}]: " in error
    assert all(record.attempt in line for line in said)


def test_lines_can_be_json(shell: Shell) -> None:
    found = [json.loads(line) for line in lines(shell, "--set", "log.format=json")]
    [record] = recorded(shell)
    within = [line for line in found if "attempt" in line]
    assert within
    assert {(line["ds"], line["attempt"]) for line in within} == {(DS, record.attempt)}
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in found)
    assert [line["level"] for line in found if "log" in line["message"] and line["level"] == "ERROR"]


def test_the_run_key_is_said_from_when_it_is_known() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "done", (), None)
    with logs.saying(ds=DS, attempt="a1", stage="train", run_key=None):
        assert f" INFO x [{DS} train a1]: done" in logs.Formatter().format(record)
        with logs.saying():
            logs.say(run_key="k1")
            assert f" INFO rank 1 [{DS} train k1 a1]: done" in logs.Formatter("rank 1").format(record)
            inherited = subprocess.run(
                [sys.executable, "-c", "from ncf_dist import logs; print(logs.said()['run_key'])"],
                capture_output=True,
                text=True,
                check=True,
            )
            assert inherited.stdout.strip() == "k1", "ranks say it, too"
        assert "k1" not in logs.Formatter().format(record)
        logs.say(format="json")
        assert json.loads(logs.Formatter().format(record))["stage"] == "train"


def test_a_traceback_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "x", 1, "failed", (), (type(error), error, error.__traceback__))
    with logs.saying(format="json"):
        text = logs.Formatter().format(record)
    assert "\n" not in text
    assert "Traceback" in json.loads(text)["message"]


def test_clients_of_a_store_do_not_say_where_credentials_are() -> None:
    program = """if True:
        import logging
        from ncf_dist.logs import log_to_stderr
        log_to_stderr()
        for name in ("botocore.credentials", "aiobotocore.credentials", "ours"):
            logging.getLogger(name).info("found credentials, says %s", name)
        logging.getLogger("botocore.httpsession").warning("a warning")"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert [line.split(": ", 1)[1] for line in shown.splitlines()] == ["found credentials, says ours", "a warning"]


def test_a_job_leaves_nothing_behind_for_the_next(shell: Shell) -> None:
    before = logs.said()
    run_job("prepare", made("prepare"), ["--config", str(shell.conf), "--ds", DS])
    assert logs.said() == before
