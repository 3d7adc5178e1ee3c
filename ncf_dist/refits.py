"""The refit of a judged model (train.refit): the same settings trained once more, on every row, the held-out ones too.
It ranks in the place of the model that was judged, and nobody judges it: it has seen the rows by which it would be.

Its runs of prepare and of train are an experiment's, by a name that says whose refit it is. So no stage finds them by
its config, and neither an evaluation, a warm start nor the next night's champion is of a refit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncf_dist.bundle import Bundle
from ncf_dist.config import Config
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest

REFIT = "refit"
"""Of the inputs of a score run the refit's run of train, and of its facts what it is the refit of."""


def name_of(run: Manifest) -> str:
    """The name of the runs that a refit of `run` makes."""
    return f"{REFIT}-{run.run_key}"


def judged_of(run: Manifest, runs: Iterable[Manifest]) -> Manifest | None:
    """The run of train, of these, that `run` is the refit of; None where it is no refit."""
    return next((other for other in runs if run.name == name_of(other)), None)


def refit_of(lake: Lake, train: Manifest) -> Manifest | None:
    """The run of train that is the refit of another."""
    name = name_of(train)
    return next((run for run in lake.stage(train.ds, "train").finished() if run.name == name), None)


def in_place_of(lake: Lake, config: Config, ds: str, train: Manifest) -> Manifest | None:
    """The refit that ranks night `ds` in place of `train`; None where `train` itself ranks: train.refit is false, or it
    is a model of an earlier night that has none. Raises ContractError where tonight's own has none."""
    found = refit_of(lake, train) if config.train.refit else None
    if config.train.refit and found is None and train.ds == ds:
        raise ContractError(
            f"train.refit is true, and {train.root} has no refit; needed one, which is trained once the model has been "
            "judged: run the job refit after evaluate, or set train.refit=false to rank by the model itself"
        )
    return found


def said_of(train: Manifest, judged: Bundle, refit: Manifest) -> dict[str, Any]:
    """Facts of a run that ranks by a refit: the model and the run of train that were judged, and its own run."""
    return {REFIT: {"of": judged.model_version, "train": train.run_key, "run": refit.run_key}}


def fits(config: Config, score: Manifest) -> bool:
    """Whether a run of score was ranked by a refit if this config asks for one, and else was not. A model of an earlier
    night may have none."""
    return (REFIT in score.inputs) == config.train.refit or (config.train.refit and "earlier_model" in score.facts)
