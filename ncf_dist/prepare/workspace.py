"""Where the steps of one prepare run work: the Spark session, and the run's folder with a staging folder inside."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from ncf_dist import spark_tables
from ncf_dist.files import file_url
from ncf_dist.parquet import TableInfo
from ncf_dist.spark_io import read_files, spark_path

STAGING = "_staging"


@dataclass(frozen=True)
class Workspace:
    """run: the folder that the tables are written to."""

    spark: SparkSession
    run: str

    @property
    def staging(self) -> str:
        """Holds what only later steps of the same run read; removed at the end."""
        return posixpath.join(self.run, STAGING)

    def staged(self, *names: str) -> str:
        """A path below the staging folder."""
        return posixpath.join(self.staging, *names)

    def files(self, table: TableInfo) -> list[str]:
        """Full paths of the files of a table of this run."""
        return table.paths(self.run)

    def read(self, files: Sequence[str], schema: pa.Schema) -> DataFrame:
        """The rows of these Parquet files; none where there is no file."""
        if files:
            return read_files(self.spark, list(files), schema)
        return spark_tables.local_rows(self.spark, schema.empty_table())

    def stored(self, frame: DataFrame, *names: str) -> DataFrame:
        """The same rows, written to the staging folder and read back, so that Spark computes them once."""
        path = self.staged(*names)
        if not spark_tables.spark_reads(path):
            return spark_tables.rows_of(self.spark, spark_tables.staged(frame, path), frame.schema)
        frame.write.mode("overwrite").parquet(file_url(path))
        return self.spark.read.schema(frame.schema).parquet(spark_path(path))
