"""Two nights of the real line: the second's model is judged beside the champion, and where it is refused the champion
ranks, on the second night's users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from ncf_dist.champion import champion
from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.publish import model

FIRST, SECOND = "2024-05-20", "2024-05-21"


def test_the_champion_is_judged_beside_the_model_and_ranks_in_its_place(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.csv"
    rows = [(f"u{user}", f"i{(3 * user + item) % 12}", 19 - item % 5) for user in range(20) for item in range(6)]
    log.write_text("u,i,t\n" + "".join(f"{user},{item},2024-05-{day}T12:00:00\n" for user, item, day in rows))
    tree = {
        "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
        "input": {
            "path": str(log),
            "format": "csv",
            "columns": {"user": "u", "item": "i", "timestamp": "t"},
            "time_unit": "iso",
        },
        "negatives": {"per_positive": 1, "draws": 1, "candidates": 3},
        "layout": {"min_files": 1},
        "model": {"name": "mf", "factors": 2},
        "train": {"launcher": "none", "epochs": 1, "device": "cpu"},
        "evaluate": {"bootstrap": 50},
        "score": {"k": 2, "tasks": 1},
        "publish": {"require": ["users", "evaluated"]},
        "gates": {"on_refusal": "champion"},
        "spark": {"master": "local[2]", "shuffle_partitions": 2},
    }
    config = Config.model_validate(tree)
    lake = Lake(config.paths.lake)
    outcome = nightly(config, FIRST)
    assert outcome.extra["gates"]["canary"]["outcome"] == "passed"
    assert not any(name.startswith("champion.") for name in outcome.metrics), "a first night has none"
    with log.open("a") as more:
        more.writelines(f"new{user},i{item},2024-05-20T12:00:00\n" for user in range(3) for item in range(5))

    # A gate refuses the model of the second night.
    real = dict(model.GATES)
    monkeypatch.setattr(model, "GATES", {**real, "champion": lambda *_: "it is worse"})
    outcome = nightly(config, SECOND)
    first, second = (lake.stage(night, "train").newest() for night in (FIRST, SECOND))
    found = champion(lake, config.publish.table, SECOND)
    assert found is not None
    assert (found.ds, found.run_key) == (FIRST, first.run_key)
    judged = lake.stage(SECOND, "evaluate").newest()
    assert judged.inputs["champion"] == f"{FIRST}/{first.run_key}"
    report = json.loads(Path(judged.root, "metrics.json").read_text())
    row = next(row for row in report["comparisons"] if (row["with"], row["metric"]) == ("champion", "ndcg@10"))
    theirs = report["baselines"]["champion"]["full"]["ndcg@10"]
    assert row["difference"] == pytest.approx(report["full"]["ndcg@10"] - theirs)
    assert judged.metrics["champion.full.ndcg@10"] == theirs
    assert "champion" in Path(judged.root, "report.html").read_text()
    scored = lake.stage(SECOND, "score").newest()
    assert (scored.inputs["train"], scored.facts["earlier_model"]["ds"]) == (first.run_key, FIRST)
    warnings = outcome.extra["warnings"]
    assert any(f"the champion of {FIRST} ranks in its place: " in text and "it is worse" in text for text in warnings)
    assert outcome.extra["version"] == 1
    latest = json.loads(Path(lake.root, "recommendations/latest.json").read_text())
    assert latest["ds"] == SECOND
    assert latest["model_version"] == judged.facts["champion"]["model_version"]
    again = nightly(config, SECOND)
    assert (again.extra["stages"]["score"], again.extra["stages"]["publish"]) == ("already-done", "already-done")

    # Once nothing speaks against it, the model of the night replaces the champion's lists.
    monkeypatch.setattr(model, "GATES", {**real, "champion": lambda *_: ""})
    assert nightly(config, SECOND).extra["version"] == 2
    assert lake.stage(SECOND, "score").newest().inputs["train"] == second.run_key
