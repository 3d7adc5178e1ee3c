"""A model that looks back, over a small night: evaluate and score rank by the same latest items, whatever the tasks and
blocks, and a user alone gets the same rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession

from ncf_dist.bundle import Bundle, read_bundle, save_bundle
from ncf_dist.config import Config
from ncf_dist.contracts import RECENT
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.files import remove
from ncf_dist.item_item.part import Part
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import build_model
from ncf_dist.parquet import read_table
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.recent import check_recent
from ncf_dist.score.pipeline import forecast, score
from ncf_dist.score.plan import Plan
from ncf_dist.score.ranker import Ranker, users_of
from ncf_dist.score.task_rows import users_to_rank
from ncf_dist.stage import Outcome, stored
from tests.test_sparse import matrix

DS, USERS, ITEMS, K, LENGTH = "2026-01-31", 60, 50, 10, 6


def history_of(user: int) -> list[int]:
    """2 to 25 items, oldest first."""
    rng = np.random.default_rng(user)
    return rng.permutation(ITEMS)[: rng.integers(2, 26)].tolist()


class Line:
    """A night that is prepared, and a model with random weights and two parts, the second of which looks furthest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [
            f"{user}::{item}::5::{1_000_000 + place * (user + 1) * 50}\n"
            for user in range(USERS)
            for place, item in enumerate(history_of(user))
        ]
        (folder / "ratings.dat").write_text("".join(rows))

    def config(self, **sections: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "paths": {"lake": str(self.folder / "lake"), "work": str(self.folder / "work")},
            "input": {"path": str(self.folder / "ratings.dat")},
            "sequences": {"length": LENGTH},
            "model": {"name": "history", "factors": 8, "history": LENGTH, "heads": 2},
            "train": {"launcher": "none", "device": "cpu"},
            "negatives": {"candidates": 10},
            "evaluate": {"ks": [1, K], "baselines": ["popularity"]},
            "score": {"k": K, "tasks": 2},
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
        }
        return Config.model_validate(
            {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
        )

    def current(self, stage: str) -> Manifest:
        return Lake(self.config().paths.lake).stage(DS, stage).newest()

    def table(self, stage: str, name: str) -> pd.DataFrame:
        return pa.concat_tables([read_table(path) for path in self.current(stage).files(name)]).to_pandas()

    def ids(self, kind: str) -> dict[int, int]:
        """The customer's id of each index."""
        table = self.table("prepare", f"{kind}_index")
        return dict(zip(table[f"{kind}_idx"].tolist(), table[f"{kind}_id"].tolist(), strict=True))

    def install(self) -> Bundle:
        torch.manual_seed(1)
        config, rng = self.config(), np.random.default_rng(1)
        prepared = self.current("prepare")
        items = int(prepared.facts["items"])
        model = build_model(config.model, USERS, items)
        parts = [
            Part("counts", 0.5, 2.0, 3, matrix(rng, items, 0.3, True)),
            Part("ease", 2.0, 30.0, LENGTH, matrix(rng, items, 0.4, False)),
        ]
        runs = Lake(config.paths.lake).stage(DS, "train")
        run = runs.begin("t1")
        inputs = {"prepare": prepared.run_key}
        bundle = save_bundle(
            f"{run}/bundle", model, config.model, USERS, items, {"prepare_run": prepared.run_key}, parts
        )
        runs.finish(
            Manifest(stage="train", ds=DS, run_key="t1", root=run, config=stored("train", config), inputs=inputs)
        )
        return bundle


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Line:
    line = Line(tmp_path_factory.mktemp("history"))
    prepare(line.config(), DS)
    line.install()
    return line


@pytest.fixture(scope="module")
def evaluated(line: Line) -> Outcome:
    return evaluate(line.config(), DS)


@pytest.fixture(scope="module")
def scored(line: Line) -> Outcome:
    return score(line.config(score={"seen": "train"}), DS)


def lists(table: pd.DataFrame) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    for row in table.sort_values(["user_id", "rank"]).to_dict("records"):
        found.setdefault(row["user_id"], []).append((row["item_id"], row["score"]))
    return found


def test_evaluate_and_score_agree_exactly(line: Line, evaluated: Outcome, scored: Outcome) -> None:
    """The lists that evaluate judged are those that ship where the same items are masked, and so is every score."""
    user_id, item_id = (line.ids(kind) for kind in ("user", "item"))
    shipped = lists(line.table("score", "recommendations"))
    ranks = line.table("evaluate", "ranks")
    judged = ranks[ranks["scorer"] == "model"].to_dict("records")
    assert len(judged) > 40
    found = 0
    for row in judged:
        mine = shipped[user_id[row["user_idx"]]]
        assert [item for item, _ in mine] == [item_id[item] for item in row["top"]]
        own = {item_id[item]: value for item, value in zip(row["item_idx"], row["score"], strict=True)}
        for item, value in mine:
            if item in own:
                assert value == own[item]
                found += 1
    hits = sum(row["full_rank"][0] <= K for row in judged)
    assert found == hits > 0
    assert evaluated.metrics[f"full.hr@{K}"] == hits / len(judged)


def files(line: Line, config: Config) -> list[tuple[str, str]]:
    """Score afresh: the files of the table and their SHA-256."""
    remove(line.current("score").root)
    assert score(config, DS).status == "done"
    return [(info.path, info.sha256) for info in line.current("score").tables["recommendations"].files]


def test_tasks_and_blocks_decide_no_byte(line: Line, scored: Outcome) -> None:
    config = line.config(score={"seen": "train", "tasks": 2, "users_per_block": 3})
    wanted = [(info.path, info.sha256) for info in line.current("score").tables["recommendations"].files]
    assert files(line, config) == wanted
    assert files(line, line.config(score={"seen": "train", "tasks": 5, "users_per_block": 1})) == wanted


@pytest.mark.parametrize("seen", ["train", "all"])
def test_a_user_alone_gets_the_same_rows(line: Line, spark: SparkSession, seen: str) -> None:
    """And ranks by what `score.seen` masks: with `all` by the held-out item, too."""
    config = line.config(score={"seen": seen})
    plan = Plan.of(config, DS)
    rows = users_to_rank(spark, plan.prepare, plan.bundle, config.score, DS).sort("user_idx").toArrow()
    ranker = Ranker(plan.spec("unused", plan.products(spark)))
    batch = rows.combine_chunks().to_batches()[0]

    together = ranker.recommend(batch, Counter()).to_pylist()
    alone = [row for n in range(len(batch)) for row in ranker.recommend(batch.slice(n, 1), Counter()).to_pylist()]
    assert alone == together
    latest = users_of(batch, ranker.spec).latest
    assert latest is not None
    item_id = line.ids("item")
    for row, length, items in zip(batch.to_pylist(), latest.length.tolist(), latest.items.tolist(), strict=True):
        known = history_of(row["user_id"])
        if seen == "train" and len(row["test_item_idx"]):
            known = known[:-1]
        assert [item_id[item] for item in items[:length]] == known[-LENGTH:]


def test_a_night_is_forecast(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert forecast(line.config(), DS).metrics["forecast.pairs"] > 0
    assert "FLOPs" in capsys.readouterr().err


def test_too_little_of_what_users_did_is_refused(line: Line) -> None:
    """Before anything starts: prepare kept none, or fewer than the model looks back on."""
    bundle, night = read_bundle(f"{line.current('train').root}/bundle"), line.current("prepare")
    check_recent(bundle, night)
    assert bundle.looks_back == LENGTH
    tables = {name: table for name, table in night.tables.items() if name != RECENT.name}
    with pytest.raises(ContractError, match="looks back on 6 items of a user, .* has kept none; needed as many: set"):
        check_recent(bundle, replace(night, tables=tables))
    fewer = replace(night, facts={**night.facts, "sequences": {"length": 5}})
    with pytest.raises(ContractError, match="has kept 5; .* sequences.length=6 and rerun the job prepare"):
        check_recent(bundle, fewer)
