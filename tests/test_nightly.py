"""A night that could not be published in the end is refused before its first stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from ncf_dist import contracts
from ncf_dist.config import Config
from ncf_dist.errors import ContractError, InputError, NcfError
from ncf_dist.nightly import pipeline
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.stage import Outcome, Upstream
from tests.published import Night


class Stages(list[str]):
    """Stages that note their names and do nothing."""

    def stage(self, name: str, **extra: Any) -> Any:
        def run(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
            self.append(name)
            return Outcome("done", name, extra=extra)

        return run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    noted = Stages()
    monkeypatch.setattr(pipeline, "STAGES", {name: noted.stage(name) for name in pipeline.STAGES})
    return noted


def published(root: Path, ds: str = "2026-01-31", numbers: bool = False) -> Night:
    night = Night(root, ds, numbers)
    night.prepare()
    night.score()
    night.publish()
    return night


def refused(stages: Stages, config: Config, ds: str, kind: type[NcfError], match: str) -> None:
    with pytest.raises(kind, match=match):
        nightly(config, ds)
    assert stages == [], "no stage was started"


def test_a_night_that_can_be_published_is_made(tmp_path: Path, stages: Stages) -> None:
    config = published(tmp_path, numbers=True).config
    for ds in ("2026-01-31", "2026-02-01"):
        stages.clear()
        assert nightly(config, ds).status == "done"
        assert stages == ["prepare", "train", "evaluate", "score", "publish"]


def test_a_first_night_needs_no_table(tmp_path: Path, stages: Stages) -> None:
    assert nightly(Night(tmp_path).config, "2026-01-31").status == "done"


def test_a_night_is_made_also_where_a_later_one_is_published(tmp_path: Path, stages: Stages) -> None:
    config = published(tmp_path, numbers=True).config
    assert nightly(config, "2026-01-30").status == "done"


@pytest.mark.parametrize("what", ["form", "ids", "partitions", "columns"])
def test_the_table_has_other_columns(tmp_path: Path, stages: Stages, what: str) -> None:
    """Ids of MovieLens are numbers unless it is said that they are text."""
    night = Night(tmp_path)
    contract = contracts.recommendations(pa.int64(), pa.int64(), "lists" if what == "form" else "long")
    schema = contract.schema.insert(0, pa.field("ds", pa.string(), nullable=False))
    if what == "columns":
        schema = schema.remove(schema.get_field_index("reason"))
    DeltaTable.create(str(night.table), schema, partition_by=["rank"] if what == "partitions" else ["ds"])
    config = night.config
    if what == "ids":
        config = config.model_copy(update={"input": config.input.model_copy(update={"user_type": "string"})})
    refused(stages, config, night.ds, ContractError, "has columns .*, partitioned by ds: .* set publish.table to a new")


def test_the_log_is_damaged(tmp_path: Path, stages: Stages) -> None:
    night = published(tmp_path, numbers=True)
    (night.table / "_delta_log" / f"{0:020d}.json").write_bytes(b"")
    refused(stages, night.config, night.ds, ContractError, "entry .*0.json of the Delta log is damaged")


@pytest.mark.parametrize("place", ["lake", "lake/recommendations", "lake/recommendations/_delta_log", "work"])
def test_a_place_is_no_folder(tmp_path: Path, stages: Stages, place: str) -> None:
    night = published(tmp_path, numbers=True)
    shutil.rmtree(tmp_path / place)
    (tmp_path / place).write_text("")
    refused(stages, night.config, night.ds, InputError, str(tmp_path / place))


@pytest.mark.parametrize("place", ["recommendations", "recommendations/_delta_log", "recommendations/ds=2026-01-31"])
def test_a_place_cannot_be_written(tmp_path: Path, stages: Stages, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs these tests may write everywhere, so the kernel's answer is made up."""
    night = published(tmp_path, numbers=True)
    closed = str(tmp_path / "lake" / place)
    monkeypatch.setattr("os.access", lambda path, mode: str(path).rstrip("/") != closed)
    refused(stages, night.config, night.ds, InputError, "is not a folder that this user may write")


def test_warnings_of_all_stages_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Stages()
    each = {name: noted.stage(name, warnings=[f"{name} warns"]) for name in ("prepare", "publish")}
    monkeypatch.setattr(pipeline, "STAGES", each)
    assert nightly(Night(tmp_path).config, "2026-01-31").extra["warnings"] == ["prepare warns", "publish warns"]
