"""The ranks of one machine: what they open, how they are started and ended. Real processes, sockets and signals."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from ncf_dist import files, locks
from ncf_dist.config import Model
from ncf_dist.errors import ConfigError, ExitCode, Preempted, StaleRun, TrainingFailed
from ncf_dist.train import checkpoints, network
from ncf_dist.train.launchers import SUPERVISOR, WORKER, rank_environment
from ncf_dist.train.pipeline import train
from ncf_dist.train.spec import Spec
from ncf_dist.train.supervisor import meeting
from tests.tables import DS, prepared, small_config
from tests.test_faults import When, job, ranks_alive, supervisor

GMF = Model(name="gmf", factors=4)


class Listening(threading.Thread):
    """Every address at which this process's children listen while inside: {(host, port)}."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: set[tuple[str, int]] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.look()

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                sockets = process.net_connections("tcp")
                self.found |= {(str(s.laddr.ip), s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}

    def __enter__(self) -> Listening:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    @property
    def open_to_others(self) -> set[tuple[str, int]]:
        """An IPv4 address in IPv6's clothes is what it is."""
        hosts = {host: ipaddress.ip_address(host.removeprefix("::ffff:")) for host, _ in self.found}
        return {(host, port) for host, port in self.found if not hosts[host].is_loopback}


def put_in_store(port: int) -> None:
    """What took over a training: a value in the store that torchrun's agents meet in."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False, timeout=dt.timedelta(seconds=5), wait_for_workers=False
    )
    store.set("anything", "a pickle that runs a program")


def a_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def stop_the_job() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_nothing_of_a_training_can_be_reached_from_another_machine(tmp_path: Path) -> None:
    """From its start to its end every listening socket is on loopback, and none of them is a store of values."""
    config = job(tmp_path, checkpoint_steps=50)
    taken: list[int] = []

    def attack(port: int) -> None:
        with contextlib.suppress(RuntimeError):
            put_in_store(port)
            taken.append(port)

    def attack_all() -> None:
        listening.look()
        attackers = [threading.Thread(target=attack, args=(port,), daemon=True) for _, port in listening.found]
        for attacker in attackers:
            attacker.start()
        # What is no store never answers: each has a second, and ten times as long as a store of ours takes meanwhile.
        own, began = a_store(), time.monotonic()
        put_in_store(own.port)
        end = time.monotonic() + 1 + 10 * (time.monotonic() - began)
        for attacker in attackers:
            attacker.join(max(0, end - time.monotonic()))
        stop_the_job()

    with Listening() as listening:
        When(config.paths.lake, attack_all)
        with pytest.raises(Preempted, match="stopped as asked"):
            train(config, DS)
    assert listening.found, "ranks that talk to each other listen"
    assert not listening.open_to_others
    assert not taken


def test_a_store_that_takes_values_is_seen_as_one() -> None:
    """The attack above works where there is something to attack."""
    server = a_store()
    put_in_store(server.port)
    assert server.get("anything") == b"a pickle that runs a program"


# ---- the ends of ranks ---------------------------------------------------------------------------------------------


def test_ranks_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    config = job(tmp_path, checkpoint_steps=50)
    ranks: list[psutil.Process] = []

    def act() -> None:
        ranks.extend(ranks_alive().values())
        supervisor().kill()

    When(config.paths.lake, act)
    with pytest.raises(TrainingFailed, match="training ended with code -9"):
        train(config, DS)
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=25)[1]


# ---- started by hand -----------------------------------------------------------------------------------------------


def spec_in(folder: Path, **settings: Any) -> Path:
    config = small_config(folder, GMF, **{"ranks": 2, "epochs": 2, **settings})
    run = folder / "run"
    (run / "ranks").mkdir(parents=True)
    path = run / "ranks/spec.json"
    Spec(config.model_dump_json(by_alias=True), prepared(config, 41).root, str(run)).save(str(path))
    return path


def losses(spec: Path) -> list[float]:
    return [epoch["loss"] for epoch in json.loads((spec.parents[1] / "history.json").read_text())["epochs"]]


def start(*command: str, **more: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **rank_environment(1)}
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, stderr=sys.stderr, **more)


def test_a_signal_that_comes_before_a_rank_listens_is_not_lost(tmp_path: Path) -> None:
    """SIGTERM while the ranks import torch: they save after their first step and end with 75."""
    spec = spec_in(tmp_path, epochs=1000)
    process = start(SUPERVISOR, "--ranks", "2", WORKER, "--spec", str(spec))
    while len(psutil.Process(process.pid).children()) < 2:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(120) == ExitCode.PREEMPTED
    assert json.loads((spec.parent / "error-0.json").read_text())["kind"] == "Preempted"


def test_a_machine_without_a_name_that_resolves_trains(tmp_path: Path) -> None:
    """In a namespace of its own, where nobody knows this machine's name; as a cluster's torchrun would, it starts a
    rank too, and both train the same."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh"]
    if subprocess.run([*named, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to a namespace of its own (unshare --uts)")
    ours, theirs = spec_in(tmp_path / "ours"), spec_in(tmp_path / "theirs")
    environment = {**os.environ, **rank_environment(1), "PYTHONPATH": os.getcwd()}
    run = [sys.executable, "-m", SUPERVISOR, "--ranks", "2", WORKER, "--spec", str(ours)]
    assert subprocess.run([*named, *run], env=environment, timeout=200).returncode == 0
    agent = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    there = ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    assert start(*agent, *there, "-m", WORKER, "--spec", str(theirs)).wait(200) == 0
    assert losses(ours) == losses(theirs)


# ---- where ranks meet ----------------------------------------------------------------------------------------------


def of(**settings: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"ranks": 2, "nodes": 1, "node_rank": 0, "rendezvous": None, **settings})


def test_one_machines_ranks_meet_in_a_folder_of_their_own() -> None:
    with meeting(of()) as (where, descriptors):
        folder = Path(where[network.STORE]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert where["GLOO_SOCKET_IFNAME"] == network.interface_of("127.0.0.1")
        assert where["NCCL_SOCKET_IFNAME"] == "=" + where["GLOO_SOCKET_IFNAME"]
        assert not descriptors
    assert not folder.exists()


def test_several_machines_meet_at_the_named_address_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with meeting(of(nodes=2, rendezvous=f"127.0.0.1:{port}")) as (where, (descriptor,)):
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            assert listening.getsockname() == ("127.0.0.1", port)
        assert (where["MASTER_ADDR"], where["MASTER_PORT"]) == ("127.0.0.1", str(port))
        assert where["GLOO_SOCKET_IFNAME"] == network.interface_of("127.0.0.1")
        with pytest.raises(ConfigError, match="cannot listen .*needed a free port"):
            network.listen("127.0.0.1", port)
    with meeting(of(nodes=2, node_rank=1, rendezvous=f"127.0.0.1:{port}")) as (_, descriptors):
        assert not descriptors


@pytest.mark.parametrize("rendezvous", ["here", "here:", ":29500", "here:x", "here:0", "here:70000"])
def test_a_rendezvous_is_a_host_and_a_port(rendezvous: str) -> None:
    with pytest.raises(ConfigError, match="needed HOST:PORT"):
        network.split(rendezvous)


def test_a_host_may_be_a_name_or_an_address() -> None:
    assert network.split("a.b:1") == ("a.b", 1)
    assert network.split("[::1]:29500") == ("::1", 29500)


def test_a_host_that_does_not_resolve_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="'nowhere', which does not resolve here .*: set train.rendezvous"):
        network.interface_facing("nowhere")


def test_an_address_of_another_machine_is_none_to_listen_at() -> None:
    """192.0.2.0/24 is kept for examples."""
    with pytest.raises(ConfigError, match="where this machine cannot listen"):
        network.listen("192.0.2.1", 29500)
    with pytest.raises(ConfigError, match="no network interface here has the address 192.0.2.1"):
        network.interface_of("192.0.2.1")


def test_a_job_that_has_lost_its_night_ends_its_ranks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run trains there by now: the ranks save nothing more, as they do when they are asked to end."""
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    config, lock = job(tmp_path, checkpoint_steps=50), str(tmp_path / "lock")
    with locks.held(lock, "the night"):
        When(config.paths.lake, lambda: files.write_bytes(lock, b"theirs"))
        with pytest.raises(StaleRun, match="has lost the night to another one"):
            train(config, DS)
    assert not ranks_alive()
    (run,) = Path(config.paths.lake).glob("runs/*/train/*")
    saved = checkpoints.latest(str(run / "checkpoints"))
    assert saved is not None
    assert saved.progress["updates"] % 50 == 0
