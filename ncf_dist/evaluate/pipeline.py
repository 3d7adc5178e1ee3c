"""The job evaluate: full-catalogue and candidate metrics of this night's model on its test rows, beside its baselines.

One pass over the users with held-out items scores them and stores their ranks; all figures are functions of that table.
"""

from __future__ import annotations

import json
import logging
import posixpath
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import contracts, metrics
from ncf_dist.bundle import Bundle, read_bundle, verify_weights
from ncf_dist.config import Config, Evaluate
from ncf_dist.engines import choose
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.evaluate import ratings, summary
from ncf_dist.evaluate.als import fit_als
from ncf_dist.evaluate.compare import check_same_rows, find_run, judged_on
from ncf_dist.evaluate.figures import sum_up, with_other
from ncf_dist.evaluate.histogram import Histogram, on_common_bins
from ncf_dist.evaluate.lists import list_metrics, popularity_counts
from ncf_dist.evaluate.periods import unit_of
from ncf_dist.evaluate.report.data import report_data
from ncf_dist.evaluate.report.examples import examples
from ncf_dist.evaluate.report.page import REPORT, headline_k, write_report
from ncf_dist.evaluate.segments import KINDS, PopularityDeciles
from ncf_dist.evaluate.spec import ALS_USER, EvaluationPass, FiguresPass, GramFit
from ncf_dist.files import read_json, remove, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.products import Products
from ncf_dist.spark_io import (
    LIST_BATCH_ROWS,
    map_in_arrow,
    on_executor,
    on_one_executor,
    read_files,
    read_table,
    spark_session,
    table_info,
)
from ncf_dist.stage import Outcome, StageRun, Upstream, find_upstream

log = logging.getLogger(__name__)

STAGE = "evaluate"
METRICS = metrics.STORED
MIN_FILES = 16
USERS_A_FILE = 25_000
"""Bounds the rows of `ranks` that a task holds."""
GRAM = ("ease", "item_knn")
GRAM_COPIES = 3
"""Matrices of items x items, float64, at the worst moment of fitting: the Gram matrix, its factor, the inverse."""
SCORE_BINS = 64


def evaluate(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Judge the current model of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together, or the run to compare with
    judged other rows; ConfigError where a baseline would not fit in memory."""
    lake = Lake(config.paths.lake)
    upstream = find_upstream(lake, config, ds, STAGE, given)
    prepare, train = upstream["prepare"], upstream["train"]
    other = find_run(lake, ds, config.evaluate.compare, config.run) if config.evaluate.compare else None
    inputs = {"prepare": prepare.run_key, "train": train.run_key, **({"compare": other.run_key} if other else {})}
    stage = StageRun(STAGE, config, ds, inputs)
    if done := stage.find():
        log.info("already evaluated: %s", done.root)
        return outcome(done, "already-done")
    if prepare.config["split"]["strategy"] == "none":
        log.warning("nothing is held out (split.strategy none): there is nothing to judge the model by")
        stage.begin()
        return outcome(stage.finish())
    if not prepare.table(contracts.TEST).rows:
        raise ContractError(
            "the test table is empty: no user has enough items to hold one out; "
            "give more data or lower split.min_interactions"
        )
    bundle = read_bundle(posixpath.join(train.root, "bundle"))
    verify_weights(bundle)
    check_gram(config.evaluate, bundle.n_items)
    judged = judged_on(prepare)
    if other:
        check_same_rows(other, judged, prepare)

    run = stage.begin()
    with spark_session("ncf-evaluate", config.spark, LIST_BATCH_ROWS) as spark:
        products = Products.agreed(on_one_executor(spark, partial(choose, bundle, "fp32")))
        night = Night(spark, config, prepare, bundle, run, products)
        try:
            fitted, als_users = night.fit_baselines()
            ranks, scores, unit = night.rank(fitted, als_users)
        finally:
            remove(night.fits)
        report = {"ds": ds, **night.report(ranks, other, unit), "scores": on_common_bins(scores, SCORE_BINS)}
        seen = read_files(spark, night.paths(ranks), contracts.RANKS.schema).where(F.col("scorer") == "model")
        page = report_data(
            spark,
            prepare,
            train,
            report,
            run_key=stage.key,
            config=stage.config,
            seconds=stage.seconds,
            examples=examples(spark, prepare, seen, config.seed, headline_k(report)),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    _log_comparison(report)
    # The metrics are a function of the tables; what the page adds, such as seconds, is not.
    write_atomic(posixpath.join(run, METRICS), json.dumps(report, indent=1).encode())
    log.info("report: %s", write_report(run, page))
    flat = summary.flat_metrics(report)
    facts = {
        "model_version": bundle.model_version,
        "n_users": report["n_users"],
        "judged_on": judged,
        "products": asdict(products),
        **{name: report[name] for name in ("beats_popularity",) if name in report},
    }
    return outcome(stage.finish(tables={ranks.path: ranks}, facts=facts, metrics=flat))


def outcome(run: Manifest, status: str = "done") -> Outcome:
    """What a run says, finished now or before. A night without held-out rows has no report."""
    names = {"metrics": METRICS, "report": REPORT} if run.tables else {}
    files = {name: posixpath.join(run.root, file) for name, file in names.items()}
    return Outcome.of(run, status, files, **(_certainty(files["metrics"]) if files else {}))


def _certainty(path: str) -> dict[str, Any]:
    """Of metrics.json the intervals and the comparisons; nothing where it is damaged, which whoever needs it says."""
    try:
        report = read_json(dict[str, Any], path)
    except (OSError, ValueError):
        return {}
    return {name: report[name] for name in ("intervals", "comparisons") if name in report}


def check_gram(config: Evaluate, n_items: int) -> None:
    """Raise ConfigError where a baseline's matrix of items x items takes more than `evaluate.gram_bytes`."""
    needed = GRAM_COPIES * 8 * n_items**2
    asked = [name for name in config.baselines if name in GRAM]
    if asked and needed > config.gram_bytes:
        raise ConfigError(
            f"evaluate.baselines asks for {' and '.join(asked)}: {n_items:,} items x {n_items:,} items x 8 bytes x "
            f"{GRAM_COPIES} matrices = {needed:,} bytes; evaluate.gram_bytes allows {config.gram_bytes:,}: raise it "
            f"where executors have that much, or leave {' and '.join(asked)} out"
        )


@dataclass(frozen=True)
class Night:
    """What the steps share."""

    spark: SparkSession
    config: Config
    prepare: Manifest
    bundle: Bundle
    run: str
    products: Products

    @property
    def fits(self) -> str:
        """Folder of the fitted baselines; removed when everybody is ranked."""
        return posixpath.join(self.run, "baselines")

    def fit_baselines(self) -> tuple[dict[str, tuple[str, ...]], DataFrame | None]:
        """(files of each baseline by name, ALS's user factors or None)."""
        settings = self.config.evaluate
        fitted: dict[str, tuple[str, ...]] = dict.fromkeys(settings.baselines, ())
        grams = {name: posixpath.join(self.fits, f"{name}.safetensors") for name in settings.baselines if name in GRAM}
        if grams:
            spec = GramFit(
                tuple(self.prepare.files("history")),
                self.bundle.n_items,
                grams.get("ease"),
                grams.get("item_knn"),
                settings.ease_lambda,
                settings.knn_neighbours,
                settings.knn_shrink,
            )
            work = on_executor("ncf_dist.evaluate.baselines:fit", spec)
            map_in_arrow(self.spark.range(0, 1, 1, 1), work, "stats string").collect()
            fitted |= {name: (path,) for name, path in grams.items()}
        if "als" not in fitted:
            return fitted, None
        seen = read_table(self.spark, self.prepare, contracts.HISTORY)
        users, items = fit_als(seen, settings, self.config.seed, self.fits)
        fitted["als"] = tuple(posixpath.join(self.fits, items.path, info.path) for info in items.files)
        return fitted, users

    def rank(
        self, fitted: Mapping[str, tuple[str, ...]], als_users: DataFrame | None
    ) -> tuple[TableInfo, dict[str, Histogram], str | None]:
        """(the table `ranks`, histograms of the model's scores by name, the unit that suits the times of the held-out
        items, if they have any)."""
        files = max(MIN_FILES, -(-self.prepare.tables["history"].rows // USERS_A_FILE))
        spec = EvaluationPass(
            self.bundle,
            tuple(self.prepare.files("item_stats")),
            posixpath.join(self.run, contracts.RANKS.name),
            max(self.config.evaluate.ks),
            tuple(fitted.items()),
            self.products,
        )
        rows = held_out_users(self.spark, self.prepare, als_users, self.config.evaluate.als_rank)
        rows = rows.withColumn("_file", F.pmod("user_idx", F.lit(files)))
        # Asked for by number: the optimiser must not merge a small input whose work is heavy into one task.
        rows = rows.repartition(files, "_file").sortWithinPartitions("_file", "user_idx")
        work = on_executor("ncf_dist.evaluate.users:evaluation_pass", spec)
        stats = [json.loads(row["stats"]) for row in map_in_arrow(rows, work, "stats string").collect()]
        histograms: dict[str, Histogram] = {}
        for task in stats:
            for name, body in task["scores"].items():
                histograms.setdefault(name, Histogram()).merge(Histogram.from_json(body))
        table = table_info(contracts.RANKS, [FileInfo(**info) for task in stats for info in task["files"]], self.run)
        times = [time for task in stats for time in task["times"]]
        return table, histograms, unit_of(min(times), max(times)) if times else None

    def paths(self, table: TableInfo) -> list[str]:
        return [posixpath.join(self.run, table.path, info.path) for info in table.files]

    def report(self, ranks: TableInfo, other: Manifest | None, unit: str | None) -> dict[str, Any]:
        """`metrics.json` but for the histograms."""
        settings = self.config.evaluate
        explicit = self.prepare.facts.get("feedback") == "explicit"
        stats = read_table(self.spark, self.prepare, contracts.ITEM_STATS)
        popularity = popularity_counts(stats)
        deciles = PopularityDeciles.of(*popularity)
        paths = self.paths(ranks)
        scorers = ["model", *settings.baselines]
        spec = FiguresPass(
            files=tuple(tuple((name, name, path) for name in scorers) for path in paths),
            stats_files=tuple(self.prepare.files("item_stats")),
            deciles=deciles,
            ks=settings.ks,
            lead_k=headline_k({"ks": settings.ks}),
            explicit=explicit,
            segments=(*KINDS, unit) if unit else KINDS,
            seed=self.config.seed,
            replicates=settings.bootstrap,
        )
        others: list[str] = list(settings.baselines)
        if other:
            name = str(other.facts["model_version"])
            spec = with_other(spec, name, other.files(contracts.RANKS.name))
            others.append(name)
        sums = sum_up(self.spark, spec, self.config.spark.shuffle_partitions)
        rated = ratings.NAMES if explicit else ()
        if explicit:
            sums |= ratings.sums(self.spark, self.prepare, settings, self.config.seed, spec)
        lists = list_metrics(read_files(self.spark, paths, contracts.RANKS.schema), stats, settings.ks, popularity)
        report: dict[str, Any] = {
            "model_version": self.bundle.model_version,
            "feedback": "explicit" if explicit else "implicit",
            "ks": list(settings.ks),
            "n_users": summary.check_users(sums),
            "n_rows": int(sums["model/rows/n"][0]),
            **summary.of_scorer(sums, "model"),
            "lists": lists["model"],
            "baselines": {
                name: summary.of_scorer(sums, name) | ({"lists": lists[name]} if name in lists else {})
                for name in dict.fromkeys((*rated, *settings.baselines))
            },
            "comparisons": summary.comparisons(sums, list(dict.fromkeys((*rated, *others)))),
            "segments": summary.by_segment(sums, spec.segments, deciles),
        }
        if "popularity" in report["baselines"]:
            worse = summary.not_better(report["full"], report["baselines"]["popularity"]["full"])
            report["beats_popularity"] = not worse
        return report


def held_out_users(
    spark: SparkSession, prepare: Manifest, als_users: DataFrame | None = None, als_rank: int = 0
) -> DataFrame:
    """One row a user with held-out items: user_idx, seen (train and validation items), held_out (list of item_idx,
    rating, timestamp, candidates, ascending by item), and ALS factors if any (zeros for a user without)."""
    history = read_table(spark, prepare, contracts.HISTORY).selectExpr("user_idx", "item_idx as seen")
    times = (
        read_table(spark, prepare, contracts.INTERACTIONS)
        .where(F.col("split") == contracts.TEST_SPLIT)
        .select("user_idx", "item_idx", "timestamp")
    )
    held_out = (
        read_table(spark, prepare, contracts.TEST)
        .join(times, ["user_idx", "item_idx"])
        .groupBy("user_idx")
        .agg(F.sort_array(F.collect_list(F.struct("item_idx", "rating", "timestamp", "candidates"))).alias("held_out"))
    )
    rows = held_out.join(history, "user_idx").select("user_idx", "seen", "held_out")
    if als_users is None:
        return rows
    zeros = F.array_repeat(F.lit(0.0).cast("float"), als_rank)
    return rows.join(als_users, "user_idx", "left").withColumn(ALS_USER, F.coalesce(ALS_USER, zeros))


def _log_comparison(report: dict[str, Any]) -> None:
    baselines = report["baselines"]
    for protocol in ("full", "candidates"):
        for name, value in report[protocol].items():
            beside = "   ".join(f"{b} {v[protocol][name]:.4f}" for b, v in baselines.items() if protocol in v)
            log.info("%-10s %-12s %.4f   %s", protocol, name, value, beside)
    if "rating" in report:
        for name, value in report["rating"].items():
            beside = "   ".join(f"{b} {v['rating'][name]:.4f}" for b, v in baselines.items() if "rating" in v)
            log.info("%-10s %-12s %.4f   %s", "rating", name, value, beside)
    for row in report["comparisons"]:
        if row["protocol"] == "full" and row.get("p") is not None and row["with"] not in baselines:
            values = (row["metric"], row["difference"], row["with"], *row["interval"], row["p"])
            log.info("%s %+.4f against %s (95 %% interval %+.4f to %+.4f, p = %.4f)", *values)
    if "popularity" in baselines:
        worse = summary.not_better(report["full"], baselines["popularity"]["full"])
        if worse:
            log.warning("THE MODEL DOES NOT BEAT POPULARITY over the full catalogue in %s", ", ".join(worse))
