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
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ncf_dist import contracts, sampling
from ncf_dist.config import Loader
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.files import file_url
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import write_parts
from ncf_dist.train import loaders
from ncf_dist.train.epoch_order import EpochOrder, Phase, deal
from ncf_dist.train.loaders import Batch, Columns, Task, TrainLoader, verify_files
from ncf_dist.train.negatives import OnlineNegatives, shared_items
from ncf_dist.train.steps import rows_per_rank, steps_per_epoch
from ncf_dist.train.world import World

N, DRAWS = 2, 3
CONTRACT = contracts.train(N, DRAWS)
READERS = sorted(loaders.BACKENDS)
CACHES = ("none", "host", "device")


def train_run(folder: Path, file_rows: Sequence[int]) -> Manifest:
    """A train table whose rows say who they are: row r has user r, item 1000 + r, and r·100 + d·10 + s as
    negative s of draw d.
    """
    parts, first = [], 0
    for rows in file_rows:
        row = np.arange(first, first + rows, dtype=np.int32)
        negatives = [row * 100 + draw * 10 + slot for draw in range(DRAWS) for slot in range(N)]
        parts.append(pa.table([pa.array(column) for column in (row, 1000 + row, *negatives)], schema=CONTRACT.schema))
        first += rows
    tables = {"train": write_parts(parts, str(folder), CONTRACT)}
    return Manifest(
        stage="prepare", ds="2026-01-31", run_key="p1", root=str(folder), config={}, inputs={}, tables=tables
    )


def task_of(**settings: Any) -> Task:
    """The task of `train_run`'s table: as many users and items as there are numbers in it."""
    usual = {"n_users": 10**6, "n_items": 10**6, "batch_size": 4, "seed": 1, "negatives": N, "draws": DRAWS}
    return Task(**(usual | settings))


def loader_of(
    run: Manifest, world: World | None = None, seed: int = 1, batch_size: int = 4, **settings: object
) -> TrainLoader:
    config = Loader.model_validate({"shuffle_files": 2, **settings})
    return TrainLoader(run, CONTRACT, task_of(seed=seed, batch_size=batch_size), config, world or World())


def worlds(size: int) -> list[World]:
    return [World(rank, size) for rank in range(size)]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that the arrow backend opens from now on."""
    opened: list[str] = []

    def noting(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
        opened.extend(files)
        return loaders.arrow_tables(files, columns, workers)

    monkeypatch.setitem(loaders.BACKENDS, "arrow", noting)
    return opened


def users(batches: Sequence[Batch]) -> list[int]:
    return [user for batch in batches for user in batch.user.tolist()]


def plain(batches: Sequence[Batch]) -> list[list[list[int]]]:
    """Batches as lists, to compare."""
    return [torch.column_stack([b.user, b.items]).tolist() for b in batches]


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


# ---- an epoch that was cut short ----------------------------------------------------------------------------

phases = st.lists(
    st.builds(Phase, st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 6)), max_size=3
)


def used_in(order: EpochOrder, phase: Phase) -> list[list[tuple[int, int]]]:
    """For each rank of the phase, the (file, row) of every row in the order of their use, to the end of the epoch."""
    ranks = []
    for world in worlds(phase.ranks):
        rows: list[tuple[int, int]] = []
        for window in order.windows(world, phase.shuffle_files):
            line = [(p.file, int(row)) for p in window.ranges for row in np.arange(1000)[order.rows_of(p)]]
            rows += [line[place] for place in window.permutation()]
        ranks.append(rows)
    return ranks


@given(tables, seeds, st.integers(0, 3), phases, st.integers(1, 4))
@budget(max_examples=500, deadline=None)
def test_an_epoch_that_goes_on_in_other_worlds_uses_every_row_once(
    file_rows: list[int], seed: int, epoch: int, done: list[Phase], size: int
) -> None:
    """What each phase uses, simulated rank by rank, and what the last one then finds: nothing twice, and nothing
    missing but fewer rows than it has ranks."""
    seen: list[tuple[int, int]] = []
    for number, phase in enumerate([*done, Phase(size, 5, 2, 10**6)]):
        for rows in used_in(EpochOrder(file_rows, seed, epoch, done[:number]), phase):
            seen += rows[: phase.steps * phase.batch_size]
    assert len(seen) == len(set(seen))
    assert set(seen) <= {(file, row) for file, rows in enumerate(file_rows) for row in range(rows)}
    assert sum(file_rows) - len(seen) < size


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("backend", READERS)
def test_an_epoch_goes_on_with_the_very_next_batch(tmp_path: Path, backend: str, cache: str) -> None:
    run = train_run(tmp_path, [9, 1, 14, 6, 6, 3])
    for world in worlds(2):
        whole = plain(list(loader_of(run, world, backend=backend, cache=cache).epoch(1)))
        assert len(whole) == 5  # ⌈(39 // 2) / 4⌉
        for skip in range(6):
            left = loader_of(run, world, backend=backend, cache=cache).epoch(1, skip=skip)
            assert plain(list(left)) == whole[skip:]


@pytest.mark.parametrize("cache", CACHES)
def test_two_ranks_then_one_then_two_see_every_row_once(tmp_path: Path, cache: str) -> None:
    run = train_run(tmp_path, [9, 1, 14, 6, 6, 4])
    seen: list[int] = []
    done: list[Phase] = []
    for size, batch_size, steps in ((2, 4, 2), (1, 3, 3), (2, 2, None)):
        for world in worlds(size):
            loader = loader_of(run, world, batch_size=batch_size, cache=cache)
            seen += users(list(itertools.islice(loader.epoch(0, done), steps)))
        done.append(dataclasses.replace(loader.phase, steps=steps or 0))
    # 2·4·2 = 16 rows, then 3·3 = 9, then 15 // 2 on each of two ranks: all 40 but one.
    assert len(seen) == len(set(seen)) == 16 + 9 + 2 * (15 // 2)


def test_files_that_are_used_up_are_not_opened_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trap 11: a reader cannot be moved in mid-iteration, so what is left is opened afresh."""
    run, opened = train_run(tmp_path, [8] * 6), noted(monkeypatch)
    list(loader_of(run, backend="arrow", shuffle_files=1).epoch(0, skip=7))  # 28 rows: three files and a half
    assert len(opened) == 3


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
        loader = loader_of(run, world, backend=reader)
        batches = list(loader.epoch(0))
        each = rows // size
        assert len(batches) == loader.steps == -(-each // 4)
        assert [len(b.user) for b in batches] == [4] * (each // 4) + ([each % 4] if each % 4 else [])
        seen += users(batches)
    assert len(seen) == len(set(seen)) == rows - rows % size
    assert set(seen) <= set(range(rows))


@pytest.mark.parametrize("reader", READERS)
def test_a_row_comes_with_its_own_negatives_of_the_epochs_draw(tmp_path: Path, reader: str) -> None:
    loader = loader_of(train_run(tmp_path, [6, 7, 8]), backend=reader)
    for epoch in range(2 * DRAWS):
        for batch in loader.epoch(epoch):
            assert batch.user.dtype == batch.items.dtype == torch.int64
            wanted = [1000 + batch.user, *(batch.user * 100 + (epoch % DRAWS) * 10 + slot for slot in range(N))]
            assert torch.equal(batch.items, torch.stack(wanted, dim=1))


def test_both_readers_give_the_same_batches(tmp_path: Path) -> None:
    run = train_run(tmp_path, [9, 1, 14, 6, 6, 3])
    for epoch in range(3):
        for world in worlds(2):
            petastorm, arrow = (list(loader_of(run, world, backend=r).epoch(epoch)) for r in ("petastorm", "arrow"))
            assert plain(petastorm) == plain(arrow)


def test_a_cache_gives_the_same_batches(tmp_path: Path) -> None:
    run = train_run(tmp_path, [9, 1, 14, 6, 6, 3])
    for world in worlds(2):
        for epoch in range(DRAWS + 1):
            none, host, device = (plain(list(loader_of(run, world, cache=c).epoch(epoch))) for c in CACHES)
            assert none == host == device


def test_a_cache_reads_the_table_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, opened = train_run(tmp_path, [8] * 6), noted(monkeypatch)
    loader = loader_of(run, backend="arrow", cache="host")
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert sorted(opened) == run.files("train")


def test_a_table_that_does_not_fit_is_read_every_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """20 rows x (2 + 2·3) columns x 4 bytes = 640."""
    run = train_run(tmp_path, [10, 10])
    wanted = plain(list(loader_of(run).epoch(0)))
    assert plain(list(loader_of(run, cache="host", cache_bytes=640).epoch(0))) == wanted
    assert not caplog.records
    assert plain(list(loader_of(run, cache="host", cache_bytes=639).epoch(0))) == wanted
    assert "20 rows x 8 columns x 4 bytes" in caplog.text


# ---- negatives drawn while training ------------------------------------------------------------------------

POSITIVES = sorted({(int(u), int(i)) for u, i in np.random.default_rng(5).integers((7, 11), size=(40, 2))})


def positives_run(folder: Path, contract: contracts.Contract, columns: dict[str, Any]) -> Manifest:
    table = pa.table([pa.array(columns[f.name]).cast(f.type) for f in contract.schema], schema=contract.schema)
    tables = {"train": write_parts((table.slice(start, 9) for start in range(0, 36, 9)), str(folder), contract)}
    return Manifest(
        stage="prepare", ds="2026-01-31", run_key="p1", root=str(folder), config={}, inputs={}, tables=tables
    )


def test_negatives_are_the_same_drawn_before_or_while_training(tmp_path: Path) -> None:
    """The prepared table holds what sampling.negatives draws; `online` finds the same from the positives alone."""
    user, item = (np.array(column, dtype=np.int64) for column in zip(*POSITIVES[:36], strict=True))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=7))])
    columns: dict[str, Any] = {"user_idx": user, "item_idx": item} | {
        contracts.negative_column(draw, slot): sampling.negatives(3, draw, slot, user, item, user, item, offsets, 11)
        for draw in range(DRAWS)
        for slot in range(N)
    }
    bare = contracts.train(N, 0)
    stored, drawn = positives_run(tmp_path / "a", CONTRACT, columns), positives_run(tmp_path / "b", bare, columns)
    for world in worlds(2):
        for epoch in range(DRAWS):
            task = task_of(n_users=7, n_items=11, seed=3)
            table = TrainLoader(stored, CONTRACT, task, Loader(), world).epoch(epoch)
            online = TrainLoader(drawn, bare, dataclasses.replace(task, draws=0), Loader(), world).epoch(epoch)
            assert plain(list(table)) == plain(list(online))


def test_online_negatives_are_never_repeated_and_never_seen() -> None:
    user, item = (np.array(column, dtype=np.int64) for column in zip(*POSITIVES, strict=True))
    online = OnlineNegatives(3, user, item, 7, 11, "cpu")
    draws = [online.draw(epoch, torch.from_numpy(user), torch.from_numpy(item), 3) for epoch in range(20)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 20
    seen = set(POSITIVES)
    assert not any((u, j) in seen for d in draws for u, row in zip(user.tolist(), d.tolist(), strict=True) for j in row)


def test_shared_items_are_uniform_and_the_same_in_every_world(tmp_path: Path) -> None:
    """Two ranks with a batch of 2 take the steps that one takes with a batch of 4."""
    run = train_run(tmp_path, [10, 10])

    def shared(world: World, batch_size: int) -> list[list[int]]:
        task = task_of(batch_size=batch_size, shared=5, negatives=0, draws=0, n_items=2000)
        batches = TrainLoader(run, CONTRACT, task, Loader(backend="arrow"), world).epoch(3)
        return [batch.shared.tolist() for batch in batches if batch.shared is not None]

    one = shared(World(), 4)
    assert one == shared(World(0, 2), 2) == shared(World(1, 2), 2)
    assert len({tuple(items) for items in one}) == len(one) == 5
    counts = np.bincount(shared_items(1, 0, 0, 20_000, 10, "cpu").numpy(), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.88  # χ² with 9 degrees of freedom, p = 0.001


def test_ratings_come_with_their_rows(tmp_path: Path) -> None:
    contract = contracts.train(0, 0, explicit=True)
    row = np.arange(36)
    run = positives_run(tmp_path, contract, {"user_idx": row, "item_idx": row + 100, "rating": row / 2})
    for backend, cache in itertools.product(READERS, CACHES):
        task = task_of(negatives=0, draws=0, explicit=True)
        batches = list(
            TrainLoader(
                run, contract, task, Loader.model_validate({"backend": backend, "cache": cache}), World()
            ).epoch(0)
        )
        assert sorted(users(batches)) == list(range(36))
        for batch in batches:
            assert batch.rating is not None
            assert batch.rating.dtype == torch.float32
            assert torch.equal(batch.rating, batch.user / 2)
            assert torch.equal(batch.items, batch.user[:, None] + 100)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("n_users", "n_items", "column"), [(19, 2000, "user_idx"), (20, 1019, "item_idx")])
def test_an_index_past_the_end_is_refused(tmp_path: Path, cache: str, n_users: int, n_items: int, column: str) -> None:
    """20 rows: users 0 to 19, items 1000 to 1019, negatives up to 1921."""
    run = train_run(tmp_path, [10, 10])
    config = Loader.model_validate({"cache": cache})
    with pytest.raises(
        ContractError, match=rf"part-00001-000.parquet has {column} from \d+ to \d+; needed 0 to .*rerun"
    ):
        list(TrainLoader(run, CONTRACT, task_of(n_users=n_users, n_items=n_items), config, World()).epoch(0))


def test_the_order_is_a_function_of_seed_epoch_rank_and_world(tmp_path: Path) -> None:
    run = train_run(tmp_path, [20, 20, 20])

    def order(seed: int = 1, epoch: int = 0, world: World | None = None) -> list[int]:
        return users(list(loader_of(run, world, seed, backend="arrow").epoch(epoch)))

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
        order = users(list(loader_of(run, world, seed, backend="arrow").epoch(epoch)))
        orders.add(tuple(np.argsort(np.argsort(order[:20])).tolist()))
    assert len(orders) == 6


def test_rows_of_a_window_are_mixed(tmp_path: Path) -> None:
    """Two files at a time: a batch holds rows of both, and not in the order of the files."""
    order = users(list(loader_of(train_run(tmp_path, [50, 50]), backend="arrow").epoch(0)))
    assert order != sorted(order)
    first_half = np.array(order[:50])
    assert 10 < (first_half < 50).sum() < 40


@pytest.mark.parametrize("window", [1, 3, 8])
def test_memory_holds_a_window_of_files_the_next_one_and_less_than_a_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window: int
) -> None:
    run, each, batch_size = train_run(tmp_path, [10] * 12), 10, 7
    read = 0

    def counting(files: Sequence[str], columns: Sequence[str], workers: int) -> Iterator[Columns]:
        nonlocal read
        for table in loaders.arrow_tables(files, columns, workers):
            read += each
            yield table

    monkeypatch.setitem(loaders.BACKENDS, "arrow", counting)
    given_out = 0
    for batch in loader_of(run, backend="arrow", batch_size=batch_size, shuffle_files=window).epoch(0):
        assert read - given_out < 2 * window * each + batch_size
        given_out += len(batch.user)
    assert read == given_out == 120


def test_the_next_window_is_made_while_one_is_used_and_ends_with_who_uses_it() -> None:
    """Same values, same errors; whoever stops early leaves neither a thread nor an open source."""
    started = [threading.Event() for _ in range(4)]
    closed = []

    def values(fails_at: int | None = None) -> Generator[int, None, None]:
        try:
            for number in range(4):
                started[number].set()
                if number == fails_at:
                    raise ContractError("number 2")
                yield number
        finally:
            closed.append(True)

    assert list(loaders.prefetched(values())) == [0, 1, 2, 3]
    with pytest.raises(ContractError, match="number 2"):
        list(loaders.prefetched(values(fails_at=2)))
    for event in started:
        event.clear()
    before = threading.active_count()
    closed.clear()
    ahead = loaders.prefetched(values())
    assert next(ahead) == 0
    assert started[1].wait(timeout=10)  # Made although nobody has asked for it.
    assert not started[2].is_set()  # One, not more.
    ahead.close()
    assert closed == [True]
    assert threading.active_count() == before


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
    with pytest.raises(ContractError, match=r"part-00001-000\.parquet .*rerun the job prepare"):
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
            task_of(negatives=N + 1),
            Loader(),
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
    (folder / "part-99999-000.parquet").write_bytes((folder / "part-00000-000.parquet").read_bytes())
    for reader in READERS:
        assert sorted(users(list(loader_of(run, backend=reader).epoch(0)))) == list(range(sum(file_rows)))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 — whatever it says afterwards, the bomb has gone off
        list(loaders.petastorm_tables([str(folder)], ["user_idx"], 1))
    assert mark.exists(), "the trap itself must work, or this test shows nothing"


# ---- the other traps ---------------------------------------------------------------------------------------


def test_several_threads_keep_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that take longer must not be overtaken."""
    from petastorm.arrow_reader_worker import ArrowReaderWorker

    run = train_run(tmp_path, [3, 4, 5, 6, 7, 8, 9, 10])
    wanted = plain(list(loader_of(run, backend="arrow", shuffle_files=1).epoch(0)))
    process = ArrowReaderWorker.process

    def slow(self: ArrowReaderWorker, piece_index: int, **kwargs: object) -> None:
        time.sleep(0.03 * (piece_index % 3))
        process(self, piece_index=piece_index, **kwargs)

    monkeypatch.setattr(ArrowReaderWorker, "process", slow)
    for workers in (1, 2, 4):
        batches = loader_of(run, backend="petastorm", workers=workers, shuffle_files=1).epoch(0)
        assert plain(list(batches)) == wanted


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_that_ends_before_its_last_files_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    """Petastorm's pool asks whether what it handed out is done, then whether all is handed out. Here, as on a busy
    machine, the rest is handed out between the two questions."""
    from petastorm.workers_pool import ventilator
    from petastorm.workers_pool.thread_pool import ThreadPool

    asked, opened = ThreadPool.all_workers_done, list[list[str]]()

    def late(pool: ThreadPool) -> bool:
        done, rest, end = bool(asked(pool)), pool._ventilator, time.monotonic() + 60
        while done and time.monotonic() < end:
            given_out = rest._ventilated_items_count - rest._processed_items_count
            if rest.completed():
                break
            time.sleep(0.01)
            if given_out >= rest._max_ventilation_queue_size and not rest.completed():
                break
        return done

    reader = loaders._petastorm_reader

    def counted(files: list[str], columns: list[str]) -> Iterator[Columns]:
        opened.append(files)
        return reader(files, columns)

    monkeypatch.setattr(ThreadPool, "all_workers_done", late)
    monkeypatch.setattr(ventilator, "sleep", lambda seconds: time.sleep(0.1))
    monkeypatch.setattr(loaders, "_petastorm_reader", counted)
    run = train_run(tmp_path, [3, 4, 5, 6, 7, 8, 9, 10, 11])
    wanted = plain(list(loader_of(run, backend="arrow").epoch(0)))
    assert plain(list(loader_of(run, backend="petastorm", workers=workers).epoch(0))) == wanted
    assert len(opened) > 1, "the trap itself must work, or this test shows nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_files_come_in_order_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Petastorm's pool passes over a thread that has nothing to do yet. Here, as on a busy machine, it looks at the
    second thread just when both get their next file."""
    from petastorm import make_batch_reader
    from petastorm.workers_pool import ventilator
    from petastorm.workers_pool.thread_pool import ThreadPool

    done = ThreadPool.current_worker_done

    def slow(pool: ThreadPool, worker: int) -> bool:
        end = time.monotonic() + 0.8
        while worker == 1 and done(pool, 1) and time.monotonic() < end:
            time.sleep(0.01)
        return bool(done(pool, worker))

    monkeypatch.setattr(ThreadPool, "current_worker_done", slow)
    monkeypatch.setattr(
        ThreadPool, "all_workers_done", lambda pool: done(pool, 0) and done(pool, pool.workers_count - 1)
    )
    monkeypatch.setattr(ventilator, "sleep", lambda seconds: time.sleep(0.4))
    run = train_run(tmp_path, list(range(1, 21)))
    files = [file_url(path) for path in run.files("train")]
    with make_batch_reader(
        files,
        schema_fields=["^user_idx$"],
        shuffle_row_groups=False,
        num_epochs=1,
        workers_count=2,
        results_queue_size=2,
    ) as reader:
        found = [len(table.user_idx) for table in reader]
    assert found != list(range(1, 21)), "the trap itself must work, or this test shows nothing"

    wanted = plain(list(loader_of(run, backend="arrow").epoch(0)))
    assert plain(list(loader_of(run, backend="petastorm", workers=2).epoch(0))) == wanted


def test_a_file_with_other_rows_than_the_manifest_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = train_run(tmp_path, [3, 4, 5])
    monkeypatch.setitem(loaders.BACKENDS, "arrow", lambda files, *rest: loaders.arrow_tables(files[::-1], *rest))
    with pytest.raises(ContractError, match=r"part-\d+.* gives \d rows of user_idx; needed \d as the manifest says"):
        list(loader_of(run, backend="arrow").epoch(0))


def test_a_reader_that_gives_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loaders, "_petastorm_reader", lambda *args: iter(()))
    with pytest.raises(ContractError, match=r"Petastorm gives no rows of .*part-0.*set loader.backend=arrow"):
        list(loader_of(train_run(tmp_path, [3, 4]), backend="petastorm").epoch(0))


def test_torchs_global_generator_is_neither_read_nor_moved(tmp_path: Path) -> None:
    """Traps 3 and 5: Petastorm's loaders draw from it."""
    run = train_run(tmp_path, [10, 10])
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        orders.append(users(list(loader_of(run, backend="petastorm").epoch(0))))
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


def test_a_reader_that_is_left_early_leaves_no_thread(tmp_path: Path) -> None:
    run = train_run(tmp_path, [10] * 6)
    before = set(threading.enumerate())
    batches = loader_of(run, backend="petastorm", shuffle_files=1, workers=3).epoch(0)
    next(batches)
    assert set(threading.enumerate()) - before
    del batches
    end = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("reader", READERS)
def test_a_lake_may_have_blanks_and_accents_in_its_name(tmp_path: Path, reader: str) -> None:
    run = train_run(tmp_path / "a b%20é", [3, 3])
    assert sorted(users(list(loader_of(run, backend=reader).epoch(0)))) == list(range(6))


@pytest.mark.parametrize("mark", ["#", "?"])
def test_a_name_that_petastorm_would_cut_short_is_refused(tmp_path: Path, mark: str) -> None:
    run = train_run(tmp_path / f"a{mark}b", [3, 3])
    with pytest.raises(ConfigError, match=r"loader\.backend=arrow"):
        list(loader_of(run, backend="petastorm").epoch(0))
    assert sorted(users(list(loader_of(run, backend="arrow").epoch(0)))) == list(range(6))


def test_equal_files_are_not_permuted_alike(tmp_path: Path) -> None:
    """Trap 4: Petastorm's workers share a seed, so row groups of one size get one permutation."""
    order = np.array(users(list(loader_of(train_run(tmp_path, [30] * 4), shuffle_files=1).epoch(0)))).reshape(4, 30)
    assert len({tuple(row % 30) for row in order}) == 4


@pytest.mark.parametrize("backend", READERS)
def test_a_large_file_is_not_cut_short(tmp_path: Path, backend: str) -> None:
    """Trap 6: Petastorm's in-memory loader keeps 1,024 rows and says nothing."""
    run = train_run(tmp_path, [3000])
    task = task_of(batch_size=512)
    batches = TrainLoader(run, CONTRACT, task, Loader.model_validate({"backend": backend}), World()).epoch(0)
    assert sorted(users(list(batches))) == list(range(3000))


def test_petastorm_reads_no_more_than_a_few_files_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trap 7: by default 50 row groups are held. Two workers with a file in hand each, two files queued, and a few."""
    from petastorm.arrow_reader_worker import ArrowReaderWorker

    run, read, process = train_run(tmp_path, [4] * 40), list[int](), ArrowReaderWorker.process

    def noting(self: ArrowReaderWorker, piece_index: int, **kwargs: object) -> None:
        read.append(piece_index)
        process(self, piece_index=piece_index, **kwargs)

    monkeypatch.setattr(ArrowReaderWorker, "process", noting)
    for given_out, _ in enumerate(loader_of(run, backend="petastorm", shuffle_files=1, workers=2).epoch(0), start=1):
        time.sleep(0.005)
        assert len(read) < given_out + 10
    assert len(read) == 40


@pytest.mark.parametrize("backend", READERS)
def test_a_column_is_taken_by_its_whole_name(tmp_path: Path, backend: str) -> None:
    """Trap 9: Petastorm takes names for patterns, and neg_0_1 is also the beginning of neg_0_10."""
    contract = contracts.train(11, 1)
    row = np.arange(36)
    columns = {name: row + 1000 * place for place, name in enumerate(contract.columns)}
    run = positives_run(tmp_path, contract, columns)
    (table,) = list(loaders.BACKENDS[backend]([run.files("train")[0]], ["neg_0_1"], 1))
    assert table["neg_0_1"].dtype == np.int32
    assert table["neg_0_1"].tolist() == (row[:9] + 3000).tolist()
    assert list(table) == ["neg_0_1"]


def test_the_order_of_files_changes_every_epoch_with_one_loader(tmp_path: Path) -> None:
    """Trap 2: Petastorm draws the order of row groups once a reader, not once an epoch."""
    loader = loader_of(train_run(tmp_path, [4] * 8), shuffle_files=1)
    firsts = [tuple(users(list(loader.epoch(epoch)))) for epoch in range(6)]
    assert len({tuple(row // 4 for row in order[::4]) for order in firsts}) == 6
