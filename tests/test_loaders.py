"""Every row once an epoch, the same number of steps on every rank, the same batches every time: laws of
the arithmetic first, then the same on real files with both readers, then one test for each trap of
Petastorm 0.13.1 that `train/loaders.py` must stay out of.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ncf_dist import contracts
from ncf_dist.artifacts import Manifest, TableInfo, write_parquet
from ncf_dist.config import Train
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.train import loaders
from ncf_dist.train.loaders import (
    Batch,
    Columns,
    TrainLoader,
    deal,
    rows_per_rank,
    steps_per_epoch,
    verify_files,
)
from ncf_dist.train.world import World

N, DRAWS = 2, 3
CONTRACT = contracts.train(N, DRAWS)
READERS = sorted(loaders.READERS)


def train_run(folder: Path, file_rows: Sequence[int]) -> Manifest:
    """A train table whose rows say who they are: row r has user r, item 1000 + r, and r·100 + d·10 + s as
    negative s of draw d.
    """
    infos, first = [], 0
    for number, rows in enumerate(file_rows):
        row = np.arange(first, first + rows, dtype=np.int32)
        negatives = [row * 100 + draw * 10 + slot for draw in range(DRAWS) for slot in range(N)]
        table = pa.table([pa.array(column) for column in (row, 1000 + row, *negatives)], schema=CONTRACT.schema)
        infos.append(write_parquet(table, str(folder / "train"), f"part-{number:05d}.parquet"))
        first += rows
    tables = {"train": TableInfo("train", CONTRACT.fingerprint, tuple(infos))}
    return Manifest("prepare", "2026-01-31", "p1", str(folder), {}, {}, tables)


def loader_of(run: Manifest, world: World | None = None, seed: int = 1, **settings: object) -> TrainLoader:
    config = Train.model_validate({"batch_size": 4, "shuffle_files": 2, **settings})
    return TrainLoader(run, CONTRACT, N, DRAWS, config, seed, world or World())


def worlds(size: int) -> list[World]:
    return [World(rank, size) for rank in range(size)]


def users(batches: Sequence[Batch]) -> list[int]:
    return [user for batch in batches for user in batch.user.tolist()]


def plain(batches: Sequence[Batch]) -> list[list[list[int]]]:
    """Batches as lists, to compare."""
    return [torch.column_stack([b.user, b.item, b.negatives]).tolist() for b in batches]


# ---- laws of the deal --------------------------------------------------------------------------------------

tables = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
seeds, epochs, sizes = st.integers(1, 2**40), st.integers(0, 50), st.integers(1, 9)


def dealt(file_rows: list[int], seed: int, epoch: int, world: World) -> list[tuple[int, int]]:
    """(file, row) of every row that the rank is dealt, in order."""
    return [(p.file, row) for p in deal(file_rows, seed, epoch, world) for row in range(p.start, p.end)]


@given(tables, seeds, epochs, sizes)
@budget(max_examples=600, deadline=None)
def test_the_ranks_cut_one_line_of_all_rows_into_equal_parts(
    file_rows: list[int], seed: int, epoch: int, size: int
) -> None:
    line = dealt(file_rows, seed, epoch, World())
    assert sorted(line) == [(file, row) for file, rows in enumerate(file_rows) for row in range(rows)]
    parts = [dealt(file_rows, seed, epoch, world) for world in worlds(size)]
    assert {len(part) for part in parts} == {sum(file_rows) // size}
    # Nobody twice, nobody left out but the last `rows mod size` of the line.
    assert list(itertools.chain(*parts)) == line[: len(line) - sum(file_rows) % size]


@given(st.integers(1, 10**9), st.integers(1, 64), st.integers(1, 10**5))
@budget(max_examples=200, deadline=None)
def test_steps_follow_from_the_manifest_alone(rows: int, size: int, batch_size: int) -> None:
    each = rows_per_rank(rows + size, size)
    steps = steps_per_epoch(rows + size, size, batch_size)
    assert (steps - 1) * batch_size < each <= steps * batch_size


def test_a_rank_without_a_row_is_refused() -> None:
    assert steps_per_epoch(4, 4, 10) == 1
    with pytest.raises(ContractError, match=r"3 rows for 4 ranks.*lower train\.ranks"):
        steps_per_epoch(3, 4, 10)


@given(tables, seeds, epochs, sizes)
@budget(max_examples=100, deadline=None)
def test_the_deal_is_a_pure_function(file_rows: list[int], seed: int, epoch: int, size: int) -> None:
    np.random.seed(epoch)
    first = [deal(file_rows, seed, epoch, world) for world in worlds(size)]
    np.random.seed(epoch + 1)
    torch.manual_seed(epoch)
    assert first == [deal(list(file_rows), seed, epoch, world) for world in worlds(size)]


def test_epochs_and_seeds_deal_anew() -> None:
    """12 files have 12! = 479,001,600 orders: 100 draws should all differ."""
    rows = [10] * 12
    orders = {tuple(deal(rows, seed, epoch, World())) for seed in range(1, 6) for epoch in range(20)}
    assert len(orders) == 5 * 20


def test_every_rank_meets_every_file_in_time() -> None:
    """Trap 1: Petastorm's own sharding shows a rank the same files for ever."""
    met = {p.file for epoch in range(20) for p in deal([10] * 8, 1, epoch, World(0, 4))}
    assert met == set(range(8))


def test_no_row_is_left_out_for_ever() -> None:
    """7 rows on 2 ranks leave one out an epoch; each has its turn."""
    rows = [1] * 7
    left = set()
    for epoch in range(60):
        left |= set(range(7)) - {file for world in worlds(2) for file, _ in dealt(rows, 1, epoch, world)}
    assert left == set(range(7))


# ---- on real files -----------------------------------------------------------------------------------------

SHAPES = {
    "many equal files": ([5] * 8, 2),
    "unequal files": ([1, 9, 4, 30, 2], 3),
    "one file, four ranks": ([19], 4),  # Trap 10: Petastorm raises NoDataAvailableError
    "fewer files than ranks": ([7, 6], 5),
    "one row a rank": ([1, 1, 1], 3),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_once_and_steps_batches(tmp_path: Path, shape: str, reader: str) -> None:
    file_rows, size = SHAPES[shape]
    run, rows = train_run(tmp_path, file_rows), sum(file_rows)
    seen: list[int] = []
    for world in worlds(size):
        loader = loader_of(run, world, reader=reader)
        batches = list(loader.epoch(0))
        each = rows // size
        assert len(batches) == loader.steps == -(-each // 4)
        assert [len(b.user) for b in batches] == [4] * (each // 4) + ([each % 4] if each % 4 else [])
        seen += users(batches)
    assert len(seen) == len(set(seen)) == rows - rows % size
    assert set(seen) <= set(range(rows))


@pytest.mark.parametrize("reader", READERS)
def test_a_row_comes_with_its_own_negatives_of_the_epochs_draw(tmp_path: Path, reader: str) -> None:
    loader = loader_of(train_run(tmp_path, [6, 7, 8]), reader=reader)
    for epoch in range(2 * DRAWS):
        for batch in loader.epoch(epoch):
            assert batch.user.dtype == batch.item.dtype == batch.negatives.dtype == torch.int64
            assert torch.equal(batch.item, 1000 + batch.user)
            wanted = [batch.user * 100 + (epoch % DRAWS) * 10 + slot for slot in range(N)]
            assert torch.equal(batch.negatives, torch.stack(wanted, dim=1))


def test_both_readers_give_the_same_batches(tmp_path: Path) -> None:
    run = train_run(tmp_path, [9, 1, 14, 6, 6, 3])
    for epoch in range(3):
        for world in worlds(2):
            petastorm, arrow = (list(loader_of(run, world, reader=r).epoch(epoch)) for r in ("petastorm", "arrow"))
            assert plain(petastorm) == plain(arrow)


def test_the_order_is_a_function_of_seed_epoch_rank_and_world(tmp_path: Path) -> None:
    run = train_run(tmp_path, [20, 20, 20])

    def order(seed: int = 1, epoch: int = 0, world: World | None = None) -> list[int]:
        return users(list(loader_of(run, world, seed, reader="arrow").epoch(epoch)))

    assert order() == order()
    different = [order(), order(seed=2), order(epoch=1), order(world=World(0, 2)), order(world=World(1, 2))]
    assert len({tuple(o) for o in different}) == 5
    assert sorted(order()) == sorted(order(seed=2)) == sorted(order(epoch=1)) == list(range(60))


def test_rows_of_one_file_are_permuted_anew_for_every_seed_epoch_rank_and_world(tmp_path: Path) -> None:
    """With one file there is nothing to deal: what differs is the order of its rows."""
    run, orders = train_run(tmp_path, [60]), set()
    for seed, epoch, world in [
        (1, 0, World()),
        (2, 0, World()),
        (1, 1, World()),
        (1, 0, World(0, 2)),
        (1, 0, World(1, 2)),
        (1, 0, World(0, 3)),
    ]:
        order = users(list(loader_of(run, world, seed, reader="arrow").epoch(epoch)))
        orders.add(tuple(np.argsort(np.argsort(order[:20])).tolist()))
    assert len(orders) == 6


def test_rows_of_a_window_are_mixed(tmp_path: Path) -> None:
    """Two files at a time: a batch holds rows of both, and not in the order of the files."""
    order = users(list(loader_of(train_run(tmp_path, [50, 50]), reader="arrow").epoch(0)))
    assert order != sorted(order)
    first_half = np.array(order[:50])
    assert 10 < (first_half < 50).sum() < 40


@pytest.mark.parametrize("window", [1, 3, 8])
def test_memory_holds_a_window_of_files_and_less_than_a_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window: int
) -> None:
    run, each, batch_size = train_run(tmp_path, [10] * 12), 10, 7
    read = 0

    def counting(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
        nonlocal read
        for table in loaders.arrow_tables(files, columns, workers):
            read += each
            yield table

    monkeypatch.setitem(loaders.READERS, "arrow", counting)
    given_out = 0
    for batch in loader_of(run, reader="arrow", batch_size=batch_size, shuffle_files=window).epoch(0):
        assert read - given_out < window * each + batch_size
        given_out += len(batch.user)
    assert read == given_out == 120


# ---- only the manifest's files, and only as they were ------------------------------------------------------


@pytest.mark.parametrize("damage", ["one bit", "cut short", "gone", "other rows"])
def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path, damage: str) -> None:
    run = train_run(tmp_path, [5, 5, 5])
    path = Path(run.files("train")[1])
    data = path.read_bytes()
    if damage == "one bit":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "cut short":
        path.write_bytes(data[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(Path(run.files("train")[0]).read_bytes())
    verify_files(run, CONTRACT, World(0, 2))  # files 0 and 2
    with pytest.raises(ContractError, match=r"part-00001\.parquet .*rerun the job prepare"):
        verify_files(run, CONTRACT, World(1, 2))


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    """Whichever file is damaged, exactly one of three ranks finds it."""
    for number in range(5):
        run = train_run(tmp_path / str(number), [3] * 5)
        Path(run.files("train")[number]).write_bytes(b"")
        found = 0
        for world in worlds(3):
            try:
                verify_files(run, CONTRACT, world)
            except ContractError:
                found += 1
        assert found == 1


def test_a_table_of_another_contract_is_refused(tmp_path: Path) -> None:
    run = train_run(tmp_path, [5])
    more = contracts.train(N + 1, DRAWS)
    old = dataclasses.replace(run.tables["train"], schema="another")
    with pytest.raises(ContractError, match=r"neg_0_2 is missing.*rerun the job prepare"):
        TrainLoader(
            dataclasses.replace(run, tables={"train": old}),
            more,
            N + 1,
            DRAWS,
            Train(batch_size=1),
            1,
            World(),
        )


class Bomb:
    """Unpickling it leaves a file behind, by a name that Petastorm's allow-list lets through."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",)


@pytest.mark.parametrize("file_rows", [[6], [6, 6]])
def test_nothing_else_in_the_folder_is_opened(tmp_path: Path, file_rows: list[int]) -> None:
    """Trap 8: given a folder, Petastorm unpickles its `_common_metadata`, and reads every file in it."""
    run, mark = train_run(tmp_path, file_rows), tmp_path / "ran"
    folder = tmp_path / "train"
    schema = CONTRACT.schema.with_metadata({b"dataset-toolkit.unischema.v1": pickle.dumps(Bomb(mark))})
    pq.write_metadata(schema, folder / "_common_metadata")
    pq.write_metadata(schema, folder / "_metadata")
    (folder / "part-99999.parquet").write_bytes((folder / "part-00000.parquet").read_bytes())
    for reader in READERS:
        assert sorted(users(list(loader_of(run, reader=reader).epoch(0)))) == list(range(sum(file_rows)))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 — whatever it says afterwards, the bomb has gone off
        list(loaders.petastorm_tables([str(folder)], ["user_idx"], 1))
    assert mark.exists(), "the trap itself must work, or this test shows nothing"


# ---- the other traps ---------------------------------------------------------------------------------------


def test_several_threads_keep_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that take longer must not be overtaken."""
    from petastorm.arrow_reader_worker import ArrowReaderWorker

    run = train_run(tmp_path, [3, 4, 5, 6, 7, 8, 9, 10])
    wanted = plain(list(loader_of(run, reader="arrow", shuffle_files=1).epoch(0)))
    process = ArrowReaderWorker.process

    def slow(self: ArrowReaderWorker, piece_index: int, **kwargs: object) -> None:
        time.sleep(0.03 * (piece_index % 3))
        process(self, piece_index=piece_index, **kwargs)

    monkeypatch.setattr(ArrowReaderWorker, "process", slow)
    for workers in (1, 2, 4):
        batches = loader_of(run, reader="petastorm", reader_workers=workers, shuffle_files=1).epoch(0)
        assert plain(list(batches)) == wanted


def test_torchs_global_generator_is_neither_read_nor_moved(tmp_path: Path) -> None:
    """Traps 3 and 5: Petastorm's loaders draw from it."""
    run = train_run(tmp_path, [10, 10])
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        orders.append(users(list(loader_of(run, reader="petastorm").epoch(0))))
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


def test_a_reader_that_is_left_early_leaves_no_thread(tmp_path: Path) -> None:
    run = train_run(tmp_path, [10] * 6)
    before = threading.active_count()
    batches = loader_of(run, reader="petastorm", shuffle_files=1, reader_workers=3).epoch(0)
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


@pytest.mark.parametrize("reader", READERS)
def test_a_lake_may_have_blanks_and_accents_in_its_name(tmp_path: Path, reader: str) -> None:
    run = train_run(tmp_path / "a b%20é", [3, 3])
    assert sorted(users(list(loader_of(run, reader=reader).epoch(0)))) == list(range(6))


@pytest.mark.parametrize("mark", ["#", "?"])
def test_a_name_that_petastorm_would_cut_short_is_refused(tmp_path: Path, mark: str) -> None:
    run = train_run(tmp_path / f"a{mark}b", [3, 3])
    with pytest.raises(ConfigError, match=r"train\.reader=arrow"):
        list(loader_of(run, reader="petastorm").epoch(0))
    assert sorted(users(list(loader_of(run, reader="arrow").epoch(0)))) == list(range(6))
