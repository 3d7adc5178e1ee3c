"""The job prepare: clean → index → split → negatives → trainer-ready Parquet.

Every input line ends in exactly one place:
accepted, a duplicate of an accepted row, filtered by the config, or the quarantine.
"""

from __future__ import annotations

import json
import logging
import posixpath
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.artifacts import (
    FileInfo,
    Lake,
    Manifest,
    Outcome,
    TableInfo,
    file_url,
    fingerprint,
    input_files,
    read_manifest,
    remove,
    run_key,
)
from ncf_dist.config import Config
from ncf_dist.errors import InputError
from ncf_dist.prepare.index import extend_index
from ncf_dist.prepare.layout import write_train
from ncf_dist.prepare.parse import (
    FORMATS,
    positives,
    quarantine,
    read_interactions,
    read_titles,
    select_files,
)
from ncf_dist.prepare.users import UserPass, staging_schema, user_pass
from ncf_dist.spark_io import ROWS_PER_FILE, read_files, read_table, spark_path, spark_session, table_info, write_table

log = logging.getLogger(__name__)

STAGE = "prepare"
SECTIONS = ("input", "split", "negatives", "layout", "seed")
"""What of the config decides the bytes of this stage's tables."""
ROWS_PER_USER_FILE = 500_000
MIN_USER_FILES = 8


def prepare(config: Config, ds: str) -> Outcome:
    """Make the tables of night `ds`, or find them made. Raises InputError, ContractError."""
    start = time.monotonic()
    lake = Lake(config.paths.lake)
    files = select_files(input_files(config.input.path), config.input.format)
    titles = input_files(config.input.items) if config.input.items else []
    before = _base(lake, ds)
    used = config.model_dump(mode="json", include=set(SECTIONS))
    inputs = {
        "interactions": fingerprint(files),
        "items": fingerprint(titles),
        "index": {"ds": before.ds, "run_key": before.run_key} if before else None,
    }
    key = run_key(STAGE, ds, used, inputs)
    runs = lake.stage(ds, STAGE)
    if done := runs.find(key):
        log.info("already prepared: %s", done.root)
        return Outcome.of(done, "already-done", rows=done.facts["rows"])

    run = runs.begin(key)
    with spark_session("ncf-prepare", config.spark) as spark:
        tables, facts = _make_tables(spark, config, files, titles, before, run)
    remove(_staging(run))
    seconds = round(time.monotonic() - start, 3)
    manifest = runs.finish(Manifest(STAGE, ds, key, run, used, inputs, tables, facts, {}, seconds))
    log.info("prepared %s in %.1f s: %s", run, seconds, json.dumps(facts["rows"]))
    return Outcome.of(manifest, rows=facts["rows"])


def _make_tables(
    spark: SparkSession,
    config: Config,
    files: list[str],
    titles: list[str],
    before: Manifest | None,
    run: str,
) -> tuple[dict[str, TableInfo], dict[str, Any]]:
    id_type = FORMATS[config.input.format].id_type
    staged = _stage_rows(spark, config, files, run)
    tables, rejected, total = _reject(staged, config, run, files)
    accepted = positives(staged, config.input)
    made, indexes = _indexes(spark, accepted, before, id_type, run)
    tables |= made
    n_users, n_items = tables["user_index"].rows, tables["item_index"].rows
    if not n_users:
        raise InputError(
            f"input {config.input.path} has no positive row ({total:,} rows read); needed at least one: "
            "check input.min_rating"
        )

    joined = accepted.join(indexes["item_index"], "item_id").join(indexes["user_index"], "user_id")
    stats = _pass_over_users(joined, config, run, n_users, n_items, total)
    for contract in (contracts.INTERACTIONS, contracts.HISTORY, contracts.VALIDATION, contracts.TEST):
        tables[contract.name] = table_info(contract, _collected(stats, contract.name), run)
    tables["train"] = _train_table(spark, config, stats, run)
    tables |= _item_tables(spark, config, tables, indexes["item_index"], titles, id_type, run)
    return tables, {"users": n_users, "items": n_items, **_facts(config, stats, rejected, total)}


def _indexes(
    spark: SparkSession, accepted: DataFrame, before: Manifest | None, id_type: pa.DataType, run: str
) -> tuple[dict[str, TableInfo], dict[str, DataFrame]]:
    """user_index and item_index: the night before's, and after it every new id."""
    tables, frames = {}, {}
    for contract in (contracts.user_index(id_type), contracts.item_index(id_type)):
        id_column, index_column = contract.columns
        old = read_table(spark, before, contract) if before else None
        indexed = extend_index(spark, accepted, old, id_column, index_column)
        file = F.floor(F.col(index_column) / F.lit(ROWS_PER_FILE))
        tables[contract.name] = write_table(indexed, run, contract, file)
        frames[contract.name] = read_files(spark, _paths(run, tables[contract.name]), contract.schema)
    return tables, frames


def _train_table(spark: SparkSession, config: Config, stats: list[dict[str, Any]], run: str) -> TableInfo:
    """The train table, from what the pass over users staged."""
    contract = contracts.train(config.negatives.per_positive, config.negatives.draws)
    files = [posixpath.join(_staging(run), "train", f.path) for f in _collected(stats, "staging")]
    staged = read_files(spark, files, staging_schema(config.negatives))
    buckets = np.sum([task["buckets"] for task in stats], axis=0)
    return write_train(spark, staged, buckets, run, contract, config.layout)


def _facts(config: Config, stats: list[dict[str, Any]], rejected: dict[str, int], total: int) -> dict[str, Any]:
    """The accounting of rows, and what later stages and people want to know."""
    counts: Counter[str] = Counter()
    for task in stats:
        counts.update(task["counts"])
    rows: dict[str, Any] = {
        "input": total,
        "accepted": counts["accepted"],
        "duplicates": counts["duplicates"],
        "quarantined": dict(sorted(rejected.items())),
    }
    if filtered := total - sum(rejected.values()) - counts["rows"]:
        assert config.input.min_rating is not None, f"{filtered:,} of {total:,} rows were lost on the way"
        rows["filtered"] = {"below min_rating": filtered}
    kept = ("tied_users", "train", "validation", "test", "users_without_negatives")
    short = ("validation_short_candidates", "test_short_candidates")
    return {"rows": rows, "active_users": counts["users"], **{name: counts[name] for name in (*kept, *short)}}


def _stage_rows(spark: SparkSession, config: Config, files: list[str], run: str) -> DataFrame:
    """Parse the text once; later passes read columns."""
    rows = read_interactions(spark, files, config.input)
    path = posixpath.join(_staging(run), "rows")
    rows.withColumn("raw", F.when(F.col("reason").isNotNull(), F.col("raw"))).write.parquet(file_url(path))
    return spark.read.schema(rows.schema).parquet(spark_path(path))


def _reject(
    staged: DataFrame, config: Config, run: str, files: list[str]
) -> tuple[dict[str, TableInfo], dict[str, int], int]:
    """Write the quarantine; (its table, rejected rows by reason, rows in all).
    Raises InputError when too many are bad."""
    by_reason = {row["reason"]: int(row["count"]) for row in staged.groupBy("reason").count().collect()}
    total = sum(by_reason.values())
    if not total:
        raise InputError(
            f"input {', '.join(files[:3])} is empty (0 rows); needed an interaction log of format {config.input.format}"
        )
    rejected = {str(k): n for k, n in by_reason.items() if k is not None}
    file = F.pmod(F.xxhash64("raw"), F.lit(1 + sum(rejected.values()) // ROWS_PER_FILE))
    table = write_table(quarantine(staged), run, contracts.QUARANTINE, file)
    bad = sum(rejected.values())
    if bad:
        log.warning("%s of %s rows quarantined: %s (%s/quarantine)", f"{bad:,}", f"{total:,}", rejected, run)
    if bad > config.input.max_bad_fraction * total:
        example = quarantine(staged).orderBy("reason", "raw").first()
        raw = example["raw"][:80] if example else ""
        raise InputError(
            f"{bad:,} of {total:,} rows ({bad / total:.1%}) of {config.input.path} do not fit "
            f"format {config.input.format}: {rejected}, for example {raw!r}; "
            f"needed lines like {FORMATS[config.input.format].example!r} and "
            f"at most {config.input.max_bad_fraction:.1%} bad: set input.format to what the file is, or mend it; "
            f"every rejected row and its reason is in {run}/quarantine"
        )
    return {"quarantine": table}, rejected, total


def _pass_over_users(
    joined: DataFrame, config: Config, run: str, n_users: int, n_items: int, rows: int
) -> list[dict[str, Any]]:
    """Run `users.user_pass` and return its statistics, one a task."""
    user_files = max(MIN_USER_FILES, -(-rows // ROWS_PER_USER_FILE))
    spec = UserPass(
        run=run,
        staging=posixpath.join(_staging(run), "train"),
        n_items=n_items,
        users_per_file=-(-n_users // user_files),
        min_interactions=config.split.min_interactions,
        negatives=config.negatives,
        seed=config.seed,
    )
    file = F.floor(F.col("user_idx") / F.lit(spec.users_per_file))
    grouped = (
        joined.select("user_idx", "item_idx", "rating", "timestamp", file.alias("_file"))
        .repartition(config.spark.shuffle_partitions, "_file")
        .drop("_file")
        .sortWithinPartitions("user_idx")
    )
    return [json.loads(row["stats"]) for row in grouped.mapInArrow(user_pass(spec), "stats string").collect()]


def _item_tables(
    spark: SparkSession,
    config: Config,
    tables: dict[str, TableInfo],
    index: DataFrame,
    titles: list[str],
    id_type: pa.DataType,
    run: str,
) -> dict[str, TableInfo]:
    """item_stats, and the items' titles where there are any."""
    file = F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
    interactions = read_files(spark, _paths(run, tables["interactions"]), contracts.INTERACTIONS.schema)
    counted = (
        interactions.where(F.col("split") != contracts.TEST_SPLIT)
        .groupBy("item_idx")
        .agg(F.count("*").alias("train_count"))
    )
    stats = index.join(counted, "item_idx", "left").select(
        "item_idx", F.coalesce("train_count", F.lit(0)).cast("bigint").alias("train_count")
    )
    made = {"item_stats": write_table(stats, run, contracts.ITEM_STATS, file)}
    if titles:
        contract = contracts.items(id_type)
        named = index.join(read_titles(spark, titles, config.input.format), "item_id", "left")
        named = named.withColumn("title", F.coalesce("title", F.col("item_id").cast("string")))
        made["items"] = write_table(named, run, contract, file)
    return made


def _base(lake: Lake, ds: str) -> Manifest | None:
    """The run whose indexes this night extends: the one it extended last time, or the latest finished one before `ds`.

    A night keeps its base for ever: an earlier night that is made up for later must not renumber it.
    """
    runs = lake.stage(ds, STAGE)
    if runs.exists():
        recorded = runs.current().inputs["index"]
        return read_manifest(lake.stage(recorded["ds"], STAGE).run_path(recorded["run_key"])) if recorded else None
    earlier = [night for night in lake.nights(STAGE) if night < ds]
    return lake.stage(earlier[-1], STAGE).current() if earlier else None


def _staging(run: str) -> str:
    return posixpath.join(run, "_staging")


def _paths(run: str, table: TableInfo) -> list[str]:
    return [posixpath.join(run, table.path, file.path) for file in table.files]


def _collected(stats: list[dict[str, Any]], name: str) -> list[FileInfo]:
    return [FileInfo(**info) for task in stats for info in task["files"][name]]
