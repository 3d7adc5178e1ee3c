"""Who ranks in the place of a model that a gate has refused."""

from __future__ import annotations

from collections.abc import Mapping

from ncf_dist.champion import CHAMPION, champion
from ncf_dist.config import Config
from ncf_dist.earlier import objection
from ncf_dist.errors import GateRefused, ScoresNotFinite
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.publish.model import refused as refused_model


def stand_in(config: Config, ds: str, made: Mapping[str, Manifest], error: GateRefused) -> tuple[Manifest, GateRefused]:
    """The champion's run of train, where gates.on_refusal says so and there is one that may rank; and the refusal.
    Raises the refusal where there is none. made: this night's runs by stage."""
    lake, table = Lake(config.paths.lake), config.publish.table
    if isinstance(error, ScoresNotFinite):
        said, error = error.extra, refused_model(config, ds, made["train"].run_key, str(error))
        error.extra = {**said, **error.extra}
    found = champion(lake, table, ds) if config.gates.on_refusal == CHAMPION else None
    if found is None or objection(lake, table, made["prepare"], found) is not None:
        raise error from None
    return found, error
