"""The champion of a night: the model of the newest night before it that readers see."""

from __future__ import annotations

import logging

from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.published import nights_before, shown
from ncf_dist.stage import load_run

log = logging.getLogger(__name__)

CHAMPION = "champion"


def champion(lake: Lake, table: str, ds: str) -> Manifest | None:
    """Its train run. None on a first night, and where the published night's runs are gone or cannot be read."""
    try:
        now = shown(lake, table)
        for night in nights_before(now.nights, ds)[:1]:
            scored = now.score_run(lake, night)
            return load_run(lake, night, "train", scored.made_from("train")) if scored is not None else None
        return None
    except (ContractError, OSError) as error:
        log.warning("the champion of %s cannot be told, so nothing is compared with it (%s)", ds, error)
        return None
