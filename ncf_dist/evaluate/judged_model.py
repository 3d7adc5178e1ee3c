"""The model that evaluate judges, checked before anything is computed."""

from __future__ import annotations

import posixpath

from ncf_dist import contracts
from ncf_dist.ancestry import Sizes
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle, verify_weights
from ncf_dist.config import Config
from ncf_dist.earlier import come_since
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.fitting import check_gram
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.recent import check_recent


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
