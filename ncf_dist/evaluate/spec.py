"""What the driver of evaluate sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncf_dist.bundle import Bundle
from ncf_dist.config import Evaluate
from ncf_dist.evaluate.segments import PopularityDeciles
from ncf_dist.products import PLAIN, Products

ALS_USER = "als_user"
"""Column of the users' ALS factors, where ALS is a baseline."""

GRAM, COUNTED = ("ease", "item_knn"), "item_to_item"
"""The baselines that are fitted on the Gram matrix, and the one that is made from the counts of what follows what."""


@dataclass(frozen=True)
class EvaluationPass:
    """One pass over users with held-out items. n_items: of tonight, of which a model of an earlier night knows the
    first. stats_files: the item_stats table. longest: length of the lists. baselines: by name, the files each needs.
    earlier: whether the model is one of an earlier night. products: how they multiply. kept: how many latest items of a
    user are known. champion: the model of the last published night, which is compared with."""

    bundle: Bundle
    n_items: int
    stats_files: tuple[str, ...]
    folder: str
    longest: int
    baselines: tuple[tuple[str, tuple[str, ...]], ...] = ()
    earlier: bool = False
    products: Products = PLAIN
    config: Evaluate = field(default_factory=Evaluate)
    kept: int = 0
    champion: Bundle | None = None


@dataclass(frozen=True)
class Fit:
    """Item-item weights from the Gram matrix of the history, and from the counts of what follows what. files: of each
    baseline that is wanted, by name. next_files, totals_files: the tables next_items and next_totals; none where no
    baseline needs them."""

    history_files: tuple[str, ...]
    n_items: int
    config: Evaluate
    files: Mapping[str, str]
    next_files: tuple[str, ...] = ()
    totals_files: tuple[str, ...] = ()


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
