"""What failed on Spark's executors, in our own terms."""

from __future__ import annotations

import re

from ncf_dist import errors
from ncf_dist.errors import NcfError, WorkerKilled

_OURS = re.compile(r"^ncf_dist\.errors\.(\w+): (.+)$", re.MULTILINE)
_KILLED = re.compile(
    r"Python worker exited unexpectedly \(crashed\)|(?i:exit(?:ed with)? (?:code|status):? 137)|OOMKilled"
    r"|(?i:exceeding (?:physical |virtual )?memory limits)|(?i:killed by (?:external signal|YARN))"
)
_HEAP = re.compile(r"java\.lang\.OutOfMemoryError: ([^\n]*)")


def from_executors(error: Exception) -> NcfError | None:
    """What a failed job of Spark says in our own terms: the NcfError that our code raised in a worker, or WorkerKilled
    where a process died without a word; None for anything else."""
    try:
        text = str(error)
    except Exception:  # py4j asks the JVM, which may be gone.
        text = repr(error.args)
    if ours := _OURS.findall(text):
        name, message = ours[-1]
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, NcfError):
            return kind(message)
    if heap := _HEAP.search(text):
        return WorkerKilled(
            f"a JVM of Spark ran out of memory ({heap[1]}); needed more: raise spark.driver_memory (with a local "
            "master) or spark.executor_memory, or spark.shuffle_partitions, so that a task holds less"
        )
    if killed := _KILLED.search(text):
        return WorkerKilled(
            f"a worker of Spark was killed ({killed[0]}), most likely because no memory was left on its machine or in "
            "its container; needed room for all workers at once, beside the JVMs: run fewer tasks at once "
            "(spark.master: local[N] with a smaller N; on a cluster fewer cores an executor), lower "
            "score.users_per_block or layout.rows_per_file, or raise spark.executor.memoryOverhead; `score --dry-run` "
            "says what a worker takes"
        )
    return None
