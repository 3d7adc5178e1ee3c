"""The job evaluate: full-catalogue and candidate metrics of this night's model on its test rows, beside popularity."""

from __future__ import annotations

import json
import logging
import posixpath
import time
from collections import Counter
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from ncf_dist import contracts, metrics
from ncf_dist.artifacts import Lake, Manifest, Outcome, run_key, write_atomic
from ncf_dist.bundle import current_runs, read_bundle, verify_weights
from ncf_dist.config import Config
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.spec import EvaluationPass, on_executors
from ncf_dist.spark_io import LIST_BATCH_ROWS, read_table, spark_session

log = logging.getLogger(__name__)

STAGE = "evaluate"


def evaluate(config: Config, ds: str) -> Outcome:
    """Judge the current model of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together."""
    start = time.monotonic()
    lake = Lake(config.paths.lake)
    prepare, train = current_runs(lake, ds)
    used = config.model_dump(mode="json", include={"evaluate"})
    runs = lake.stage(ds, STAGE)
    key = run_key(STAGE, ds, used, {"prepare": prepare.run_key, "train": train.run_key})
    if done := runs.find(key):
        log.info("already evaluated: %s", done.root)
        return Outcome.of(done, "already-done")
    if prepare.config["split"]["strategy"] == "none":
        log.warning("nothing is held out (split.strategy none): there is nothing to judge the model by")
        inputs = {"prepare": prepare.run_key, "train": train.run_key}
        return Outcome.of(runs.finish(Manifest(STAGE, ds, key, runs.begin(key), used, inputs)))
    if not prepare.table(contracts.TEST).rows:
        raise ContractError(
            "the test table is empty: no user has enough items to hold one out; "
            "give more data or lower split.min_interactions"
        )

    run = runs.begin(key)
    bundle = read_bundle(posixpath.join(train.root, "bundle"))
    verify_weights(bundle)
    with spark_session("ncf-evaluate", config.spark, LIST_BATCH_ROWS) as spark:
        explicit = prepare.facts.get("feedback") == "explicit"
        spec = EvaluationPass(bundle, tuple(prepare.files("item_stats")), config.evaluate.ks, explicit)
        rows = held_out_users(spark, prepare).repartition(config.spark.shuffle_partitions, "user_idx")
        stats = [json.loads(row["stats"]) for row in rows.mapInArrow(on_executors(spec), "stats string").collect()]
    report = summarise(stats)
    write_atomic(posixpath.join(run, "metrics.json"), json.dumps(report, indent=1).encode())
    _log_comparison(report)
    protocols = [p for p in ("full", "candidates", "rating") if p in report]
    flat = {f"{p}.{name}": value for p in protocols for name, value in report[p].items()}
    flat |= {
        f"popularity.{p}.{name}": value
        for p, values in report["baselines"]["popularity"].items()
        for name, value in values.items()
    }
    seconds = round(time.monotonic() - start, 3)
    facts = {"model_version": bundle.model_version, "n_users": report["n_users"]}
    runs.finish(
        Manifest(
            STAGE,
            ds,
            key,
            run,
            used,
            {"prepare": prepare.run_key, "train": train.run_key},
            {},
            facts,
            flat,
            seconds,
        )
    )
    return Outcome("done", key, {"metrics": posixpath.join(run, "metrics.json")}, flat)


def held_out_users(spark: SparkSession, prepare: Manifest) -> DataFrame:
    """One row a test row: user_idx, seen (train and validation items), item_idx, rating, candidates."""
    history = read_table(spark, prepare, contracts.HISTORY).selectExpr("user_idx", "item_idx as seen")
    return (
        read_table(spark, prepare, contracts.TEST)
        .join(history, "user_idx")
        .select("user_idx", "seen", "item_idx", "rating", "candidates")
    )


def summarise(stats: list[dict[str, float]]) -> dict[str, Any]:
    """Add the tasks' sums and divide: {"full", "candidates", "baselines": {"popularity": {…}}, "n_users"}, and
    "rating" where scores are ratings."""
    total: Counter[str] = Counter()
    for task in stats:
        total.update(task)

    def sums(scorer: str, protocol: str) -> dict[str, float]:
        prefix = f"{scorer}/{protocol}/"
        return {name.removeprefix(prefix): value for name, value in total.items() if name.startswith(prefix)}

    def of(scorer: str, protocol: str) -> dict[str, float]:
        return metrics.means(sums(scorer, protocol))

    popularity = {protocol: of("popularity", protocol) for protocol in ("full", "candidates")}
    rated = sums("model", "rating")
    return {
        **({"rating": metrics.rating_errors(rated)} if rated else {}),
        "full": of("model", "full"),
        "candidates": of("model", "candidates"),
        "baselines": {"popularity": popularity},
        "n_users": int(total["model/full/n"]),
    }


def _log_comparison(report: dict[str, Any]) -> None:
    baseline = report["baselines"]["popularity"]
    for protocol in ("full", "candidates"):
        for name, value in report[protocol].items():
            log.info("%-10s %-8s %.4f   popularity %.4f", protocol, name, value, baseline[protocol][name])
    if "rating" in report:
        log.info("%s", "   ".join(f"{name} {value:.4f}" for name, value in report["rating"].items()))
    worse = [name for name, value in report["full"].items() if value <= baseline["full"][name]]
    if worse:
        log.warning("THE MODEL DOES NOT BEAT POPULARITY over the full catalogue in %s", ", ".join(worse))
