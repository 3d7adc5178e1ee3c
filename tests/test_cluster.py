"""A night on a cluster: a driver with Spark's standalone master and an S3 server, and two workers, on machines that
share nothing but a network. What they have of ours is what `make package` made. Spark is authenticated and encrypted,
as docs/cluster.md says.

`make cluster-test` runs this; it needs root.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyspark
import pytest
import yaml

from ncf_dist import archives, gateway
from tests import holding
from tests.machines import SPARK_HOME, Machine, Network, cluster_of, wait_for, why_not
from tests.s3 import Store
from tests.snippets import blocks

PACKED = archives.environment_archive()
REASON = why_not() or (None if PACKED.is_file() else f"there is no {PACKED}: run make package")
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

JAVA = {"JAVA_HOME": "/usr/lib/jvm/java-17-openjdk-amd64"}
HOME = "/opt/ncf-dist"
MASTER = "spark://driver:7077"
STORE = f"http://driver:{holding.PORT}"
LAKES = "s3://lake/nights"
DS = "2023-07-01"
GIB = 2**30
SECRET = "SecretOfTheTestsCluster0"
DOCUMENT = blocks((archives.ROOT / "docs/cluster.md").read_text(), "docs/cluster.md")
[PROPERTIES] = [block.code.replace("SECRET", SECRET) for block in DOCUMENT if "spark.authenticate" in block.code]
"""Of Spark's daemons, as the document says."""
ENV = {**JAVA, **Store(url=STORE).environment, gateway.SECRET: SECRET}
RANK = "ncf_dist.train.worker"


@dataclass
class Cluster:
    network: Network
    driver: Machine
    workers: list[Machine]
    logs: Path

    def submit(self, job: str, *words: str) -> tuple[int, dict[str, Any], str]:
        """A job as a person on the driver's machine submits it: (exit code, last line, log)."""
        return self.begin(job, *words).end()

    def begin(self, job: str, *words: str, env: Mapping[str, str] | None = None) -> Job:
        """env: what the person has in the environment, in place of ENV."""
        stem = f"{job}-{len(list(self.logs.iterdir()))}"
        out, log = self.logs / f"{stem}.out", self.logs / f"{stem}.log"
        command = self.driver.command([f"{HOME}/spark-submit.sh", job, *words], env=env or ENV, folder=HOME)
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        return Job(process, out, log)

    def registered(self) -> list[str]:
        """Names of the applications that Spark's master has let in."""
        return re.findall(r"Registered app (\S+)", (self.logs / "driver.log").read_text())

    def ask(self, script: str, *words: str) -> Any:
        """What a script says that runs on the driver's machine."""
        done = self.driver.run(f"{HOME}/.venv/bin/python", "-c", script, *words, env=ENV, folder=HOME)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def lose_in_puts(self, patterns: Sequence[str], meanwhile: Callable[[], None]) -> None:
        """For each pattern, lose the worker that is the first to put something with such a path into the store, while
        it does. It comes back at once, empty. meanwhile: is called while nobody has."""
        held = holding.hold(patterns[0], self.driver.root)
        for following in (*patterns[1:], "nothing more"):
            while not held.exists():
                meanwhile()
                time.sleep(0.05)
            [machine] = [worker for worker in self.workers if worker.address == held.read_text()]
            machine.lose()
            held = holding.hold(following, self.driver.root)
            machine.start()
            self.network.plug(machine, [self.driver, *self.workers])
            begin_worker(machine, self.logs)
        holding.release(self.driver.root)


@dataclass
class Job:
    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> tuple[int, dict[str, Any], str]:
        code, log = self.process.wait(1500), self.log.read_text()
        lines = self.out.read_text().splitlines()
        assert lines, log
        return code, json.loads(lines[-1]), log


def begin(machine: Machine, kind: str, *words: str, logs: Path) -> None:
    """A daemon of Spark's, as its own scripts start it."""
    env = {**JAVA, "SPARK_LOCAL_DIRS": "/tmp/spark", "SPARK_DAEMON_MEMORY": "512m", "SPARK_NO_DAEMONIZE": "1"}
    (machine.root / "etc/spark.conf").write_text(PROPERTIES)
    words = (f"org.apache.spark.deploy.{kind}", "--properties-file", "/etc/spark.conf", "--host", machine.name, *words)
    machine.begin(f"{SPARK_HOME}/bin/spark-class", *words, env=env, folder="/tmp", log=logs / f"{machine.name}.log")


def begin_worker(machine: Machine, logs: Path) -> None:
    words = (MASTER, "--cores", "2", "--memory", "3g", "--work-dir", "/var/tmp/spark")
    log, registered = logs / f"{machine.name}.log", "Successfully registered with master"
    before = log.read_text().count(registered) if log.exists() else 0
    begin(machine, "worker.Worker", *words, logs=logs)
    wait_for(lambda: log.read_text().count(registered) > before, f"the worker of {machine.name}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (logs := folder / "logs").mkdir()
    spark = Path(pyspark.__file__).parent
    with cluster_of(folder / "machines", ["driver", "one", "two"], spark) as (network, machines):
        driver, *workers = machines
        install(driver)
        begin(driver, "master.Master", "--port", "7077", "--webui-port", "8080", logs=logs)
        log = logs / "driver.log"
        wait_for(lambda: "I have been elected leader" in log.read_text(), "Spark's master")
        for worker in workers:
            begin_worker(worker, logs)
        (driver.root / "root/tests").mkdir()
        for name in ("s3.py", "holding.py"):
            shutil.copy(archives.ROOT / "tests" / name, driver.root / "root/tests")
        server = ("/usr/bin/python3", "-m", "tests.holding", "driver", STORE)
        driver.begin(*server, log=logs / "s3.log", folder="/root")
        yield Cluster(network, driver, workers, logs)


def bring(machine: Machine) -> None:
    """Put the two files of dist/ into the machine's /tmp."""
    for path in (PACKED, archives.pack_code(machine.root / "tmp/jobs.zip")):
        if path.parent != machine.root / "tmp":
            subprocess.run(["cp", str(path), str(machine.root / "tmp")], check=True)


def install(machine: Machine) -> None:
    """As docs/cluster.md says: unpack the two files of dist/ beside each other."""
    bring(machine)
    script = (
        f"mkdir -p {HOME}/.venv && python3 -m zipfile -e /tmp/jobs.zip {HOME} && chmod +x {HOME}/spark-submit.sh && "
        f"tar -xzf /tmp/{PACKED.name} -C {HOME}/.venv && mkdir {HOME}/dist && mv /tmp/{PACKED.name} {HOME}/dist/"
    )
    done = machine.run("bash", "-c", script)
    assert done.returncode == 0, done.stderr


def config(cluster: Cluster, name: str, lake: str, **sections: Any) -> str:
    """The demo's config with `lake`, on the driver's machine. Returns its path there."""
    tree = yaml.safe_load((archives.ROOT / "conf/demo.yaml").read_text())
    tree["paths"] = {"lake": lake, "work": "/var/tmp/work"}
    tree["input"] |= {"path": f"{LAKES}/raw/ratings.dat", "items": f"{LAKES}/raw/movies.dat"}
    tree["spark"] |= {"master": MASTER, "executor_memory": "1g"}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    (cluster.driver.root / f"etc/{name}.yaml").write_text(yaml.safe_dump(tree))
    return f"/etc/{name}.yaml"


ASKED = """
import json, subprocess, sys
import ncf_dist, pyarrow.dataset, torch
from ncf_dist import native
from ncf_dist.attempts import code
import ncf_dist.score.ranker, ncf_dist.train.worker
compiled = [n for n in ("ncf_dist.scoring._sparse_rows", "ncf_dist.train._neumf_step_avx2") if native.library(n)]
maps = sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
child = subprocess.run([sys.executable, "-c", "import ncf_dist"]).returncode
print(json.dumps({"prefix": sys.prefix, "code": code().sha256, "maps": maps, "compiled": compiled, "child": child,
                  "sum": float(torch.ones(3) @ torch.ones(3))}))
"""
GLIBC = re.compile(r"/usr/lib(64)?/(\w+-linux-gnu/)?(ld-linux-[\w-]+|lib(c|m|dl|rt|pthread|util|resolv|mvec))[.-]\S+")


def test_the_environment_runs_where_nothing_else_is(cluster: Cluster) -> None:
    """On a machine without a checkout, at a path of its own, with libraries of its own but for glibc."""
    there = cluster.workers[0]
    bring(there)
    unpack = (
        f"mkdir -p '/tmp/any where/{archives.ENVIRONMENT}' && cd '/tmp/any where' && rm -f /tmp/x && "
        f"tar -xzf /tmp/{PACKED.name} -C {archives.ENVIRONMENT} && python3 -m zipfile -e /tmp/jobs.zip {archives.CODE}"
    )
    assert (done := there.run("bash", "-c", unpack)).returncode == 0, done.stderr
    env = {"PYTHONPATH": archives.CODE}
    done = there.run(archives.PYTHON, "-c", ASKED, env=env, folder="/tmp/any where")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    from ncf_dist.attempts import code

    assert said["prefix"] == "/tmp/any where/environment"
    assert (said["code"], said["sum"], said["child"]) == (code().sha256, 3.0, 0)
    assert len(said["compiled"]) == 2
    assert [
        path for path in said["maps"] if not (path.startswith("/tmp") or "where/" in path or GLIBC.match(path))
    ] == []
    assert PACKED.stat().st_size <= GIB
    there.run("rm", "-rf", "/tmp/any where", f"/tmp/{PACKED.name}")


PUBLISHED = """
import hashlib, json, sys
from ncf_dist.demo import read_latest
from ncf_dist.files import read_bytes
root = sys.argv[1] + "/recommendations"
print(json.dumps(sorted(hashlib.sha256(read_bytes(f"{root}/{file}")).hexdigest() for file in read_latest(root).files)))
"""


@pytest.fixture(scope="module")
def raw(cluster: Cluster) -> None:
    """The log of all nights, in the store."""
    path = config(cluster, "raw", "/var/tmp/near", spark={"master": "local[2]"})
    code, _, log = cluster.submit("fetch", "--config", path, "--set", f"fetch.to={LAKES}/raw")
    assert code == 0, log


@pytest.fixture(scope="module")
def near(cluster: Cluster, raw: None) -> list[str]:
    """What a night of the driver's machine alone publishes."""
    path = config(cluster, "near", "/var/tmp/near", spark={"master": "local[2]"})
    code, line, log = cluster.submit("nightly", "--config", path, "--ds", DS)
    assert (code, line["status"]) == (0, "done"), log
    found: list[str] = cluster.ask(PUBLISHED, "/var/tmp/near")
    return found


def test_a_night_on_a_cluster_publishes_what_a_local_one_does(cluster: Cluster, near: list[str]) -> None:
    path = config(cluster, "far", f"{LAKES}/far")
    code, line, log = cluster.submit("doctor", "--config", path, "--ds", DS, "--cluster")
    assert code == 0, log
    assert "executors 2 on one, two, 4 tasks at once" in log
    assert f"executors' lake {LAKES}/far is read and written by all" in log
    code, line, log = cluster.submit("nightly", "--config", path, "--ds", DS, "--cluster")
    assert (code, line["status"]) == (0, "done"), log
    assert "neither authenticated nor encrypted" not in log
    assert SECRET not in log + json.dumps(line)
    assert cluster.ask(PUBLISHED, f"{LAKES}/far") == near


def keep_as_installed(worker: Machine) -> None:
    """Make what the last executor there has unpacked an installation, as an image has it."""
    unpacked = "cd $(ls -td /var/tmp/spark/app-*/*/ | head -n 1)"
    script = f"mkdir -p {HOME} && {unpacked} && mv ncf-dist/* {HOME}/ && mv environment {HOME}/.venv"
    done = worker.run("bash", "-c", script)
    assert done.returncode == 0, done.stderr


def test_strangers_are_refused_and_what_differs_on_a_machine_is_named(cluster: Cluster, raw: None) -> None:
    """An application without the secret, or with another one, gets no executor. Of machines that have an environment of
    their own, doctor names the one with another version of a package and with other code."""
    path, before = config(cluster, "odd", f"{LAKES}/odd"), cluster.registered()
    asked = ("doctor", "--config", path, "--ds", DS)
    without = {name: value for name, value in ENV.items() if name != gateway.SECRET}
    known = [without, {**without, gateway.SECRET: "AnotherSecretOfTheTests"}]
    strangers = [cluster.begin(*asked, "--cluster", env=env) for env in known]
    assert cluster.submit(*asked, "--cluster")[0] == 0
    for worker in cluster.workers:
        keep_as_installed(worker)
    two = cluster.workers[1]
    [metadata] = two.root.glob(f"{HOME[1:]}/.venv/lib/python3.*/site-packages/tqdm-*.dist-info/METADATA")
    metadata.write_text(re.sub(r"(?m)^Version: .*", "Version: 4.1", metadata.read_text()))
    with (two.root / HOME[1:] / "ncf_dist/lake.py").open("a") as module:
        module.write("# Changed by hand.\n")
    own = ("--set", "spark.environment=image", "--", "--conf", f"spark.executorEnv.PYTHONPATH={HOME}")
    code, _, log = cluster.submit(*asked, "--cluster", *own)
    assert code == 2
    [of_code, of_tqdm] = re.findall(r"(?m)^FAIL executors' (\S+) (\S+) on (\S+), (\S+) here", log)
    assert (of_code[0], of_code[2], of_code[3] != of_code[1]) == ("code", "two", True)
    assert of_tqdm[:3] == ("tqdm", "4.1", "two")
    for stranger in strangers:
        code, line, _ = stranger.end()
        assert code == 2
        assert re.search(r"executors did not answer \(.*\bexport SPARK_AUTHENTICATE_SECRET", line["error"])
    assert cluster.registered()[len(before) :] == ["ncf-doctor"] * 2, "of those with the secret"
    for worker in cluster.workers:
        worker.run("rm", "-rf", HOME)


def test_a_night_survives_the_loss_of_workers(cluster: Cluster, near: list[str]) -> None:
    """One is lost while it writes a table of prepare, one while its rank writes a checkpoint, and one while it writes
    recommendations. Spark does the work of prepare and score again; a training ends, leaves no rank anywhere, and goes
    on from the checkpoint before with one rerun. Each of the two runs is one application. What is published has no byte
    less or other."""
    train = {"launcher": "spark", "timeout_s": 60, "checkpoint_steps": 20}
    words = ("--config", config(cluster, "lost", f"{LAKES}/lost", train=train), "--ds", DS, "--cluster")
    before, jobs = cluster.registered(), [cluster.begin("nightly", *words)]

    def rerun_where_it_has_ended() -> None:
        if jobs[-1].has_ended:
            code, line, log = jobs[-1].end()
            assert (len(jobs), code) == (1, 1), log
            assert "run the job train again" in line["error"]
            ranks = lambda: [p for worker in cluster.workers for p in worker.processes(RANK)]  # noqa: E731
            wait_for(lambda: not ranks(), "the end of all ranks", timeout=90)
            jobs.append(cluster.begin("nightly", *words))

    written = ("prepare/[^/]+/interactions/", "train/[^/]+/checkpoints/step-0*40/", "score/[^/]+/recommendations/")
    cluster.lose_in_puts([f"/lost/runs/{DS}/{each}" for each in written], meanwhile=rerun_where_it_has_ended)
    code, line, log = jobs[-1].end()
    assert (code, line["status"]) == (0, "done"), log
    assert "going on from" in "".join(job.log.read_text() for job in jobs)
    assert cluster.registered()[len(before) :] == ["ncf-nightly"] * len(jobs), "also of a night that goes on at train"
    assert cluster.ask(PUBLISHED, f"{LAKES}/lost") == near
