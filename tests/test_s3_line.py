"""The whole line with its lake in S3 beside one in a folder: the same bytes, whatever mood the store is in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator

import pytest
from pyspark.sql import SparkSession

from ncf_dist import files, retries
from ncf_dist.config import Config
from ncf_dist.contracts import INTERACTIONS
from ncf_dist.evaluate import held_out
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.prepare import user_tables
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import publish
from ncf_dist.score import plan
from ncf_dist.score.pipeline import score
from ncf_dist.spark_io import read_table
from ncf_dist.stage import Outcome
from ncf_dist.train.pipeline import train
from tests.s3 import KEY, SECRET, Store, served
from tests.test_line import checkerboard

pytest.importorskip("s3fs")

DS = "2026-01-02"
Stage = Callable[[Config, str], Outcome]


def night_of(config: Config, *stages: Stage) -> dict[str, Outcome]:
    lake = Lake(config.paths.lake)
    with lake.hold(DS):
        return {stage.__name__: stage(config, DS) for stage in stages}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _as_before(spark: SparkSession) -> Iterator[None]:
    """What reading from S3 sets in the session, which is that of all tests, goes with these."""
    names = ("spark.sql.autoBroadcastJoinThreshold", "spark.sql.adaptive.autoBroadcastJoinThreshold")
    before = {name: spark.conf.get(name, None) for name in names}
    yield
    for name, value in before.items():
        spark.conf.unset(name)
        if value is not None:
            spark.conf.set(name, value)


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Config]:
    folder = tmp_path_factory.mktemp("s3")
    (folder / "ratings.dat").write_text("\n".join(checkerboard()) + "\n")

    def config(lake: str) -> Config:
        return Config.model_validate(
            {
                "paths": {"lake": lake, "work": str(folder / "work")},
                "input": {"path": str(folder / "ratings.dat")},
                "negatives": {"draws": 2, "candidates": 10},
                "model": {"name": "gmf", "factors": 8},
                "train": {"launcher": "none", "batch_size": 32, "lr": 0.05, "epochs": 2, "checkpoint_steps": 5},
                "evaluate": {"ks": [1, 5]},
                "score": {"k": 5, "tasks": 2},
                "layout": {"min_files": 2, "world_sizes": [1, 2]},
                "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2},
            }
        )

    return config


@pytest.fixture(scope="module", autouse=True)
def _three_files() -> Iterator[None]:
    """Each file of a table takes requests in every stage; three have a first, a middle and a last one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (user_tables, held_out, plan):
            patch.setattr(module, "MIN_FILES", 3)
        yield


@pytest.fixture(scope="module")
def local(spark: SparkSession, config_of: Callable[[str], Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(str(tmp_path_factory.mktemp("local") / "lake"))
    night_of(config, prepare, train, score)
    return config


@pytest.fixture(scope="module")
def far(spark: SparkSession, store: Store, config_of: Callable[[str], Config]) -> Config:
    """A night in S3, whose store refuses every tenth request."""
    config, before = config_of(f"{store.root}/lake"), retries.OURS.taken
    store.fail_every = 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "LONGEST_S", 0.01)  # This process asks again at once.
        outcomes = night_of(config, prepare, train, evaluate, score, publish)
    store.fail_every = 0
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys(outcomes, "done")
    refused = len(store.requests) // 10
    assert refused / 2 < retries.OURS.taken - before <= refused, "those of tasks and ranks are counted, too"
    return config


def run_of(config: Config, stage: str) -> Manifest:
    return Lake(config.paths.lake).stage(DS, stage).newest()


@pytest.mark.parametrize("stage", ["prepare", "train", "score"])
def test_a_lake_in_s3_holds_the_bytes_of_one_in_a_folder(local: Config, far: Config, stage: str) -> None:
    here, there = run_of(local, stage), run_of(far, stage)
    assert there.run_key == here.run_key
    assert there.tables == here.tables
    for name in here.tables:
        for one, other in zip(here.files(name), there.files(name), strict=True):
            assert files.read_bytes(one) == files.read_bytes(other)
    assert there.facts.get("model_version") == here.facts.get("model_version")


def test_what_is_published_is_read_by_latest_json_and_by_the_log(local: Config, far: Config) -> None:
    root = f"{far.paths.lake}/recommendations"
    latest = json.loads(files.read_bytes(f"{root}/latest.json"))
    wanted = sorted(info.sha256 for info in run_of(local, "score").tables["recommendations"].files)
    found = [files.read_bytes(f"{root}/{path}") for path in latest["files"]]
    assert sorted(hashlib.sha256(data).hexdigest() for data in found) == wanted
    assert night_of(far, publish)["publish"].status == "already-done"


def test_a_table_in_s3_is_not_taken_for_a_small_one(spark: SparkSession, far: Config) -> None:
    """Of rows from Python Spark sees no size, and would send a table of any size to every executor."""
    rows = read_table(spark, run_of(far, "prepare"), INTERACTIONS)
    other = spark.range(100).withColumnRenamed("id", "user_idx")
    plan = rows.join(other.repartition(2), "user_idx")._jdf.queryExecution().executedPlan().toString()
    assert "Broadcast" not in plan
    assert spark.conf.get("spark.sql.adaptive.autoBroadcastJoinThreshold") not in (None, "-1")


def test_no_credential_is_stored(far: Config, store: Store) -> None:
    for name in store.names():
        data = store.data(name)
        assert KEY.encode() not in data, name
        assert SECRET.encode() not in data, name


def test_nothing_that_is_temporary_is_left(far: Config, store: Store) -> None:
    assert not store.uploads
    assert [name for name in store.names() if re.search(r"_staging|probe|\.tmp|\.part$", name)] == []
    assert json.loads(store.data(f"lake/runs/{DS}/.lock"))["free"]
