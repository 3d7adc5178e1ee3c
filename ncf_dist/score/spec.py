"""What the driver of score sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from ncf_dist.bundle import Bundle
from ncf_dist.contracts import Contract


@dataclass(frozen=True)
class ScorePass:
    """Travels to the workers. item_files: the item_index table."""

    bundle: Bundle
    item_files: tuple[str, ...]
    contract: Contract
    folder: str
    k: int
    users_per_block: int
    mask_test: bool


def on_executors(spec: ScorePass) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """`users.score_pass` for mapInArrow, imported on the executor."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from ncf_dist.score.users import score_pass

        return score_pass(spec)(batches)

    return run
