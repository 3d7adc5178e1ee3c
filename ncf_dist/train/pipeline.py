"""The job train: start the ranks, wait, and judge the run by what it left, never by an exit code alone."""

from __future__ import annotations

import contextlib
import json
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
from typing import Any

from ncf_dist import errors
from ncf_dist.ancestry import Line, index_sizes
from ncf_dist.bundle import BUNDLE, read_bundle
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, NcfError, Preempted, TrainingFailed
from ncf_dist.files import exists, list_names, make_dirs, read_bytes, read_json, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.stage import Outcome, StageRun, Upstream, find_upstream
from ncf_dist.stopping import SIGNALS
from ncf_dist.train.launchers import LAUNCHERS, others, rank_environment, threads
from ncf_dist.train.lr_find import smoothed, suggest
from ncf_dist.train.memory import check_memory
from ncf_dist.train.order import steps_per_epoch
from ncf_dist.train.plots import history_figure, rate_figure
from ncf_dist.train.processes import dying_with_us, end_tree
from ncf_dist.train.reports import UNEXPECTED
from ncf_dist.train.start import check_starts, start_bundle
from ncf_dist.train.worker import CHECKPOINTS, HISTORY, RATES, SPEC, STOP, Spec, train_contract

log = logging.getLogger(__name__)

STAGE = "train"
RANKS, PLOT = "ranks", "history.svg"
STOP_S = 20.0
"""What the ranks have, once asked, to save and end."""
FAILED_S = 8.0
"""What the others have to end by themselves once one has reported a failure."""


def train(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Fit the model on this night's train table. Raises ConfigError, ContractError, TrainingFailed, Preempted."""
    _check_negatives(config)
    lake = Lake(config.paths.lake)
    prepare = find_upstream(lake, config, ds, STAGE, given)["prepare"]
    line = Line(lake, prepare)
    first = start_bundle(config.train, line)
    inputs = {"prepare": prepare.run_key, **check_starts(config, line, first)}
    stage = StageRun(STAGE, config, ds, inputs)
    if not config.train.lr_find and (done := stage.find()):
        log.info("already trained: %s", done.root)
        return Outcome.of(done, "already-done")
    table = prepare.table(train_contract(prepare, config.loss == "mse"))
    steps_per_epoch(table.rows, _world_size(config), config.train.batch_size)
    check_memory(config, *index_sizes(prepare), table.rows, max(file.rows for file in table.files))

    if config.train.lr_find:
        return _find_rate(config, prepare, stage.runs.begin(f"{stage.key}-lr-find"), first)
    run = stage.begin(CHECKPOINTS)
    _run_ranks(config, Spec(config.model_dump_json(by_alias=True), prepare.root, run, first), HISTORY)
    bundle, history = read_bundle(posixpath.join(run, BUNDLE)), json.loads(read_bytes(posixpath.join(run, HISTORY)))
    write_atomic(posixpath.join(run, PLOT), history_figure(history))
    facts = {"model_version": bundle.model_version, "sha256": bundle.sha256, "prepare_run": prepare.run_key}
    facts["products"] = history["products"]
    manifest = stage.finish(facts=facts, metrics=_metrics(history))
    log.info("trained %s in %.1f s: %s", bundle.model_version, manifest.seconds, dict(manifest.metrics))
    outputs = {"bundle": bundle.path, "history": posixpath.join(run, HISTORY), "plot": posixpath.join(run, PLOT)}
    return Outcome.of(manifest, outputs=outputs, model_version=bundle.model_version)


def _metrics(history: dict[str, Any]) -> dict[str, Any]:
    kept = history["epochs"][history["epoch"]]
    metrics = {f"validation.{k}": v for k, v in kept.items() if "@" in k or k in ("mrr", "mse", "mae")}
    metrics |= {
        "train.loss": kept["loss"],
        "train.epochs": len(history["epochs"]),
        "train.best_epoch": history["epoch"],
        "train.data_wait": min(epoch["data_wait"] for epoch in history["epochs"]),
    }
    return metrics | {"train.samples_per_s": max(epoch["samples_per_s"] for epoch in history["epochs"])}


def _find_rate(config: Config, prepare: Manifest, run: str, first: str | None) -> Outcome:
    """Draw loss over learning rate and suggest one; no model is made."""
    _run_ranks(config, Spec(config.model_dump_json(by_alias=True), prepare.root, run, first), RATES)
    curve = json.loads(read_bytes(posixpath.join(run, RATES)))
    rate = suggest(curve)
    path = posixpath.join(run, "lr_find.svg")
    write_atomic(path, rate_figure(curve, smoothed([loss for _, loss in curve]), rate))
    log.info("suggested: --set train.lr=%.2g (no model was trained; the curve is in %s)", rate, path)
    return Outcome("done", None, {"lr_find": path}, {"train.lr_suggested": float(f"{rate:.3g}")})


def _world_size(config: Config) -> int:
    train = config.train
    return 1 if train.launcher == "none" else train.ranks * train.nodes


def _check_negatives(config: Config) -> None:
    """The train table must hold what this config reads."""
    if config.loss in ("bce", "bpr"):
        n, draws = config.negatives.per_positive, config.negatives.draws
        if not n or (config.train.negatives == "table" and not draws):
            raise ConfigError(
                f"negatives.per_positive is {n} and negatives.draws is {draws} with train.loss={config.loss} and "
                f"train.negatives={config.train.negatives}; needed at least 1 of both, or train.negatives=online"
            )


# ---- the ranks -----------------------------------------------------------------------------------------------------


def _run_ranks(config: Config, spec: Spec, wanted: str) -> None:
    """Start the ranks and wait until all have ended, leaving `wanted` in the run's folder. Raises what a rank reported,
    or TrainingFailed. SIGTERM and SIGINT ask them to save and end."""
    folder = posixpath.join(spec.run, RANKS)
    path = posixpath.join(folder, SPEC)
    make_dirs(folder)
    spec.save(path)
    command = LAUNCHERS[config.train.launcher](config, path)
    log.info("starting %d rank(s): %s", _world_size(config), shlex.join(command))
    if config.train.nodes > 1:
        log.info("%s", others(config))
    environment = {**rank_environment(threads(config)), **os.environ}
    # The ranks run this checkout's code, whatever lies in the folder that the job was started in.
    environment["PYTHONSAFEPATH"] = "1"
    with _asked_to_stop() as asked:
        # A rank's stdout must not get between us and the scheduler: ours ends with the report. A session of their own:
        # a signal to our group is for us, who ask them to save; it must not end them before they have.
        process = subprocess.Popen(
            dying_with_us(command, signal.SIGTERM), stdout=sys.stderr, env=environment, start_new_session=True
        )
        try:
            _wait(process, folder, asked)
        finally:
            end_tree(process, grace_s=5)
        _raise_reported(folder)
    if process.returncode != 0 or not exists(posixpath.join(spec.run, wanted)):
        raise TrainingFailed(
            f"training ended with code {process.returncode} and "
            f"{'a' if exists(posixpath.join(spec.run, wanted)) else 'no'} {wanted}; its log is above"
        )


def _wait(process: subprocess.Popen[bytes], folder: str, asked: threading.Event) -> None:
    """Until the ranks have ended, or have had their time to end after a failure or a request to stop."""
    end = float("inf")
    stopping = False
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if asked.is_set() and not stopping:
            log.warning("asked to stop: the ranks save a checkpoint and end")
            write_atomic(posixpath.join(folder, STOP), b"")
            stopping, end = True, min(end, time.monotonic() + STOP_S)
        if end == float("inf") and _reports(folder):
            end = time.monotonic() + FAILED_S


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT while inside; raises Preempted at the end where nothing else was raised.
    Only a main thread can listen; elsewhere nobody sets it."""
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


def _reports(folder: str) -> list[str]:
    return [name for name in list_names(folder) if name.startswith("error-") and name.endswith(".json")]


def _raise_reported(folder: str) -> None:
    """Raise what the ranks reported. A rank that lost its peers only says so: what the peers say comes first."""
    found = []
    for name in _reports(folder):
        said, message = _read_report(posixpath.join(folder, name))
        kind: type[NcfError] = TrainingFailed if said == UNEXPECTED else getattr(errors, said)
        rank = name.removeprefix("error-").removesuffix(".json")
        found.append(((said == UNEXPECTED, kind is Preempted, int(rank)), kind, rank, message))
    if found:
        _, kind, rank, message = min(found, key=lambda report: report[0])
        raise kind(f"rank {rank}: {message}")


def _read_report(path: str) -> tuple[str, str]:
    """(kind, message) of what a rank reported. A report that is damaged is one of a failure all the same."""
    try:
        body = read_json(dict[str, str], path)
        kind, message = body["kind"], body["message"]
        if kind != UNEXPECTED and not issubclass(getattr(errors, kind, object), NcfError):
            raise ValueError(f"{kind} is no error of ours")
        return kind, message
    except (OSError, ValueError, TypeError, KeyError) as error:
        return UNEXPECTED, f"its report {path} cannot be read ({error}); its log is above"
