"""What the gates of publish want to know of the data: a few numbers and two small histograms, made by Spark."""

from __future__ import annotations

import datetime as dt
import logging
import posixpath
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pyspark.sql import Column, DataFrame
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
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_io import read_files, read_table

log = logging.getLogger(__name__)

PROFILE = "profile"
"""The fact."""
ITEM_BUCKETS = 64
"""An item keeps its number for ever, so it stays in its bucket."""
BINS_AN_OCTAVE = 7
"""Of ratings: enough that half stars from 0.5 to 5 are all told apart."""
SMALLEST, LARGEST = -14, 112
"""Bins of the ratings 0.25 and 65,536; what is smaller or larger is in these."""


def profile(
    space: Workspace,
    ds: str,
    ingested: Ingested,
    indexes: Indexes,
    tables: Mapping[str, TableInfo],
    base: Manifest | None,
    before: Manifest | None,
) -> dict[str, Any]:
    """new_users_a_day, since the base; quarantine, the share of the rows that are not for later nights; age_days, of
    the newest interaction; vanished, the share of the interactions of the run `before` whose user or item is gone;
    ratings and items, how many interactions are in each bin. None is what nothing is known of."""
    rows = read_files(space.spark, space.files(tables[contracts.INTERACTIONS.name]), contracts.INTERACTIONS.schema)
    grouped = rows.groupBy(F.pmod("item_idx", F.lit(ITEM_BUCKETS)).alias("item"), rating_bin().alias("rating"))
    ratings, items, newest = Counter[str](), Counter[str](), 0
    for row in grouped.agg(F.count("*").alias("rows"), F.max("timestamp").alias("newest")).collect():
        ratings[str(row["rating"])] += row["rows"]
        items[str(row["item"])] += row["rows"]
        newest = max(newest, row["newest"])
    late = ingested.quarantined.get(LATE, 0)
    night = dt.date.fromisoformat(ds)
    return {
        "new_users_a_day": _new_users(indexes, base, night),
        "quarantine": (sum(ingested.quarantined.values()) - late) / max(1, ingested.read - late),
        "age_days": (contracts.day_start(night) - newest) / contracts.DAY if newest else None,
        "vanished": _vanished(space, before, rows, tables) if before else None,
        "ratings": dict(ratings),
        "items": dict(items),
    }


def rating_bin() -> Column:
    """A bin by the logarithm, so that it is a function of the rating alone, whatever the scale; 0 has its own."""
    rating = F.col("rating").cast("double")
    octave = F.floor(F.log2(F.abs(rating)) * F.lit(BINS_AN_OCTAVE)).cast("int")
    place = F.greatest(F.lit(SMALLEST), F.least(F.lit(LARGEST), octave)) + F.lit(1 - SMALLEST)
    return F.when(rating == 0, F.lit(0)).otherwise(place * F.signum(rating).cast("int"))


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


def _vanished(space: Workspace, before: Manifest, tonight: DataFrame, tables: Mapping[str, TableInfo]) -> float | None:
    history = space.files(tables[contracts.HISTORY.name])
    users = read_files(space.spark, history, contracts.HISTORY.schema).select("user_idx", F.lit(True).alias("_user"))
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
