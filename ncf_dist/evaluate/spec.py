"""What the driver of evaluate sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ncf_dist.bundle import Bundle
from ncf_dist.config import Evaluate
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
    """Item-item weights from the Gram matrix of the history. files: of each baseline that is wanted, by name."""

    history_files: tuple[str, ...]
    n_items: int
    config: Evaluate
    files: Mapping[str, str]


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
