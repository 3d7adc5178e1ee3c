"""What the driver of score sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from dataclasses import dataclass

from ncf_dist.bundle import Bundle
from ncf_dist.config import Score
from ncf_dist.contracts import TEST_SPLIT, VALIDATION_SPLIT, Contract
from ncf_dist.products import PLAIN, Products
from ncf_dist.score.items import ItemLists


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
    def last_split(self) -> int:
        """What of a user's rows is known: what they must not be offered."""
        return TEST_SPLIT if self.config.seen == "all" else VALIDATION_SPLIT

    @property
    def masked(self) -> tuple[str, ...]:
        """The columns that hold what a user must not be offered."""
        return ("item_idx", "test_item_idx") if self.config.seen == "all" else ("item_idx",)
