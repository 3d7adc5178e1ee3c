"""What the night's data is: counts, the long tail, who is active, when, and what was quarantined.

The driver holds the catalogue's counts (8 bytes an item) and histograms; whatever is as large as the users or the
interactions is counted by Spark.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.contracts import DAY
from ncf_dist.evaluate.lists import train_counts
from ncf_dist.evaluate.periods import period_codes, period_name, unit_of
from ncf_dist.manifests import Manifest
from ncf_dist.spark_io import read_table

TOP_PERCENTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 80, 100)
SAMPLES = 10
MOST_PERIODS = 200
"""Years that are shown at most, the last ones; a span in a finer unit has fewer periods anyway."""
EDGES = [m * 10**power for power in range(12) for m in (1, 2, 5)]
"""Bins of counts: 1, 2–4, 5–9, 10–19, …"""


@dataclass(frozen=True)
class Counted:
    """by_day: interactions that have a time, by day since 1970; rated: the least, the greatest and the mean rating of
    train and validation, None where there are none."""

    by_day: Mapping[int, int]
    rated: tuple[float, float, float] | None

    @classmethod
    def of(cls, interactions: DataFrame) -> Counted:
        """One pass over the table: its driver holds a few numbers a day."""
        day = F.when(F.col("timestamp") != 0, F.floor(F.col("timestamp") / F.lit(DAY)).cast("long"))
        rating = F.when(F.col("split") != contracts.TEST_SPLIT, F.col("rating").cast("double"))
        figures = {"least": F.min(rating), "most": F.max(rating), "total": F.sum(rating), "rated": F.count(rating)}
        named = [F.count("*").alias("rows"), *(column.alias(name) for name, column in figures.items())]
        days = interactions.groupBy(day.alias("day")).agg(*named).collect()
        by_day = {row["day"]: row["rows"] for row in days if row["day"] is not None}
        rated = [row for row in days if row["rated"]]
        if not rated:
            return cls(by_day, None)
        mean = math.fsum(row["total"] for row in rated) / sum(row["rated"] for row in rated)
        return cls(by_day, (min(row["least"] for row in rated), max(row["most"] for row in rated), mean))


def profile(spark: SparkSession, prepare: Manifest, counted: Counted) -> dict[str, Any]:
    """The section `profile` of the report; users and items are those with interactions this night."""
    counts = train_counts(prepare.files(contracts.ITEM_STATS.name))
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
        "item_counts": item_activity(counts),
        "by_time": by_period(counted.by_day),
    }


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
    # N interactions have at most sqrt(2 N) different sizes.
    rows = history.groupBy(size.alias("size")).agg(F.count("*").alias("users")).collect()
    edges, users = binned([row["size"] for row in rows], [row["users"] for row in rows])
    return {"edges": edges, "users": users}


def item_activity(counts: npt.NDArray[np.int64]) -> dict[str, list[int]]:
    """{"edges", "items"}: the same of items, by their train and validation interactions."""
    edges, items = binned(*np.unique(counts, return_counts=True))
    return {"edges": edges, "items": items}


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


def binned(values: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[list[int], list[int]]:
    """(edges, the sum of the weights in each bin) from the first bin to the last one that holds anything; values below
    1 are in none."""
    found = np.searchsorted(EDGES, np.asarray(values, dtype=np.int64), side="right") - 1
    held = np.zeros(len(EDGES), dtype=np.int64)
    np.add.at(held, found[found >= 0], np.asarray(weights, dtype=np.int64)[found >= 0])
    filled = np.flatnonzero(held)
    if not len(filled):
        return [], []
    first, last = int(filled[0]), int(filled[-1])
    return EDGES[first : last + 2], held[first : last + 1].tolist()
