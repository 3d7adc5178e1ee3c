"""The ranks of one machine: `python -m ncf_dist.train.supervisor --ranks N MODULE --spec FILE`.

It starts N processes of MODULE, each with RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, and ends when they have
ended, with 0 if all of them did. When one fails, the others are asked to end, and killed if they do not. SIGTERM and
SIGINT are passed on, so that ranks save. It writes the report of a rank that a signal ended. When this process dies,
the ranks die, too.

On one machine nothing can be reached from another: ranks meet in a file in a scratch folder that only this user can
enter, and talk over loopback. With `--nodes`, the first machine's rank 0 listens at `--rendezvous`, at that address
alone, and all talk over the interface that faces it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from ncf_dist.errors import NcfError, TrainingFailed
from ncf_dist.logs import log_to_stderr
from ncf_dist.machine import cores
from ncf_dist.train.launchers import rank_environment
from ncf_dist.train.network import LISTENING, STORE, bound_to, interface_facing, interface_of, listen, split
from ncf_dist.train.processes import die_with_parent
from ncf_dist.train.reports import report

log = logging.getLogger(__name__)

POLL_S = 0.1
STOP_S = 20.0
"""What ranks have, once asked, to save and end."""
FAILED_S = 5.0
"""What the others have to end by themselves once one has failed."""
SIGNALS = {signal.SIGTERM, signal.SIGINT}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True, help="processes on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is; 0 is the one with HOST")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="an address of machine 0 and a free port there")
    parser.add_argument("module")
    parser.add_argument("--spec", required=True)
    return parser.parse_args()


@contextlib.contextmanager
def meeting(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """(environment that tells the ranks where they meet, descriptors that they inherit for it). Raises ConfigError."""
    if args.nodes == 1:
        with tempfile.TemporaryDirectory(prefix="ncf-ranks-") as folder:  # Its mode is 0700.
            yield {STORE: os.path.join(folder, "store"), **bound_to(interface_of("127.0.0.1"))}, ()
        return
    host, port = split(args.rendezvous)
    there = {"MASTER_ADDR": host, "MASTER_PORT": str(port), LISTENING: "", **bound_to(interface_facing(host))}
    if args.node_rank > 0:
        yield there, ()
        return
    with listen(host, port) as listening:
        yield {**there, LISTENING: str(listening.fileno())}, (listening.fileno(),)


class Ranks:
    """The processes, by rank."""

    def __init__(self, args: argparse.Namespace, where: dict[str, str], descriptors: tuple[int, ...]) -> None:
        first = args.node_rank * args.ranks
        common = {**rank_environment(max(1, cores() // args.ranks)), **os.environ, **where}
        common |= {"WORLD_SIZE": str(args.nodes * args.ranks), "LOCAL_WORLD_SIZE": str(args.ranks)}
        self.spec = args.spec
        self.processes = {
            first + local: subprocess.Popen(
                [sys.executable, "-m", args.module, "--spec", args.spec],
                env={**common, "RANK": str(first + local), "LOCAL_RANK": str(local)},
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors if first + local == 0 else (),
                start_new_session=True,
                preexec_fn=_before_a_rank,
            )
            for local in range(args.ranks)
        }

    def codes(self) -> dict[int, int | None]:
        return {rank: process.poll() for rank, process in self.processes.items()}

    def send(self, number: int) -> None:
        """Send a signal to the ranks that still run; SIGKILL also to processes that they started."""
        for process in self.processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)

    def watch(self, asked: list[int]) -> int:
        """Wait until all have ended. `asked` is filled by a signal to us. Returns the exit code."""
        end, failed, told = float("inf"), None, False
        while None in (codes := self.codes()).values():
            if failed is None and (failed := self._first_failure(codes, told)):
                end = min(end, time.monotonic() + FAILED_S)
            if not told and (asked or failed):
                self.send(signal.SIGTERM)
                told, end = True, min(end, time.monotonic() + STOP_S)
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)
        failed = failed or self._first_failure(codes, told)
        return 0 if failed is None else failed

    def _first_failure(self, codes: dict[int, int | None], told: bool) -> int | None:
        """The exit code of a rank that failed. Reports a rank that somebody else's signal ended."""
        for rank, code in codes.items():
            if code is not None and code < 0 and not told:
                log.error("rank %d was ended by %s", rank, signal.Signals(-code).name)
                report(self.spec, rank, TrainingFailed.__name__, _ended_by(signal.Signals(-code)))
        bad = [code for code in codes.values() if code]
        return (bad[0] if bad[0] > 0 else 128 - bad[0]) if bad else None


def _before_a_rank() -> None:
    """In the new process: die with the supervisor, and block signals until the rank has imported its modules and
    handles them."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _ended_by(number: signal.Signals) -> str:
    memory = " (the kernel sends it where memory runs out)" if number == signal.SIGKILL else ""
    less = "lower train.batch_size, loader.shuffle_files or train.ranks if memory ran out, then " if memory else ""
    return (
        f"ended by {number.name}{memory}; needed a process that nobody ends before its work is done: {less}run the job "
        "train again: it goes on from the last checkpoint"
    )


def main() -> int:
    args = arguments()
    log_to_stderr("ranks")
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        with meeting(args) as (where, descriptors):
            ranks = Ranks(args, where, descriptors)
            try:
                return ranks.watch(asked)
            finally:
                ranks.send(signal.SIGKILL)
    except NcfError as error:
        report(args.spec, args.node_rank * args.ranks, type(error).__name__, str(error))
        log.error("%s", error)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
