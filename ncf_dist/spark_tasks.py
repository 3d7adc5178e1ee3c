"""How a Python worker of Spark runs what a stage gives it."""

from __future__ import annotations

import functools
import gc
import os
import sys
import uuid
import zipimport
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
from pyspark.accumulators import Accumulator, AccumulatorParam
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from ncf_dist import retries

Pass = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""What a Python worker does with a partition's rows."""


def map_in_arrow(frame: DataFrame, work: Pass, schema: str | StructType) -> DataFrame:
    """`frame.mapInArrow(work, schema)` without two costs of every task, which in small tasks are most of the time:
    a garbage collection of all that was imported (torch alone brings a million objects), and, before Python 3.12, the
    reading of the table of contents of Spark's zip archives, once for each folder in them
    (github.com/python/cpython/issues/103200). What tasks write has the modes of what the driver writes."""
    umask = os.umask(0)
    os.umask(umask)
    retried = _retried(frame.sparkSession)

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        os.umask(umask)
        before = retries.OURS.taken
        rows = work(batches)  # Imports what it needs.
        freeze_imports()
        try:
            yield from rows
        finally:
            if retried is not None and retries.OURS.taken > before:
                retried.add(retries.OURS.taken - before)
            forget_archives()

    return frame.mapInArrow(run, schema)


class _Counted(AccumulatorParam[int]):
    """Adds what tasks say to the retries of the process that made it."""

    def __init__(self) -> None:
        self.made_in = _PROCESS

    def zero(self, value: int) -> int:
        return 0

    def addInPlace(self, value1: int, value2: int) -> int:
        if self.made_in == _PROCESS:
            retries.OURS.add(value2)
        return value1 + value2


_PROCESS = uuid.uuid4().hex
_accumulators: dict[str, Accumulator[int]] = {}
"""By application; one serves all its tasks."""


def _retried(spark: SparkSession) -> Accumulator[int] | None:
    """To which tasks add their retries; None where Spark's context is another process's."""
    if "SPARK_REMOTE" in os.environ:
        return None
    context = spark.sparkContext
    name = str(context.applicationId)
    if name not in _accumulators:
        _accumulators[name] = context.accumulator(0, _Counted())
    return _accumulators[name]


@functools.cache
def freeze_imports() -> None:
    """Spark's Python daemon collects garbage after every task: not in what is there now."""
    gc.freeze()


def forget_archives() -> None:
    """Spark invalidates the importers' caches before every task. Those of archives are made again when needed."""
    if sys.version_info < (3, 12):
        for path, importer in [*sys.path_importer_cache.items()]:
            if isinstance(importer, zipimport.zipimporter):
                del sys.path_importer_cache[path]
