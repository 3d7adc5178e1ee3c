"""A lake that an earlier version of ours wrote goes on: its runs are found, and the next night builds on them.

tests/lakes/README.md says how a lake was made, and when one is added.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from ncf_dist.bundle import BUNDLE, read_bundle, verify_weights
from ncf_dist.config import Config, load_config
from ncf_dist.contracts import ITEM_INDEX, USER_INDEX
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_table
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import publish
from ncf_dist.score.pipeline import score
from ncf_dist.stage import find_upstream
from ncf_dist.train.pipeline import train

STORED = sorted((Path(__file__).parent / "lakes").glob("*.tar.gz"))
NIGHT, NEXT = "2026-01-31", "2026-02-01"
NEW_USER, NEW_ITEM = 1_000, 2_000


@pytest.fixture(params=STORED, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The stored lake's config, whose paths are relative, in a folder of its own."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return load_config("config.yaml")


def index(run: Manifest, table: str) -> dict[Any, int]:
    rows = pa.concat_tables([read_table(path) for path in run.files(table)])
    return dict(zip(*(column.to_pylist() for column in rows.columns), strict=True))


def published(config: Config) -> pd.DataFrame:
    """The table as a consumer reads it, through the Delta log."""
    root = Lake(config.paths.lake).path(config.publish.table)
    return pd.concat([pd.read_parquet(uri) for uri in DeltaTable(root).file_uris()])


def test_its_runs_are_found_and_the_jobs_have_nothing_to_do(config: Config) -> None:
    """By the settings (whatever is new has its default) and by their keys, which no change of ours may rename. Only the
    key of prepare holds where the log lies, and when it was written."""
    runs = find_upstream(Lake(config.paths.lake), config, NIGHT, "publish")
    assert set(runs) == {"score", "train", "prepare"}
    verify_weights(read_bundle(f"{runs['train'].root}/{BUNDLE}"))
    for job in (train, evaluate, score, publish):
        assert job(config, NIGHT).status == "already-done"


def test_the_next_night_builds_on_it(config: Config, spark: SparkSession) -> None:
    """With a new user and a new item: the index goes on, the model starts from the earlier one, and the table has both
    nights."""
    lake = Lake(config.paths.lake)
    before = find_upstream(lake, config, NIGHT, "publish")
    shown = published(config)
    seconds = int(np.datetime64(NIGHT, "s").astype(int))
    with Path("log/ratings.dat").open("a") as log:
        log.writelines(f"{NEW_USER}::{item}::5::{seconds + item}\n" for item in (1, 2, 3, 4, NEW_ITEM))

    for job in (prepare, train, score, publish):
        assert job(config, NEXT).status == "done"
    after = find_upstream(lake, config, NEXT, "publish")
    for table, new in ((USER_INDEX, NEW_USER), (ITEM_INDEX, NEW_ITEM)):
        earlier = index(before["prepare"], table)
        assert index(after["prepare"], table) == earlier | {new: len(earlier)}
    start = read_bundle(f"{before['train'].root}/{BUNDLE}")
    assert after["train"].inputs["warm_start"] == start.model_version
    now = published(config)
    assert set(now["user_id"]) == {*shown["user_id"], NEW_USER}
    assert set(now["model_version"]) == {start.model_version, after["score"].facts["model_version"]}
