"""Fixtures that every test may use: one Spark session for the whole run, MovieLens where it is at hand,
and a small line's config."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from ncf_dist import config as settings
from ncf_dist import gateway, logs, stopping
from ncf_dist.config import Config
from ncf_dist.evaluate import held_out
from ncf_dist.score import plan
from ncf_dist.spark_io import spark_session

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background process ignores SIGINT, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test's JVM lives for seconds: its second compiler would take a third of its processor time and never earn it back,
# and a collector that works beside the program a tenth. A JVM that is told of two collectors ends.
COLLECTOR = "" if "GC" in os.environ.get("JAVA_TOOL_OPTIONS", "") else "-XX:+UseSerialGC"
os.environ.setdefault("SPARK_SUBMIT_OPTS", f"-XX:TieredStopAtLevel=1 {COLLECTOR}".rstrip())


def _written(handle: int) -> None:
    """No test cuts the power, and for the disk a small publication would wait nine tenths of its time. What tests start
    syncs its files as ever."""
    os.fstat(handle)  # Of a file that is open.


os.fsync = _written  # type: ignore[assignment]

ROOT = Path(__file__).parent.parent
SPARK: dict[str, Any] = {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2}

LONGEST = (
    "any_log signals s3_line train line faults baselines urls score launchers cases publish_damage evaluate_score "
    "ranks prepare forgetting stored_lakes gates_line s3_publish clean clean_kills clean_machine published_table "
    "steps every"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker takes whole files, in this order: the longest first, else one of them runs alone at the end."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def tests_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes with the process that a night runs in ends with the test: what log lines are of, Spark's options, and
    that a request to stop, which tests send to themselves, ends the process's JVM, which here is that of all tests."""
    for name in (logs.ENVIRONMENT, gateway.OPTIONS):
        monkeypatch.setenv(name, "")  # Else what a test leaves there would stay: there is nothing to restore.
        monkeypatch.delenv(name)
    monkeypatch.setattr(stopping, "before_raising", [])


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A real session; jobs called in this process use it and leave it running."""
    with spark_session("tests", settings.Spark(**SPARK)) as session:
        session.sparkContext.setLogLevel("ERROR")
        yield session


@pytest.fixture(scope="session", autouse=True)
def few_files() -> Iterator[None]:
    """Ranks and recommendations of a test's few users, where stages are called in this process, are in fewer files than
    a night's: each is a task, which loads the model."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (held_out, plan):
            patch.setattr(stage, "MIN_FILES", 6)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real MovieLens data; skips where there is none."""
    path = (ROOT / os.environ.get("NCF_DATA_DIR", "../shared/data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no MovieLens data at {path}; set NCF_DATA_DIR to a folder with ml-100k/, ml-1m/ …")
    return path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """make_config(log, section={…}) → a Config of a small line whose lake is under tmp_path."""

    def make(log: Path, **sections: Any) -> Config:
        tree: dict[str, Any] = {
            "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
            "input": {"path": str(log)},
            "layout": {"min_files": 4, "rows_per_file": 1000},
            "spark": SPARK,
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
        return Config.model_validate(tree)

    return make
