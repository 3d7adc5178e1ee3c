"""The baselines that must be fitted before users are ranked: those on the Gram matrix by an executor, within
`evaluate.gram_bytes`, and ALS for implicit feedback (Hu, Koren & Volinsky, ICDM 2008) by Spark."""

from __future__ import annotations

import posixpath

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.config import Evaluate
from ncf_dist.contracts import FLOAT_LIST, INDEX, Contract
from ncf_dist.errors import ConfigError
from ncf_dist.evaluate.evaluation import Evaluation
from ncf_dist.evaluate.spec import ALS_USER, GramFit
from ncf_dist.item_item.memory import COPIES, bytes_to_fit
from ncf_dist.parquet import TableInfo
from ncf_dist.spark_io import ROWS_PER_FILE, on_executor, read_table, task_stats, write_table

ITEM_FACTORS = Contract(
    "als_items",
    pa.schema([pa.field("item_idx", INDEX, nullable=False), pa.field("factors", FLOAT_LIST, nullable=False)]),
    ("item_idx",),
    "factors of the items that anybody has in train or validation",
    "evaluate",
)
GRAM = ("ease", "item_knn")


def check_gram(config: Evaluate, n_items: int) -> None:
    """Raise ConfigError where a baseline's matrix of items x items takes more than `evaluate.gram_bytes`."""
    needed = bytes_to_fit(n_items)
    asked = [name for name in config.baselines if name in GRAM]
    if asked and needed > config.gram_bytes:
        raise ConfigError(
            f"evaluate.baselines asks for {' and '.join(asked)}: {n_items:,} items x {n_items:,} items x 8 bytes x "
            f"{COPIES} matrices = {needed:,} bytes; evaluate.gram_bytes allows {config.gram_bytes:,}: raise it "
            f"where executors have that much, or leave {' and '.join(asked)} out"
        )


def fit_baselines(job: Evaluation) -> tuple[dict[str, tuple[str, ...]], DataFrame | None]:
    """(files of each baseline by name, ALS's user factors or None).

    ALS adds up floats in the order of Spark's shuffles, so factors of two runs agree to rounding, not to the bit."""
    settings = job.config.evaluate
    fitted: dict[str, tuple[str, ...]] = dict.fromkeys(settings.baselines, ())
    grams: dict[str, str] = {
        name: posixpath.join(job.fits, f"{name}.safetensors") for name in settings.baselines if name in GRAM
    }
    if grams:
        spec = GramFit(tuple(job.prepare.files(contracts.HISTORY.name)), job.bundle.n_items, settings, grams)
        work = on_executor("ncf_dist.evaluate.baselines:fit", spec)
        task_stats(job.spark.range(0, 1, 1, 1), work)
        fitted |= {name: (path,) for name, path in grams.items()}
    if "als" not in fitted:
        return fitted, None
    seen = read_table(job.spark, job.prepare, contracts.HISTORY)
    users, items = fit_als(seen, settings, job.config.seed, job.fits)
    fitted["als"] = tuple(items.paths(job.fits))
    return fitted, users


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
