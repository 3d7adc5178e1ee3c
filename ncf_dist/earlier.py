"""A model of an earlier night beside a later night's tables: lawful where the later index begins with the one that the
model was trained on (`ancestry`), whatever the model is."""

from __future__ import annotations

import logging
import posixpath
from typing import Any

from ncf_dist.ancestry import Index, Line, Sizes, index_sizes
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle
from ncf_dist.errors import ContractError
from ncf_dist.files import list_names, read_json
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.published import shown

log = logging.getLogger(__name__)

GATES = "gates"
"""Folder of a night in which publish keeps a record a score run: which `train_run` it is ranked by, and the names of
the gates that `refused` it."""


def come_since(lake: Lake, prepare: Manifest, train: Manifest, bundle: Bundle) -> Sizes | None:
    """How many users and items `prepare` has numbered that the model does not know; None where it was trained on this
    very run. Raises ContractError unless this run's index begins with the one that the model was trained on."""
    if (train.ds, train.inputs.get("prepare")) == (prepare.ds, prepare.run_key):
        return None
    if (why := Line(lake, prepare).objection(Index.of_bundle(bundle))) is not None:
        raise ContractError(
            f"train run {train.run_key} of {train.ds}: its rows may belong to other users and items: {why}; needed a "
            "model whose prepare run this night's index extends: rerun the job train for this night"
        )
    sizes = index_sizes(prepare)
    return Sizes(sizes.users - bundle.n_users, sizes.items - bundle.n_items)


def objection(lake: Lake, table: str, prepare: Manifest, train: Manifest) -> str | None:
    """Why the model of an earlier night is not to rank `prepare`'s; None where nothing speaks against it. table: the
    published one's name."""
    try:
        since = come_since(lake, prepare, train, read_bundle(posixpath.join(train.root, BUNDLE)))
    except ContractError as error:
        return str(error)
    if since is not None and any(since) and prepare.facts.get("feedback") == "explicit":
        return f"it cannot predict ratings of {since.users:,} users and {since.items:,} items that have come since"
    return rejected(lake, table, train)


def rejected(lake: Lake, table: str, train: Manifest) -> str | None:
    """Why no later night is to build on a model: a gate refused it in its own night, or that night was rolled back."""
    return _refused(lake, train) or _rolled_back(lake, table, train)


def _refused(lake: Lake, train: Manifest) -> str | None:
    """What a gate said against the model in its own night, by the record that publish left of it."""
    folder = lake.path("runs", train.ds, GATES)
    for name in list_names(folder):
        try:
            record = read_json(dict[str, Any], posixpath.join(folder, name))
        except (OSError, ValueError) as error:
            log.warning("%s/%s cannot be read (%s): it is passed over", folder, name, error)
            continue
        if record.get("train_run") == train.run_key and record.get("refused"):
            return f"it was refused by {', '.join(map(str, record['refused']))}"
    return None


def _rolled_back(lake: Lake, table: str, train: Manifest) -> str | None:
    """What a rollback said of the model's own night, unless it was published again. A run that is gone is taken for one
    of this model."""
    try:
        now = shown(lake, table)
        keys = sorted(key for ds, key in now.undone if ds == train.ds)
        seen = now.score_run(lake, train.ds) if keys else None
        if seen is not None and seen.inputs.get("train") == train.run_key:
            return None
        for key in keys:
            scored = lake.stage(train.ds, "score").find(key)
            if scored is None or scored.inputs.get("train") == train.run_key:
                return f"a rollback took the run {key} of {train.ds} back, which it ranked"
    except (ContractError, OSError) as error:
        log.warning("whether the night %s was rolled back cannot be told (%s)", train.ds, error)
    return None


def earlier_model(train: Manifest, bundle: Bundle, since: Sizes, users: str) -> dict[str, Any]:
    """Facts of a run that ranks by a model of an earlier night, and the warning that it logs and gives on. users: how
    those whom the model does not know are ranked, as a clause."""
    ranked = "ranked by what they did" if bundle.by_history else "ranked by popularity"
    warning = (
        f"the model {bundle.model_version} is of {train.ds}: {since.users:,} users have come since, who are {ranked} "
        f"({users}), and {since.items:,} items, which are not offered; run the job train to have them in the model"
    )
    if any(since):
        log.warning("%s", warning)
    log.info("ranked by the model of %s: %s", train.ds, bundle.model_version)
    known = {"ds": train.ds, "users": bundle.n_users, "items": bundle.n_items, "by_history": bundle.by_history}
    new = {"new_users": since.users, "new_items": since.items}
    return {"earlier_model": known | new, "warnings": [warning] if any(since) else []}


def said(run: Manifest) -> dict[str, Any]:
    """What such a run says in its last line beside its metrics; nothing for a run by a model of its own night."""
    model_of = {"model_of": run.facts["earlier_model"]["ds"]} if "earlier_model" in run.facts else {}
    return model_of | ({"warnings": run.facts["warnings"]} if "warnings" in run.facts else {})
