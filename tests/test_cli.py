"""The command line that all jobs share: one JSON line for the scheduler, one exit code, one run a night."""

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

from ncf_dist import cli, errors
from ncf_dist.artifacts import Lake, Outcome
from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.errors import NcfError

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
KEYS = {"job", "ds", "run_key", "status", "outputs", "metrics", "seconds"}
Report = dict[str, Any]


class Shell:
    """Runs jobs in this process and reads what they leave on stdout."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.lake, self.conf, self._capture = root / "lake", root / "conf.yaml", capture
        self.conf.write_text(json.dumps({"paths": {"lake": str(self.lake)}, "input": {"path": "log"}}))

    def run(self, function: Callable[[Config, str], Outcome], *more: str, job: str = "prepare") -> tuple[int, Report]:
        return self.call(lambda: run_job(job, function, ["--config", str(self.conf), "--ds", DS, *more]))

    def call(self, job: Callable[[], int]) -> tuple[int, Report]:
        """(exit code, the last line of stdout as JSON)."""
        self._capture.readouterr()
        code = job()
        return code, json.loads(self._capture.readouterr().out.splitlines()[-1])


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


def done(config: Config, ds: str) -> Outcome:
    print("something on stdout before the report")
    return Outcome("done", "k1", {"train": "somewhere"}, {"full.hr@10": 0.5}, {"rows": {"input": 7}})


def raises(error: BaseException) -> Callable[[Config, str], Outcome]:
    def job(config: Config, ds: str) -> Outcome:
        raise error

    return job


def test_the_last_line_of_stdout_tells_the_scheduler_everything(shell: Shell) -> None:
    code, report = shell.run(done)
    assert code == 0
    assert report.pop("seconds") >= 0
    assert report == {
        "job": "prepare",
        "ds": DS,
        "run_key": "k1",
        "status": "done",
        "outputs": {"train": "somewhere"},
        "metrics": {"full.hr@10": 0.5},
        "rows": {"input": 7},
    }


def test_the_job_gets_the_config_with_overrides_and_the_night(shell: Shell) -> None:
    def job(config: Config, ds: str) -> Outcome:
        return Outcome("done", extra={"seen": [config.seed, ds]})

    assert shell.run(job, "--set", "seed=5", "--set", "seed=6")[1]["seen"] == [6, DS]


CODES = {
    "ConfigError": (2, "failed"),
    "InputError": (3, "failed"),
    "ContractError": (3, "failed"),
    "GateRefused": (4, "refused"),
    "StaleRun": (5, "refused"),
    "BusyRun": (5, "failed"),
    "Preempted": (75, "failed"),
    "TrainingFailed": (1, "failed"),
}


def _subclasses(kind: type[NcfError]) -> set[str]:
    return {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NcfError)}


def test_every_error_has_its_exit_code_here() -> None:
    assert set(CODES) == _subclasses(NcfError) - {"NcfError"}


@pytest.mark.parametrize("name", CODES)
def test_an_error_that_a_person_can_mend_has_its_exit_code(shell: Shell, name: str) -> None:
    code, report = shell.run(raises(getattr(errors, name)("got a, needed b: do c")))
    assert (code, report["status"]) == CODES[name]
    assert report["error"] == "got a, needed b: do c"
    assert set(report) == KEYS | {"error"}
    assert (report["run_key"], report["outputs"], report["metrics"]) == (None, {}, {})


def test_anything_else_is_our_mistake_and_comes_with_its_trace(shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        code, report = shell.run(raises(KeyError("boom")))
    assert code == 1
    assert (report["status"], report["error"]) == ("failed", "KeyError: 'boom'")
    assert set(report) == KEYS | {"error"}
    assert caplog.records[-1].exc_info is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--config", "x.yaml", "--ds", "2026-02-30"], "--ds is '2026-02-30'"),
        (["--config", "x.yaml", "--force"], "unrecognized arguments: --force"),
    ],
)
def test_wrong_usage_exits_2_before_anything_starts(shell: Shell, arguments: list[str], message: str) -> None:
    code, report = shell.call(lambda: run_job("prepare", raises(AssertionError()), arguments))
    assert code == 2
    assert message in report["error"]
    assert not shell.lake.exists()


# ---- one run a night ---------------------------------------------------------------------------------------

HOLD = """
import sys
from ncf_dist.artifacts import Lake
with Lake(sys.argv[1]).hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_night_that_another_process_holds_is_busy_until_that_process_is_gone(shell: Shell) -> None:
    command = [sys.executable, "-c", HOLD, str(shell.lake), DS]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        code, report = shell.run(done)
        assert (code, report["status"]) == (5, "failed")
        assert f"another run holds ds {DS}" in report["error"]
        assert shell.run(done, "--ds", "2026-02-01")[0] == 0
        assert [shell.run(done, job=job)[0] for job in ("fetch", "doctor")] == [0, 0]
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert shell.run(done)[0] == 0


def test_the_night_is_held_while_the_job_runs_and_free_after_it_failed(shell: Shell) -> None:
    def job(config: Config, ds: str) -> Outcome:
        with Lake(config.paths.lake).hold(ds):
            return Outcome("done")

    assert shell.run(job)[0] == 5
    assert shell.run(raises(ValueError("boom")))[0] == 1
    assert shell.run(done)[0] == 0


def _unwritable(tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_text("")
    return [str(tmp_path / "file" / "lake"), str(tmp_path / "file")] + ["/proc/lake"] * Path("/proc").is_dir()


def test_a_lake_that_cannot_be_written_exits_3(shell: Shell, tmp_path: Path) -> None:
    for lake in _unwritable(tmp_path):
        code, report = shell.run(raises(AssertionError()), "--set", f"paths.lake={lake}")
        assert code == 3, report
        assert f"the lake {lake} cannot be written" in report["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_lake_without_permission_exits_3(shell: Shell) -> None:
    shell.lake.mkdir(mode=0o500)
    assert shell.run(done)[0] == 3


# ---- ncf-dist JOB, and what the launcher asks --------------------------------------------------------------


def test_every_job_has_its_file() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(cli.JOBS)


def test_ncf_dist_runs_the_job_of_that_name(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncf_dist.prepare.pipeline.prepare", done)
    code, report = shell.call(lambda: cli.main(["prepare", "--config", str(shell.conf), "--ds", DS]))
    assert (code, report["job"], report["run_key"]) == (0, "prepare", "k1")


@pytest.mark.parametrize("arguments", [[], ["bake"], ["--config", "x.yaml"]])
def test_an_unknown_job_exits_2_and_lists_the_known_ones(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert "fetch|prepare|train|evaluate|score|publish|nightly|doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "master"),
    [([], []), (["--set", "spark.master=local[2]"], ["--master", "local[2]"])],
)
def test_spark_options_are_what_must_be_known_before_the_jvm_starts(
    shell: Shell, capsys: pytest.CaptureFixture[str], overrides: list[str], master: list[str]
) -> None:
    arguments = ["prepare", "--config", str(shell.conf), "--set", "spark.driver_memory=3g", *overrides]
    assert cli.main(["spark-options", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*master, "--driver-memory", "3g", "--executor-memory", "2g"]


@pytest.mark.parametrize("more", [["--set", "sede=1"], ["--ds", "today"], ["--what"]])
def test_spark_options_of_a_bad_config_report_as_the_job_would(shell: Shell, more: list[str]) -> None:
    arguments = ["--config", str(shell.conf), *more]
    asked = shell.call(lambda: cli.main(["spark-options", "train", *arguments]))
    ran = shell.call(lambda: cli.main(["train", *arguments]))
    for code, report in (asked, ran):
        assert (code, report["job"], report["status"]) == (2, "train", "failed")
    assert asked[1]["error"] == ran[1]["error"]
