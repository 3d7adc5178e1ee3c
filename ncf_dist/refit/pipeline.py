"""The job refit: once the gates of the model have passed, the same settings are trained on every row of the log, for as
many epochs as were kept of the training that was judged (train.refit). `ncf_dist/refits.py` says who finds the refit.
"""

from __future__ import annotations

import logging
import posixpath

from ncf_dist.bundle import BUNDLE, read_bundle
from ncf_dist.config import Config, Split
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.model import check as check_model
from ncf_dist.publish.runs import best_evaluation
from ncf_dist.refits import REFIT, name_of, refit_of
from ncf_dist.spark_io import lent_to_ranks
from ncf_dist.stage import Outcome, Upstream, find_upstream
from ncf_dist.train.pipeline import train

log = logging.getLogger(__name__)


def refit(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Train the judged model of night `ds` once more. Nothing is trained for a model of an earlier night, whose own
    night it was. Raises ConfigError where train.refit is false; ContractError where the model was not judged, or the
    log has changed since; GateRefused where a gate refuses the model; and what prepare and train raise."""
    if not config.train.refit:
        raise ConfigError("train.refit is false; needed true for a refit: --set train.refit=true, in every job")
    lake = Lake(config.paths.lake)
    upstream = find_upstream(lake, config, ds, "score", given)
    judged, tables = upstream["train"], upstream["prepare"]
    if (before := refit_of(lake, judged)) is not None:
        log.info("already trained: %s, the refit of %s", before.root, judged.root)
        return _outcome(before, judged, "already-done")
    if judged.ds != ds:
        log.info("nothing is refitted tonight: %s ranks, which has no refit", judged.root)
        return Outcome("already-done")
    if config.run is None:  # An experiment is not published, so no gate is asked.
        _check_judged(lake, config, tables, judged)
    every = prepare(_of_every_row(config, tables), ds).manifest
    assert every is not None
    _check_same_log(tables, every)
    with lent_to_ranks(config):
        made = train(settings_of(config, judged), ds, {"prepare": every}).manifest
    assert made is not None
    return _outcome(made, judged, "done")


def settings_of(config: Config, judged: Manifest) -> Config:
    """What the judged training was made with, and what its validation rows chose: how many epochs, and the weights of
    the item-to-item parts."""
    kept = judged.metrics.get("train.best_epoch")
    chosen = judged.facts.get("parts", {}).get("weights", {})
    parts = {
        name: part.model_copy(update={"weights": (chosen[name],)})
        for name, part in (("counts", config.item_parts.counts), ("ease", config.item_parts.ease))
        if part is not None and name in chosen
    }
    training = {"refit": False, "every": None, "lr_find": False, "stop_after": None if kept is None else kept + 1}
    return _of_every_row(config, judged).model_copy(
        update={
            "parts": config.parts.model_copy(update=parts),
            "train": config.train.model_copy(update=training),
        }
    )


def _of_every_row(config: Config, whose: Manifest) -> Config:
    """Every row of the log is a train row, and the runs are those of the refit of `whose`."""
    return config.model_copy(update={"run": name_of(whose), "split": Split(strategy="none", ties=config.split.ties)})


def _check_judged(lake: Lake, config: Config, tables: Manifest, judged: Manifest) -> None:
    evaluation = best_evaluation(lake, judged.ds, judged.run_key)
    if evaluation is None:
        raise ContractError(
            f"{judged.root} was not judged, and its refit cannot be; needed a run of evaluate of it: run the job "
            "evaluate first"
        )
    check_model(config, judged.ds, tables, evaluation)


def _check_same_log(judged: Manifest, every: Manifest) -> None:
    """Raise ContractError unless both were made from the same rows, users and items."""
    differing = [name for name in every.inputs if every.inputs[name] != judged.inputs.get(name)]
    if differing:
        raise ContractError(
            f"the log has changed since {judged.root} was prepared ({', '.join(differing)}), and a refit is of the "
            "same rows; needed what was judged: run the line again from the job prepare on"
        )


def _outcome(run: Manifest, judged: Manifest, status: str) -> Outcome:
    bundle, of = (read_bundle(posixpath.join(one.root, BUNDLE)) for one in (run, judged))
    log.info("%s is the refit of %s, and ranks in its place", bundle.model_version, of.model_version)
    said = {"model_version": bundle.model_version, "refit_of": of.model_version}
    return Outcome(status, run.run_key, {REFIT: bundle.path}, {}, said, run)
