"""The job train: start the ranks, wait, and judge the run by the files it left, never by an exit code alone."""

from __future__ import annotations

import json
import logging
import posixpath
from typing import Any

from ncf_dist.ancestry import Line, index_sizes
from ncf_dist.bundle import BUNDLE, CARD, read_bundle
from ncf_dist.config import Config, Train
from ncf_dist.errors import ConfigError
from ncf_dist.files import exists, read_bytes, write_atomic
from ncf_dist.item_item.memory import check_gram
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.stage import Outcome, StageRun, Upstream, find_upstream, model_of_earlier_night
from ncf_dist.train.figures import of_parts, of_training
from ncf_dist.train.launchers import world_size
from ncf_dist.train.lr_curve import smoothed, suggest
from ncf_dist.train.plots import history_figure, rate_figure
from ncf_dist.train.run_ranks import run_ranks
from ncf_dist.train.spec import CHECKPOINTS, HISTORY, PARTS, RATES, Spec, train_contract
from ncf_dist.train.start import check_starts, start_bundle
from ncf_dist.train.steps import steps_per_epoch

log = logging.getLogger(__name__)

STAGE = "train"
PLOT = "history.svg"
FEW_STEPS = 200
"""In fewer a model has hardly left its start, at any usual learning rate."""


def train(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Fit the model on this night's train table. Raises ConfigError, ContractError, TrainingFailed, Preempted."""
    if config.model.trained:
        _check_negatives(config)
    lake = Lake(config.paths.lake)
    prepare = find_upstream(lake, config, ds, STAGE, given)["prepare"]
    line = Line(lake, prepare)
    first = start_bundle(config.train, config.model, line, config.publish.table)
    inputs = {"prepare": prepare.run_key, **check_starts(config, line, first)}
    stage = StageRun(STAGE, config, ds, inputs)
    if not config.train.lr_find and (done := stage.find()):
        log.info("already trained: %s", done.root)
        return _outcome(done, "already-done")
    if not config.train.lr_find and (earlier := model_of_earlier_night(lake, config, prepare)):
        log.info("nothing is trained tonight (train.every %s): %s ranks", config.train.every, earlier.root)
        return of_earlier_night(earlier)
    if ease := config.item_parts.ease:
        check_gram(ease, index_sizes(prepare).items)
    if not config.model.trained:
        return _made_of_parts(stage, config, prepare)
    table = prepare.table(train_contract(prepare, config))
    warning = few_steps(config.train, table.rows, world_size(config))

    if config.train.lr_find:
        return _find_rate(config, prepare, stage.runs.begin(f"{stage.key}-lr-find"), first)
    run = stage.begin(CHECKPOINTS)
    run_ranks(config, Spec(config.model_dump_json(by_alias=True), prepare.root, run, first), HISTORY)
    history = json.loads(read_bytes(posixpath.join(run, HISTORY)))
    write_atomic(posixpath.join(run, PLOT), history_figure(history))
    facts = {"products": history["products"], "warnings": [warning] if warning else []}
    return _finished(stage, run, prepare, facts, of_training(history))


def _made_of_parts(stage: StageRun, config: Config, prepare: Manifest) -> Outcome:
    """A model of which nothing is trained: one process makes its parts."""
    alone = {"launcher": "none", "ranks": 1, "nodes": 1, "rendezvous": None, "device": "cpu"}
    config = config.model_copy(update={"train": config.train.model_copy(update=alone)})
    run = stage.begin()
    spec = Spec(config.model_dump_json(by_alias=True), prepare.root, run)
    run_ranks(config, spec, posixpath.join(BUNDLE, CARD))
    return _finished(stage, run, prepare, {"trained": False, "warnings": []}, {})


def _finished(stage: StageRun, run: str, prepare: Manifest, facts: dict[str, Any], metrics: dict[str, Any]) -> Outcome:
    bundle = read_bundle(posixpath.join(run, BUNDLE))
    facts |= {"model_version": bundle.model_version, "sha256": bundle.sha256, "prepare_run": prepare.run_key}
    if exists(record := posixpath.join(run, PARTS)):
        chosen = json.loads(read_bytes(record))
        facts["parts"] = {"weights": chosen["weights"], "chosen_by": chosen["chosen_by"]}
        metrics |= of_parts(chosen)
    manifest = stage.finish(facts=facts, metrics=metrics)
    log.info("made %s in %.1f s: %s", bundle.model_version, manifest.seconds, dict(manifest.metrics))
    return _outcome(manifest)


def _outcome(run: Manifest, status: str = "done") -> Outcome:
    """What a run of this night left, whether it was made now or before."""
    facts, left = run.facts, {"bundle": BUNDLE}
    left |= {"parts": PARTS} if "parts" in facts else {}
    left |= {"history": HISTORY, "plot": PLOT} if facts.get("trained", True) else {}
    outputs = {name: posixpath.join(run.root, file) for name, file in left.items()}
    return Outcome.of(run, status, outputs, model_version=facts["model_version"], warnings=facts.get("warnings", []))


def of_earlier_night(run: Manifest) -> Outcome:
    """The model of a night before, which ranks tonight."""
    outputs = {"bundle": posixpath.join(run.root, BUNDLE)}
    return Outcome.of(run, "already-done", outputs, model_version=run.facts["model_version"], model_of=run.ds)


def _find_rate(config: Config, prepare: Manifest, run: str, first: str | None) -> Outcome:
    """Draw loss over learning rate and suggest one; no model is made."""
    run_ranks(config, Spec(config.model_dump_json(by_alias=True), prepare.root, run, first), RATES)
    curve = json.loads(read_bytes(posixpath.join(run, RATES)))
    rate = suggest(curve)
    path = posixpath.join(run, "lr_find.svg")
    write_atomic(path, rate_figure(curve, smoothed([loss for _, loss in curve]), rate))
    log.info("suggested: --set train.lr=%.2g (no model was trained; the curve is in %s)", rate, path)
    return Outcome("done", None, {"lr_find": path}, {"train.lr_suggested": float(f"{rate:.3g}")})


def few_steps(config: Train, rows: int, ranks: int) -> str | None:
    """The warning that there are too few to learn anything. Raises ContractError when a rank would have no row."""
    steps = steps_per_epoch(rows, ranks, config.batch_size) * config.epochs
    if steps >= FEW_STEPS:
        return None
    warning = (
        f"at most {steps} steps change the model: {rows:,} train rows, {ranks} ranks of train.batch_size "
        f"{config.batch_size:,}, train.epochs {config.epochs}; needed some {FEW_STEPS} to learn anything: lower "
        "train.batch_size"
    )
    log.warning("%s", warning)
    return warning


def _check_negatives(config: Config) -> None:
    """The train table must hold what this config reads."""
    source, n, draws = config.negatives_from, config.negatives.per_positive, config.negatives.draws
    if source and (not n or (source == "table" and not draws)):
        raise ConfigError(
            f"negatives.per_positive is {n} and negatives.draws is {draws} with train.loss={config.loss} and "
            f"train.negatives={config.train.negatives}; needed at least 1 of both, or train.negatives=online"
        )
