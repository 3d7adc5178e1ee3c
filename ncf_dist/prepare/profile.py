"""What the gates of publish want to know of the data: a few numbers and two small histograms."""

from __future__ import annotations

import datetime as dt
import logging
import posixpath
from collections.abc import Mapping
from typing import Any

from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.ancestry import index_sizes
from ncf_dist.errors import ContractError
from ncf_dist.files import exists, read_json
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.ingest import Ingested
from ncf_dist.prepare.interactions import LATE
from ncf_dist.prepare.user_tables import UserTables
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_io import read_files, read_table

log = logging.getLogger(__name__)

PROFILE = "profile"
"""The fact."""


def profile(
    space: Workspace,
    ds: str,
    ingested: Ingested,
    indexes: Indexes,
    users: UserTables,
    base: Manifest | None,
    before: Manifest | None,
) -> dict[str, Any]:
    """new_users_a_day, since the base; quarantine, the share of the rows that are not for later nights; age_days, of
    the newest interaction; vanished, the share of the interactions of the run `before` whose user or item is gone;
    ratings and items, how many interactions are in each bin. None is what nothing is known of."""
    newest = users.bins.newest
    late = ingested.quarantined.get(LATE, 0)
    night = dt.date.fromisoformat(ds)
    return {
        "new_users_a_day": _new_users(indexes, base, night),
        "quarantine": (sum(ingested.quarantined.values()) - late) / max(1, ingested.read - late),
        "age_days": (contracts.day_start(night) - newest) / contracts.DAY if newest else None,
        "vanished": _vanished(space, before, users.tables) if before else None,
        "ratings": dict(users.bins.ratings),
        "items": dict(users.bins.items),
    }


def last_published(lake: Lake, table: str, base: Manifest | None, ds: str) -> Manifest | None:
    """The prepare run of the newest published night, where that is before `ds` and tonight's index extends its own;
    else the base. A night that was refused is no measure, if it can be helped."""
    try:
        path = lake.path(table, "latest.json")
        latest = read_json(dict[str, Any], path) if base and exists(path) else {}
        night, key = str(latest.get("ds")), str(latest.get("run_key"))
        if base is None or not latest or night >= ds:
            return base
        score = lake.stage(night, "score").find(posixpath.basename(key))
        wanted = score.inputs.get("prepare") if score else None
        run: Manifest | None = base
        while run is not None and run.ds >= night:
            if (run.ds, run.run_key) == (night, wanted):
                return run
            further = run.inputs.get("index")
            run = lake.stage(further["ds"], "prepare").find(further["run_key"]) if further else None
    except (ContractError, ValueError, OSError) as error:
        log.warning("the published night before %s cannot be told (%s)", ds, error)
    return base


def _new_users(indexes: Indexes, base: Manifest | None, night: dt.date) -> float | None:
    if base is None:
        return None
    days = max(1, (night - dt.date.fromisoformat(base.ds)).days)
    return (indexes.sizes.users - index_sizes(base).users) / days


def _vanished(space: Workspace, before: Manifest, tables: Mapping[str, TableInfo]) -> float | None:
    tonight, users = (
        read_files(space.spark, space.files(tables[contract.name]), contract.schema)
        for contract in (contracts.INTERACTIONS, contracts.HISTORY)
    )
    users = users.select("user_idx", F.lit(True).alias("_user"))
    items = tonight.select("item_idx").distinct().withColumn("_item", F.lit(True))
    then = read_table(space.spark, before, contracts.INTERACTIONS).select("user_idx", "item_idx")
    gone = F.isnull("_user") | F.isnull("_item")
    counts = (
        then.join(users, "user_idx", "left")
        .join(items, "item_idx", "left")
        .agg(F.count("*").alias("rows"), F.coalesce(F.sum(gone.cast("bigint")), F.lit(0)).alias("gone"))
        .collect()[0]
    )
    return counts["gone"] / counts["rows"] if counts["rows"] else None
