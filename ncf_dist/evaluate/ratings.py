"""Baselines of predicted ratings, which stand beside a model of explicit feedback: what do its errors beat?

- mean: the mean rating, for everybody and everything.
- biases: mean + item offset + user offset, each shrunk by how many ratings it stands on (Koren, Factor in the
  Neighbors, TKDD 2010, section 2.1).
- als: alternating least squares on the ratings (Zhou et al., AAIM 2008), fitted by Spark with evaluate.als_rank,
  als_reg and als_iterations; where a user or an item has no factors, the biases.

They learn from train and validation, and predict within the range of those ratings. Means are rounded, so that the
order of a sum does not show; ALS agrees between two runs to rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts, metrics
from ncf_dist.config import Evaluate
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.evaluate.sums import SUMS, Sums, added_up, sums_batch, totals
from ncf_dist.manifests import Manifest
from ncf_dist.spark_io import Pass, map_in_arrow, read_table

NAMES = ("mean", "biases", "als")
ITEM_SHRINK, USER_SHRINK = 25.0, 10.0
"""Ratings at the mean that an offset has beside its own (Koren's λ2 and λ3)."""
DIGITS = 6


def sums(spark: SparkSession, prepare: Manifest, config: Evaluate, seed: int, spec: FiguresPass) -> Sums:
    """Squared and absolute errors over the held-out ratings, by `name/rating/…`: the same users and the same replicates
    as the model's, so that differences are paired."""
    learned = read_table(spark, prepare, contracts.INTERACTIONS).where(F.col("split") != contracts.TEST_SPLIT)
    rows = predictions(learned, read_table(spark, prepare, contracts.TEST), config, seed)
    files = len(spec.files)
    rows = rows.withColumn("file", F.pmod("user_idx", F.lit(files)).cast("long"))
    rows = rows.repartition(files, "file").sortWithinPartitions("file", "user_idx", "item_idx")
    return added_up(map_in_arrow(rows, _error_sums(spec), SUMS), files)


def predictions(learned: DataFrame, test: DataFrame, config: Evaluate, seed: int) -> DataFrame:
    """(user_idx, item_idx, rating, mean, biases, als) of every row of test. learned: (user_idx, item_idx, rating)."""
    rated = learned.select("user_idx", "item_idx", F.col("rating").cast("double").alias("rating"))
    row = rated.select(F.avg("rating"), F.min("rating"), F.max("rating")).first()
    mean, lowest, highest = (round(row[0], DIGITS), row[1], row[2]) if row and row[0] is not None else (0.0, 0.0, 0.0)
    items = _offsets(rated.withColumn("rest", F.col("rating") - mean), "item_idx", ITEM_SHRINK)
    rest = F.col("rating") - mean - F.col("item_offset")
    users = _offsets(rated.join(items, "item_idx").withColumn("rest", rest), "user_idx", USER_SHRINK)
    held = test.select("user_idx", "item_idx", F.col("rating").cast("double").alias("rating"))
    held = held.join(items, "item_idx", "left").join(users, "user_idx", "left")
    biases = F.lit(mean) + F.coalesce("item_offset", F.lit(0.0)) + F.coalesce("user_offset", F.lit(0.0))
    fitted = _als(rated, held.select("user_idx", "item_idx"), config, seed)

    def within(value: Column) -> Column:
        return F.least(F.greatest(value, F.lit(lowest)), F.lit(highest))

    als = F.coalesce(F.nanvl(F.col("prediction").cast("double"), F.lit(None).cast("double")), biases)
    return held.join(fitted, ["user_idx", "item_idx"], "left").select(
        "user_idx", "item_idx", "rating", F.lit(mean).alias("mean"), within(biases).alias("biases"),
        within(als).alias("als"),
    )  # fmt: skip


def _offsets(rows: DataFrame, key: str, shrink: float) -> DataFrame:
    """(key, item_offset or user_offset): the sum of `rest` over how many there are and `shrink` more."""
    name = key.replace("idx", "offset")
    return rows.groupBy(key).agg(F.round(F.sum("rest") / (F.count("rest") + shrink), DIGITS).alias(name))


def _als(rated: DataFrame, held: DataFrame, config: Evaluate, seed: int) -> DataFrame:
    """`held` with the column prediction, NaN where a user or an item has no factors."""
    from pyspark.ml.recommendation import ALS

    als = ALS(
        userCol="user_idx", itemCol="item_idx", ratingCol="rating", seed=seed, rank=config.als_rank,
        regParam=config.als_reg, maxIter=config.als_iterations,
    )  # fmt: skip
    return als.fit(rated).transform(held)


def _error_sums(spec: FiguresPass) -> Pass:
    """Rows ascending in (file, user_idx, item_idx) → rows of SUMS."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        held = [batch for batch in batches if batch.num_rows]
        if not held:
            return
        table = pa.Table.from_batches(held)
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        for file in np.unique(columns["file"]).tolist():
            here = columns["file"] == file
            found = file_errors({name: column[here] for name, column in columns.items()}, spec)
            yield sums_batch(list(found), [file] * len(found), list(found.values()))

    return run


def file_errors(rows: dict[str, Any], spec: FiguresPass) -> Sums:
    """Sums of one file. rows: columns (S,) of `predictions`, ascending in user_idx."""
    user = rows["user_idx"].astype(np.int64)
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    offsets = np.append(starts, len(user))
    columns = {
        f"{name}/rating/{key}": column
        for name in NAMES
        for key, column in metrics.rating_sums(rows[name], rows["rating"], offsets).items()
    }
    return totals(columns, user[starts], spec)
