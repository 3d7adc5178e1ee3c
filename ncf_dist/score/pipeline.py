"""The job score: exact top K over the whole catalogue for every user with a history, seen items masked; what is popular
for the others.

`forecast` is the same job as `--dry-run`: it says what it would take.
"""

from __future__ import annotations

import json
import logging
import posixpath
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow.compute as pc
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.ancestry import index_sizes
from ncf_dist.bundle import Bundle, read_bundle, verify_weights
from ncf_dist.config import Config
from ncf_dist.engines import choose
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo, read_schema, read_table
from ncf_dist.products import Products
from ncf_dist.score import forecasting
from ncf_dist.score.items import ItemLists
from ncf_dist.score.rows import active_from, in_files, in_tasks, popularity, users_to_rank
from ncf_dist.score.spec import ScorePass
from ncf_dist.spark_io import (
    LIST_BATCH_ROWS,
    ROWS_PER_FILE,
    map_in_arrow,
    on_executor,
    on_one_executor,
    read_files,
    spark_session,
    table_info,
    write_table,
)
from ncf_dist.stage import Outcome, StageRun, Upstream, find_upstream

log = logging.getLogger(__name__)

STAGE = "score"
MIN_FILES = 16
PAIRS_PER_FILE = 10**9
"""A file is a task's smallest share: about a minute of work, so that a large job can use many slots."""
CHECKED_FILES, CHECKED_USERS = 4, 4
"""How many files, and users of each, are compared with the model at the end."""


def score(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Rank for every user of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together, or where what was written is
    not what the model says; InputError where the item lists cannot be read or leave nothing."""
    night = _Night.of(config, ds, given)
    inputs = {"prepare": night.prepare.run_key, "train": night.train.run_key, **night.lists.fingerprint}
    stage = StageRun(STAGE, config, ds, inputs)
    if done := stage.find():
        log.info("already scored: %s", done.root)
        return Outcome.of(done, "already-done")

    items = night.lists.count(night.prepare.files("item_index"))
    run = stage.begin()
    tables: dict[str, TableInfo] = {}
    spec = night.spec(f"{run}/{night.contract.name}")
    with spark_session("ncf-score", config.spark, LIST_BATCH_ROWS) as spark:
        spec = replace(spec, products=night.products(spark))
        if config.score.fallback_days is not None:
            tables |= _popularity(spark, night, run)
            spec = replace(spec, popularity_files=_paths(run, tables["popularity"]))
        users = users_to_rank(spark, night.prepare, config.score, ds)
        rows = in_tasks(in_files(users, night.n_files, night.indexed), config.score.tasks or night.n_files)
        work = on_executor("ncf_dist.score.users:score_pass", spec)
        stats = [json.loads(row["stats"]) for row in map_in_arrow(rows, work, "stats string").collect()]
        table = table_info(night.contract, [FileInfo(**f) for task in stats for f in task["files"]], run)
        _check(spark, night, spec, _paths(run, table))
    counts = _total(task["counts"] for task in stats)
    spent = _total(task["seconds"] for task in stats)
    facts = {
        **night.facts(ds),
        "items": items,
        "products": spec.products.facts(stats),
        "users": counts["users"],
        "short_users": counts["short_users"],
        "popular_users": counts["popular_users"],
        "seconds": {step: round(seconds, 3) for step, seconds in spent.items()},
        "worker_memory_bytes": max((task["memory"] for task in stats), default=0),
    }
    metrics = {
        "score.users": counts["users"],
        "score.popular_users": counts["popular_users"],
        "score.rows": table.rows,
        "score.recommendations": counts["recommendations"],
        "score.short_users": counts["short_users"],
        "score.eligible_items": items["eligible"],
        "score.pairs": counts["pairs"],
        "score.pairs_per_s": round(counts["pairs"] / max(spent["score"], 1e-9)),
    }
    tables[night.contract.name] = table
    manifest = stage.finish(tables=tables, facts=facts, metrics=metrics)
    log.info(
        "scored %s users (%s by popularity, %s with fewer than %d items) in %.1f s: %s",
        *(f"{counts[name]:,}" for name in ("users", "popular_users", "short_users")),
        config.score.k, manifest.seconds, manifest.table_path(night.contract.name),
    )  # fmt: skip
    return Outcome.of(manifest)


def forecast(config: Config, ds: str) -> Outcome:
    """What `score` would take, from a sample of tonight's users that is really scored; nothing is written to the lake.
    Raises what `score` raises before it starts."""
    start = time.monotonic()
    night = _Night.of(config, ds)
    items = night.lists.count(night.prepare.files("item_index"))
    # Files of this scheme live in the memory of the worker that writes them; the probe removes them.
    spec = night.spec("memory://ncf-dist-probe")
    with spark_session("ncf-score-forecast", config.spark, LIST_BATCH_ROWS) as spark:
        session_s, began = time.monotonic() - start, time.monotonic()
        spec = replace(spec, products=night.products(spark))
        rows = users_to_rank(spark, night.prepare, config.score, ds)
        users = {bool(row["by_model"]): int(row["count"]) for row in rows.groupBy("by_model").count().collect()}
        if config.score.fallback_days is not None:
            popularity(spark, night.prepare, config.score, ds).agg(F.sum("total")).collect()
        reading_s, began = time.monotonic() - began, time.monotonic()
        slots = forecasting.slots(spark)
        every = max(1, users.get(True, 0) // (slots * forecasting.USERS_A_SLOT))
        sample = rows.where("by_model").where(F.pmod(F.xxhash64("user_id"), F.lit(every)) == 0)
        sample = in_files(sample, 1, night.indexed).repartition(slots)
        work = on_executor("ncf_dist.score.probe:probe_pass", spec, forecasting.SECONDS_A_SLOT)
        probe = map_in_arrow(sample, work, "stats string").collect()
        probe_s = time.monotonic() - began
    result = forecasting.Forecast.of(
        [json.loads(row["stats"]) for row in probe],
        model_users=users.get(True, 0),
        popular_users=users.get(False, 0),
        items=night.bundle.n_items,
        eligible=items["eligible"],
        slots=slots,
        tasks=min(night.n_files, config.score.tasks or night.n_files),
        start_s={"session": session_s, "reading": reading_s},
        probe_s=probe_s,
    )
    print(result.table(ds, night.bundle.model_version), file=sys.stderr, flush=True)
    return Outcome("done", metrics=result.metrics)


@dataclass(frozen=True)
class _Night:
    """What is ranked tonight, and with what."""

    config: Config
    prepare: Manifest
    train: Manifest
    bundle: Bundle
    contract: contracts.Contract
    lists: ItemLists

    @classmethod
    def of(cls, config: Config, ds: str, given: Upstream | None = None) -> _Night:
        upstream = find_upstream(Lake(config.paths.lake), config, ds, STAGE, given)
        prepare, train = upstream["prepare"], upstream["train"]
        bundle = read_bundle(posixpath.join(train.root, "bundle"))
        verify_weights(bundle)  # Once; the workers then trust them.
        user_id, item_id = (
            read_schema(prepare.files(f"{kind}_index")[0]).field(f"{kind}_id").type for kind in ("user", "item")
        )
        contract = contracts.recommendations(user_id, item_id, config.score.form)
        return cls(config, prepare, train, bundle, contract, ItemLists.read(config.score))

    @property
    def indexed(self) -> int:
        """Numbers given to users, those of forgotten ones included."""
        return index_sizes(self.prepare).users

    @property
    def n_files(self) -> int:
        """Files of the table: a function of the night's tables and the config alone, never of the cluster."""
        unseen = self.prepare.tables.get("unseen_users")
        users = self.indexed + (unseen.rows if unseen and self.config.score.fallback_days is not None else 0)
        rows, pairs = users * self.config.score.k, users * self.bundle.n_items
        return max(MIN_FILES, -(-rows // ROWS_PER_FILE), -(-pairs // PAIRS_PER_FILE))

    def spec(self, folder: str) -> ScorePass:
        items = tuple(self.prepare.files("item_index"))
        return ScorePass(self.bundle, items, self.contract, folder, self.config.score, self.lists)

    def products(self, spark: SparkSession) -> Products:
        """How the executors multiply, from a probe on one of them."""
        asked = self.config.score.precision
        return Products.agreed(on_one_executor(spark, partial(choose, self.bundle, asked)), asked)

    def facts(self, ds: str) -> dict[str, Any]:
        """What the audit holds the table to."""
        config, since = self.config.score, active_from(self.config.score, ds)
        return {
            "k": config.k,
            "form": config.form,
            "seen": config.seen,
            "active_since": since.isoformat() if since else None,
            "fallback_days": config.fallback_days,
            "model_version": self.bundle.model_version,
            "prepare_run": self.prepare.run_key,
        }


def _popularity(spark: SparkSession, night: _Night, run: str) -> dict[str, TableInfo]:
    rows = popularity(spark, night.prepare, night.config.score, night.prepare.ds)
    file = F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
    return {"popularity": write_table(rows, run, contracts.POPULARITY, file)}


def _check(spark: SparkSession, night: _Night, spec: ScorePass, files: tuple[str, ...]) -> None:
    """Compare a few users of a few files with the model. Raises ContractError."""
    step = max(1, len(files) // CHECKED_FILES)
    files = files[::step][:CHECKED_FILES]
    ids = [user for path in files for user in _some_users(path)]
    index_files = night.prepare.files("user_index")
    index = read_files(spark, index_files, read_schema(index_files[0])).where(F.col("user_id").isin(ids))
    user_ids = {row["user_idx"]: row["user_id"] for row in index.collect()}
    history = read_files(spark, night.prepare.files("history"), contracts.HISTORY.schema)
    rows = history.where(F.col("user_idx").isin([*user_ids])).coalesce(1)
    work = on_executor("ncf_dist.score.check:check_pass", spec, user_ids, files)
    problems = [row["problem"] for row in map_in_arrow(rows, work, "problem string").collect()]
    if problems:
        raise ContractError(
            f"the recommendations of {len(problems)} of {len(ids)} users are not what the model "
            f"{night.bundle.model_version} says: {problems[0]}; needed its own scores: rerun the job score, and if it "
            "happens again, the executors run other code or other weights than the driver"
        )


def _some_users(path: str) -> list[Any]:
    """The first users of a file that were ranked by the model."""
    rows = contracts.in_long_form(read_table(path))
    by_model = rows.filter(pc.equal(rows["reason"], contracts.MODEL))
    return [*pc.unique(by_model["user_id"]).slice(0, CHECKED_USERS).to_pylist()]


def _paths(run: str, table: TableInfo) -> tuple[str, ...]:
    return tuple(posixpath.join(run, table.path, file.path) for file in table.files)


def _total(parts: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
