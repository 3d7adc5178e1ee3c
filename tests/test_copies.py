"""The files of a train table that is in S3, on a rank's own disk: the same batches, checked, in bounded space."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncf_dist import files
from ncf_dist.errors import ContractError
from ncf_dist.manifests import Manifest
from ncf_dist.train.copies import Copies
from ncf_dist.train.loaders import TrainLoader, verify_files
from ncf_dist.train.world import World
from tests.s3 import Store, served
from tests.test_loaders import CONTRACT, READERS, loader_of, plain, train_run

pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as server:
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Manifest:
    return train_run(tmp_path / "run", [30] * 8)


@pytest.fixture
def there(here: Manifest, store: Store, tmp_path: Path) -> Manifest:
    """The same run in S3."""
    root = f"{store.root}/{tmp_path.name}"
    for path in here.files("train"):
        files.write_bytes(root + path.removeprefix(here.root), Path(path).read_bytes())
    return dataclasses.replace(here, root=root)


def size_of(run: Manifest, number: int) -> int:
    """Bytes of so many of its files."""
    return sum(sorted((info.bytes for info in run.tables["train"].files), reverse=True)[:number])


def held(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):  # Dropped by the thread that fetches ahead.
            size += path.stat().st_size
    return size


def far_loader(run: Manifest, copies: Copies, **settings: object) -> TrainLoader:
    near = loader_of(run, **settings)  # type: ignore[arg-type]
    return TrainLoader(run, CONTRACT, near.task, near.config, World(), copies)


@pytest.mark.parametrize("room", [1, 3, 100])
@pytest.mark.parametrize("backend", READERS)
def test_the_batches_are_those_of_local_files_whatever_room_there_is(
    here: Manifest, there: Manifest, tmp_path: Path, backend: str, room: int
) -> None:
    copies = Copies(str(tmp_path / "work"), size_of(there, room))
    for epoch in (0, 1):
        wanted = plain(list(loader_of(here, backend=backend).epoch(epoch)))
        assert plain(list(far_loader(there, copies, backend=backend).epoch(epoch))) == wanted


def test_space_is_bounded_and_what_there_is_room_for_is_fetched_once(
    there: Manifest, store: Store, tmp_path: Path
) -> None:
    work, infos = tmp_path / "work", list(zip(there.files("train"), there.tables["train"].files, strict=True))
    copies, most = Copies(str(work), size_of(there, 5)), 0
    for paths in copies.groups(infos, 2):
        assert all(os.path.exists(path) for path in paths)
        most = max(most, held(work))
    assert most <= size_of(there, 5)
    roomy = Copies(str(work), size_of(there, 8))
    verify_files(there, CONTRACT, World(), roomy)
    store.requests.clear()
    for _ in range(2):
        assert len([path for paths in roomy.groups(infos, 2) for path in paths]) == 8
    assert store.requests == []


def test_a_file_that_is_not_the_manifests_is_refused(there: Manifest, tmp_path: Path) -> None:
    path = there.files("train")[5]
    files.write_bytes(path, files.read_bytes(path)[:-1] + b"x")
    with pytest.raises(ContractError, match=f"{path} has SHA-256 .* rerun the job prepare"):
        verify_files(there, CONTRACT, World(), Copies(str(tmp_path / "one"), 2**30))
    with pytest.raises(ContractError, match="has SHA-256"):
        list(far_loader(there, Copies(str(tmp_path / "other"), 2**30), backend="arrow").epoch(0))
