"""What the driver of evaluate sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from dataclasses import dataclass

from ncf_dist.bundle import Bundle
from ncf_dist.evaluate.segments import PopularityDeciles
from ncf_dist.products import PLAIN, Products

ALS_USER = "als_user"
"""Column of the users' ALS factors, where ALS is a baseline."""


@dataclass(frozen=True)
class EvaluationPass:
    """One pass over users with held-out items. stats_files: the item_stats table. longest: length of the lists.
    baselines: by name, the files each needs. products: how they multiply."""

    bundle: Bundle
    stats_files: tuple[str, ...]
    folder: str
    longest: int
    baselines: tuple[tuple[str, tuple[str, ...]], ...] = ()
    products: Products = PLAIN


@dataclass(frozen=True)
class GramFit:
    """Item-item weights from the Gram matrix of the history, each to a file, or None where it is not wanted."""

    history_files: tuple[str, ...]
    n_items: int
    ease_to: str | None
    knn_to: str | None
    ease_lambda: float
    knn_neighbours: int
    knn_shrink: float


@dataclass(frozen=True)
class FiguresPass:
    """One pass over the stored ranks. files[f]: (scorer to give in the report, scorer in the file, path) of file number
    f: this run's, and the other run's that it is compared with. segments: kinds to break down by."""

    files: tuple[tuple[tuple[str, str, str], ...], ...]
    stats_files: tuple[str, ...]
    deciles: PopularityDeciles
    ks: tuple[int, ...]
    lead_k: int
    explicit: bool
    segments: tuple[str, ...]
    seed: int
    replicates: int
