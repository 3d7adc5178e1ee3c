"""Starting the ranks and waiting for them: one process of the launcher, judged by the reports and files it leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from ncf_dist import gateway, locks
from ncf_dist.config import Config
from ncf_dist.errors import Preempted, StaleRun, TrainingFailed
from ncf_dist.files import exists, make_dirs, write_atomic
from ncf_dist.stopping import SIGNALS
from ncf_dist.train.launchers import LAUNCHERS, other_nodes, others, rank_environment, threads, world_size
from ncf_dist.train.processes import dying_with_us, end_tree
from ncf_dist.train.reports import count_retries, raise_reported, reports_in
from ncf_dist.train.spec import SPEC, STOP, Spec

log = logging.getLogger(__name__)

RANKS = "ranks"
"""The folder, in a run's, of the spec and the reports."""
STOP_S = 20.0
"""What the ranks have, once asked, to save and end."""
FAILED_S = 8.0
"""What the others have to end by themselves once one has reported a failure."""


def run_ranks(config: Config, spec: Spec, wanted: str) -> None:
    """Start the ranks and wait until all have ended, leaving `wanted` in the run's folder. Raises what a rank reported,
    TrainingFailed, or StaleRun. SIGTERM and SIGINT ask them to save and end."""
    folder = posixpath.join(spec.run, RANKS)
    path = posixpath.join(folder, SPEC)
    make_dirs(folder)
    spec.save(path)
    command = LAUNCHERS[config.train.launcher](config, path)
    log.info("starting %d rank(s): %s", world_size(config), shlex.join(command))
    if config.train.nodes > 1:
        log.info("%s", others(config))
    with gateway.lending():
        environment = {**rank_environment(threads(config)), **os.environ}
    # The ranks must not import modules from the folder that the job was started in.
    environment["PYTHONSAFEPATH"] = "1"
    with _asked_to_stop() as asked:
        running = [_started(command, environment)]
        if (others_command := other_nodes(config, path)) is not None:
            running.append(_started(others_command, environment))
        grace_s = 5.0
        try:
            _wait(running, folder, asked)
            codes = [process.poll() for process in running]
        except StaleRun:
            grace_s = 0.0  # What they would still save is in the way of the run that has this night now.
            raise
        finally:
            for process in running:
                end_tree(process, grace_s)
        count_retries(folder)
        raise_reported(folder)
    left = exists(posixpath.join(spec.run, wanted))
    if codes[0] == 0 and left:
        return
    if len(codes) > 1 and codes[1]:
        raise TrainingFailed(
            f"Spark's tasks on the other machines ended with code {codes[1]}; needed {config.train.nodes - 1} free "
            "slots at once, and machines that reach train.rendezvous: the log is above; then run the job train again: "
            "it goes on from the last checkpoint"
        )
    raise TrainingFailed(
        f"training ended with code {running[0].returncode} and {'a' if left else 'no'} {wanted}; needed ranks that end "
        "with their work done: the log above says why they did not; then run the job train again: it goes on from the "
        "last checkpoint"
    )


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # The scheduler reads our stdout, so a rank's goes to stderr. A session of their own: a signal to our process
    # group must reach us alone; we ask the ranks to save, and they must not end before they have.
    return subprocess.Popen(
        dying_with_us(command, signal.SIGTERM), stdout=sys.stderr, env=environment, start_new_session=True
    )


def _wait(running: list[subprocess.Popen[bytes]], folder: str, asked: threading.Event) -> None:
    """Wait until all of `running` have ended (this machine's ranks, and where there are any what started those of
    others), or their time to end after a failure or a request to stop, or after our own ranks' end, is over. Raises
    StaleRun where another run has taken this night over meanwhile."""
    ranks, end, stopping = running[0], float("inf"), False
    while any(process.poll() is None for process in running) and time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            (ranks if ranks.poll() is None else running[-1]).wait(0.5)
        locks.check()
        if asked.is_set() and not stopping:
            log.warning("asked to stop: the ranks save a checkpoint and end")
            write_atomic(posixpath.join(folder, STOP), b"")
            stopping, end = True, min(end, time.monotonic() + STOP_S)
        failed = any(process.poll() for process in running)
        if end == float("inf") and (failed or reports_in(folder)):
            end = time.monotonic() + FAILED_S
        elif end == float("inf") and ranks.poll() is not None:
            end = time.monotonic() + STOP_S


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set while inside; raises Preempted at the end where nothing else was raised.
    Only the main thread can handle signals; in another one nothing sets the event."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in SIGNALS}
    try:
        yield asked
        if asked.is_set():
            raise Preempted(
                "training was asked to stop and goes on from its latest checkpoint: run the job train again"
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
