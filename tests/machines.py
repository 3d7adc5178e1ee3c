"""Machines of namespaces: each has a network, host name, processes and file system of its own, and shares nothing with
the others but a network, and folders that a test gives them. Needs root.

A machine's root holds what a bare one of a cluster has: the system's /usr (with Java and the system's Python), Spark at
/opt/spark, and an empty rest. No checkout, no package registry, no home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SPARK_HOME = "/opt/spark"
SETUP = r"""
set -eu
root=$1 name=$2 spark=$3; shift 3
mount --make-rprivate /
mkdir -p "$root"/{usr,etc,proc,dev,sys,tmp,run,root,var/tmp,opt/spark,home}
chmod 1777 "$root/tmp" "$root/var/tmp"
for folder in bin sbin lib lib64; do ln -sfn "usr/$folder" "$root/$folder"; done
mount --rbind /usr "$root/usr"
mount -t tmpfs none "$root/usr/local"
mount --bind "$spark" "$root/opt/spark"
for part in alternatives ssl ld.so.cache java-17-openjdk; do
  [ -e "/etc/$part" ] || continue
  if [ -d "/etc/$part" ]; then mkdir -p "$root/etc/$part"; else touch "$root/etc/$part"; fi
  mount --bind "/etc/$part" "$root/etc/$part"
done
echo 'root:x:0:0:root:/root:/bin/bash' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
echo 'hosts: files' >"$root/etc/nsswitch.conf"
: >"$root/etc/resolv.conf"
for shared; do mkdir -p "$root/${shared#*:}"; mount --bind "${shared%%:*}" "$root/${shared#*:}"; done
for node in null zero full random urandom; do touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
mkdir -p "$root/dev/shm"; mount -t tmpfs -o mode=1777 none "$root/dev/shm"
ln -sfn /proc/self/fd "$root/dev/fd"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys" 2>/dev/null || true
hostname "$name"
exec chroot "$root" /bin/bash -c 'touch /run/ready; trap "exit 0" TERM; while :; do sleep 3600 & wait; done'
"""


@dataclass
class Machine:
    name: str
    address: str
    root: Path
    """Its file system, seen from outside."""
    spark: Path
    shared: Mapping[Path, str] = field(default_factory=dict)
    """Folders of this test to the places where the machine has them."""
    outer: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        binds = [f"{source}:{target}" for source, target in self.shared.items()]
        (self.root / "run/ready").unlink(missing_ok=True)
        self.outer = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL", "--",
             "/bin/bash", "-c", SETUP, "setup", str(self.root), self.name, str(self.spark), *binds],
            start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: (self.root / "run/ready").exists(), f"the machine {self.name}", alive=self.outer)

    @property
    def init(self) -> int:
        """Its first process: with it the machine dies."""
        assert self.outer is not None
        return psutil.Process(self.outer.pid).children()[0].pid

    def command(self, words: Sequence[str], env: Mapping[str, str] = {}, folder: str = "/") -> list[str]:
        """What runs `words` on this machine, with no environment but `env`."""
        given = {"PATH": "/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "SPARK_HOME": SPARK_HOME, **env}
        return ["nsenter", f"--target={self.init}", "--all", f"--root=/proc/{self.init}/root", f"--wdns={folder}", "--",
                "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in given.items()), *words]  # fmt: skip

    def run(
        self, *words: str, env: Mapping[str, str] = {}, folder: str = "/", timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(words, env, folder), capture_output=True, text=True, timeout=timeout, check=False
        )

    def begin(self, *words: str, log: Path, env: Mapping[str, str] = {}, folder: str = "/") -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(words, env, folder),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those on this machine whose command line has all of `words`."""
        found = []
        mine = os.readlink(f"/proc/{self.init}/ns/pid")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == mine:
                    line = " ".join(process.cmdline())
                    if all(word in line for word in words):
                        found.append(process)
        return found

    def lose(self) -> None:
        """Kill it; what was on its disk is gone, too."""
        self.kill()
        self.root.rename(self.root.with_name(f"{self.name}-lost-{time.monotonic_ns()}"))  # Faster than to remove it.

    def kill(self) -> None:
        """As a power cut does: all its processes at once, and its end of the cable."""
        if self.outer is not None:
            with contextlib.suppress(psutil.Error, IndexError):
                # A nsenter stops with the process that it has begun; then it never reaps it, and the machine stays.
                begun = [process.parent() for process in self.processes()]
                psutil.Process(self.init).kill()
                for parent in begun:
                    if parent is not None and parent.name() == "nsenter":
                        parent.kill()
            self.outer.wait(120)
            self.outer = None


class Network:
    """A switch with the machines on it, which know each other by name."""

    def __init__(self) -> None:
        self.switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        wait_for(lambda: _net(self.switch.pid) != _net(os.getpid()), "the switch", alive=self.switch)
        self._inside("ip", "link", "add", "br0", "type", "bridge")
        self._inside("ip", "link", "set", "br0", "up")

    def _inside(self, *words: str, check: bool = True) -> None:
        command = ["nsenter", f"--net=/proc/{self.switch.pid}/ns/net", *words]
        subprocess.run(command, check=check, stderr=None if check else subprocess.DEVNULL)

    def plug(self, machine: Machine, machines: Sequence[Machine]) -> None:
        port, init = f"p-{machine.name}", machine.init
        self._inside("ip", "link", "delete", port, check=False)  # A dead machine's: the kernel takes its time.
        subprocess.run(
            ["ip", "link", "add", "name", port, "netns", str(self.switch.pid), "type", "veth",
             "peer", "name", "eth0", "netns", str(init)], check=True,
        )  # fmt: skip
        self._inside("ip", "link", "set", port, "master", "br0", "up")
        enter = ["nsenter", f"--net=/proc/{init}/ns/net", "ip"]
        for words in (
            ["address", "add", f"{machine.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run([*enter, *words], check=True)
        names = [f"{each.address} {each.name}" for each in machines]
        (machine.root / "etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (machine.root / "etc/hostname").write_text(f"{machine.name}\n")

    def close(self) -> None:
        self.switch.kill()
        self.switch.wait()


def _net(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


@contextlib.contextmanager
def cluster_of(
    folder: Path, names: Sequence[str], spark: Path, shared: Mapping[Path, str] = {}
) -> Iterator[tuple[Network, list[Machine]]]:
    """Machines of these names on one network; gone at the end, with all that runs on them."""
    machines = [
        Machine(name, f"10.77.0.{number}", folder / name, spark, shared) for number, name in enumerate(names, 1)
    ]
    network = Network()
    try:
        for machine in machines:
            machine.start()
            network.plug(machine, machines)
        yield network, machines
    finally:
        for machine in machines:
            machine.kill()
        network.close()
        for machine in machines:
            assert not os.path.ismount(machine.root / "usr"), "its mounts are its own, and went with it"
        shutil.rmtree(folder, ignore_errors=True)


def why_not() -> str | None:
    """Why there can be no such machine here; None where there can."""
    if os.geteuid() != 0:
        return "machines of namespaces need root"
    for program in ("unshare", "nsenter", "ip", "hostname"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return None if done.returncode == 0 else f"namespaces cannot be made here: {done.stderr.decode().strip()}"


def wait_for(
    happened: Callable[[], bool], what: str, timeout: float = 120, alive: subprocess.Popen[bytes] | None = None
) -> None:
    end = time.monotonic() + timeout
    while not happened():
        if alive is not None and alive.poll() is not None:
            raise RuntimeError(f"{what} ended with code {alive.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not there after {timeout:.0f} s")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
