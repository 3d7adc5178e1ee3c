"""Two machines with file systems of their own, which share a network and the lake, train one model: torchrun's
supervisor on each. What happens to one of them ends the job on both, and the next one goes on.

`make cluster-test` runs this; it needs root.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyspark
import pytest

from ncf_dist.bundle import read_bundle
from ncf_dist.config import Config, Model
from ncf_dist.train.launchers import torchrun
from tests import holding
from tests.machines import Machine, cluster_of, wait_for, why_not
from tests.s3 import Store
from tests.tables import DS, prepared, small_config

REASON = why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

ROOT = Path(__file__).parent.parent
LAKE, PORT, ROWS = "/lake", 29_500, 4_000
TIMEOUT_S, ENDS_S = 15, 60
"""train.timeout_s, and what a job may take to end after it on a busy machine."""
JOB = """
import sys
from ncf_dist.config import Config
from ncf_dist.errors import NcfError
from ncf_dist.files import read_bytes
from ncf_dist.logs import log_to_stderr
from ncf_dist.train.pipeline import train
log_to_stderr("train")
try:
    train(Config.model_validate_json(read_bytes(sys.argv[1])), sys.argv[2])
except NcfError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass
class Pair:
    one: Machine
    two: Machine
    folder: Path

    def lake(self, name: str) -> Path:
        """A lake with train rows, as this test sees it."""
        outside = self.folder / "lake" / name
        if not outside.exists():
            prepared(small_config(outside, MODEL), ROWS)
        return outside / "lake"

    def config(self, name: str) -> Config:
        """Of that lake, as the machines see it. Some 500 steps, of which every fiftieth is saved."""
        rendezvous = f"{self.one.address}:{PORT}"
        settings: dict[str, Any] = {
            "nodes": 2,
            "rendezvous": rendezvous,
            "timeout_s": TIMEOUT_S,
            "epochs": 4,
            "batch_size": 16,
        }
        return small_config(Path(LAKE) / name, MODEL, checkpoint_steps=50, **settings)

    def train(self, name: str, act: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """(exit code, log) of a job on machine one, whose command for the other machine runs there. act: when a
        checkpoint has been saved that was not there before. Both machines have ended what they began."""
        lake, config = self.lake(name), self.config(name)
        (self.folder / "lake" / name / "config.json").write_text(config.model_dump_json(by_alias=True))
        for old in lake.glob("runs/*/train/*/ranks/spec.json"):
            old.unlink()
        before = saved(lake)
        logs = [self.folder / f"{name}-{side}.log" for side in ("one", "two")]
        for log in logs:
            log.write_bytes(b"")
        command = (sys.executable, "-c", JOB, f"{LAKE}/{name}/config.json", DS)
        job = self.one.begin(*command, log=logs[0], env=ENV)
        specs = lambda: list(lake.glob("runs/*/train/*/ranks/spec.json"))  # noqa: E731
        wait_for(lambda: bool(specs()), "the spec of the ranks", alive=job)
        spec = str(Path(LAKE) / name / "lake" / specs()[0].relative_to(lake))
        other = self.two.begin(*torchrun(config, spec, node=1), log=logs[1], env=ENV)
        while saved(lake) <= before and job.poll() is None:
            time.sleep(0.02)
        act()
        code, started = job.wait(300), time.monotonic()
        other.wait(TIMEOUT_S + ENDS_S)
        assert time.monotonic() - started < TIMEOUT_S + ENDS_S
        for machine in (self.one, self.two):
            assert not machine.processes("ncf_dist.train"), machine.name
        return code, logs[0].read_text()

    def weights(self, name: str) -> str:
        (bundle,) = self.lake(name).glob("runs/*/train/*/bundle")
        return read_bundle(str(bundle)).sha256


ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MODEL = Model(name="mlp", layers=(8, 4), dropout=0.3)


def saved(lake: Path) -> set[Path]:
    return set(lake.glob("runs/*/train/*/checkpoints/step-*"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """They have the system's files, Python and this project, which were installed on each, and empty disks."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "lake").mkdir()
    installed = {path: str(path) for path in (ROOT, Path(sys.base_prefix))}
    spark = Path(pyspark.__file__).parent
    with cluster_of(folder / "machines", ["one", "two"], spark, {**installed, folder / "lake": LAKE}) as (
        _,
        (one, two),
    ):
        yield Pair(one, two, folder)


@pytest.fixture(scope="module")
def undisturbed(pair: Pair) -> str:
    code, log = pair.train("undisturbed")
    assert code == 0, log
    return pair.weights("undisturbed")


def inside(machine: Machine, *words: str) -> None:
    """A command in a machine's network."""
    subprocess.run(["nsenter", f"--net=/proc/{machine.init}/ns/net", *words], check=True)


def cable(machine: Machine, state: str) -> None:
    inside(machine, "ip", "link", "set", "eth0", state)


def kill(machine: Machine) -> None:
    for process in machine.processes("ncf_dist.train"):
        process.kill()


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_machine_that_is_killed_ends_the_job_and_the_next_goes_on(pair: Pair, undisturbed: str, which: str) -> None:
    code, log = pair.train(which, lambda: kill(getattr(pair, which)))
    assert code != 0
    assert which == "one" or "run the job train again" in log, "the job itself is on machine one"
    code, log = pair.train(which)
    assert code == 0, log
    assert "going on from" in log
    assert pair.weights(which) == undisturbed


def test_a_network_that_is_cut_ends_the_job_on_both_sides(pair: Pair, undisturbed: str) -> None:
    try:
        code, log = pair.train("cut", lambda: cable(pair.two, "down"))
    finally:
        cable(pair.two, "up")
    assert code != 0
    assert "another was ended, stands still or cannot be reached" in log
    code, log = pair.train("cut")
    assert code == 0, log
    assert pair.weights("cut") == undisturbed


def test_a_slow_network_changes_no_weight(pair: Pair, undisturbed: str) -> None:
    queue = ("dev", "eth0", "root")
    inside(pair.two, "tc", "qdisc", "add", *queue, "tbf", "rate", "5mbit", "burst", "16kb", "latency", "200ms")
    try:
        code, log = pair.train("slow")
    finally:
        inside(pair.two, "tc", "qdisc", "del", *queue)
    assert code == 0, log
    assert pair.weights("slow") == undisturbed


# ---- a lake that is in no machine's file system ----------------------------------------------------------------------

UPLOAD = """
import sys; from pathlib import Path; from ncf_dist.files import write_bytes
for path in Path(sys.argv[1]).rglob("*"):
    path.is_file() and write_bytes(f"{sys.argv[2]}/{path.relative_to(sys.argv[1])}", path.read_bytes())
"""
WEIGHTS = """
import sys; from ncf_dist.bundle import read_bundle
print(read_bundle(sys.argv[1] + "/bundle").sha256)
"""


def test_machines_whose_lake_is_in_s3_train_the_same(pair: Pair, undisturbed: str) -> None:
    """Machine two is killed in mid-training; the next job goes on from the checkpoint in the store."""
    url, lake = f"http://{pair.two.address}:{holding.PORT}", "s3://lake/two"
    env = {**ENV, **Store(url=url).environment}
    server = (sys.executable, "-m", "tests.holding", pair.two.address, url)
    pair.two.begin(*server, log=pair.folder / "s3.log", env=env, folder=str(ROOT))
    there = f"{LAKE}/undisturbed/lake"
    wait_for(
        lambda: pair.one.run(sys.executable, "-c", UPLOAD, f"{there}/runs/{DS}/prepare",
                             f"{lake}/runs/{DS}/prepare", env=env).returncode == 0, "the store"
    )  # fmt: skip
    config = pair.config("undisturbed")
    config = config.model_copy(update={"paths": config.paths.model_copy(update={"lake": lake})})
    (pair.folder / "lake/s3.json").write_text(config.model_dump_json(by_alias=True))
    for killed in (True, False):
        log, other_log = (pair.folder / f"s3-{killed}-{side}.log" for side in ("one", "two"))
        job = pair.one.begin(sys.executable, "-c", JOB, f"{LAKE}/s3.json", DS, log=log, env=env)
        wait_for(lambda: "--spec s3://" in log.read_text(), "the spec of the ranks", alive=job)  # noqa: B023
        spec = log.read_text().split("--spec ")[1].split()[0]
        wait_for(lambda: "other machine(s)" in log.read_text(), "the command", alive=job)  # noqa: B023
        other = pair.two.begin(*torchrun(config, spec, node=1), log=other_log, env=env)
        if killed:
            held = holding.hold("/checkpoints/step-0*200/", pair.two.root)
            wait_for(held.exists, "a checkpoint", timeout=300, alive=job)
            kill(pair.two)
            holding.release(pair.two.root)
        code = job.wait(300)
        other.wait(TIMEOUT_S + ENDS_S)
        assert (code != 0) == killed, log.read_text()
        assert ("going on from" in log.read_text()) != killed
    run = spec.removesuffix("/ranks/spec.json")
    assert pair.one.run(sys.executable, "-c", WEIGHTS, run, env=env).stdout.strip() == undisturbed
