"""What the driver of score sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ncf_dist.bundle import Bundle
from ncf_dist.config import Score
from ncf_dist.contracts import Contract
from ncf_dist.products import PLAIN, Products
from ncf_dist.score.items import ItemLists
from ncf_dist.spark_io import Pass


@dataclass(frozen=True)
class ScorePass:
    """Travels to the workers. item_files: the item_index table; popularity_files: none without a fallback; products:
    how they multiply."""

    bundle: Bundle
    item_files: tuple[str, ...]
    contract: Contract
    folder: str
    config: Score
    lists: ItemLists
    popularity_files: tuple[str, ...] = ()
    products: Products = PLAIN

    @property
    def masked(self) -> tuple[str, ...]:
        """The columns that hold what a user must not be offered."""
        return ("item_idx", "test_item_idx") if self.config.seen == "all" else ("item_idx",)


def on_executors(spec: ScorePass) -> Pass:
    """`users.score_pass` for mapInArrow, imported on the executor."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from ncf_dist.score.users import score_pass

        return score_pass(spec)(batches)

    return run


def checked(spec: ScorePass, user_ids: dict[int, Any], files: tuple[str, ...]) -> Pass:
    """`check.check_pass` likewise."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from ncf_dist.score.check import check_pass

        return check_pass(spec, user_ids, files)(batches)

    return run


def probed(spec: ScorePass, seconds: float) -> Pass:
    """`probe.probe_pass` likewise."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from ncf_dist.score.probe import probe_pass

        return probe_pass(spec, seconds)(batches)

    return run
