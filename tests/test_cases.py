"""Small inputs of kinds that public bug reports tell of, each prepared whole; those that later stages stumbled over
go through the whole line. Each folder of tests/cases holds an input and the config that reads it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.nightly.pipeline import nightly
from tests.nights import Night, run

DS = "2024-06-01"
CASES = Path(__file__).parent / "cases"
CHARSET = "text is not in the charset"


@dataclass(frozen=True)
class Right:
    """The right outcome. rows: of the input; ids: the type of user ids; absent: ids of users or items that must not be
    indexed; present: users that must be."""

    rows: int
    ids: pa.DataType = field(default_factory=pa.string)
    quarantined: dict[str, int] = field(default_factory=dict)
    absent: tuple[Any, ...] = ()
    present: tuple[Any, ...] = ()


RIGHT = {
    "bracket": Right(24),
    "delta": Right(20, pa.int64(), absent=(1,)),
    "far_year": Right(24, pa.int64(), {"timestamp is after the year 2199": 1}),
    "float_ids": Right(24, pa.int64(), {"user id is null": 1}, present=(10_000_000_001,)),
    "left_out": Right(24),
    "ml10m": Right(120, pa.int64(), absent=(9001,)),
    "multiline": Right(300, absent=("9999",)),
    "surrogate": Right(24, quarantined={CHARSET: 1}),
    "symlink": Right(24),
}
WHOLE_NIGHTS = {
    "bad_utf8": Right(24, quarantined={CHARSET: 1}),
    "empty_first": Right(24, pa.int64()),
}


def config_of(case: str, tmp_path: Path) -> Config:
    """The case's config, with its input copied to `tmp_path`."""
    folder = tmp_path / case
    shutil.copytree(CASES / case, folder)
    if case == "symlink":
        (folder / "log/feb").symlink_to("../nas/feb")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["input"]["path"] = str(folder / tree["input"]["path"])
    tree["paths"] = {name: str(folder / path) for name, path in tree["paths"].items()}
    return Config.model_validate(tree)


def assert_right(night: Night, right: Right) -> None:
    report = night.outcome.extra["rows"]
    assert (report["input"], report["quarantined"]) == (right.rows, right.quarantined)
    assert report["accepted"] + report["duplicates"] + sum(right.quarantined.values()) == right.rows
    users, items = night.index("user"), night.index("item")
    assert night.stored("user_index")[0].schema.field("user_id").type == right.ids
    assert set(right.present) <= set(users)
    assert not {*users, *items} & set(right.absent)


def test_every_case_is_tried() -> None:
    assert {path.name for path in CASES.iterdir()} == set(RIGHT) | set(WHOLE_NIGHTS)


@pytest.mark.parametrize("case", RIGHT)
def test_prepare_gives_the_right_outcome(case: str, spark: SparkSession, tmp_path: Path) -> None:
    assert_right(run(config_of(case, tmp_path), DS), RIGHT[case])


@pytest.mark.parametrize("case", WHOLE_NIGHTS)
def test_a_whole_night_gives_the_right_outcome(case: str, spark: SparkSession, tmp_path: Path) -> None:
    config = config_of(case, tmp_path)
    outcome = nightly(config, DS)
    assert outcome.status == "done"
    manifest = Lake(config.paths.lake).stage(DS, "prepare").newest()
    night = Night(config, outcome, manifest)
    assert_right(night, WHOLE_NIGHTS[case])
    published = DeltaTable(outcome.outputs["recommendations"]).get_add_actions(flatten=True)
    assert sum(published.column("num_records").to_pylist()) > 0
