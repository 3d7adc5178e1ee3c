"""The section `loader`: how the trainer reads the train table."""

from __future__ import annotations

from typing import Literal

from ncf_dist.config.section import PositiveInt, Section


class Loader(Section):
    """How a rank reads the train table. Nothing here but shuffle_files changes a batch."""

    backend: Literal["petastorm", "arrow"] = "petastorm"
    """What reads the Parquet files: Petastorm, or its plain pyarrow twin with the same batches."""
    cache: Literal["none", "host", "device"] = "none"
    """`none`: read every epoch, `shuffle_files` files at a time · `host`: read once, kept in each rank's memory ·
    `device`: the same on its GPU. A table that does not fit in `cache_bytes` is read every epoch after all."""
    cache_bytes: PositiveInt = 2**31
    """Upper bound of a rank's cache."""
    local_bytes: PositiveInt = 2**33
    """Where the lake is an object store: the space in `paths.work` for a rank's copies of the train table's files. They
    are fetched ahead of use; what does not fit is fetched again in each epoch."""
    workers: PositiveInt = 2
    """Petastorm threads a rank."""
    shuffle_files: PositiveInt = 8
    """Files whose rows a rank mixes: so many are in memory, and as many are read ahead."""
