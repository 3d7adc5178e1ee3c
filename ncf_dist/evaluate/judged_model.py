"""The model that evaluate judges, checked before anything is computed."""

from __future__ import annotations

import logging
import posixpath

from ncf_dist import contracts
from ncf_dist.ancestry import Sizes
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle, verify_weights
from ncf_dist.champion import champion
from ncf_dist.config import Config
from ncf_dist.earlier import come_since
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.fitting import check_gram
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.recent import check_recent

log = logging.getLogger(__name__)


def champion_beside(config: Config, prepare: Manifest, train: Manifest) -> tuple[Manifest, Bundle] | None:
    """(train run, model) of the last published night, where tonight's model is to be compared with it and may be: it is
    another model, of users and items that tonight's begin with, and its scores are no predicted ratings. What speaks
    against it is logged."""
    lake = Lake(config.paths.lake)
    if config.gates.champion is None or config.run is not None or prepare.facts.get("feedback") == "explicit":
        return None
    if not prepare.table(contracts.TEST).rows:
        return None
    found = champion(lake, config.publish.table, prepare.ds)
    if found is None or (found.ds, found.run_key) == (train.ds, train.run_key):
        return None
    try:
        bundle = read_bundle(posixpath.join(found.root, BUNDLE))
        verify_weights(bundle)
        check_recent(bundle, prepare)
        come_since(lake, prepare, found, bundle)
    except ContractError as error:
        log.warning(
            "the model is not compared with the champion, train run %s of %s: %s", found.run_key, found.ds, error
        )
        return None
    return found, bundle


def judged_model(config: Config, prepare: Manifest, train: Manifest) -> tuple[Bundle, Sizes | None]:
    """(the model, what has come since its night where that was an earlier one).
    Raises ContractError where nothing is held out, the weights are damaged or the model is of other users and items;
    ConfigError as `check_gram` does."""
    if not prepare.table(contracts.TEST).rows:
        raise ContractError(
            "the test table is empty: no user has enough items to hold one out; "
            "give more data or lower split.min_interactions"
        )
    bundle = read_bundle(posixpath.join(train.root, BUNDLE))
    verify_weights(bundle)
    check_recent(bundle, prepare)
    since = come_since(Lake(config.paths.lake), prepare, train, bundle)
    if since is not None and any(since) and prepare.facts.get("feedback") == "explicit":
        raise ContractError(
            f"{bundle.model_version} of {train.ds} knows nothing of {since.users:,} users and {since.items:,} items of "
            f"{prepare.ds}, whose ratings it cannot predict; needed a model of this night: rerun the job train"
        )
    check_gram(config.evaluate, bundle.n_items + (since.items if since else 0))
    return bundle, since
