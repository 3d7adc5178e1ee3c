"""conf/schedulers/: what a person copies fits the jobs, their exit codes and the schedulers' own schemas.

Airflow has an environment of its own (its packages do not go with ours): set NCF_AIRFLOW_PYTHON to its Python.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import yaml

from ncf_dist.cli import JOBS, parser
from ncf_dist.errors import ExitCode
from ncf_dist.nightly.pipeline import STAGES
from tests.conftest import ROOT

FILES = ROOT / "conf" / "schedulers"
DAG = "airflow_dag.py"
FOR_GOOD = {int(code) for code in (ExitCode.CONFIG, ExitCode.INPUT, ExitCode.GATE_REFUSED)}
AGAIN = {int(code) for code in ExitCode} - FOR_GOOD - {0}
AIRFLOW = os.environ.get("NCF_AIRFLOW_PYTHON")
needs_airflow = pytest.mark.skipif(AIRFLOW is None, reason="NCF_AIRFLOW_PYTHON names no Python that has Airflow 3")


def unit(name: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment]
    found.read(FILES / name)
    return found


def manifest(name: str) -> Any:
    return yaml.safe_load((FILES / name).read_text())


def commands() -> Iterator[tuple[str, list[str]]]:
    """(file, the job and its arguments) of each command that a scheduler would run."""
    yield "ncf-nightly.service", shlex.split(unit("ncf-nightly.service")["Service"]["ExecStart"])[1:]
    container = manifest("kubernetes-cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    yield "kubernetes-cronjob.yaml", container["args"]
    template = manifest("scheduled-spark-application.yaml")["spec"]["template"]
    job = re.fullmatch(r"local:///opt/ncf-dist/jobs/(\w+)\.py", template["mainApplicationFile"])
    assert job is not None
    yield "scheduled-spark-application.yaml", [job[1], *template["arguments"]]
    for line in (FILES / "crontab").read_text().splitlines():
        if re.match(r"\d", line):
            shell = line.split(None, 5)[5].replace(r"\%", "%")
            words = shlex.split(shell.replace('"$(date -u +%F)"', "2026-01-31").split("2>>")[0])
            yield "crontab", words[words.index("./spark-submit.sh") + 1 :]


@pytest.mark.parametrize(
    ("file", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_is_one_that_a_job_takes(file: str, command: list[str]) -> None:
    job, *arguments = command
    assert job in JOBS
    assert parser(job).parse_args(arguments).config == "/etc/ncf-dist/line.yaml"


def test_systemd_tries_again_what_may_go_better() -> None:
    service, timer = unit("ncf-nightly.service"), unit("ncf-nightly.timer")
    assert {int(code) for code in service["Service"]["RestartPreventExitStatus"].split()} == FOR_GOOD
    assert service["Service"]["Restart"] == "on-failure"
    assert service["Service"]["KillMode"] == "mixed", "SIGTERM is the job's, which ends what it started"
    assert "UTC" in timer["Timer"]["OnCalendar"], "as --ds is"


def test_kubernetes_tries_again_what_may_go_better() -> None:
    job = manifest("kubernetes-cronjob.yaml")["spec"]["jobTemplate"]["spec"]
    [rule] = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert set(rule["onExitCodes"]["values"]) == FOR_GOOD
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    [container] = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_image_is_built_in_stages_and_runs_as_nobody_special() -> None:
    text = (FILES / "Dockerfile").read_text()
    *_, last = re.split(r"^FROM ", text, flags=re.MULTILINE)
    assert text.count("\nFROM ") == 2
    user = re.search(r"^USER (\d+)$", last, re.MULTILINE)
    assert user is not None
    for name in ("kubernetes-cronjob.yaml", "scheduled-spark-application.yaml"):
        assert f"runAsUser: {user[1]}" in (FILES / name).read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert all((ROOT / word).exists() for word in copied)
    let_in = {line[1:] for line in (FILES / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied), "the context holds what is copied, and no lake"


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("hadolint", ["Dockerfile"]),
        ("kubernetes-validate", ["kubernetes-cronjob.yaml"]),
        ("systemd-analyze", ["ncf-nightly.service", "ncf-nightly.timer"]),
    ],
)
def test_the_schedulers_own_checks_pass(tool: str, files: list[str], tmp_path: Path) -> None:
    if (program := shutil.which(tool)) is None:
        pytest.skip(f"{tool} is not on PATH")
    for name in files:  # systemd also asks for the program that would run.
        text = (FILES / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/ncf-dist/spark-submit.sh", "/bin/true"))
    more = ["verify"] if tool == "systemd-analyze" else []
    done = subprocess.run([program, *more, *files], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Airflow -------------------------------------------------------------------------------------------------

RUN = """
import json, os, sys
import datetime as dt
sys.path.insert(0, sys.argv[1])
from airflow_dag import dag
for task in dag.tasks:
    task.retry_delay = dt.timedelta(0)
said = []
for day in sys.argv[2:]:
    run = dag.test(logical_date=dt.datetime.fromisoformat(day + "T00:00:00+00:00"))
    tasks = {task.task_id: str(getattr(task.state, "value", task.state)) for task in run.get_task_instances()}
    said.append({"state": str(getattr(run.state, "value", run.state)), "tasks": tasks})
print("SAID " + json.dumps({"runs": said, "max_active_runs": dag.max_active_runs,
    "outlets": [asset.name for asset in dag.get_task("publish").outlets]}))
"""
LAUNCHER = """#!{python}
import json, os, sys
job, ds = sys.argv[1], sys.argv[sys.argv.index("--ds") + 1]
with open({log!r}, "a") as out:
    print(job, ds, *sys.argv[2:], file=out)
print("a line of the log", file=sys.stderr)
print(json.dumps({{"job": job, "ds": ds, "error": "trouble"}}))
sys.exit({code} if job == {fails!r} else 0)
"""


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an Airflow whose database is there."""
    assert AIRFLOW is not None
    home = tmp_path_factory.mktemp("airflow")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "NCF_"))}
    env |= {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "false", "PYTHONHASHSEED": "0"}
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags")}
    shutil.copytree(FILES, home / "dags", ignore=lambda _, names: [name for name in names if name != DAG])
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        subprocess.run([AIRFLOW, "-m", "airflow", *command], env=env, check=True, capture_output=True)
    return env


def nights(
    airflow: dict[str, str], home: Path, config: str, *days: str, args: str = "", refit: bool = False
) -> tuple[dict[str, Any], str]:
    """(what the DAG's runs say, the log)."""
    assert AIRFLOW is not None
    env = airflow | {"NCF_HOME": str(home), "NCF_CONFIG": config, "NCF_ARGS": args}
    env |= {"NCF_REFIT": "true"} if refit else {}
    done = subprocess.run(
        [AIRFLOW, "-c", RUN, env["AIRFLOW__CORE__DAGS_FOLDER"], *days], env=env, capture_output=True, text=True
    )
    said = [line[5:] for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert said, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(said[-1]), done.stdout + done.stderr


def stub(folder: Path, fails: str | None, code: int) -> Path:
    """A launcher that notes how it was called."""
    log, launcher = folder / "calls", folder / "spark-submit.sh"
    launcher.write_text(LAUNCHER.format(python=sys.executable, log=str(log), fails=fails, code=code))
    launcher.chmod(0o755)
    return log


@needs_airflow
def test_airflow_runs_two_nights_a_task_a_stage(airflow: dict[str, str], tmp_path: Path) -> None:
    log = stub(tmp_path, None, 0)
    said, _ = nights(airflow, tmp_path, "c.yaml", "2026-01-30", "2026-01-31", args="--set train.ranks=4")
    stages = ["prepare", "train", "evaluate", "score", "publish"]
    assert [run["state"] for run in said["runs"]] == ["success", "success"]
    assert [line.split()[:2] for line in log.read_text().splitlines()] == [
        [stage, ds] for ds in ("2026-01-30", "2026-01-31") for stage in stages
    ]
    assert "--config c.yaml --ds 2026-01-30 --set train.ranks=4" in log.read_text()
    assert (said["max_active_runs"], said["outlets"]) == (1, ["ncf_recommendations"])


@needs_airflow
def test_airflow_refits_what_was_judged(airflow: dict[str, str], tmp_path: Path) -> None:
    log = stub(tmp_path, None, 0)
    said, _ = nights(airflow, tmp_path, "c.yaml", "2026-03-31", refit=True)
    assert [run["state"] for run in said["runs"]] == ["success"]
    assert [line.split()[0] for line in log.read_text().splitlines()] == list(STAGES)


@needs_airflow
@pytest.mark.parametrize("code", [4, 75])
def test_airflow_tries_again_what_may_go_better(airflow: dict[str, str], tmp_path: Path, code: int) -> None:
    """A refusal ends the night as failed, after one try; so does what goes on failing, after three."""
    calls, ds = stub(tmp_path, "train", code), f"2026-02-{code % 28 + 1:02}"
    said, log = nights(airflow, tmp_path, "c.yaml", ds)
    [run] = said["runs"]
    assert run["state"] == "failed", log[-2000:]
    assert run["tasks"] == {"prepare": "success", "train": "failed"} | dict.fromkeys(
        ("evaluate", "score", "publish"), "upstream_failed"
    ), "nothing is published, and nothing counts as done"
    assert [line.split()[0] for line in calls.read_text().splitlines()] == [
        "prepare",
        *["train"] * (3 if code in AGAIN else 1),
    ]
    assert f"train of {ds} ended with {code}: trouble" in log


def test_the_dag_knows_the_exit_codes() -> None:
    """All of them, without Airflow: its own are the complement."""
    assert f"FOR_GOOD = {FOR_GOOD}" in (FILES / DAG).read_text()


class Operator:
    """What the DAG uses of Airflow's: a task knows which one comes after it."""

    made: ClassVar[list[Operator]] = []

    def __init__(self, task_id: str, **_: Any) -> None:
        self.task_id, self.after = task_id, list[str]()
        self.made.append(self)

    def __rshift__(self, other: Operator) -> None:
        self.after.append(other.task_id)


@pytest.mark.parametrize("refit", [None, "true", "false"])
def test_the_dags_tasks_are_the_stages_of_nightly_in_its_order(
    monkeypatch: pytest.MonkeyPatch, refit: str | None
) -> None:
    """Without Airflow, too."""
    sdk, exceptions = ModuleType("airflow.sdk"), ModuleType("airflow.sdk.exceptions")
    exceptions.__dict__.update(AirflowException=Exception, AirflowFailException=Exception)
    sdk.__dict__.update(Asset=str, BaseOperator=Operator, DAG=lambda *_, **__: contextlib.nullcontext())
    for module in (ModuleType("airflow"), sdk, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Operator, "made", [])
    monkeypatch.delenv("NCF_REFIT", raising=False)
    if refit is not None:
        monkeypatch.setenv("NCF_REFIT", refit)
    runpy.run_path(str(FILES / DAG))
    stages = [name for name in STAGES if name != "refit" or refit == "true"]
    assert {task.task_id: task.after for task in Operator.made} == dict(
        zip(stages, [*([name] for name in stages[1:]), []], strict=True)
    )


@needs_airflow
@pytest.mark.soak
def test_airflow_runs_the_demos_nights(airflow: dict[str, str], tmp_path: Path) -> None:
    sets = {"paths.lake": tmp_path / "lake", "paths.work": tmp_path / "work", "fetch.users": 300, "fetch.items": 200}
    sets |= {"input.path": tmp_path / "lake/raw/synthetic/ratings.dat", "train.epochs": 1, "train.ranks": 1}
    sets |= {"input.items": tmp_path / "lake/raw/synthetic/movies.dat"}
    args = " ".join(f"--set {key}={value}" for key, value in sets.items())
    demo = str(ROOT / "conf" / "demo.yaml")
    subprocess.run([str(ROOT / "spark-submit.sh"), "fetch", "--config", demo, *args.split()], check=True)
    said, log = nights(airflow, ROOT, demo, "2026-01-30", "2026-01-31", args=args)
    assert [run["state"] for run in said["runs"]] == ["success", "success"], log[-3000:]
    latest = json.loads((tmp_path / "lake" / "recommendations" / "latest.json").read_text())
    assert latest["ds"] == "2026-01-31"
