"""The run of score by which the champion stands in for tonight's model, for a publish that nightly does not hand it to.

It fits no config by its model, which is another night's. It counts where gates.on_refusal lets the champion rank and
the gates refuse the model that this config leads to, judged anew: the same as nightly asks before it scores.
"""

from __future__ import annotations

import logging

from ncf_dist.champion import CHAMPION, champion
from ncf_dist.config import Config
from ncf_dist.earlier import rejected
from ncf_dist.errors import GateRefused
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish import model
from ncf_dist.publish.runs import best_evaluation
from ncf_dist.stage import Upstream, decisive, find_fitting, load_run, stored

log = logging.getLogger(__name__)


def standing_in(config: Config, ds: str) -> Upstream | None:
    """What publish builds on where the champion ranks tonight; None where tonight's own model does."""
    lake = Lake(config.paths.lake)
    if config.gates.on_refusal != CHAMPION or config.run is not None:
        return None
    found = champion(lake, config.publish.table, ds)
    own = next((run for run in find_fitting(lake, config, ds, "train") if run.ds == ds), None)
    scored = _ranked_by(found, lake, config, ds) if found is not None else None
    if found is None or own is None or scored is None or not _is_refused(own, lake, config, ds):
        return None
    log.info("the model of ds %s is refused, and %s ranks in its place: %s", ds, found.root, scored.root)
    return {"score": scored, "train": found, "prepare": load_run(lake, ds, "prepare", scored.made_from("prepare"))}


def _ranked_by(train: Manifest, lake: Lake, config: Config, ds: str) -> Manifest | None:
    """The newest run of score by a model of an earlier night that fits this config otherwise."""
    wanted = decisive("score", stored("score", config))
    prepared = {run.run_key for run in find_fitting(lake, config, ds, "prepare")}
    for run in lake.stage(ds, "score").production():
        made_from = (run.inputs.get("train"), run.inputs.get("prepare") in prepared)
        if made_from == (train.run_key, True) and decisive("score", run.config) == wanted:
            return run
    return None


def _is_refused(own: Manifest, lake: Lake, config: Config, ds: str) -> bool:
    judged = best_evaluation(lake, ds, own.run_key)
    if judged is None:  # A model that gave no numbers leaves a record of that, and no evaluation.
        return rejected(lake, config.publish.table, own) is not None
    try:
        model.check(config, ds, load_run(lake, ds, "prepare", own.made_from("prepare")), judged)
    except GateRefused:
        return True
    return False
