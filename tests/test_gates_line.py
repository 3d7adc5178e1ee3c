"""Two nights of the real line: the second's model is judged beside the champion, and where it is refused the champion
ranks, on the second night's users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from ncf_dist.champion import champion
from ncf_dist.config import Publish
from ncf_dist.lake import Lake
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish import model
from ncf_dist.publish.pipeline import publish
from ncf_dist.score.pipeline import score
from ncf_dist.train.pipeline import train
from tests.shop import new_users, shop

FIRST, SECOND = "2024-05-20", "2024-05-21"


def test_the_champion_is_judged_beside_the_model_and_ranks_in_its_place(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shop(tmp_path, publish={"require": ["users", "evaluated"]}, gates={"on_refusal": "champion"})
    lake = Lake(config.paths.lake)
    for job in (prepare, train, score):
        job(config, FIRST)
    ungated = config.model_copy(update={"publish": Publish(require=())})
    assert publish(ungated, FIRST).extra["gates"]["canary"]["outcome"] == "passed"
    new_users(config)

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
    assert latest["model_version"] == outcome.extra["model_version"] == judged.facts["champion"]["model_version"]
    again = nightly(config, SECOND)
    assert (again.extra["stages"]["score"], again.extra["stages"]["publish"]) == ("already-done", "already-done")

    # Once nothing speaks against it, the model of the night replaces the champion's lists.
    monkeypatch.setattr(model, "GATES", {**real, "champion": lambda *_: ""})
    assert nightly(config, SECOND).extra["version"] == 2
    assert lake.stage(SECOND, "score").newest().inputs["train"] == second.run_key
