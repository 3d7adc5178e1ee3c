"""The lake: a run exists when its manifest does, files appear whole, and what a table says of its files is true."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from ncf_dist import files, lake, parquet, urls
from ncf_dist.contracts import ITEM_STATS
from ncf_dist.errors import BusyRun, ConfigError, ContractError
from ncf_dist.files import fingerprint, write_atomic
from ncf_dist.lake import Lake, StageRuns
from ncf_dist.manifests import Manifest, read_manifest, run_key
from ncf_dist.parquet import TableInfo, write_parquet

ROOT = Path(__file__).parent.parent
DS = "2026-01-31"
STATS = pa.table({"item_idx": [0, 1, 2], "train_count": [5, 0, 7]}, schema=ITEM_STATS.schema)


@pytest.fixture(params=["folder", "memory"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> StageRuns:
    """The runs of one stage, in a folder and in a file system that is only a URL."""
    root = str(tmp_path / "lake") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    return Lake(root).stage(DS, "prepare")


def finish(runs: StageRuns, key: str, name: str | None = None) -> Manifest:
    path = runs.begin(key)
    table = TableInfo("item_stats", ITEM_STATS.fingerprint, (write_parquet(STATS, f"{path}/item_stats", "a.parquet"),))
    return runs.finish(
        Manifest(
            stage="prepare",
            ds=DS,
            run_key=key,
            root=path,
            config={"seed": 1},
            inputs={"index": None},
            tables={"item_stats": table},
            name=name,
        )
    )


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_found_as_it_was_written(runs: StageRuns) -> None:
    written = finish(runs, "k1")
    assert runs.find("k1") == runs.newest() == read_manifest(runs.run_path("k1")) == written
    assert written.outputs() == {"item_stats": f"{runs.root}/k1/item_stats"}
    assert written.table(ITEM_STATS).rows == 3
    assert parquet.read_table(written.files("item_stats")[0]).equals(STATS)


def test_what_nothing_here_can_open_is_a_mistake_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # As where it is not installed.
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for path in ("nosuch://bucket/x", "http://me:s3cret-word@host/x"):
        with pytest.raises(ConfigError, match=r"://.*/x cannot be opened \(.*install fsspec's package") as error:
            files.filesystem(urls.hide(path))
        assert "s3cret-word" not in str(error.value)


def test_local_files_are_opened_by_arrow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of Arrow that hold a Python file may abort a process that ends. Through a URL there is no other way."""
    write_parquet(STATS, str(tmp_path), "a b%20é.parquet")
    write_parquet(STATS, "memory://opened", "part.parquet")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("opened by Python")

    monkeypatch.setattr(LocalFileSystem, "open", refuse)
    for folder, name in ((str(tmp_path), "a b%20é.parquet"), ("memory://opened", "part.parquet")):
        assert parquet.read_table(f"{folder}/{name}").equals(STATS)
        assert parquet.read_schema(f"{folder}/{name}").equals(STATS.schema)
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    for name in ("missing", "junk"):
        with pytest.raises(ContractError, match=rf"{name}\.parquet cannot be read .* rerun the job that made it"):
            parquet.read_table(f"{tmp_path}/{name}.parquet")


def test_without_its_manifest_a_run_does_not_exist_and_the_next_attempt_starts_empty(runs: StageRuns) -> None:
    path = runs.begin("k1")
    write_parquet(STATS, f"{path}/item_stats", "half.parquet")
    assert runs.find("k1") is None
    with pytest.raises(ContractError, match=f"no finished run; needed the output of prepare for ds {DS}: run the job"):
        runs.newest()
    assert files.list_names(f"{path}/item_stats") == ["half.parquet"]
    assert runs.begin("k1", keep=("item_stats",)) == path
    assert files.list_names(path) == ["item_stats"]
    assert runs.begin("k1") == path
    assert files.list_names(path) == []


def test_the_manifest_is_the_last_file_of_a_run(runs: StageRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    writers = (
        *((files, "write_bytes"), (parquet, "write_atomic")),
        *((lake, name) for name in ("write_atomic", "write_bytes", "create")),
    )
    for module, name in writers:
        real = getattr(module, name)

        def noted(path: str, data: bytes, real: Any = real) -> Any:
            written.append(path)
            return real(path, data)

        monkeypatch.setattr(module, name, noted)
    finish(runs, "k1")
    order = [path.removeprefix(f"{runs.root}/") for path in dict.fromkeys(written)]
    assert order == ["k1/item_stats/a.parquet", "k1/manifest.json"]


def test_the_newest_run_is_the_one_that_finished_last_whatever_is_looked_up(runs: StageRuns) -> None:
    for key in ("k2", "k1", "k3"):
        finish(runs, key)
    finish(runs, "k4", name="a-trial")
    assert [run.run_key for run in runs.finished()] == ["k4", "k3", "k1", "k2"]
    before = files.list_names(runs.root)
    assert runs.find("k2") is not None
    assert runs.newest().run_key == "k3", "an experiment is never the newest, and a look-up moves nothing"
    assert files.list_names(runs.root) == before
    assert finish(runs, "k2") == runs.newest(), "finished once more, now"


def test_a_damaged_manifest_beside_a_sound_one_is_passed_over_and_logged(
    runs: StageRuns, caplog: pytest.LogCaptureFixture
) -> None:
    finish(runs, "k1")
    finish(runs, "k2")
    files.write_bytes(f"{runs.root}/k2/manifest.json", b"{")
    assert runs.newest().run_key == "k1"
    assert "k2/manifest.json cannot be read" in caplog.text
    with pytest.raises(ContractError, match="k3 cannot be read: it is no finished run, but a later one was made"):
        runs.load("k3")


@pytest.mark.parametrize("damage", ["cut", "", "null", "[]", '"text"', '{"tables": []}', '{"tables": {}}', "more"])
def test_a_damaged_manifest_says_what_to_do(tmp_path: Path, damage: str) -> None:
    runs = Lake(str(tmp_path)).stage(DS, "prepare")
    path = Path(finish(runs, "k1").root) / "manifest.json"
    whole = path.read_text()
    path.write_text({"cut": whole[:-40], "more": whole.replace("{", '{"colour": "red",', 1)}.get(damage, damage))
    with pytest.raises(ContractError, match=r"manifest\.json cannot be read .*: delete the folder and rerun"):
        runs.find("k1")


def test_a_table_that_is_missing_or_of_another_schema_is_refused(tmp_path: Path) -> None:
    runs = Lake(str(tmp_path)).stage(DS, "prepare")
    path = runs.begin("k1")
    other = STATS.set_column(1, "train_count", STATS["train_count"].cast(pa.int32()))
    file = write_parquet(other, f"{path}/item_stats", "a.parquet")
    table = TableInfo("item_stats", "another fingerprint", (file,))
    manifest = Manifest(
        stage="prepare", ds=DS, run_key="k1", root=path, config={}, inputs={}, tables={"item_stats": table}
    )
    with pytest.raises(ContractError, match="item_stats: column train_count is int32, needed int64; rerun"):
        manifest.table(ITEM_STATS)
    with pytest.raises(ContractError, match=r"prepare run k1 has no table train \(it has item_stats\); rerun prepare"):
        manifest.files("train")


def test_nights_are_the_folders_named_by_a_date(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    assert lake.nights() == []
    for ds in ("2026-02-01", "2026-01-31"):
        finish(lake.stage(ds, "prepare"), "k1")
    (tmp_path / "runs" / "lost+found").mkdir()
    assert lake.nights() == ["2026-01-31", "2026-02-01"]


def test_a_run_key_follows_what_decides_the_bytes_and_not_the_order_of_keys() -> None:
    base = run_key("prepare", DS, {"a": 1, "b": 2}, {"x": "1"})
    assert run_key("prepare", DS, {"b": 2, "a": 1}, {"x": "1"}) == base
    others = [
        run_key("train", DS, {"a": 1, "b": 2}, {"x": "1"}),
        run_key("prepare", "2026-02-01", {"a": 1, "b": 2}, {"x": "1"}),
        run_key("prepare", DS, {"a": 1, "b": 3}, {"x": "1"}),
        run_key("prepare", DS, {"a": 1, "b": 2}, {"x": "2"}),
    ]
    assert len({base, *others}) == 5


def test_one_run_holds_a_night_and_leaves_no_probe(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    with lake.hold(DS), lake.hold("2026-02-01"):
        with pytest.raises(BusyRun, match=f"another run holds ds {DS}"), lake.hold(DS):
            pass
        assert os.listdir(lake.root) == ["runs"]
    with lake.hold(DS):
        pass


# ---- files -------------------------------------------------------------------------------------------------

# Forks a writer for every line of stdin: its interpreter has started already, so a kill lands in a write.
WRITERS = """
import json, os, sys
from ncf_dist.files import write_atomic

for line in sys.stdin:
    writer = os.fork()
    if writer == 0:
        n = 0
        while True:
            n += 1
            write_atomic(sys.argv[1], json.dumps({"size": n % 9 * 40_000, "pad": "x" * (n % 9 * 40_000)}).encode())
    print(writer, flush=True)
    os.waitpid(writer, 0)
"""


def test_readers_see_whole_files_while_writers_are_killed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(str(path), b'{"size": 0, "pad": ""}')
    pause, reads = random.Random(1), 0
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITERS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(40):
            print(flush=True, file=writers.stdin)
            writer, end = int(writers.stdout.readline()), time.monotonic() + pause.uniform(0.005, 0.03)
            killed = False
            while not killed:
                if killed := time.monotonic() > end:
                    os.kill(writer, signal.SIGKILL)
                found = json.loads(path.read_bytes())
                assert found["size"] == len(found["pad"])
                reads += 1
    assert reads > 100


def test_the_same_table_gives_the_same_bytes_in_one_row_group(tmp_path: Path) -> None:
    """Also beyond pyarrow's default row group, 1024 x 1024 rows."""
    rows = 1024 * 1024 + 1
    table = pa.table({"n": pa.array(np.arange(rows) % 100, pa.int8())})
    first, second = (write_parquet(table, str(tmp_path / name), "t.parquet") for name in "ab")
    data = (tmp_path / "a" / "t.parquet").read_bytes()
    assert first == second
    assert data == (tmp_path / "b" / "t.parquet").read_bytes()
    assert (first.rows, first.row_groups, first.bytes) == (rows, 1, len(data))
    assert first.sha256 == hashlib.sha256(data).hexdigest()
    assert pq.ParquetFile(tmp_path / "a" / "t.parquet").metadata.num_row_groups == 1


def test_a_fingerprint_changes_when_a_file_is_added_removed_or_rewritten(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("two")
    both = [str(a), str(b)]
    before = fingerprint(both)
    assert fingerprint(both) == before
    found = {before, fingerprint(both[:1]), fingerprint([])}
    os.utime(a, ns=(0, 0))
    a.write_text("ONE")  # as long as before
    found.add(fingerprint(both))
    b.write_text("longer")
    found.add(fingerprint(both))
    assert len(found) == 5
