"""The canary: before the commit, the files that are about to be published are read as consumers will read them, by
stock readers that know nothing of ours. They must find the rows that the audit counted, in the columns of the contract.

pandas reads a file at a time. DuckDB reads a lake in a folder, where it is installed. Spark reads where the job has a
session open, as within `nightly`: starting one would take longer than publishing.
"""

from __future__ import annotations

import importlib
import logging
import posixpath
import sys
from collections.abc import Callable, Mapping, Sequence

from ncf_dist.config import Gates
from ncf_dist.contracts import Contract
from ncf_dist.files import filesystem, is_local
from ncf_dist.publish.measures import Check

log = logging.getLogger(__name__)

GATE = "canary"
Found = tuple[int, list[str]] | None
"""Rows and columns; None where the reader is not at hand."""


def canary(gates: Gates, contract: Contract, files: Mapping[str, int]) -> Check:
    """files: the candidate files with their rows."""
    if gates.canary is None:
        return Check(GATE, "off")
    rows, read = sum(files.values()), []
    for name in gates.canary:
        try:
            found = READERS[name]([*files])
        except Exception as error:  # Whatever a reader raises is what a consumer would get.
            said = " ".join(str(error).split())[:200]
            return _refused(files, f"{name} cannot read them ({type(error).__name__}: {said})")
        if found is None:
            continue
        read.append(name)
        if found[0] != rows:
            return _refused(files, f"{name} reads {found[0]:,} rows; needed {rows:,}")
        if missing := [column for column in contract.columns if column not in found[1]]:
            return _refused(files, f"{name} reads no column {missing[0]}; needed {', '.join(contract.columns)}")
    log.info("the files that are to be published were read by %s: %s rows", " and ".join(read) or "nobody", f"{rows:,}")
    return Check(GATE, "passed" if read else "unknown", float(len(read)))


def _refused(files: Mapping[str, int], what: str) -> Check:
    folder = posixpath.dirname(next(iter(files), ""))
    return Check(
        GATE,
        "refused",
        message=f"the {len(files)} files that were to be published in {folder}: {what}: rerun the jobs score and "
        "publish, and look at whether the file system returns what was written",
    )


def _pandas(files: Sequence[str]) -> Found:
    import pandas as pd

    rows, columns = 0, set[str]()
    for path in files:
        fs, inner = filesystem(path)
        with fs.open(inner, "rb") as source:
            frame = pd.read_parquet(source)
        columns = columns & {*frame.columns} if rows else {*frame.columns}
        rows += len(frame)
    return rows, sorted(columns)


def _duckdb(files: Sequence[str]) -> Found:
    try:
        duckdb = importlib.import_module("duckdb")
    except ImportError:
        return None
    if not all(map(is_local, files)):
        return None
    rows = "read_parquet(?, hive_partitioning = false)"
    with duckdb.connect() as connection:
        described = connection.execute(f"DESCRIBE SELECT * FROM {rows}", [[*files]]).fetchall()
        columns = [str(column[0]) for column in described]
        # Every column is read: a count alone reads the footers.
        counted = ", ".join(f'count("{name}")' for name in columns)
        counts = connection.execute(f"SELECT {counted} FROM {rows}", [[*files]]).fetchall()[0]
    return min(counts), columns


def _spark(files: Sequence[str]) -> Found:
    # Publishing by itself loads no Spark, and without it there is no session.
    spark_io = sys.modules.get("ncf_dist.spark_io")
    spark = spark_io.open_session() if spark_io else None
    if spark_io is None or spark is None or not all(map(spark_io.spark_tables.spark_reads, files)):
        return None
    frame = spark.read.parquet(*map(spark_io.spark_path, files))
    counts = frame.selectExpr(*(f"count(`{name}`)" for name in frame.columns)).collect()[0]
    return min(counts), list(frame.columns)


READERS: Mapping[str, Callable[[Sequence[str]], Found]] = {"pandas": _pandas, "duckdb": _duckdb, "spark": _spark}
