"""What users did last, on its way from the table `recent` to the executors that rank by it."""

from __future__ import annotations

from typing import cast

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from ncf_dist import contracts
from ncf_dist.bundle import Bundle
from ncf_dist.errors import ContractError
from ncf_dist.manifests import Manifest
from ncf_dist.spark_io import read_table

COLUMN = "recent"
"""Of the rows that tasks get: a structure of the lists that contracts.RECENT has of a user."""
LISTS = contracts.RECENT.columns[1:]


def check_recent(bundle: Bundle, prepare: Manifest) -> None:
    """Raise ContractError where the scores need more of what users did last than `prepare` has kept."""
    length = int(prepare.facts["sequences"]["length"]) if contracts.RECENT.name in prepare.tables else 0
    if bundle.looks_back > length:
        raise ContractError(
            f"the model {bundle.model_version} looks back on {bundle.looks_back} items of a user, prepare run "
            f"{prepare.run_key} of {prepare.ds} has kept {length or 'none'}; needed as many: set "
            f"sequences.length={bundle.looks_back} and rerun the job prepare"
        )


def recent_lists(spark: SparkSession, prepare: Manifest) -> DataFrame:
    """Rows (user_idx, recent)."""
    return read_table(spark, prepare, contracts.RECENT).select("user_idx", F.struct(*LISTS).alias(COLUMN))


def no_lists(rows: DataFrame) -> Column:
    """The `recent` of a user who has none, for rows that have the column."""
    kind = cast(StructType, rows.schema[COLUMN].dataType)
    return F.struct(*(F.array().cast(field.dataType).alias(field.name) for field in kind))


def recent_rows(column: pa.Array) -> pa.Table:
    """The column, as rows of contracts.RECENT have it."""
    return pa.table(dict(zip(LISTS, column.flatten(), strict=True)))
