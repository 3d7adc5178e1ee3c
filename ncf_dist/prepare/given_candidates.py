"""Candidates that come with a split, as the NCF paper's test.negative: `(user,item)`, then items, tab-separated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist.errors import InputError
from ncf_dist.prepare.columns import candidates_source
from ncf_dist.prepare.forget import NOBODY, Forget
from ncf_dist.prepare.id_types import IdTypes
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.input_files import InputFiles
from ncf_dist.prepare.reading import read_unit
from ncf_dist.prepare.source import Source
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_io import Pass, batch_of, map_in_arrow

_PAIR = re.compile(r"^\(\s*([^,]+?)\s*,\s*(.+?)\s*\)$")


def given_candidates(space: Workspace, files: InputFiles, ids: IdTypes, forget: Forget) -> DataFrame | None:
    """One row a candidate: user_id, item_id (the held-out one), candidate; none of users to be forgotten. None where
    the config names no file. Raises InputError for a line that is not of this form: a wrong list makes a wrong metric,
    so none is left out."""
    if not files:
        return None
    source = candidates_source(files.paths)
    schema = pa.schema([("user_id", ids.user), ("item_id", ids.item), ("candidate", ids.item), ("bad", pa.string())])
    count = len(source.units)
    units = space.spark.range(0, count, 1, max(1, count))
    rows = space.stored(map_in_arrow(units, _pass(source, schema, forget), from_arrow_schema(schema)), "candidates")
    if wrong := rows.where(F.col("bad").isNotNull()).select(F.min("bad")).collect()[0][0]:
        raise InputError(
            f"split.candidates: the line at byte {wrong} is no candidate list; needed `(user,item)` and then items, "
            "tab-separated"
        )
    return rows.drop("bad")


def with_candidates(rows: DataFrame, given: DataFrame, indexes: Indexes) -> DataFrame:
    """The indexed rows with a column `candidates`: item indexes, ascending; null on rows that have none."""
    candidate = indexes.items.select(F.col("item_id").alias("candidate"), F.col("item_idx").alias("_candidate"))
    lists = (
        given.join(candidate, "candidate")
        .join(indexes.items, "item_id")
        .join(indexes.users, "user_id")
        .groupBy("user_idx", "item_idx")
        .agg(F.sort_array(F.collect_list("_candidate")).alias("candidates"))
    )
    return rows.join(lists, ["user_idx", "item_idx"], "left")


def _pass(source: Source, schema: pa.Schema, forget: Forget = NOBODY) -> Pass:
    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for unit in batch.column(0).to_pylist():
                for chunk in read_unit(source, source.units[unit]):
                    lines = chunk.raw.lines
                    assert lines is not None
                    name = source.files[chunk.file]
                    read = zip(
                        lines.to_pylist(), chunk.reason, (f"{at:,} of {name}" for at in chunk.place), strict=True
                    )
                    rows = batch_of([row for line, bad, at in read for row in _line(line, bad, at, schema)], schema)
                    yield rows.filter(pa.array(~forget.among(rows.column("user_id"))))

    return run


def _line(line: str, reason: str | None, place: str, schema: pa.Schema) -> list[dict[str, object]]:
    pair, *items = line.split("\t")
    match = _PAIR.match(pair)
    user = None
    try:
        if reason or match is None:
            raise ValueError
        user = _id(match[1], schema.field("user_id").type)
        if not items:
            raise ValueError
        item = _id(match[2], schema.field("item_id").type)
        candidates = [_id(text, schema.field("candidate").type) for text in items if text]
    except ValueError:
        return [{"user_id": user, "item_id": None, "candidate": None, "bad": place}]
    return [{"user_id": user, "item_id": item, "candidate": value, "bad": None} for value in candidates]


def _id(text: str, kind: pa.DataType) -> int | str:
    """Raises ValueError, also for an integer that no column holds."""
    if kind != pa.int64():
        return text
    if not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError
    return number
