"""From the train table to batches, with guarantees that are arithmetic on the manifest.

- Every row is used once an epoch, but for the last `rows mod world size` of that epoch's order;
  other rows are last in the next epoch.
- All ranks take the same number of steps, known before a file is opened.
  The trainer counts steps; nothing here can end a rank early.
- The order is a function of (seed, epoch, rank, world size): files are dealt anew every epoch, and the rows of `window`
  files at a time are permuted together (the table itself is in hashed order).
- Only files that the manifest names are opened, each by its own URL.
  A folder is never handed to Petastorm: it would unpickle what it finds.

Deal: the files in the epoch's order are one line of rows, cut into equal intervals, one a rank. A file on a cut is read
by both neighbours, each taking its own rows, so any number of files serves any number of ranks exactly.

All of Petastorm is `petastorm_tables`; `arrow_tables` is its twin and gives the same arrays. What we do not use of
Petastorm 0.13.1, and why: its sharding (a rank would see the same files for ever), its shuffling (seeds 0 and None
busy-spin; all workers share one seed), its loaders (their buffers draw from torch's global generator), its default
prefetch (50 row groups a rank).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist.artifacts import Manifest, file_url, read_bytes, read_table
from ncf_dist.config import Train
from ncf_dist.contracts import Contract, negative_column
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.train.world import World

Columns = dict[str, npt.NDArray[np.int32]]
ReadTables = Callable[[Sequence[str], Sequence[str], int], Iterator[Columns]]


@dataclass(frozen=True)
class Piece:
    """Rows start..end of one file."""

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """user, item: (B,) int64; negatives: (B, N) int64."""

    user: Tensor
    item: Tensor
    negatives: Tensor


def rows_per_rank(rows: int, world_size: int) -> int:
    return rows // world_size


def steps_per_epoch(rows: int, world_size: int, batch_size: int) -> int:
    """Steps of every rank; the last batch may be smaller, by as much on all ranks.
    Raises ContractError when a rank would have no row."""
    each = rows_per_rank(rows, world_size)
    if each == 0:
        raise ContractError(
            f"the train table has {rows} rows for {world_size} ranks; needed at least one a rank: "
            "lower train.ranks or give more data"
        )
    return -(-each // batch_size)


def deal(file_rows: Sequence[int], seed: int, epoch: int, world: World) -> list[Piece]:
    """The pieces that this rank reads in this epoch, in order: rows_per_rank rows in all."""
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(file_rows))
    each = rows_per_rank(sum(file_rows), world.size)
    low, high = world.rank * each, (world.rank + 1) * each
    pieces, position = [], 0
    for file in order.tolist():
        start, end = max(low - position, 0), min(high - position, file_rows[file])
        if start < end:
            pieces.append(Piece(file, start, end))
        position += file_rows[file]
    return pieces


def petastorm_tables(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
    """The wanted columns of each file, one file (one row group) at a time, in order,
    read ahead by `workers` threads."""
    from petastorm import make_batch_reader

    if odd := [path for path in files if set(path) & set("#?")]:
        raise ConfigError(
            f"{odd[0]} has a # or ? in its path, and Petastorm takes the rest for another part of a URL; "
            "needed a path without: set train.reader=arrow, or another paths.lake"
        )
    with warnings.catch_warnings():
        # Petastorm uses pyarrow's legacy dataset on purpose; requirements.lock holds the pyarrow that still has it.
        warnings.simplefilter("ignore", FutureWarning)
        reader = make_batch_reader(
            [file_url(f) for f in files],
            schema_fields=[f"^{name}$" for name in columns],
            shuffle_row_groups=False,
            num_epochs=1,
            workers_count=workers,
            results_queue_size=workers,
        )
        try:
            for table in reader:
                yield {name: getattr(table, name) for name in columns}
        finally:
            reader.stop()
            reader.join()


def arrow_tables(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
    """What `petastorm_tables` gives, read with pyarrow alone."""
    for path in files:
        table = read_table(path, list(columns))
        yield {name: table.column(name).to_numpy() for name in columns}


READERS: dict[str, ReadTables] = {"petastorm": petastorm_tables, "arrow": arrow_tables}


def verify_files(manifest: Manifest, contract: Contract, world: World) -> None:
    """Read this rank's share of the table's files and compare their SHA-256 with the manifest. Raises ContractError."""
    infos = manifest.table(contract).files
    for path, info in list(zip(manifest.files(contract.name), infos, strict=True))[world.rank :: world.size]:
        try:
            found = hashlib.sha256(read_bytes(path)).hexdigest()
        except OSError as error:
            raise ContractError(
                f"{path} cannot be read ({error}); the manifest names it: rerun the job prepare"
            ) from None
        if found != info.sha256:
            raise ContractError(
                f"{path} has SHA-256 {found[:12]}…, the manifest says {info.sha256[:12]}…: "
                "the file changed, rerun the job prepare"
            )


class TrainLoader:
    """Batches of the train table for one rank."""

    def __init__(
        self,
        manifest: Manifest,
        contract: Contract,
        per_positive: int,
        draws: int,
        config: Train,
        seed: int,
        world: World,
    ) -> None:
        infos = manifest.table(contract).files
        self.files = manifest.files(contract.name)
        self.file_rows = [info.rows for info in infos]
        self.config, self.seed, self.world = config, seed, world
        self.per_positive, self.draws = per_positive, draws
        self.rows = rows_per_rank(sum(self.file_rows), world.size)
        self.steps = steps_per_epoch(sum(self.file_rows), world.size, config.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Exactly `steps` batches with the negatives of draw `epoch mod draws`."""
        rng = np.random.default_rng([self.seed, 2, epoch, self.world.rank, self.world.size])
        negatives = [negative_column(epoch % self.draws, slot) for slot in range(self.per_positive)]
        names = ["user_idx", "item_idx", *negatives]
        size, held = self.config.batch_size, np.empty((0, len(names)), dtype=np.int32)
        for window in self._windows(epoch, names):
            mixed = window[rng.permutation(len(window))]
            held = np.concatenate([held, mixed]) if len(held) else mixed
            whole = len(held) // size * size
            for start in range(0, whole, size):
                yield _batch(held[start : start + size])
            held = held[whole:]
        if len(held):
            yield _batch(held)

    def _windows(self, epoch: int, names: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        """(rows, columns) of `shuffle_files` pieces at a time."""
        pieces = deal(self.file_rows, self.seed, epoch, self.world)
        tables = READERS[self.config.reader]([self.files[p.file] for p in pieces], names, self.config.reader_workers)
        held: list[npt.NDArray[np.int32]] = []
        for piece, table in zip(pieces, tables, strict=True):
            held.append(np.stack([table[name][piece.start : piece.end] for name in names], axis=1))
            if len(held) == self.config.shuffle_files:
                yield np.concatenate(held)
                held = []
        if held:
            yield np.concatenate(held)


def _batch(rows: npt.NDArray[np.int32]) -> Batch:
    columns = torch.from_numpy(rows).long()
    return Batch(columns[:, 0], columns[:, 1], columns[:, 2:])
