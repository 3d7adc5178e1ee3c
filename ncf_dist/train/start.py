"""Starting from trained weights: NeuMF from a GMF and an MLP, or a model from an earlier one of its own kind. Here the
job chooses what to start from, without torch; `start_weights.py` gives a rank's model those weights.

Only from a model whose user and item index tonight's begin with (`ncf_dist/ancestry.py`): the rows of an earlier
embedding table are then the first rows of today's. A warm start keeps them. A new row starts at the mean of the old
ones plus its fresh initial value: an average user or item, yet unlike any other. The row of a forgotten user starts
afresh. All other weights are kept, and no state of an optimiser.
"""

from __future__ import annotations

import logging
import posixpath
from typing import Any

from ncf_dist import config as settings
from ncf_dist.ancestry import Index, Line, index_sizes
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle
from ncf_dist.earlier import rejected
from ncf_dist.errors import ContractError
from ncf_dist.stage import production_runs

log = logging.getLogger(__name__)

PREVIOUS = "previous"
SAME = {"name", "factors", "layers", "biases", "embedding_sizes", "batch_norm", "y_range"} | {
    *("history", "block", "blocks", "heads", "gaps")
}
"""What of `model` must be equal for one model's weights to fit another."""


def start_bundle(train: settings.Train, model: settings.Model, line: Line, table: str) -> str | None:
    """The bundle that a warm start begins with: the named one; with `previous` the newest of an earlier night that is a
    model of this kind, whose index tonight's begins with, and which no gate refused and no rollback took back; None for
    a fresh start. table: the published one's name."""
    if train.warm_start != PREVIOUS:
        return train.warm_start
    wanted = kind(model)
    # A night may have several runs, of models of several kinds.
    for run in production_runs(line.lake, "train", before=line.prepare.ds):
        try:
            bundle = read_bundle(posixpath.join(run.root, BUNDLE))
            if (found := kind(bundle.model)) != wanted:
                different = {name: value for name, value in found.items() if value != wanted[name]}
                log.info("warm start: not from %s of %s, whose model has %s", bundle.model_version, run.ds, different)
                continue
            objection = line.objection(Index.of_bundle(bundle)) or rejected(line.lake, table, run)
        except ContractError as error:
            objection = str(error)
        if objection is None:
            log.info("warm start: from the model of %s, %s", run.ds, bundle.model_version)
            return bundle.path
        log.warning("warm start: not from the model of %s: %s", run.ds, objection)
    log.info(
        "warm start: no earlier night has a good model of this kind whose index tonight's begins with: a fresh start"
    )
    return None


def kind(model: settings.Model, same: set[str] = SAME) -> dict[str, Any]:
    """The settings in which two models must be equal; one that an earlier version did not store has its default."""
    return model.model_dump(mode="json", include=same)


def check_starts(config: settings.Config, line: Line, first: str | None) -> dict[str, str]:
    """The versions of the models that this one starts from. first: the bundle of a warm start.
    Raises ContractError where they do not fit."""
    versions, sizes = {}, index_sizes(line.prepare)
    if first is not None:
        bundle = read_bundle(first)
        check_start(bundle, config.model, *sizes)
        line.check(Index.of_bundle(bundle), f"train.warm_start is {bundle.path}")
        versions["warm_start"] = bundle.model_version
    if config.train.pretrained is not None:
        for name in ("gmf", "mlp"):
            bundle = read_bundle(getattr(config.train.pretrained, name))
            if bundle.model.name != name:
                raise ContractError(
                    f"train.pretrained.{name} is {bundle.path}, the bundle of a {bundle.model.name}; "
                    f"needed that of a {name}: train one with model.name={name} first"
                )
            line.check(Index.of_bundle(bundle), f"train.pretrained.{name} is {bundle.path}")
            versions[f"pretrained.{name}"] = bundle.model_version
    return versions


def check_start(bundle: Bundle, model: settings.Model, n_users: int, n_items: int, same: set[str] = SAME) -> None:
    """Raise ContractError unless `bundle` is a model of this kind whose users and items are the first of today's."""
    found, wanted = kind(bundle.model, same), kind(model, same)
    if found != wanted:
        raise ContractError(
            f"bundle {bundle.path} is of {found}, needed {wanted}: set `model` to what the bundle was trained with, "
            "or start afresh"
        )
    if bundle.n_users > n_users or bundle.n_items > n_items:
        raise ContractError(
            f"bundle {bundle.path} has {bundle.n_users:,} users and {bundle.n_items:,} items, the tables have "
            f"{n_users:,} and {n_items:,}; needed at least as many, the earlier ones first: "
            "take a bundle of this lake, or start afresh"
        )
    grown = (bundle.n_users, bundle.n_items) != (n_users, n_items)
    if grown and model.name == "embedding_nn" and model.embedding_sizes is None:
        raise ContractError(
            f"bundle {bundle.path} is for fewer users or items, and embedding_nn's sizes follow their number; "
            "needed fixed ones: train with model.embedding_sizes set from the first night on"
        )
