"""The step index: dense, append-only indexes of users and items, without the driver and without a single-task window.

New keys are put into a fixed number of hash buckets. Counting the buckets gives each bucket's first index (a
prefix sum over BUCKETS numbers, the only thing the driver sees); inside a bucket keys are ordered by value. So
an index depends on the set of new keys and on the old table alone: not on partitions, file order or retries.
A number that was given to an id is never given to another one, even where that id is to be forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.ancestry import INDEXES, Sizes, index_sizes, joined, partial_digest
from ncf_dist.errors import InputError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo, read_schema
from ncf_dist.prepare.filters import Filtered
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.id_types import IdTypes
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_files import ROWS_PER_FILE, write_tables
from ncf_dist.spark_io import read_files, read_table
from ncf_dist.spark_tables import local_rows
from ncf_dist.stage import production_runs

BUCKETS = 4096
"""Part of the meaning of an index: never change it."""
INT32_MAX = 2**31 - 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Indexes:
    """users: user_id, user_idx; items: item_id, item_idx; sizes: how many numbers have been given; digests: by the
    names of `ancestry.INDEXES`; forgotten_users: how many users of the base's index are not in tonight's."""

    users: DataFrame
    items: DataFrame
    tables: Mapping[str, TableInfo]
    sizes: Sizes
    digests: Mapping[str, str]
    forgotten_users: int

    def of(self, rows: DataFrame) -> DataFrame:
        """Rows with user_idx and item_idx in place of the ids."""
        indexed = rows.join(self.items, "item_id").join(self.users, "user_id")
        further = [name for name in rows.columns if name not in ("user_id", "item_id")]
        return indexed.select("user_idx", "item_idx", *further)


# ---- the run that a night extends


def base_run(lake: Lake, ds: str) -> Manifest | None:
    """The run whose indexes this night extends: the one it extended last time, or the latest finished one before `ds`.

    A night keeps its base for ever: an earlier night that is made up for later must not renumber it.
    """
    if tonight := lake.stage(ds, "prepare").production():
        recorded = tonight[0].inputs["index"]
        return lake.stage(recorded["ds"], "prepare").load(recorded["run_key"]) if recorded else None
    return next(production_runs(lake, "prepare", before=ds), None)


def base_types(base: Manifest | None) -> tuple[pa.DataType | None, pa.DataType | None]:
    """The types of user_id and item_id in the indexes of a run; None where they hold nothing."""
    files = [base.files(table) if base else [] for table in INDEXES.values()]
    user, item = (read_schema(paths[0]).types[0] if paths else None for paths in files)
    return user, item


# ---- tonight's indexes


def extend_indexes(
    space: Workspace, rows: Filtered, given: DataFrame | None, ids: IdTypes, base: Manifest | None, forget: Forget
) -> Indexes:
    """user_index and item_index: those of the base without forgotten users, then every new id. given: candidates,
    which are items that need a number too."""
    user_contract, item_contract = contracts.user_index(ids.user), contracts.item_index(ids.item)
    before = index_sizes(base) if base else Sizes(0, 0)
    old_users = forget.leave_out(read_table(space.spark, base, user_contract), "user_id") if base else None
    old_items = read_table(space.spark, base, item_contract) if base else None
    item_ids = rows.item_ids
    if given is not None:
        item_ids = item_ids.union(given.select(F.col("candidate").alias("item_id")))
    users, user_table, n_users, user_digest = _write_index(space, rows.user_ids, old_users, before.users, user_contract)
    items, item_table, n_items, item_digest = _write_index(space, item_ids, old_items, before.items, item_contract)
    log.info("user_index: %s, item_index: %s", f"{user_table.rows:,}", f"{item_table.rows:,}")
    tables = {user_contract.name: user_table, item_contract.name: item_table}
    known = base.tables[user_contract.name].rows if base else 0
    return Indexes(
        users,
        items,
        tables,
        Sizes(n_users, n_items),
        dict(zip(INDEXES, (user_digest, item_digest), strict=True)),
        known + n_users - before.users - user_table.rows if base else 0,
    )


def _write_index(
    space: Workspace, keys: DataFrame, old: DataFrame | None, start: int, contract: contracts.Contract
) -> tuple[DataFrame, TableInfo, int, str]:
    """(the extended index, its table, how many numbers have been given, its digest)."""
    id_column, index_column = contract.columns
    extended, size = extend_index(space.spark, keys, old, start, id_column, index_column)
    file = F.floor(F.col(index_column) / F.lit(ROWS_PER_FILE))
    [table], digests = write_tables(extended, space.run, [contract], file, partial_digest)
    return read_files(space.spark, space.files(table), contract.schema), table, size, joined(digests)


def extend_index(
    spark: SparkSession, keys: DataFrame, old: DataFrame | None, start: int, id_column: str, index_column: str
) -> tuple[DataFrame, int]:
    """(`old` and, numbered from `start` on, every key of `keys` that is not in it: (id_column, index_column int32);
    how many numbers have been given now).

    keys: one column `id_column`, repeats allowed, no nulls. start: how many numbers `old` and the indexes before it
    have given, which are more than its rows where keys were forgotten. Raises InputError past 2^31 - 1 numbers.
    """
    new = keys.select(id_column).distinct()
    if old is not None:
        new = new.join(old, id_column, "left_anti")
    new = new.select(id_column, F.pmod(F.xxhash64(id_column), F.lit(BUCKETS)).cast("int").alias("_bucket"))
    counts: dict[int, int] = dict(new.groupBy("_bucket").count().toLocalIterator())
    sizes = [int(counts.get(bucket, 0)) for bucket in range(BUCKETS)]
    size = start + sum(sizes)
    if size > INT32_MAX:
        raise InputError(
            f"{index_column}: {size:,} distinct {id_column} do not fit int32; needed at most {INT32_MAX:,}"
        )
    firsts = accumulate(sizes, initial=start)
    # A table, not an array of literals: Spark would take minutes to plan and compile four thousand expressions. In a
    # small night few buckets have keys.
    numbered_from = zip(range(BUCKETS), firsts, sizes, strict=False)
    starts = [{"_bucket": bucket, "_first": number} for bucket, number, size in numbered_from if size]
    schema = pa.schema([("_bucket", pa.int32()), ("_first", pa.int32())])
    first = F.broadcast(local_rows(spark, pa.Table.from_pylist(starts, schema)))
    position = F.row_number().over(Window.partitionBy("_bucket").orderBy(id_column)) - 1
    numbered = new.join(first, "_bucket").select(
        id_column, (F.col("_first") + position).cast("int").alias(index_column)
    )
    return (numbered if old is None else old.select(id_column, index_column).unionByName(numbered)), size
