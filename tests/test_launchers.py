"""Every launcher runs the same worker file, and ends with the same kind of run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from ncf_dist import gateway, machine
from ncf_dist import other_nodes as far
from ncf_dist.config import Config, Model
from ncf_dist.errors import ConfigError, ContractError, TrainingFailed
from ncf_dist.train import run_ranks
from ncf_dist.train.launchers import LAUNCHERS, WORKER, other_nodes, others, threads, torchrun
from ncf_dist.train.pipeline import train
from tests.conftest import SPARK
from tests.tables import DS, prepared, small_config

GMF = Model(name="gmf", factors=4)


def losses(outputs: Any) -> list[float]:
    return [epoch["loss"] for epoch in json.loads(Path(outputs["history"]).read_text())["epochs"]]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks of one machine over 41 rows, which every other way to start two has to give."""
    config = small_config(tmp_path_factory.mktemp("one"), GMF, ranks=2, epochs=2)
    prepared(config, 41)
    return losses(train(config, DS).outputs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_launcher_is_a_command_with_the_spec(launcher: str) -> None:
    config = small_config(Path("unused"), GMF, launcher=launcher, ranks=3)
    command = LAUNCHERS[launcher](config, "/lake/spec.json")
    assert command[-2:] == ["--spec", "/lake/spec.json"]
    assert WORKER in command or "ncf_dist.distribute" in command


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    of = [threads(small_config(Path("unused"), GMF, launcher=how, ranks=3)) for how in ("torchrun", "none", "spark")]
    assert of == [8 // 3, 8, 8 // 3]


@pytest.mark.parametrize(("own", "wanted"), [({}, str(2**30)), ({"MALLOC_TRIM_THRESHOLD_": "1"}, "1")])
def test_ranks_keep_what_a_step_frees_unless_told_otherwise(
    own: dict[str, str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = small_config(tmp_path, GMF, launcher="none"), tmp_path / "environment.json"
    prepared(config, 40)
    look = f"import json, os; open({str(found)!r}, 'w').write(json.dumps(dict(os.environ)))"
    monkeypatch.setitem(LAUNCHERS, "none", lambda *_: [sys.executable, "-c", look])
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingFailed, match=r"no history\.json"):
        train(config, DS)
    assert json.loads(found.read_text())["MALLOC_TRIM_THRESHOLD_"] == wanted


def on_nodes(config: Config, started: list[subprocess.Popen[bytes]]) -> None:
    """The other machine: it runs the command that the job printed, once the spec is there."""
    while not (found := list(Path(config.paths.lake).glob("runs/*/train/*/ranks/spec.json"))):
        time.sleep(0.05)
    started.append(subprocess.Popen(torchrun(config, str(found[0]), node=1)))


def test_two_machines_train_what_one_trains_with_two_ranks(
    tmp_path: Path, of_two_ranks: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Two supervisors whose ranks meet at a port, one rank each."""
    caplog.set_level("INFO")
    two = small_config(tmp_path, GMF, ranks=1, nodes=2, rendezvous=f"127.0.0.1:{free_port()}", epochs=2)
    prepared(two, 41)
    agents: list[subprocess.Popen[bytes]] = []
    threading.Thread(target=on_nodes, args=(two, agents), daemon=True).start()
    assert losses(train(two, DS).outputs) == of_two_ranks
    assert agents[0].wait(30) == 0
    assert "needed on 1 other machine(s): the same command" in caplog.text


def test_a_rank_without_enough_memory_says_so_before_it_waits_for_others(tmp_path: Path) -> None:
    """The other machine never comes: waiting for it would take minutes."""
    config = small_config(
        tmp_path, GMF, ranks=1, nodes=2, rendezvous=f"127.0.0.1:{free_port()}", max_model_bytes=1000, device="cpu"
    )
    prepared(config, 41)
    with pytest.raises(ConfigError, match=r"^rank 0: model gmf for .* needs .* GiB on this machine, 1 rank"):
        train(config, DS)


# ---- the other machines, started by Spark ----------------------------------------------------------------------------


def with_spark(config: Config) -> Config:
    return Config.model_validate({**config.model_dump(by_alias=True), "spark": SPARK})


def of_two_nodes(folder: Path, **train: Any) -> Config:
    return small_config(folder, GMF, ranks=1, nodes=2, rendezvous=f"127.0.0.1:{free_port()}", epochs=2, **train)


def test_who_starts_the_other_machines_is_said(tmp_path: Path) -> None:
    by_hand, by_spark = of_two_nodes(tmp_path), of_two_nodes(tmp_path, other_nodes="spark")
    assert other_nodes(by_hand, "/lake/spec.json") is None
    assert "the same command with --node-rank 1" in others(by_hand)
    command = other_nodes(by_spark, "/lake/spec.json")
    assert command is not None
    assert command[1:] == ["-m", "ncf_dist.other_nodes", "--spec", "/lake/spec.json"]
    assert "a free slot of Spark on each" in others(by_spark)


def test_a_task_that_spark_runs_again_starts_no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that are left do not wait for new ones: these would meet nobody, or a later training."""
    monkeypatch.setattr(far, "torchrun", lambda config, spec, node: [sys.executable, "-c", f"exit({node} + 2)"])
    spec = str(tmp_path / "spec.json")
    assert [far.run_node(of_two_nodes(tmp_path), spec, 1) for _ in range(2)] == [1 + 2, 75]


def test_machines_that_spark_cannot_start_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_two_nodes(tmp_path, other_nodes="spark")
    prepared(config, 41)
    monkeypatch.setattr(run_ranks, "FAILED_S", 0.1)
    monkeypatch.setattr(run_ranks, "other_nodes", lambda *_: [sys.executable, "-c", "exit(7)"])
    with pytest.raises(TrainingFailed, match=r"on the other machines ended with code 7; needed 1 free slots at once"):
        train(config, DS)


@pytest.mark.cluster
def test_spark_starts_the_other_machine(tmp_path: Path, of_two_ranks: list[float]) -> None:
    """The other machine is a barrier task of a local master: the weights are those of two ranks of one machine."""
    two = with_spark(of_two_nodes(tmp_path, other_nodes="spark"))
    prepared(two, 41)
    assert losses(train(two, DS).outputs) == of_two_ranks


# ---- the ranks, started by Spark -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spark_trains_what_torchrun_trains(tmp_path: Path, of_two_ranks: list[float]) -> None:
    """Two barrier tasks of a local[2] master."""
    config = with_spark(small_config(tmp_path, GMF, ranks=2, launcher="spark", epochs=2))
    prepared(config, 41)
    assert losses(train(config, DS).outputs) == of_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_what_a_rank_that_spark_started_reports_is_the_jobs_own_error(
    spark: SparkSession, tmp_path: Path, ranks: int
) -> None:
    """In the session that is there, as in a night. With two ranks the other one waits for it."""
    config = with_spark(small_config(tmp_path, GMF, ranks=ranks, launcher="spark"))
    prepared(config, 41)
    (table,) = Path(config.paths.lake).glob("runs/*/prepare/*/train/part-00001-000.parquet")
    table.write_bytes(table.read_bytes()[:-1])
    with (
        gateway.lender(gateway.lent),
        pytest.raises(ContractError, match=r"part-00001-000\.parquet has SHA-256 .*rerun the job prepare"),
    ):
        train(config, DS)
