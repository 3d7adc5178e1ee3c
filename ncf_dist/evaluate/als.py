"""The ALS baseline, fitted by Spark (Hu, Koren & Volinsky, ICDM 2008).

Its floating point sums follow Spark's shuffles, so factors of two runs agree to rounding, not to the bit.
"""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist.config import Evaluate
from ncf_dist.contracts import FLOAT_LIST, INDEX, Contract
from ncf_dist.evaluate.spec import ALS_USER
from ncf_dist.parquet import TableInfo
from ncf_dist.spark_io import ROWS_PER_FILE, write_table

ITEM_FACTORS = Contract(
    "als_items",
    pa.schema([pa.field("item_idx", INDEX, nullable=False), pa.field("factors", FLOAT_LIST, nullable=False)]),
    ("item_idx",),
    "factors of the items that anybody has in train or validation",
    "evaluate",
)


def fit_als(history: DataFrame, config: Evaluate, seed: int, folder: str) -> tuple[DataFrame, TableInfo]:
    """(rows (user_idx, als_user), table of item factors under `folder`). history: rows (user_idx, item_idx list)."""
    from pyspark.ml.recommendation import ALS

    rows = history.select("user_idx", F.explode("item_idx").alias("item_idx"), F.lit(1.0).alias("rating"))
    als = ALS(
        userCol="user_idx", itemCol="item_idx", implicitPrefs=True, seed=seed, rank=config.als_rank,
        regParam=config.als_reg, alpha=config.als_alpha, maxIter=config.als_iterations,
    )  # fmt: skip
    model = als.fit(rows)
    items = model.itemFactors.select(F.col("id").alias("item_idx"), F.col("features").alias("factors"))
    table = write_table(items, folder, ITEM_FACTORS, F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE)))
    return model.userFactors.select(F.col("id").alias("user_idx"), F.col("features").alias(ALS_USER)), table
