"""The command line that all jobs share: one JSON line for the scheduler, one exit code, one run a night."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from ncf_dist import cli, errors, gateway, stopping
from ncf_dist import config as settings
from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.errors import NcfError
from ncf_dist.lake import Lake
from ncf_dist.stage import Outcome

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
KEYS = {"job", "ds", "run_key", "status", "outputs", "metrics", "lake", "details", "seconds"}
Report = dict[str, Any]


class Shell:
    """Runs jobs in this process and reads what they leave on stdout."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.lake, self.work, self.conf, self._capture = root / "lake", root / "work", root / "conf.yaml", capture
        paths = {"lake": str(self.lake), "work": str(self.work)}
        self.conf.write_text(json.dumps({"paths": paths, "input": {"path": "log"}}))

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
    assert (shell.lake / report.pop("details")).exists()
    assert report == {
        "job": "prepare",
        "ds": DS,
        "run_key": "k1",
        "status": "done",
        "outputs": {"train": "somewhere"},
        "metrics": {"full.hr@10": 0.5},
        "rows": {"input": 7},
        "lake": str(shell.lake),
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
    "ScoresNotFinite": (4, "refused"),
    "StaleRun": (5, "refused"),
    "BusyRun": (5, "failed"),
    "Preempted": (75, "failed"),
    "TrainingFailed": (1, "failed"),
    "WorkerKilled": (1, "failed"),
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
    gate = {"refused"} if name == "ScoresNotFinite" else set()  # It is a gate by itself, and says which.
    assert set(report) == KEYS | {"error"} | gate
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
from ncf_dist.lake import Lake
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
    assert "|".join(cli.JOBS) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "master"),
    [([], []), (["--set", "spark.master=local[2]"], ["--master", "local[2]"])],
)
def test_what_must_be_known_before_the_jvm_starts_is_handed_over(
    shell: Shell, overrides: list[str], master: list[str]
) -> None:
    """The config's options first, so that a person's win."""
    mine = ["--driver-memory", "8g", "--conf", "spark.x=a b\n'c'"]
    code, _ = shell.run(done, "--set", "spark.driver_memory=3g", *overrides, "--", *mine)
    assert code == 0
    assert gateway.handed_over() == [*master, "--driver-memory", "3g", "--executor-memory", "2g", *mine]


def test_without_options_nothing_is_handed_over(shell: Shell) -> None:
    assert shell.run(done)[0] == 0
    assert gateway.handed_over() is None


@pytest.mark.parametrize(
    "option", [["--deploy-mode", "cluster"], ["--deploy-mode=cluster"], ["--conf", "spark.submit.deployMode=cluster"]]
)
def test_deploy_mode_cluster_becomes_spark_submit(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    (tmp_path / "submit").write_text('#!/bin/bash\nprintf "%s\\n" "$@"; exit 7\n')
    (tmp_path / "submit").chmod(0o755)
    job = ["--config", str(shell.conf), "--ds", DS]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/train.py"), *job, "--", *option, "--name", "n"],
        env={**os.environ, "NCF_SPARK_SUBMIT": str(tmp_path / "submit")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    options = ["--driver-memory", "1g", "--executor-memory", "2g", *option, "--name", "n"]
    assert done.stdout.splitlines() == [*options, str(ROOT / "jobs/train.py"), *job]
    assert not shell.lake.exists(), "the night is held where the job runs"


# ---- hostile words on a command line -----------------------------------------------------------------------

FLAGS_AND_NUMBERS = ("shuffle_partitions", "authenticate", "one_application")
REACH_THE_COMMAND_LINE = (
    *("master", "driver_memory", "executor_memory", "compiler", "environment", "environment_archive"),
    *FLAGS_AND_NUMBERS,
)
WHITE_OR_CONTROL = st.characters(categories=("Cc", "Cf", "Zs", "Zl", "Zp"))


def test_every_key_that_reaches_the_command_line_is_named_here() -> None:
    assert set(settings.Spark.model_fields) == set(REACH_THE_COMMAND_LINE)


@pytest.mark.parametrize("key", REACH_THE_COMMAND_LINE)
@given(before=st.sampled_from(["", "local[2]", "1g", "8", "true"]), odd=WHITE_OR_CONTROL, after=st.text(max_size=20))
@example(before="local[2]", odd="\n", after="--conf")
@example(before="1g", odd="\n", after="")
def test_no_white_space_or_control_character_gets_there(key: str, before: str, odd: str, after: str) -> None:
    words: dict[str, Any] = {key: before + odd + after}
    if key not in FLAGS_AND_NUMBERS:
        with pytest.raises(ValidationError, match=f"spark.{key}|{key}"):
            settings.Spark(**words)
        return
    # A number or a flag with white space around it is that number or flag.
    with contextlib.suppress(ValidationError):
        options = gateway.plain_options(settings.Spark(**words))
        assert all(word.isprintable() and " " not in word for word in options)


@pytest.mark.parametrize("text", ["local[2]\n--conf\nspark.x=y", "a b", "-x", "", "local\x00", "\u2028", "a\tb"])
def test_a_master_that_is_no_single_word_is_refused_by_name(shell: Shell, text: str) -> None:
    code, report = shell.run(raises(AssertionError()), "--set", f"spark.master={json.dumps(text)}")
    assert code == 2
    assert f"spark.master is {text!r}; needed one word" in report["error"]


@given(st.lists(st.text(), max_size=5))
def test_options_go_over_as_they_are(options: list[str]) -> None:
    """No splitting, no quoting: what a person writes after `--` may hold anything."""
    before = dict(os.environ)
    try:
        gateway.hand_over(options)
        assert gateway.handed_over() == options
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_program_gets_the_options_word_by_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for spark-submit writes down what it got and ends, which is one message."""
    monkeypatch.setattr(gateway, "_process", None)  # Whose JVM is that of the other tests.
    program = tmp_path / "submit"
    program.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{tmp_path}/got; exit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("NCF_SPARK_SUBMIT", str(program))
    options = ["--conf", "spark.x=two words\nand 'a' \"line\" $(touch evil) \\", "--name", ""]
    with pytest.raises(NcfError, match="Spark ended with code 3 before it was ready"):
        gateway.start(options)
    assert (tmp_path / "got").read_bytes().split(b"\0")[:-1] == [o.encode() for o in [*options, "pyspark-shell"]]


@pytest.mark.parametrize(
    ("options", "master"),
    [
        ([], "local[*]"),
        (["--master", "yarn"], "yarn"),
        (["--master=yarn", "--master", "local[2]"], "local[2]"),
        (["--conf", "spark.master=yarn"], "yarn"),
        (["--conf", "spark.master=yarn", "--master", "local[3]"], "local[3]"),
        (["--properties-file", "FILE"], "spark://host:7077"),
        (["--properties-file", "FILE", "--master", "k8s://https://host"], "k8s://https://host"),
    ],
)
def test_the_master_is_known_before_spark_starts(tmp_path: Path, options: list[str], master: str) -> None:
    (tmp_path / "spark.conf").write_text(
        "# spark.master yarn\nspark.master   spark://host:7077\nspark.ui.enabled false\n"
    )
    options = [str(tmp_path / "spark.conf") if word == "FILE" else word for word in options]
    assert gateway.master(options) == master


def test_an_option_is_not_taken_from_another_ones_value() -> None:
    assert gateway.option(["--name", "x", "--conf", "spark.a=1", "--conf", "spark.ab=2"], "spark.a") == "1"
    assert gateway.option(["--conf", "spark.a=b=c"], "spark.a") == "b=c"
    assert gateway.option(["--name"], "spark.a", "name") == ""
    assert gateway.option([], "spark.a") is None


# ---- a night in the future ---------------------------------------------------------------------------------


def in_days(days: int) -> str:
    return (dt.datetime.now(dt.timezone.utc).date() + dt.timedelta(days=days)).isoformat()


def test_a_ds_after_tomorrow_is_refused(shell: Shell) -> None:
    for job in cli.JOBS:
        code, report = shell.run(raises(AssertionError()), "--ds", in_days(2), job=job)
        assert code == 2
        for words in (f"--ds is {in_days(2)}, and today is", "needed tomorrow at the latest", "--allow-future"):
            assert words in report["error"]
    assert not shell.lake.exists()
    for more in (
        ["--ds", in_days(1)],
        ["--ds", in_days(2), "--allow-future"],
        ["--ds", "2999-12-31", "--allow-future"],
    ):
        assert shell.run(done, *more)[0] == 0


# ---- asked to stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_asked_to_stop_says_so_and_exits_75(shell: Shell, number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in stopping.SIGNALS]

    def job(config: Config, ds: str) -> Outcome:
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    code, report = shell.run(job)
    assert (code, report["status"]) == (75, "failed")
    assert f"was stopped by {number.name}" in report["error"]
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    assert shell.run(done)[0] == 0, "the night is free"


def test_a_library_that_makes_something_else_of_the_interruption_hides_nothing(shell: Shell) -> None:
    def job(config: Config, ds: str) -> Outcome:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise OSError("connection lost") from None
        raise AssertionError("went on")

    assert shell.run(job)[0] == 75


def test_a_second_signal_does_not_cut_cleaning_up_short(shell: Shell) -> None:
    cleaned = []

    def job(config: Config, ds: str) -> Outcome:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append("all")
        raise AssertionError("went on")

    assert shell.run(job)[0] == 75
    assert cleaned == ["all"]


def test_log_lines_carry_the_date(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    program = "from ncf_dist.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    arguments = ["prepare", "--config", "nowhere.yaml", "--ds", DS]
    log = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True).stderr
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ERROR ncf_dist.cli: ", log)
