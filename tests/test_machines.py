"""The machines of the cluster tests are what they promise: nothing is shared but the network, and they can be lost."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import psutil
import pyspark
import pytest

from tests.machines import SPARK_HOME, cluster_of, wait_for, why_not

REASON = why_not()
LISTEN = (
    "import socket; s = socket.create_server(('', 5000)); c, _ = s.accept(); c.sendall(socket.gethostname().encode())"
)
CALL = (
    "import socket, sys, time\n"
    "for _ in range(100):\n"
    "    try: print(socket.create_connection((sys.argv[1], 5000), 5).recv(9).decode()); break\n"
    "    except OSError: time.sleep(0.05)"
)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_machines_share_a_network_and_nothing_else(tmp_path: Path) -> None:
    spark = Path(pyspark.__file__).parent
    with cluster_of(tmp_path / "machines", ["one", "two"], spark) as (network, machines):
        one, two = machines
        listening = two.begin("python3", "-c", LISTEN, log=tmp_path / "log")
        assert one.run("python3", "-c", CALL, "two").stdout == "two\n", "by name, and with a host name of its own"
        assert listening.wait(10) == 0
        one.run("touch", "/tmp/mine")
        assert one.run("ls", "/tmp").stdout == "mine\n"
        assert two.run("ls", "/tmp", "/root", "/home").stdout.split() == ["/home:", "/root:", "/tmp:"]
        checkout = str(Path(__file__).parent)
        assert two.run("ls", checkout).returncode != 0
        assert two.run(f"{SPARK_HOME}/bin/find-spark-home").returncode == 0
        assert len(two.run("ps", "-A", "-o", "pid=").stdout.split()) <= 4, "processes of its own"

        sleeping = two.begin("sleep", "1000", log=tmp_path / "log")
        wait_for(lambda: bool(two.processes("sleep", "1000")), "the process")
        two.processes("sleep", "1000")[0].suspend()  # What entered the machine stops with it.
        wait_for(lambda: psutil.Process(sleeping.pid).status() == psutil.STATUS_STOPPED, "the stop")
        two.run("touch", "/tmp/theirs")
        two.lose()
        assert sleeping.wait(10) != 0
        two.start()
        network.plug(two, machines)
        assert two.run("hostname").stdout == "two\n"
        assert two.run("ls", "/tmp").stdout == "", "an empty disk"
    ports = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "p-one" not in ports
    assert socket.gethostname() not in ("one", "two")
