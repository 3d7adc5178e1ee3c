"""Side tables: facts about users or items, read as the log is, checked against the index, carried along with types.

A row without a usable id is left out and counted; of rows with the same id the smallest stands, and they are counted; a
value that is not of its type is null, and counted. Nothing here reaches the trainer.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist import contracts
from ncf_dist.config import SideTable
from ncf_dist.errors import InputError
from ncf_dist.files import file_url
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.chunks import Chunk, as_mask, row_by_row
from ncf_dist.prepare.forget import NOBODY, Forget
from ncf_dist.prepare.reading import read_unit
from ncf_dist.prepare.source import Source
from ncf_dist.prepare.values import floats, integers
from ncf_dist.spark_io import ROWS_PER_FILE, Pass, map_in_arrow, spark_path, write_table

TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_TRUE, _FALSE = pa.array(["true", "t", "yes", "y", "1"]), pa.array(["false", "f", "no", "n", "0"])


@dataclass(frozen=True)
class SideSpec:
    """A side table for the workers. columns: name → type, `title` first where there is one."""

    source: Source
    id_type: pa.DataType
    columns: dict[str, pa.DataType]
    forget: Forget = NOBODY

    @property
    def schema(self) -> pa.Schema:
        marks = {"_bad": pa.int32(), "_unusable": pa.bool_(), "_forgotten": pa.bool_()}
        fields = {"id": self.id_type, **self.columns, **marks}
        return pa.schema(list(fields.items()))


def side_columns(side: SideTable, kind: str) -> dict[str, pa.DataType]:
    further = {name: TYPES[column.type] for name, column in side.columns.items()}
    return {"title": pa.string(), **further} if kind == "items" else further


def side_contract(side: SideTable, kind: str, id_type: pa.DataType) -> contracts.Contract:
    further = {name: TYPES[column.type] for name, column in side.columns.items()}
    return contracts.items(id_type, further) if kind == "items" else contracts.users(id_type, further)


def side_pass(spec: SideSpec) -> Pass:
    """For mapInArrow over unit numbers: the rows of the side table, typed."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for unit in batch.column(0).to_pylist():
                for chunk in read_unit(spec.source, spec.source.units[unit]):
                    yield from row_by_row(chunk, lambda part: typed(part, spec))

    return run


def typed(chunk: Chunk, spec: SideSpec) -> pa.RecordBatch:
    """One row a row of the chunk: id, columns, how many values were not of their type, whether the id is unusable, and
    whether it is to be forgotten: then only that is said."""
    column = chunk.columns["id"]
    if spec.id_type == pa.string():
        ids = column.cast(pa.string())
        usable = as_mask(pc.not_equal(pc.utf8_trim_whitespace(ids), ""))
        ids = pc.fill_null(ids, "")
    else:
        values, usable = integers(column)
        ids = pa.array(values)
    usable = usable & ~chunk.rejected()
    bad = np.zeros(len(usable), dtype=np.int32)
    columns = []
    for name, kind in spec.columns.items():
        key = "title" if name == "title" else f"column {name}"
        if key not in chunk.columns:
            columns.append(pa.nulls(len(usable), kind))
            continue
        values, wrong = _value(chunk.columns[key], kind)
        columns.append(values)
        bad += wrong
    forgotten = usable & spec.forget.among(ids)
    if forgotten.any():
        gone, bad = pa.array(forgotten), np.where(forgotten, np.int32(0), bad)
        ids, *columns = (pc.if_else(gone, None, values) for values in (ids, *columns))
    marks = (pa.array(mark) for mark in (bad, ~usable, forgotten))
    return pa.RecordBatch.from_arrays([ids, *columns, *marks], schema=spec.schema)


def _value(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """(values of the type, where a value is there and is not of it)."""
    if kind == pa.string():
        return column.cast(pa.string()), np.zeros(len(column), dtype=bool)
    present = as_mask(pc.is_valid(column))
    if pa.types.is_string(column.type):
        present = present & as_mask(pc.not_equal(pc.utf8_trim_whitespace(column), ""))
    if kind == pa.bool_():
        if pa.types.is_boolean(column.type):
            return column, np.zeros(len(column), dtype=bool)
        text = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string())))
        ok = as_mask(pc.or_(pc.is_in(text, _TRUE), pc.is_in(text, _FALSE)))
        values = pc.is_in(text, _TRUE)
    elif kind == pa.int64():
        numbers, ok = integers(column)
        values = pa.array(numbers)
    else:
        fractions, ok = floats(column)
        values = pa.array(fractions.astype(np.float64))
    return pc.if_else(pa.array(ok & present), values, None), present & ~ok


def write_side(
    spark: SparkSession, spec: SideSpec, contract: contracts.Contract, index: DataFrame, run: str, staging: str
) -> tuple[dict[str, TableInfo], dict[str, int]]:
    """Write the side table of every indexed id, and of users those that have no index; (the tables, what was found).
    Raises InputError where it has no row. index: (id, idx) frame of the side's index."""
    kind = contract.name
    units = len(spec.source.units)
    path = posixpath.join(staging, kind)
    schema = from_arrow_schema(spec.schema)
    map_in_arrow(spark.range(0, units, 1, max(1, units)), side_pass(spec), schema).write.parquet(file_url(path))
    rows = spark.read.schema(schema).parquet(spark_path(path))
    sums = (F.coalesce(F.sum(F.col(mark).cast("int")), F.lit(0)) for mark in ("_unusable", "_bad", "_forgotten"))
    total, unusable, bad, forgotten = rows.agg(F.count("*"), *sums).collect()[0]
    if total == unusable:
        raise InputError(
            f"input.{kind} {', '.join(spec.source.files[:3])} has no row with a usable id ({total:,} rows read); "
            f"needed a table of {kind}: set input.{kind}.id to the column of the ids, or input.{kind}.separator and "
            f"input.{kind}.header to how it is written"
        )
    id_column, idx = index.columns
    known = rows.where(~F.col("_unusable") & ~F.col("_forgotten")).groupBy("id")
    one = known.agg(F.min(F.struct(*spec.columns)).alias("s"), F.count("*").alias("n")).select("id", "n", "s.*")
    joined = index.join(one.withColumnRenamed("id", id_column), id_column, "full_outer")
    if "title" in spec.columns:
        empty = F.coalesce(F.trim("title"), F.lit("")) == ""
        joined = joined.withColumn("title", F.when(empty, F.col(id_column).cast("string")).otherwise(F.col("title")))
    joined.write.parquet(file_url(path + "-joined"))
    stored = spark.read.schema(joined.schema).parquet(spark_path(path + "-joined"))
    unknown, without, repeated = stored.agg(
        F.coalesce(F.sum(F.col(idx).isNull().cast("int")), F.lit(0)),
        F.coalesce(F.sum(F.col("n").isNull().cast("int")), F.lit(0)),
        F.coalesce(F.sum(F.col("n") - 1), F.lit(0)),
    ).collect()[0]
    found = {
        "rows": total, "unusable": unusable, "repeated": repeated, "unknown": unknown, "without": without,
        "bad_values": bad,
    }  # fmt: skip
    if spec.forget.ids is not None:
        found["forgotten"] = forgotten
    file = F.floor(F.col(idx) / F.lit(ROWS_PER_FILE))
    tables = {kind: write_table(stored.where(F.col(idx).isNotNull()), run, contract, file)}
    if kind == "users":
        unseen = contracts.unseen_users(spec.id_type)
        file = F.pmod(F.xxhash64(id_column), F.lit(1 + unknown // ROWS_PER_FILE))
        tables[unseen.name] = write_table(stored.where(F.col(idx).isNull()), run, unseen, file)
    return tables, {name: int(value) for name, value in found.items()}
