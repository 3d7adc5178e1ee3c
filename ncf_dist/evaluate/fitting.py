"""The baselines that must be fitted before users are ranked: those on a matrix of items by an executor, the Gram matrix
within `evaluate.gram_bytes`; recent popularity, and ALS for implicit feedback (Hu, Koren & Volinsky, ICDM 2008), by
Spark."""

from __future__ import annotations

import posixpath
from dataclasses import replace

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.config import Evaluate
from ncf_dist.contracts import FLOAT_LIST, INDEX, Contract
from ncf_dist.errors import ConfigError
from ncf_dist.evaluate.evaluation import Evaluation
from ncf_dist.evaluate.spec import ALS_USER, COUNTED, GRAM, Fit
from ncf_dist.item_item.memory import COPIES, bytes_to_fit
from ncf_dist.parquet import TableInfo
from ncf_dist.spark_files import ROWS_PER_FILE, write_table
from ncf_dist.spark_io import on_executor, read_table, task_stats

ITEM_FACTORS = Contract(
    "als_items",
    pa.schema([pa.field("item_idx", INDEX, nullable=False), pa.field("factors", FLOAT_LIST, nullable=False)]),
    ("item_idx",),
    "factors of the items that anybody has in train or validation",
    "evaluate",
)
RECENT_COUNTS = Contract(
    "recent_counts",
    pa.schema([pa.field("item_idx", INDEX, nullable=False), pa.field("recent", pa.int64(), nullable=False)]),
    ("item_idx",),
    "train and validation interactions of the last days; of items that have any",
    "evaluate",
)


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
    matrices = {name: posixpath.join(job.fits, f"{name}.safetensors") for name in fitted if name in (*GRAM, COUNTED)}
    if matrices:
        spec = Fit(_files(job, contracts.HISTORY), job.n_items, settings, matrices)
        if COUNTED in matrices:
            followed, totals = _files(job, contracts.NEXT_ITEMS), _files(job, contracts.NEXT_TOTALS)
            spec = replace(spec, next_files=followed, totals_files=totals)
        work = on_executor("ncf_dist.evaluate.baselines:fit", spec)
        task_stats(job.spark.range(0, 1, 1, 1), work)
        fitted |= {name: (path,) for name, path in matrices.items()}
    if "recent_popularity" in fitted:
        table = write_recent(read_table(job.spark, job.prepare, contracts.INTERACTIONS), settings, job.fits)
        fitted["recent_popularity"] = tuple(table.paths(job.fits))
    if "als" not in fitted:
        return fitted, None
    seen = read_table(job.spark, job.prepare, contracts.HISTORY)
    users, items = fit_als(seen, settings, job.config.seed, job.fits)
    fitted["als"] = tuple(items.paths(job.fits))
    return fitted, users


def _files(job: Evaluation, contract: Contract) -> tuple[str, ...]:
    job.prepare.table(contract)
    return tuple(job.prepare.files(contract.name))


def write_recent(interactions: DataFrame, config: Evaluate, folder: str) -> TableInfo:
    """Counts of the interactions, but those of the test, in the `evaluate.recent_days` that end with the latest one."""
    known = interactions.where(F.col("split") != contracts.TEST_SPLIT)
    end = known.agg(F.max("timestamp").alias("end"))
    since = F.col("end") - F.lit(config.recent_days * contracts.DAY)
    recent = known.crossJoin(F.broadcast(end)).where(F.col("timestamp") > since)
    counts = recent.groupBy("item_idx").agg(F.count("*").alias("recent"))
    return write_table(counts, folder, RECENT_COUNTS, F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE)))


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
