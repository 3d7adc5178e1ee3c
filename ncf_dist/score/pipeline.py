"""The job score: exact top K over the whole catalogue for every user with a history, seen items masked."""

from __future__ import annotations

import json
import logging
import posixpath
import time
from collections import Counter

from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.artifacts import FileInfo, Lake, Manifest, Outcome, read_schema, run_key
from ncf_dist.bundle import current_runs, read_bundle, verify_weights
from ncf_dist.config import Config
from ncf_dist.score.spec import ScorePass, on_executors
from ncf_dist.spark_io import LIST_BATCH_ROWS, ROWS_PER_FILE, read_files, spark_session, table_info

log = logging.getLogger(__name__)

STAGE = "score"
MIN_FILES = 16


def score(config: Config, ds: str) -> Outcome:
    """Rank for every user of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together."""
    start = time.monotonic()
    lake = Lake(config.paths.lake)
    prepare, train = current_runs(lake, ds)
    used = {"score": config.score.model_dump(mode="json", include={"k", "seen"})}
    runs = lake.stage(ds, STAGE)
    key = run_key(STAGE, ds, used, {"prepare": prepare.run_key, "train": train.run_key})
    if done := runs.find(key):
        log.info("already scored: %s", done.root)
        return Outcome.of(done, "already-done")

    run = runs.begin(key)
    bundle = read_bundle(posixpath.join(train.root, "bundle"))
    verify_weights(bundle)  # Once; the workers then trust them.
    user_files, item_files = prepare.files("user_index"), prepare.files("item_index")
    user_schema, item_schema = read_schema(user_files[0]), read_schema(item_files[0])
    contract = contracts.recommendations(user_schema.field("user_id").type, item_schema.field("item_id").type)
    users = prepare.table(contracts.HISTORY).rows
    files = max(MIN_FILES, -(-users * config.score.k // ROWS_PER_FILE))
    spec = ScorePass(
        bundle,
        tuple(item_files),
        contract,
        f"{run}/{contract.name}",
        config.score.k,
        config.score.users_per_block,
        config.score.seen == "all",
    )
    with spark_session("ncf-score", config.spark, LIST_BATCH_ROWS) as spark:
        history = read_files(spark, prepare.files("history"), contracts.HISTORY.schema)
        rows = history.join(read_files(spark, user_files, user_schema), "user_idx").withColumn(
            "_file", F.pmod("user_idx", F.lit(files))
        )
        rows = rows.select("_file", "user_id", "user_idx", "item_idx", "test_item_idx")
        # Asked for by number: the optimiser must not merge a small input whose work is heavy into one task.
        rows = rows.repartition(config.score.tasks or files, "_file").sortWithinPartitions("_file", "user_id")
        stats = [json.loads(row["stats"]) for row in rows.mapInArrow(on_executors(spec), "stats string").collect()]
    counts: Counter[str] = Counter()
    for task in stats:
        counts.update(task["counts"])
    table = table_info(contract, [FileInfo(**f) for task in stats for f in task["files"]], run)
    facts = {
        "k": config.score.k,
        "seen": config.score.seen,
        "users": counts["users"],
        "short_users": counts["short_users"],
        "model_version": bundle.model_version,
        "prepare_run": prepare.run_key,
    }
    metrics = {
        "score.users": counts["users"],
        "score.rows": table.rows,
        "score.short_users": counts["short_users"],
    }
    seconds = round(time.monotonic() - start, 3)
    inputs = {"prepare": prepare.run_key, "train": train.run_key}
    manifest = runs.finish(Manifest(STAGE, ds, key, run, used, inputs, {contract.name: table}, facts, metrics, seconds))
    log.info("scored %s users in %.1f s: %s", f"{counts['users']:,}", seconds, manifest.table_path(contract.name))
    return Outcome.of(manifest)
