"""What the night's data is: counts, the long tail, who is active, when, and what was quarantined.

The driver holds the catalogue's counts (8 bytes an item) and histograms; whatever is as large as the users or the
interactions is counted by Spark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.contracts import DAY
from ncf_dist.evaluate.periods import period_codes, period_name, unit_of
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_table as read_file
from ncf_dist.spark_io import read_table

TOP_PERCENTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 80, 100)
SAMPLES = 10
MOST_PERIODS = 200
"""Years that are shown at most, the last ones; a span in a finer unit has fewer periods anyway."""
EDGES = [m * 10**power for power in range(12) for m in (1, 2, 5)]
"""Bins of counts: 1, 2–4, 5–9, 10–19, …"""


def profile(spark: SparkSession, prepare: Manifest) -> dict[str, Any]:
    """The section `profile` of the report; users and items are those with interactions this night."""
    counts = item_counts(prepare)
    interactions = prepare.table(contracts.INTERACTIONS).rows
    users, items = int(prepare.facts["active_users"]), int((counts > 0).sum())
    history = read_table(spark, prepare, contracts.HISTORY)
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "density": interactions / (users * items) if users and items else 0.0,
        "rows": prepare.facts["rows"],
        "quarantine_samples": quarantine_samples(spark, prepare),
        "long_tail": long_tail(counts),
        "activity": activity(history),
        "item_counts": _binned(counts),
        "by_time": by_time(read_table(spark, prepare, contracts.INTERACTIONS)),
    }


def item_counts(prepare: Manifest) -> npt.NDArray[np.int64]:
    """(I,) train and validation interactions of every item."""
    files = prepare.files(contracts.ITEM_STATS.name)
    return np.concatenate([read_file(path, ["train_count"])["train_count"].to_numpy() for path in files])


def long_tail(counts: npt.NDArray[np.int64]) -> list[list[float]]:
    """[percent, share]: what share of the interactions the most popular so many percent of the items hold. Items
    nobody touched are left out; a percentage is rounded up to whole items."""
    sorted_counts = np.sort(counts[counts > 0])[::-1]
    if not len(sorted_counts):
        return []
    share = np.cumsum(sorted_counts) / sorted_counts.sum()
    return [[percent, float(share[-(-len(share) * percent // 100) - 1])] for percent in TOP_PERCENTS]


def activity(history: DataFrame) -> dict[str, list[int]]:
    """{"edges", "users"}: users by their number of interactions, train, validation and test together; bin i holds
    edges[i] up to, not including, edges[i + 1]."""
    size = F.size("item_idx") + F.size("test_item_idx")
    rows = history.groupBy(_bin(size).alias("bin")).count().where("bin >= 0").collect()
    edges, found = _trimmed({row["bin"]: row["count"] for row in rows})
    return {"edges": edges, "users": found}


def by_time(interactions: DataFrame) -> dict[str, Any]:
    """`by_period` of the log's interactions; {} where it has no times."""
    day = F.floor(F.col("timestamp") / F.lit(DAY)).cast("long")
    rows = interactions.where("timestamp != 0").groupBy(day.alias("day")).count().collect()
    return by_period({row["day"]: row["count"] for row in rows})


def by_period(by_day: Mapping[int, int]) -> dict[str, Any]:
    """Counts by day since 1970 → {"unit": "month", "counts": [["2000-01", interactions], …]}: every period from the
    first to the last, empty ones too, but for a log with years that cannot be right; {} without any."""
    if not by_day:
        return {}
    unit = unit_of(min(by_day) * DAY, max(by_day) * DAY)
    codes = period_codes(np.array(list(by_day), dtype=np.int64) * DAY, unit).tolist()
    held: Counter[int] = Counter()
    for code, count in zip(codes, by_day.values(), strict=True):
        held[code] += count
    periods = range(min(held), max(held) + 1)
    shown = periods if len(periods) <= MOST_PERIODS else sorted(held)[-MOST_PERIODS:]
    return {"unit": unit, "counts": [[period_name(code, unit), held[code]] for code in shown]}


def quarantine_samples(spark: SparkSession, prepare: Manifest) -> list[dict[str, Any]]:
    """At most SAMPLES rows of the quarantine as it stands, the first of each reason before the second of any."""
    if not prepare.table(contracts.QUARANTINE).rows:
        return []
    rows = read_table(spark, prepare, contracts.QUARANTINE)
    place = F.row_number().over(Window.partitionBy("reason").orderBy("file", "place"))
    first = rows.withColumn("_place", place).orderBy("_place", "reason").limit(SAMPLES)
    return [row.asDict() for row in first.select(*contracts.QUARANTINE.columns).collect()]


def _bin(value: Column) -> Column:
    """Index of the last edge that is not above `value`; -1 below the first."""
    return sum((value >= edge).cast("int") for edge in EDGES[1:]) + (value >= EDGES[0]).cast("int") - 1


def _binned(counts: npt.NDArray[np.int64]) -> dict[str, list[int]]:
    found = np.searchsorted(EDGES, counts[counts > 0], side="right") - 1
    edges, items = _trimmed(dict(enumerate(np.bincount(found).tolist())))
    return {"edges": edges, "items": items}


def _trimmed(by_bin: dict[int, int]) -> tuple[list[int], list[int]]:
    """(edges, counts) from the first bin to the last one that holds anything."""
    filled = [number for number, count in by_bin.items() if count]
    if not filled:
        return [], []
    first, last = min(filled), max(filled)
    return EDGES[first : last + 2], [by_bin.get(number, 0) for number in range(first, last + 1)]
