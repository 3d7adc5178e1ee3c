"""From the train table to batches: what `epoch_order.py` says, read by Petastorm, by its pyarrow twin, or from a cache.

- The batches do not depend on what reads them, and an epoch that is resumed goes on with the next batch.
- The trainer counts the steps, which are known before a file is opened. Nothing here can end a rank early.
- Only files that the manifest names are opened, each by its own URL. Petastorm never gets a folder: it would unpickle
  what it finds there.

All calls of Petastorm are in `petastorm_tables`; `arrow_tables` is its twin and gives the same arrays. Of Petastorm
0.13.1 we do not use its sharding (a rank would see the same files for ever), its shuffling (seeds 0 and None busy-spin,
and all workers share one seed), its loaders (their buffers draw from torch's global generator) and its default prefetch
(50 row groups a rank).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncf_dist.config import Loader
from ncf_dist.contracts import Contract, negative_column
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.files import file_url
from ncf_dist.manifests import Manifest
from ncf_dist.models import Windows
from ncf_dist.parquet import read_table
from ncf_dist.train.copies import Copies, checked
from ncf_dist.train.epoch_order import EpochOrder, Phase, Window
from ncf_dist.train.negatives import OnlineNegatives, shared_items
from ncf_dist.train.steps import steps_per_epoch
from ncf_dist.train.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")
END = object()
Columns = dict[str, npt.NDArray[Any]]
ReadTables = Callable[[Sequence[str], Sequence[str], int], Iterator[Columns]]


@dataclass(frozen=True)
class Batch:
    """user: (B,) int64; items: (B, 1 + N) int64, the row's own item first. Explicit feedback: rating (B,) float32.
    Sampled softmax: shared (M,) int64. A model of histories: windows of B users, and items (T, 1), what is to be
    predicted at each of their known positions; the loss is the sum over these, divided by `divisor`."""

    user: Tensor
    items: Tensor
    rating: Tensor | None = None
    shared: Tensor | None = None
    windows: Windows | None = None
    divisor: float | None = None

    def mean(self, loss: float) -> float:
        """The step's loss as a mean over its rows, or over what is to be predicted."""
        return loss if self.divisor is None else loss * self.divisor / len(self.items)


def petastorm_tables(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
    """The wanted columns of each file, one file (one row group) at a time, in order, prefetched by `workers` threads.

    Each thread is a reader of its own, and we read from them in turn. One reader with several threads does not keep the
    order: the pool of Petastorm 0.13.1 skips a thread that has no work yet, and on a busy machine it may give that
    thread the next file at this moment.
    """
    if odd := [path for path in files if set(path) & set("#?")]:
        raise ConfigError(
            f"{odd[0]} has a # or ? in its path, and Petastorm takes the rest for another part of a URL; "
            "needed a path without: set loader.backend=arrow, or another paths.lake"
        )
    with contextlib.ExitStack() as stack:
        readers = [_petastorm_thread(files[number::workers], columns) for number in range(min(workers, len(files)))]
        for reader in readers:
            stack.callback(reader.close)
        for number in range(len(files)):
            yield next(readers[number % len(readers)])
        for reader in readers:
            yield from reader  # Nothing, unless a reader has a table too many, which the caller refuses.


def _petastorm_thread(files: Sequence[str], columns: Sequence[str]) -> Generator[Columns, None, None]:
    """The tables of `files` in order.

    A reader of Petastorm 0.13.1 may end before its last files. Its thread pool first checks that all files given to
    threads are read, then that all files were given to one, and the last files may be given out in between. So we open
    the files that are missing again.
    """
    left = list(files)
    while left:
        read = 0
        for table in _petastorm_reader(left, columns):
            read += 1
            yield table
        if not read:
            raise ContractError(f"Petastorm gives no rows of {left[0]}; set loader.backend=arrow to read without it")
        left = left[read:]


def _petastorm_reader(files: Sequence[str], columns: Sequence[str]) -> Iterator[Columns]:
    from petastorm import make_batch_reader

    with warnings.catch_warnings():
        # Petastorm uses pyarrow's legacy dataset; requirements.lock pins a pyarrow that still has it.
        warnings.simplefilter("ignore", FutureWarning)
        reader = make_batch_reader(
            [file_url(f) for f in files],
            schema_fields=[f"^{name}$" for name in columns],
            shuffle_row_groups=False,
            num_epochs=1,
            workers_count=1,
            results_queue_size=1,
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


def prefetched(values: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same values: while the caller uses one, a thread computes the next. When the caller stops, the thread ends
    and `values` is closed."""
    with contextlib.closing(values), ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(next, values, END)
        while (value := coming.result()) is not END:
            coming = thread.submit(next, values, END)
            yield cast(T, value)


# On a CPU the next two use NumPy: torch would start a second OpenMP team in the prefetching thread, and its threads
# spin while they wait.
def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns (R,) → (R, columns)."""
    if columns[0].device.type != "cpu":
        return torch.stack(list(columns), dim=1)
    return torch.from_numpy(np.stack([column.numpy() for column in columns], axis=1))


def in_order(table: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
    """table[rows]"""
    if table.device.type != "cpu":
        return table.index_select(0, torch.from_numpy(rows).to(table.device))
    return torch.from_numpy(table.numpy().take(rows, axis=0))


BACKENDS: dict[str, ReadTables] = {"petastorm": petastorm_tables, "arrow": arrow_tables}


def verify_files(manifest: Manifest, contract: Contract, world: World, copies: Copies | None = None) -> None:
    """Read this rank's share of the table's files and compare their SHA-256 with the manifest. Raises ContractError.
    copies: keep what was read there."""
    infos = manifest.table(contract).files
    for path, info in list(zip(manifest.files(contract.name), infos, strict=True))[world.rank :: world.size]:
        copies.keep(path, info) if copies is not None else checked(path, info)


@dataclass(frozen=True)
class Task:
    """What a step needs of the rows. negatives: N for each row, read from the table's `draws` draws in turn, or drawn
    online where draws is 0; shared: M items a step; explicit: ratings, and no negatives."""

    n_users: int
    n_items: int
    batch_size: int
    seed: int
    negatives: int = 0
    draws: int = 0
    shared: int = 0
    explicit: bool = False


class TrainLoader:
    """Batches of the train table for one rank, on its device."""

    def __init__(
        self,
        manifest: Manifest,
        contract: Contract,
        task: Task,
        config: Loader,
        world: World,
        copies: Copies | None = None,
    ) -> None:
        """copies: where files are fetched to that this machine does not have."""
        infos = manifest.table(contract).files
        self.files, self.infos, self.copies = manifest.files(contract.name), infos, copies
        self.file_rows = [info.rows for info in infos]
        self.stored = contract.columns
        self.task, self.config, self.world = task, config, world
        self.rows = sum(self.file_rows)
        self.steps = steps_per_epoch(self.rows, world.size, task.batch_size)
        self._cache: dict[str, Tensor] | None = None
        self._online: OnlineNegatives | None = None

    @property
    def phase(self) -> Phase:
        """How this world deals an epoch."""
        return Phase(self.world.size, self.task.batch_size, self.config.shuffle_files)

    def order(self, epoch: int, done: Sequence[Phase] = ()) -> EpochOrder:
        return EpochOrder(self.file_rows, self.task.seed, epoch, done)

    def epoch(self, epoch: int, done: Sequence[Phase] = (), skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch after the phases in `done` and `skip` steps of this one."""
        order, size = self.order(epoch, done), self.task.batch_size
        each = order.rows // self.world.size
        used = self.rows - order.rows + skip * size * self.world.size
        held: list[Tensor] = []
        for columns in prefetched(self._shuffled(epoch, order, skip * size)):
            held = [torch.cat(pair) for pair in zip(held, columns, strict=True)] if held else columns
            last = skip * size + len(held[0]) >= each
            whole = len(held[0]) if last else len(held[0]) // size * size
            for start in range(0, whole, size):
                yield self._batch(epoch, used, [column[start : start + size] for column in held])
                used, skip = used + size * self.world.size, skip + 1
            held = [column[whole:] for column in held]

    def _batch(self, epoch: int, used: int, columns: list[Tensor]) -> Batch:
        """columns: user (B,), items (B, 1 + N), and rating (B,) where there are ratings."""
        task, device = self.task, self.world.device
        user, items = (column.to(device, non_blocking=True).long() for column in columns[:2])
        if task.negatives and not task.draws:
            drawn = self._negatives().draw(epoch, user, items[:, 0], task.negatives)
            items = torch.cat([items, drawn], dim=1)
        rating = columns[2].to(device, non_blocking=True) if task.explicit else None
        shared = shared_items(task.seed, epoch, used, task.shared, task.n_items, device) if task.shared else None
        return Batch(user, items, rating, shared)

    def _shuffled(self, epoch: int, order: EpochOrder, skip: int) -> Generator[list[Tensor], None, None]:
        """Each window's rows in the order of their use, without the first `skip` rows of the epoch."""
        windows = order.windows(self.world, self.config.shuffle_files)
        while windows and skip >= windows[0].rows:
            skip -= windows.pop(0).rows
        names = self._names(epoch)
        source = self._from_cache if self._cached() is not None else self._from_files
        for window, columns in zip(windows, source(order, windows, names), strict=True):
            rows, skip = window.permutation()[skip:], 0
            yield [in_order(table, rows) for table in self._arranged(columns)]

    def _arranged(self, columns: list[Tensor]) -> list[Tensor]:
        """A row's items side by side, so that the permutation takes them in one look-up."""
        last = 2 + self._from_table
        return [columns[0], side_by_side(columns[1:last]), *columns[last:]]

    @property
    def _from_table(self) -> int:
        """How many negatives of a row are read from the table."""
        return self.task.negatives if self.task.draws else 0

    def _names(self, epoch: int) -> list[str]:
        draw = epoch % self.task.draws if self.task.draws else 0
        negatives = [negative_column(draw, slot) for slot in range(self._from_table)]
        return ["user_idx", "item_idx", *negatives, *(["rating"] if self.task.explicit else [])]

    def _from_files(self, order: EpochOrder, windows: list[Window], names: list[str]) -> Iterator[list[Tensor]]:
        """The columns of each window."""
        tables = self._tables([part.file for window in windows for part in window.ranges], names)
        for window in windows:
            columns: list[list[npt.NDArray[Any]]] = []
            for part in window.ranges:
                table, rows = next(tables), order.rows_of(part)
                columns.append([table[name][rows] for name in names])
            yield [torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True)]
        next(tables, None)  # Past the last file: ends the reader, and zip raises where it has a table too many.

    def _from_cache(self, order: EpochOrder, windows: list[Window], names: list[str]) -> Iterator[list[Tensor]]:
        """The same from the cached columns."""
        cache = self._cached()
        assert cache is not None
        first = np.concatenate([[0], np.cumsum(self.file_rows)]).astype(np.int64)
        for window in windows:
            rows = np.concatenate(
                [np.arange(first[p.file], first[p.file + 1], dtype=np.int64)[order.rows_of(p)] for p in window.ranges]
            )
            yield [in_order(cache[name], rows) for name in names]

    def _cached(self) -> dict[str, Tensor] | None:
        """All columns that any epoch reads, in the order of the files; None where there is no cache."""
        if self.config.cache == "none" or self._cache is not None:
            return self._cache
        names = sorted({name for draw in range(max(1, self.task.draws)) for name in self._names(draw)})
        row_bytes, in_words = self._row_bytes(names)
        needed = row_bytes * self.rows
        if needed > self.config.cache_bytes:
            log.warning(
                "loader.cache=%s is off: %d rows x %s = %.2f GiB, loader.cache_bytes allows %.2f GiB",
                *(self.config.cache, self.rows, in_words, needed / 2**30, self.config.cache_bytes / 2**30),
            )
            self.config = self.config.model_copy(update={"cache": "none"})
            return None
        device = self.world.device if self.config.cache == "device" else "cpu"
        columns = self._whole_table(names)
        self._cache = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
        return self._cache

    def _negatives(self) -> OnlineNegatives:
        if self._online is None:
            task, table = self.task, self._whole_table(["user_idx", "item_idx"])
            self._online = OnlineNegatives(
                task.seed, table["user_idx"], table["item_idx"], task.n_users, task.n_items, self.world.device
            )
        return self._online

    def _whole_table(self, names: list[str]) -> Columns:
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        for table in self._tables(range(len(self.files)), names):
            for name in names:
                parts[name].append(table[name])
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _row_bytes(self, names: Sequence[str]) -> tuple[int, str]:
        """What a row takes in the cache, and the same in words."""
        return 4 * len(names), f"{len(names)} columns x 4 bytes"

    def _tables(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[Columns]:
        """The columns of these files, checked."""
        files = [self.files[number] for number in numbers]
        for number, path, table in zip(numbers, files, self._read(numbers, names), strict=True):
            decoded = self._decoded(table)
            self._check(path, decoded, self.file_rows[number])
            yield decoded

    def _read(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[Columns]:
        """The tables of these files, as the backend gives them."""
        read, files = BACKENDS[self.config.backend], [(self.files[number], self.infos[number]) for number in numbers]
        if self.copies is None:
            yield from read([path for path, _ in files], names, self.config.workers)
            return
        with contextlib.closing(self.copies.groups(files, self.config.shuffle_files)) as groups:
            for paths in groups:
                yield from read(paths, names, self.config.workers)

    def _decoded(self, table: Columns) -> Columns:
        """What a backend gives → columns of numbers."""
        return table

    def _bounds(self, name: str) -> tuple[int, int, str]:
        """The least and the greatest value of an integer column, and why."""
        count = self.task.n_users if name == "user_idx" else self.task.n_items
        return 0, count - 1, "the size of the index"

    def _check(self, path: str, table: Columns, rows: int) -> None:
        """Raise ContractError for a table that is not of this file, or that has an index outside its embedding table.
        Rows of another file would be used twice or never; such an index reads other memory, or ends a GPU's process."""
        for name, column in table.items():
            if len(column) != rows:
                raise ContractError(
                    f"{path} gives {len(column)} rows of {name}; needed {rows} as the manifest says: "
                    "rerun the job prepare"
                )
            if name == "rating" or not len(column):
                continue
            low, high = int(column.min()), int(column.max())
            least, most, why = self._bounds(name)
            if low < least or high > most:
                raise ContractError(
                    f"{path} has {name} from {low} to {high}; needed {least} to {most}, {why}: rerun the job prepare"
                )
