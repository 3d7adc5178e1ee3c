"""The step side tables: facts about users or items, read as the log is, typed, and joined with the index.

A row without a usable id is left out; of rows with the same id the smallest is kept; a value that is not of its type
becomes null. Each of these is counted. Nothing here reaches the trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist import contracts
from ncf_dist.config import Input, SideTable
from ncf_dist.errors import InputError
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.chunks import Chunk, as_mask, row_by_row
from ncf_dist.prepare.columns import side_source
from ncf_dist.prepare.forget import NOBODY, Forget
from ncf_dist.prepare.id_types import IdTypes
from ncf_dist.prepare.ids import typed_ids
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.reading import read_unit
from ncf_dist.prepare.records import with_whole_files
from ncf_dist.prepare.run_inputs import RunInputs
from ncf_dist.prepare.source import Source
from ncf_dist.prepare.values import floats, integers
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_files import ROWS_PER_FILE, write_table
from ncf_dist.spark_io import Pass, map_in_arrow

TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
log = logging.getLogger(__name__)
_TRUE, _FALSE = pa.array(["true", "t", "yes", "y", "1"]), pa.array(["false", "f", "no", "n", "0"])


@dataclass(frozen=True)
class SideTables:
    """tables: users, unseen_users, items, as far as the config has them; facts: counts of each table's rows."""

    tables: Mapping[str, TableInfo]
    facts: Mapping[str, Mapping[str, int]]


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
    """The types of the columns of side table `kind`, items or users."""
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
    """(R,) id, columns, how many values were not of their type, whether the id is unusable, and whether it is to be
    forgotten (then the other columns are null)."""
    ids = typed_ids(chunk, "id", spec.id_type)
    usable = ~chunk.rejected()
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


def write_side_tables(
    space: Workspace, config: Input, inputs: RunInputs, indexes: Indexes, ids: IdTypes, forget: Forget
) -> SideTables:
    """Write the side tables of the config. Raises ConfigError, InputError."""
    tables: dict[str, TableInfo] = {}
    facts: dict[str, dict[str, int]] = {}
    for kind, side, files, id_type, index, gone in (
        ("users", config.users, inputs.users, ids.user, indexes.users, forget),
        ("items", config.items, inputs.items, ids.item, indexes.items, NOBODY),
    ):
        if side is None:
            continue
        source = with_whole_files(side_source(kind, side, config.format, files))
        spec = SideSpec(source, id_type, side_columns(side, kind), gone)
        written, counts = write_side(space, spec, side_contract(side, kind, id_type), index)
        tables |= written
        facts[f"side_{kind}"] = counts
        if counts["unusable"] or counts["repeated"] or counts["bad_values"]:
            log.warning("input.%s: %s", kind, counts)
    return SideTables(tables, facts)


def write_side(
    space: Workspace, spec: SideSpec, contract: contracts.Contract, index: DataFrame
) -> tuple[dict[str, TableInfo], dict[str, int]]:
    """Write the side table of every indexed id, and of users those that have no index; (the tables, counts of rows).
    Raises InputError where it has no row with an id. index: (id, idx) frame of the side's index."""
    kind = contract.name
    rows, counts = _typed_rows(space, spec, kind)
    id_column, idx = index.columns
    known = rows.where(~F.col("_unusable") & ~F.col("_forgotten")).groupBy("id")
    one = known.agg(F.min(F.struct(*spec.columns)).alias("s"), F.count("*").alias("n")).select("id", "n", "s.*")
    joined = index.join(one.withColumnRenamed("id", id_column), id_column, "full_outer")
    if "title" in spec.columns:
        empty = F.coalesce(F.trim("title"), F.lit("")) == ""
        joined = joined.withColumn("title", F.when(empty, F.col(id_column).cast("string")).otherwise(F.col("title")))
    stored = space.stored(joined, f"{kind}-joined")
    unknown, without, repeated = stored.agg(
        F.coalesce(F.sum(F.col(idx).isNull().cast("int")), F.lit(0)),
        F.coalesce(F.sum(F.col("n").isNull().cast("int")), F.lit(0)),
        F.coalesce(F.sum(F.col("n") - 1), F.lit(0)),
    ).collect()[0]
    file = F.floor(F.col(idx) / F.lit(ROWS_PER_FILE))
    tables = {kind: write_table(stored.where(F.col(idx).isNotNull()), space.run, contract, file)}
    if kind == "users":
        unseen = contracts.unseen_users(spec.id_type)
        file = F.pmod(F.xxhash64(id_column), F.lit(1 + unknown // ROWS_PER_FILE))
        tables[unseen.name] = write_table(stored.where(F.col(idx).isNull()), space.run, unseen, file)
    joins = {"repeated": repeated, "unknown": unknown, "without": without}
    order = ("rows", "unusable", "repeated", "unknown", "without", "bad_values", "forgotten")
    every = counts | {name: int(value) for name, value in joins.items()}
    return tables, {name: every[name] for name in order if name in every}


def _typed_rows(space: Workspace, spec: SideSpec, kind: str) -> tuple[DataFrame, dict[str, int]]:
    """(the typed rows of the side table with their marks, counts of these). Raises InputError where no id is usable."""
    units = len(spec.source.units)
    numbers = space.spark.range(0, units, 1, max(1, units))
    rows = space.stored(map_in_arrow(numbers, side_pass(spec), from_arrow_schema(spec.schema)), kind)
    sums = (F.coalesce(F.sum(F.col(mark).cast("int")), F.lit(0)) for mark in ("_unusable", "_bad", "_forgotten"))
    total, unusable, bad, forgotten = (int(count) for count in rows.agg(F.count("*"), *sums).collect()[0])
    if total == unusable:
        raise InputError(
            f"input.{kind} {', '.join(spec.source.files[:3])} has no row with a usable id ({total:,} rows read); "
            f"needed a table of {kind}: set input.{kind}.id to the column of the ids, or input.{kind}.separator and "
            f"input.{kind}.header to how it is written"
        )
    listed = {"forgotten": forgotten} if spec.forget.ids is not None else {}
    return rows, {"rows": total, "unusable": unusable, "bad_values": bad, **listed}
