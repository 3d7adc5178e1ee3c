"""Figures of all users' lists together, counted by Spark: the driver gets distinct counts, and no items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import metrics
from ncf_dist.evaluate.segments import IntArray
from ncf_dist.parquet import read_table


def train_counts(stats_files: Sequence[str]) -> IntArray:
    """(I,) train and validation interactions of every item, from the files of item_stats."""
    return np.concatenate([read_table(path, ["train_count"])["train_count"].to_numpy() for path in stats_files])


def list_metrics(
    ranks: DataFrame, stats: DataFrame, ks: tuple[int, ...], popularity: tuple[IntArray, IntArray]
) -> dict[str, dict[str, float]]:
    """Coverage, novelty, Gini index and popularity bias of the lists, by scorer and `metric@K`.

    popularity: the distinct train interactions of an item, ascending, and how many items have so many.
    """
    places = ranks.select("scorer", F.posexplode("top").alias("place", "item_idx"))
    shown = [F.sum((F.col("place") < k).cast("long")).alias(f"k{k}") for k in ks]
    pairs = ", ".join(f"{k}, k{k}" for k in ks)
    exposure = (
        places.groupBy("scorer", "item_idx")
        .agg(*shown)
        .join(stats, "item_idx")
        .selectExpr("scorer", "train_count", f"stack({len(ks)}, {pairs}) as (k, shown)")
        .where("shown > 0")
        .persist()
    )
    by_shown = exposure.groupBy("scorer", "k", "shown").agg(F.count("*").alias("items")).collect()
    by_count = exposure.groupBy("scorer", "k", "train_count").agg(F.sum("shown").alias("shown")).collect()
    exposure.unpersist()

    count, items = popularity
    n_items, interactions = int(items.sum()), int((count * items).sum())
    how_often: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    how_popular: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for row in by_shown:
        how_often[row["scorer"], row["k"]].append((row["shown"], row["items"]))
    for row in by_count:
        how_popular[row["scorer"], row["k"]][row["train_count"]] = row["shown"]
    by_scorer: dict[str, dict[str, float]] = defaultdict(dict)
    for scorer, k in sorted(how_often):
        often = np.array(sorted(how_often[scorer, k]), dtype=np.int64)
        recommended = int(often[:, 1].sum())
        often = np.vstack([[0, n_items - recommended], often])
        shown_by_count = np.array([how_popular[scorer, k].get(int(c), 0) for c in count])
        by_scorer[scorer] |= {
            f"coverage@{k}": metrics.coverage(recommended, n_items),
            f"novelty@{k}": metrics.novelty(count, shown_by_count, interactions),
            f"gini@{k}": metrics.gini(often[:, 0], often[:, 1]),
            f"popularity_bias@{k}": metrics.popularity_bias(count, shown_by_count, items),
        }
    return dict(by_scorer)
