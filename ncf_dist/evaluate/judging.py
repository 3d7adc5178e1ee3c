"""From the stored ranks to `metrics.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ncf_dist import contracts
from ncf_dist.evaluate import ratings, summary
from ncf_dist.evaluate.evaluation import Evaluation
from ncf_dist.evaluate.lists import list_metrics, train_counts
from ncf_dist.evaluate.report.page import headline_k
from ncf_dist.evaluate.segments import KINDS, PopularityDeciles
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.evaluate.sums import sum_up, with_other
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo
from ncf_dist.spark_io import read_files, read_table


def judge(job: Evaluation, ranks: TableInfo, other: Manifest | None, unit: str | None) -> dict[str, Any]:
    """`metrics.json` but for the histograms."""
    settings = job.config.evaluate
    explicit = job.prepare.facts.get("feedback") == "explicit"
    stats = read_table(job.spark, job.prepare, contracts.ITEM_STATS)
    stats_files = tuple(job.prepare.files(contracts.ITEM_STATS.name))
    popularity = np.unique(train_counts(stats_files), return_counts=True)
    deciles = PopularityDeciles.of(*popularity)
    paths = ranks.paths(job.run)
    scorers = ["model", *job.scorers]
    spec = FiguresPass(
        files=tuple(tuple((name, name, path) for name in scorers) for path in paths),
        stats_files=stats_files,
        deciles=deciles,
        ks=settings.ks,
        lead_k=headline_k({"ks": settings.ks}),
        explicit=explicit,
        segments=(*KINDS, unit) if unit else KINDS,
        seed=job.config.seed,
        replicates=settings.bootstrap,
    )
    others: list[str] = list(job.scorers)
    if other:
        name = str(other.facts["model_version"])
        spec = with_other(spec, name, other.files(contracts.RANKS.name))
        others.append(name)
    sums = sum_up(job.spark, spec, job.config.spark.shuffle_partitions)
    rated = ratings.NAMES if explicit else ()
    if explicit:
        sums |= ratings.sums(job.spark, job.prepare, settings, job.config.seed, spec)
    lists = list_metrics(read_files(job.spark, paths, contracts.RANKS.schema), stats, settings.ks, popularity)
    report: dict[str, Any] = {
        "model_version": job.bundle.model_version,
        "feedback": "explicit" if explicit else "implicit",
        "ks": list(settings.ks),
        "n_users": summary.check_users(sums),
        "n_rows": int(sums["model/rows/n"][0]),
        **summary.of_scorer(sums, "model"),
        "lists": lists["model"],
        "baselines": {
            name: summary.of_scorer(sums, name) | ({"lists": lists[name]} if name in lists else {})
            for name in dict.fromkeys((*rated, *job.scorers))
        },
        "comparisons": summary.comparisons(sums, list(dict.fromkeys((*rated, *others)))),
        "segments": summary.by_segment(sums, spec.segments, deciles),
    }
    if "popularity" in report["baselines"]:
        worse = summary.not_better(report["full"], report["baselines"]["popularity"]["full"])
        report["beats_popularity"] = not worse
    return report
