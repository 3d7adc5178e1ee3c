"""The job score: exact top K over the whole catalogue for every user with a history, seen items masked; popular items
for the others.

`forecast` is the same job with `--dry-run`: it says what the job would take.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.config import Config
from ncf_dist.earlier import earlier_model, said
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.score import forecasting
from ncf_dist.score.plan import STAGE, Plan
from ncf_dist.score.task_rows import in_files, in_tasks, popularity, users_to_rank
from ncf_dist.score.written import check_written
from ncf_dist.spark_files import ROWS_PER_FILE, table_info, write_table
from ncf_dist.spark_io import LIST_BATCH_ROWS, on_executor, spark_session, task_stats
from ncf_dist.stage import Outcome, StageRun, Upstream

log = logging.getLogger(__name__)


def score(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Rank for every user of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together, or where what was written is
    not what the model says; InputError where the item lists cannot be read or leave nothing."""
    plan = Plan.of(config, ds, given)
    stage = StageRun(STAGE, config, ds, plan.inputs)
    if before := stage.find():
        log.info("already scored: %s", before.root)
        return _outcome(before, "already-done")

    items, run = plan.count_items(), stage.begin()
    tables: dict[str, TableInfo] = {}
    with spark_session("ncf-score", config.spark, LIST_BATCH_ROWS) as spark:
        spec = plan.spec(f"{run}/{plan.contract.name}", plan.products(spark))
        if config.score.fallback_days is not None:
            file = F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
            counts = popularity(spark, plan.prepare, config.score, ds)
            popular = write_table(counts, run, contracts.POPULARITY, file)
            tables[popular.path], spec = popular, replace(spec, popularity_files=tuple(popular.paths(run)))
        users = users_to_rank(spark, plan.prepare, plan.bundle, config.score, ds)
        rows = in_tasks(in_files(users, plan.n_files, plan.indexed), plan.tasks)
        work = on_executor("ncf_dist.score.ranker:score_pass", spec)
        stats = task_stats(rows, work)
        table = table_info(plan.contract, [FileInfo(**f) for task in stats for f in task["files"]], run)
        check_written(spark, plan.prepare, spec, tuple(table.paths(run)))
    tables[plan.contract.name] = table
    done = _total(task["counts"] for task in stats)
    facts, metrics = _account(stats, done, items, table.rows)
    facts = plan.facts() | {"items": items, "products": spec.products.facts(stats)} | facts
    if plan.since is not None:
        ranked = f"{done['new_by_model']:,} of {done['new_users']:,} who are ranked tonight by the model"
        facts |= earlier_model(plan.train, plan.bundle, plan.since, ranked)
        metrics |= {f"score.{name}": done[name] for name in ("new_users", "new_by_model")}
    manifest = stage.finish(tables=tables, facts=facts, metrics=metrics)
    log.info(
        "scored %s users (%s by popularity, %s with fewer than %d items) in %.1f s: %s",
        *(f"{done[name]:,}" for name in ("users", "popular_users", "short_users")),
        config.score.k, manifest.seconds, manifest.table_path(plan.contract.name),
    )  # fmt: skip
    return _outcome(manifest)


def _outcome(run: Manifest, status: str = "done") -> Outcome:
    """What it says of the model is of the one that ranked: the champion, a refit or that of an earlier night too."""
    return Outcome.of(run, status, model_version=run.facts["model_version"], **said(run))


def _account(
    stats: list[dict[str, Any]], counts: Counter[str], items: Mapping[str, Any], rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts, metrics) of what the tasks did."""
    spent = _total(task["seconds"] for task in stats)
    facts = {
        **{name: counts[name] for name in ("users", "short_users", "popular_users")},
        "seconds": {step: round(seconds, 3) for step, seconds in spent.items()},
        "worker_memory_bytes": max((task["memory"] for task in stats), default=0),
    }
    metrics = {
        "score.users": counts["users"],
        "score.popular_users": counts["popular_users"],
        "score.rows": rows,
        "score.recommendations": counts["recommendations"],
        "score.short_users": counts["short_users"],
        "score.eligible_items": items["eligible"],
        "score.pairs": counts["pairs"],
        "score.pairs_per_s": round(counts["pairs"] / max(spent["score"], 1e-9)),
    }
    return facts, metrics


def forecast(config: Config, ds: str) -> Outcome:
    """What `score` would take, from a sample of tonight's users that is really scored; nothing is written to the lake.
    Raises what `score` raises before it starts."""
    start = time.monotonic()
    plan = Plan.of(config, ds)
    items = plan.count_items()
    with spark_session("ncf-score-forecast", config.spark, LIST_BATCH_ROWS) as spark:
        session_s, began = time.monotonic() - start, time.monotonic()
        # Files of this scheme live in the memory of the worker that writes them; the probe removes them.
        spec = plan.spec("memory://ncf-dist-probe", plan.products(spark))
        rows = users_to_rank(spark, plan.prepare, plan.bundle, config.score, ds)
        users = {bool(row["by_model"]): int(row["count"]) for row in rows.groupBy("by_model").count().collect()}
        if config.score.fallback_days is not None:
            popularity(spark, plan.prepare, config.score, ds).agg(F.sum("total")).collect()
        reading_s, began = time.monotonic() - began, time.monotonic()
        slots = forecasting.slots(spark)
        every = max(1, users.get(True, 0) // (slots * forecasting.USERS_A_SLOT))
        sample = rows.where("by_model").where(F.pmod(F.xxhash64("user_id"), F.lit(every)) == 0)
        sample = in_files(sample, 1, plan.indexed).repartition(slots)
        work = on_executor("ncf_dist.score.probe:probe_pass", spec, forecasting.SECONDS_A_SLOT)
        probe = task_stats(sample, work)
        probe_s = time.monotonic() - began
    result = forecasting.Forecast.of(
        probe,
        model_users=users.get(True, 0),
        popular_users=users.get(False, 0),
        items=plan.bundle.n_items,
        eligible=items["eligible"],
        slots=slots,
        tasks=min(plan.n_files, plan.tasks),
        start_s={"session": session_s, "reading": reading_s},
        probe_s=probe_s,
    )
    print(result.table(ds, plan.bundle.model_version), file=sys.stderr, flush=True)
    return Outcome("done", metrics=result.metrics)


def _total(parts: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
