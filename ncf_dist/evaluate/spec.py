"""What the driver of evaluate sends to its executors. No torch here: it is imported where the models run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from ncf_dist.bundle import Bundle


@dataclass(frozen=True)
class EvaluationPass:
    """Travels to the workers. stats_files: the item_stats table. explicit: scores are predicted ratings."""

    bundle: Bundle
    stats_files: tuple[str, ...]
    ks: tuple[int, ...]
    explicit: bool = False


def on_executors(spec: EvaluationPass) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """`users.evaluation_pass` for mapInArrow, imported on the executor."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from ncf_dist.evaluate.users import evaluation_pass

        return evaluation_pass(spec)(batches)

    return run
