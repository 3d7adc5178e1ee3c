"""The champion of a night: the model of the newest night before it that readers see."""

from __future__ import annotations

import logging

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from ncf_dist.contracts import PARTITION
from ncf_dist.errors import ContractError
from ncf_dist.files import delta_options, exists
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.stage import load_run

log = logging.getLogger(__name__)

CHAMPION = "champion"


def champion(lake: Lake, table: str, ds: str) -> Manifest | None:
    """Its train run. None on a first night, and where the published night's runs are gone or cannot be read."""
    root = lake.path(table)
    try:
        if not exists(f"{root}/_delta_log"):
            return None
        actions = DeltaTable(root, storage_options=delta_options(root)).get_add_actions(flatten=True)
        nights: dict[str, str] = dict(
            zip(actions.column(f"partition.{PARTITION}").to_pylist(), actions.column("path").to_pylist(), strict=True)
        )
        night = max((night for night in nights if night < ds), default=None)
        if night is None:
            return None
        # Whoever published a file named it by its run.
        scored = [run for run in lake.stage(night, "score").finished() if f"-{run.run_key}-" in nights[night]]
        return load_run(lake, night, "train", scored[0].made_from("train")) if scored else None
    except (ContractError, DeltaError, KeyError, OSError) as error:
        log.warning("the champion of %s cannot be told, so nothing is compared with it (%s)", ds, error)
        return None
