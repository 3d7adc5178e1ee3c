"""The job train: start the ranks, wait, and judge the run by what it left, never by an exit code alone."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ncf_dist import errors
from ncf_dist.artifacts import Lake, Manifest, Outcome, exists, read_bytes, run_key
from ncf_dist.bundle import read_bundle
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, ContractError, NcfError, TrainingFailed
from ncf_dist.models import parameter_count
from ncf_dist.train.worker import Spec

log = logging.getLogger(__name__)

STAGE = "train"
SECTIONS = ("model", "negatives", "train", "seed")
COPIES = 5
"""Float32 copies of the weights a rank holds: weights, gradients, Adam's two moments, and the best epoch."""
MEMORY_SHARE = 0.8


def train(config: Config, ds: str) -> Outcome:
    """Fit the model on this night's train table. Raises ConfigError, ContractError, TrainingFailed."""
    start = time.monotonic()
    lake = Lake(config.paths.lake)
    prepare = lake.stage(ds, "prepare").current()
    _check_prepared_for(config, prepare)
    used = config.model_dump(mode="json", include=set(SECTIONS))
    runs = lake.stage(ds, STAGE)
    key = run_key(STAGE, ds, used, {"prepare": prepare.run_key})
    if done := runs.find(key):
        log.info("already trained: %s", done.root)
        return Outcome.of(done, "already-done")
    check_memory(config, int(prepare.facts["users"]), int(prepare.facts["items"]))

    run = runs.begin(key)
    _run_ranks(config, prepare, run, key)
    bundle, history = (
        read_bundle(posixpath.join(run, "bundle")),
        json.loads(read_bytes(posixpath.join(run, "history.json"))),
    )
    kept = history["epochs"][history["epoch"]]
    metrics: dict[str, Any] = {f"validation.{k}": v for k, v in kept.items() if "@" in k or k == "mrr"}
    metrics |= {
        "train.loss": kept["loss"],
        "train.epochs": len(history["epochs"]),
        "train.best_epoch": history["epoch"],
    }
    metrics["train.samples_per_s"] = max(epoch["samples_per_s"] for epoch in history["epochs"])
    facts = {"model_version": bundle.model_version, "sha256": bundle.sha256, "prepare_run": prepare.run_key}
    seconds = round(time.monotonic() - start, 3)
    manifest = runs.finish(
        Manifest(STAGE, ds, key, run, used, {"prepare": prepare.run_key}, {}, facts, metrics, seconds)
    )
    log.info("trained %s in %.1f s: %s", bundle.model_version, seconds, metrics)
    return Outcome(
        "done",
        key,
        {"bundle": bundle.path, "history": posixpath.join(run, "history.json")},
        manifest.metrics,
        {"model_version": bundle.model_version},
    )


def check_memory(config: Config, n_users: int, n_items: int) -> None:
    """Refuse, before anything starts, a model that cannot fit. Raises ConfigError with the arithmetic."""
    count = parameter_count(config.model, n_users, n_items)
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    ranks = 1 if on_gpu or config.train.launcher == "none" else config.train.ranks
    needed = 4 * count * COPIES * ranks
    have = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    limit = config.train.max_model_bytes or int(have * MEMORY_SHARE)
    if needed > limit:
        raise ConfigError(
            f"model {config.model.name} for {n_users:,} users and {n_items:,} items has {count:,} parameters: "
            f"x 4 bytes x {COPIES} copies (weights, gradients, Adam's moments, best epoch) x {ranks} rank(s) here "
            f"= {needed / 2**30:.2f} GiB; needed at most {limit / 2**30:.2f} GiB: "
            "lower model.factors or model.layers, lower train.ranks, or train on a machine with more memory"
        )


def _check_prepared_for(config: Config, prepare: Manifest) -> None:
    """The train table must hold the negatives that this config reads."""
    wanted, found = config.negatives.model_dump(mode="json"), prepare.config["negatives"]
    if wanted != found:
        raise ContractError(
            f"prepare run {prepare.run_key} was made with negatives {found}, this config says {wanted}: "
            "rerun the job prepare"
        )


def _run_ranks(config: Config, prepare: Manifest, run: str, key: str) -> None:
    """Start the ranks and wait for all. Raises what a rank reported, or TrainingFailed."""
    scratch = Path(config.paths.work).absolute() / "train" / key
    scratch.mkdir(parents=True, exist_ok=True)
    for old in scratch.glob("error-*.json"):
        old.unlink()
    spec = scratch / "spec.json"
    Spec(config.model_dump_json(by_alias=True), prepare.root, run).save(spec)
    ranks = 1 if config.train.launcher == "none" else config.train.ranks
    command = [sys.executable, "-m"]
    if config.train.launcher == "torchrun":
        command += [
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            "-m",
        ]
    command += ["ncf_dist.train.worker", "--spec", str(spec)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
    log.info("starting %d rank(s): %s", ranks, " ".join(command))
    # A rank's stdout must not get between us and the scheduler: ours ends with the report.
    process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    for report in sorted(scratch.glob("error-*.json")):
        body = json.loads(report.read_text())
        kind: type[NcfError] = getattr(errors, body["kind"])
        raise kind(f"{report.stem.replace('error-', 'rank ')}: {body['message']}")
    if code != 0 or not exists(posixpath.join(run, "history.json")):
        raise TrainingFailed(
            f"training ended with code {code} and "
            f"{'a' if exists(posixpath.join(run, 'history.json')) else 'no'} history.json; its log is above"
        )
