"""The job evaluate: full-catalogue and candidate metrics of this night's model on its test rows, beside its baselines.

One pass over the users with held-out items scores them and stores their ranks; all figures are functions of that table.
"""

from __future__ import annotations

import json
import logging
import posixpath
import resource
from dataclasses import asdict
from functools import partial
from typing import Any

from pyspark.sql import functions as F

from ncf_dist import contracts, metrics
from ncf_dist.champion import CHAMPION
from ncf_dist.config import Config
from ncf_dist.earlier import earlier_model, said
from ncf_dist.engines import choose
from ncf_dist.evaluate import summary
from ncf_dist.evaluate.compare import check_same_rows, find_run, judged_on
from ncf_dist.evaluate.evaluation import Evaluation
from ncf_dist.evaluate.fitting import fit_baselines
from ncf_dist.evaluate.held_out import Ranked, rank_held_out
from ncf_dist.evaluate.histogram import on_common_bins
from ncf_dist.evaluate.judged_model import champion_beside, judged_model
from ncf_dist.evaluate.judging import judge
from ncf_dist.evaluate.report.data import report_data
from ncf_dist.evaluate.report.examples import examples
from ncf_dist.evaluate.report.page import headline_k, write_report
from ncf_dist.evaluate.report.profile import Counted
from ncf_dist.files import read_json, remove, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo
from ncf_dist.products import Products
from ncf_dist.spark_io import LIST_BATCH_ROWS, on_one_executor, read_files, read_table, spark_session
from ncf_dist.stage import Outcome, StageRun, Upstream, find_upstream

log = logging.getLogger(__name__)

STAGE = "evaluate"
SCORE_BINS = 64


def evaluate(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Judge the current model of night `ds`.
    Raises ContractError where train or prepare have not finished or do not fit together, or the run to compare with
    judged other rows; ConfigError where a baseline would not fit in memory."""
    lake = Lake(config.paths.lake)
    upstream = find_upstream(lake, config, ds, STAGE, given)
    prepare, train = upstream["prepare"], upstream["train"]
    other = find_run(lake, ds, config.evaluate.compare, config.run) if config.evaluate.compare else None
    beside = champion_beside(config, prepare, train)
    inputs = {"prepare": prepare.run_key, "train": train.run_key, **({"compare": other.run_key} if other else {})}
    inputs |= {CHAMPION: f"{beside[0].ds}/{beside[0].run_key}"} if beside else {}
    stage = StageRun(STAGE, config, ds, inputs)
    if done := stage.find():
        log.info("already evaluated: %s", done.root)
        return outcome(done, "already-done")
    if prepare.config["split"]["strategy"] == "none":
        log.warning("nothing is held out (split.strategy none): there is nothing to judge the model by")
        stage.begin()
        return outcome(stage.finish())
    bundle, since = judged_model(config, prepare, train)
    judged = judged_on(prepare)
    if other:
        check_same_rows(other, judged, prepare)

    run = stage.begin()
    with spark_session("ncf-evaluate", config.spark, LIST_BATCH_ROWS) as spark:
        products = Products.agreed(on_one_executor(spark, partial(choose, bundle, "fp32")))
        job = Evaluation(spark, config, prepare, bundle, run, products, since, beside[1] if beside else None)
        ranked = _ranked(job)
        ranks, bins = ranked.table, on_common_bins(ranked.scores, SCORE_BINS)
        report = {"ds": ds, **judge(job, ranks, other, ranked.unit), "scores": bins}
        page = _page(job, train, stage, report, ranks)
    summary.log_comparison(report)
    # The metrics are a function of the tables alone; the page also shows seconds and memory.
    write_atomic(posixpath.join(run, metrics.STORED), json.dumps(report, indent=1).encode())
    log.info("report: %s", write_report(run, page))
    flat = summary.flat_metrics(report)
    facts = {
        "model_version": bundle.model_version,
        "n_users": report["n_users"],
        "judged_on": judged,
        "products": asdict(products),
        **{name: report[name] for name in ("beats_popularity",) if name in report},
    }
    if beside is not None:
        facts[CHAMPION] = {"ds": beside[0].ds, "train": beside[0].run_key, "model_version": beside[1].model_version}
    if since is not None:
        of = f"of {report['n_users']:,} users with held-out items {ranked.unknown_users:,} are judged by popularity"
        facts |= earlier_model(train, bundle, since, of) | {"unknown_users": ranked.unknown_users}
    return outcome(stage.finish(tables={ranks.path: ranks}, facts=facts, metrics=flat))


def _ranked(job: Evaluation) -> Ranked:
    try:
        fitted, als_users = fit_baselines(job)
        return rank_held_out(job, fitted, als_users)
    finally:
        remove(job.fits)


def _page(
    job: Evaluation, train: Manifest, stage: StageRun, report: dict[str, Any], ranks: TableInfo
) -> dict[str, Any]:
    """What the report page shows."""
    seen = read_files(job.spark, ranks.paths(job.run), contracts.RANKS.schema).where(F.col("scorer") == "model")
    counted = Counted.of(read_table(job.spark, job.prepare, contracts.INTERACTIONS))
    return report_data(
        job.spark,
        job.prepare,
        train,
        report,
        counted,
        run_key=stage.key,
        config=stage.config,
        seconds=stage.seconds,
        examples=examples(job.spark, job.prepare, seen, counted, job.config.seed, headline_k(report)),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def outcome(run: Manifest, status: str = "done") -> Outcome:
    """What a run says, finished now or before. A night without held-out rows has no report."""
    names = {"metrics": metrics.STORED, "report": metrics.PAGE} if run.tables else {}
    files = {name: posixpath.join(run.root, file) for name, file in names.items()}
    return Outcome.of(run, status, files, **said(run), **(_certainty(files["metrics"]) if files else {}))


def _certainty(path: str) -> dict[str, Any]:
    """Of metrics.json the intervals and the comparisons; nothing where it is damaged, which whoever needs it says."""
    try:
        report = read_json(dict[str, Any], path)
    except (OSError, ValueError):
        return {}
    return {name: report[name] for name in ("intervals", "comparisons") if name in report}
