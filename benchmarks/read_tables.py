"""Our reader of tables in object stores beside Spark's own, on the same local files, in the same run.

    .venv/bin/python benchmarks/read_tables.py [--rows 5000000] [--users 50000] [--times 5]

Spark reads what is local or in HDFS by itself; a table that is anywhere else is read by Python tasks (`spark_tables`).
This says what that costs: `interactions` (5 narrow columns), two columns of it, and `history` (lists), each summed up
in Spark. Times alternate; seconds by the clock and of the processors (driver, JVM and Python workers together), the
middle of them. Prints one table and writes benchmarks/results/read_tables.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist import config as settings
from ncf_dist import contracts, spark_tables
from ncf_dist.machine import cores, processor
from ncf_dist.parquet import write_parts
from ncf_dist.spark_io import read_files, spark_session

RESULTS = Path(__file__).parent / "results" / "read_tables.json"
FILES = 8
Read = Callable[[], DataFrame]


def as_table(made: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table({field.name: pa.array(made[field.name]).cast(field.type) for field in schema}, schema)


def interactions(rows: int) -> list[pa.Table]:
    dice = np.random.default_rng(1)
    schema = contracts.INTERACTIONS.schema
    parts = []
    for _ in range(FILES):
        n = rows // FILES
        made = {
            "user_idx": dice.integers(0, rows // 100, n),
            "item_idx": dice.integers(0, 20_000, n),
            "rating": dice.integers(1, 6, n).astype(np.float32),
            "timestamp": dice.integers(10**15, 2 * 10**15, n),
            "split": np.zeros(n, np.int8),
        }
        parts.append(as_table(made, schema))
    return parts


def history(users: int) -> list[pa.Table]:
    dice = np.random.default_rng(2)
    schema = contracts.HISTORY.schema
    parts = []
    for part in range(FILES):
        n = users // FILES
        lists = [dice.integers(0, 20_000, 100).astype(np.int32) for _ in range(n)]
        made = {"user_idx": np.arange(part * n, part * n + n), "item_idx": lists, "test_item_idx": [[1]] * n}
        parts.append(as_table(made, schema))
    return parts


def processor_seconds() -> float:
    me = psutil.Process()
    times = [each.cpu_times() for each in [me, *me.children(recursive=True)] if each.is_running()]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measured(read: Read, summed: Callable[[DataFrame], DataFrame]) -> tuple[float, float]:
    began, before = time.monotonic(), processor_seconds()
    summed(read()).collect()
    return time.monotonic() - began, processor_seconds() - before


def compared(spark: SparkSession, files: list[str], schema: pa.Schema, what: str, times: int) -> dict[str, object]:
    narrow = {
        name: F.sum(F.col(name).cast("double"))
        for name in schema.names
        if not pa.types.is_nested(schema.field(name).type)
    }
    wide = {name: F.sum(F.size(name)) for name in schema.names if pa.types.is_nested(schema.field(name).type)}
    sums = {**narrow, **wide}
    if what.endswith("two columns"):
        sums = dict(list(sums.items())[:2])
    readers: dict[str, Read] = {
        "spark": lambda: read_files(spark, files, schema),
        "ours": lambda: spark_tables.rows_of(spark, files, from_arrow_schema(schema)),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for number in range(times + 1):
        for name, read in readers.items():
            found = measured(read, lambda frame: frame.agg(*sums.values()))
            if number:  # The first warms both up.
                seen[name].append(found)
    middle = {
        name: [round(statistics.median(column), 3) for column in zip(*rows, strict=True)] for name, rows in seen.items()
    }
    return {"table": what, **{f"{name}_seconds": v[0] for name, v in middle.items()}} | {
        **{f"{name}_processor_seconds": v[1] for name, v in middle.items()},
        "ratio": round(middle["ours"][0] / middle["spark"][0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    config = settings.Spark(master=f"local[{min(2, cores())}]", driver_memory="2g", shuffle_partitions=4)
    rows = []
    with tempfile.TemporaryDirectory() as folder, spark_session("read-tables", config) as spark:
        spark.sparkContext.setLogLevel("ERROR")
        made = {contracts.INTERACTIONS: interactions(args.rows), contracts.HISTORY: history(args.users)}
        for contract, parts in made.items():
            files = write_parts(parts, folder, contract).paths(folder)
            two = [f"{contract.name}, two columns"] if contract is contracts.INTERACTIONS else []
            for what in [contract.name, *two]:
                rows.append(compared(spark, files, contract.schema, what, args.times))
    print(f"{'table':28} {'Spark':>8} {'ours':>8} {'ratio':>6}   processor seconds")
    for row in rows:
        print(
            f"{row['table']:28} {row['spark_seconds']:>8} {row['ours_seconds']:>8} {row['ratio']:>6}   "
            f"{row['spark_processor_seconds']} and {row['ours_processor_seconds']}"
        )
    facts = {"machine": processor(), "cores": cores(), "rows": args.rows, "users": args.users, "times": args.times}
    RESULTS.write_text(json.dumps({**facts, "tables": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
