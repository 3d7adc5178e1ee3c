"""The driver's side of `check`: which users of the written files are compared with the model."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.errors import ContractError
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_schema, read_table
from ncf_dist.recent import recent_lists
from ncf_dist.score.spec import ScorePass
from ncf_dist.spark_io import map_in_arrow, on_executor, read_files

FILES, USERS_A_FILE = 4, 4
"""How many files, and users of each, are compared."""


def check_written(spark: SparkSession, prepare: Manifest, spec: ScorePass, files: tuple[str, ...]) -> None:
    """Compare a few users of a few files with the model. Raises ContractError."""
    step = max(1, len(files) // FILES)
    files = files[::step][:FILES]
    ids = [user for path in files for user in _some_users(path)]
    index_files = prepare.files(contracts.USER_INDEX)
    index = read_files(spark, index_files, read_schema(index_files[0])).where(F.col("user_id").isin(ids))
    user_ids = {row["user_idx"]: row["user_id"] for row in index.collect()}
    history = read_files(spark, prepare.files(contracts.HISTORY.name), contracts.HISTORY.schema)
    if spec.bundle.looks_back:
        history = history.join(recent_lists(spark, prepare), "user_idx")
    rows = history.where(F.col("user_idx").isin([*user_ids])).coalesce(1)
    work = on_executor("ncf_dist.score.check:check_pass", spec, user_ids, files)
    problems = [row["problem"] for row in map_in_arrow(rows, work, "problem string").collect()]
    if problems:
        raise ContractError(
            f"the recommendations of {len(problems)} of {len(ids)} users are not what the model "
            f"{spec.bundle.model_version} says: {problems[0]}; needed its own scores: rerun the job score, and if it "
            "happens again, the executors run other code or other weights than the driver"
        )


def _some_users(path: str) -> list[Any]:
    """The first users of a file that were ranked by the model."""
    rows = contracts.in_long_form(read_table(path))
    by_model = rows.filter(pc.equal(rows["reason"], contracts.MODEL))
    return [*pc.unique(by_model["user_id"]).slice(0, USERS_A_FILE).to_pylist()]
