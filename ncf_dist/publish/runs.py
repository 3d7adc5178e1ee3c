"""The runs that a night is published from: score's, prepare's, and evaluate's of the model that score used."""

from __future__ import annotations

import logging
import posixpath
from dataclasses import dataclass

from ncf_dist import metrics
from ncf_dist.config import Config
from ncf_dist.contracts import INTERACTIONS
from ncf_dist.errors import ContractError
from ncf_dist.files import read_json
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish import gates
from ncf_dist.stage import Upstream, find_upstream

log = logging.getLogger(__name__)

STAGE = "publish"


@dataclass(frozen=True)
class Runs:
    """What the night was made by. evaluate: of the model that score used, where it was evaluated."""

    prepare: Manifest
    score: Manifest
    evaluate: Manifest | None


def find_runs(lake: Lake, config: Config, ds: str, given: Upstream | None) -> Runs:
    """Raises ContractError where no finished run of score fits this config."""
    upstream = find_upstream(lake, config, ds, STAGE, given)
    evaluate = best_evaluation(lake, ds, upstream["train"].run_key)
    return Runs(upstream["prepare"], upstream["score"], evaluate)


def best_evaluation(lake: Lake, ds: str, train_run: str) -> Manifest | None:
    """The newest of tonight's of a model; but one that compares says more than one that does not, also where tonight's
    config has no baselines."""
    judged = lake.stage(ds, "evaluate").production()
    return max((run for run in judged if run.inputs.get("train") == train_run), key=_says, default=None)


def _says(run: Manifest) -> int:
    """How much a run of evaluate says: nothing, figures, or a comparison with popularity."""
    if not run.tables:
        return 0
    try:
        found = evaluated(run)
    except ContractError as error:
        log.warning("%s", error)
        return 1
    assert found is not None
    compared = found.figures.comparisons if found.figures else ()
    return 2 if any(row.other == "popularity" for row in compared) else 1


def interactions_of(prepare: Manifest) -> int | None:
    """How many interactions prepare kept; None where an earlier version did not say."""
    table = prepare.tables.get(INTERACTIONS.name)
    return table.rows if table else None


def published_interactions(lake: Lake, ds: str, score_run: str | None) -> int | None:
    """How many interactions a published night was made from; None where its runs are gone, or damaged."""
    try:
        score = lake.stage(ds, "score").find(score_run) if score_run else None
        prepare = lake.stage(ds, "prepare").find(str(score.inputs.get("prepare"))) if score else None
        return interactions_of(prepare) if prepare else None
    except ContractError as error:
        log.warning("the interactions of ds %s, which is published, are compared with nothing: %s", ds, error)
        return None


def evaluated(run: Manifest | None) -> gates.Evaluated | None:
    """What the gates use of a run of evaluate. Raises ContractError where its figures cannot be read."""
    if run is None:
        return None
    if not run.tables:
        return gates.Evaluated(run.run_key, None)
    path = posixpath.join(run.root, metrics.STORED)
    try:
        return gates.Evaluated(run.run_key, read_json(gates.Figures, path, more_keys=True))
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{path} cannot be read ({error}); needed the figures of evaluate run "
            f"{run.run_key}: remove {run.root} and rerun the job evaluate"
        ) from None
