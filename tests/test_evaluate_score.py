"""Evaluate and score over one small line whose best answers are known, from the raw log to the table that
ships.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession

from ncf_dist import demo
from ncf_dist.bundle import WEIGHTS, load_model, read_bundle, save_bundle
from ncf_dist.config import Config, Model, Score
from ncf_dist.contracts import TEST, TEST_SPLIT, recommendations
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.files import remove
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF
from ncf_dist.parquet import read_table, write_parquet
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import publish
from ncf_dist.score.items import ItemLists
from ncf_dist.score.pipeline import score
from ncf_dist.score.ranker import score_pass
from ncf_dist.score.spec import ScorePass
from ncf_dist.spark_files import table_info
from ncf_dist.stage import Outcome, stored
from ncf_dist.train.pipeline import train

DS = "2026-01-31"
USERS, ITEMS, K = 200, 30, 10
OWN = ITEMS // 2
GLUTTON = 1
"""User 1 has seen all but 4 items: fewer than K are left to offer."""


def liked_by(user: int) -> list[int]:
    """Oldest first: all 15 items of the user's own parity in an order of its own. The last is held out, so
    what is left to offer is that one and the 15 of the other parity. The glutton first had 11 of those
    too.
    """
    own = np.random.default_rng(user).permutation(np.arange(user % 2, ITEMS, 2)).tolist()
    other = list(range(1 - user % 2, ITEMS, 2))
    return [*(other[: OWN - 4] if user == GLUTTON else []), *own]


class Line:
    """The line's folder; `config(section={...})` changes settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [
            f"{user}::{item}::5::{1_000_000 + second}\n"
            for user in range(USERS)
            for second, item in enumerate(liked_by(user))
        ]
        (folder / "ratings.dat").write_text("".join(rows))
        (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (19{i:02})::Drama\n" for i in range(ITEMS)))

    def config(self, **sections: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "paths": {"lake": str(self.folder / "lake"), "work": str(self.folder / "work")},
            "input": {"path": str(self.folder / "ratings.dat"), "items": str(self.folder / "movies.dat")},
            "negatives": {"candidates": 10, "draws": 2},
            "layout": {"min_files": 4},
            "model": {"name": "neumf", "factors": 8, "layers": [8, 4]},
            "train": {
                "launcher": "none",
                "device": "cpu",
                "batch_size": 64,
                "lr": 0.02,
                "epochs": 6,
                "patience": 6,
            },
            "evaluate": {"ks": [1, 5, K]},
            "score": {"k": K, "tasks": 2},
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
        }
        return Config.model_validate(
            {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
        )

    def current(self, stage: str) -> Manifest:
        return Lake(self.config().paths.lake).stage(DS, stage).newest()

    def table(self, stage: str, name: str) -> pd.DataFrame:
        run = self.current(stage)
        return pa.concat_tables([read_table(path) for path in run.files(name)]).to_pandas()

    def indexes(self) -> tuple[dict[int, int], dict[int, int]]:
        """(user_idx by user_id, item_idx by item_id)"""
        users, items = (self.table("prepare", name) for name in ("user_index", "item_index"))
        return (
            dict(zip(users["user_id"], users["user_idx"], strict=True)),
            dict(zip(items["item_id"], items["item_idx"], strict=True)),
        )

    def install(self, key: str, model: GMF, prepare_run: str | None = None) -> Manifest:
        """Make `model` the trained model of the night."""
        runs = Lake(self.config().paths.lake).stage(DS, "train")
        run, made_from = runs.begin(key), prepare_run or self.current("prepare").run_key
        config = Model(name="gmf", factors=model.output.in_features)
        save_bundle(f"{run}/bundle", model, config, USERS, ITEMS, {})
        return runs.finish(
            Manifest(
                stage="train",
                ds=DS,
                run_key=key,
                root=run,
                config=stored("train", self.config()),
                inputs={"prepare": made_from},
            )
        )


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Prepared and trained."""
    line = Line(tmp_path_factory.mktemp("line"))
    prepare(line.config(), DS)
    train(line.config(), DS)
    return line


@pytest.fixture(scope="module")
def evaluated(line: Line) -> Outcome:
    return evaluate(line.config(), DS)


@pytest.fixture(scope="module")
def scored(line: Line) -> Outcome:
    return score(line.config(), DS)


@pytest.fixture
def afterwards_the_trained_model(line: Line) -> Iterator[None]:
    """For tests that put another model, or another prepare run, in the trained one's place."""
    now = {stage: line.current(stage) for stage in ("prepare", "train")}
    yield
    for stage, manifest in now.items():
        Lake(line.config().paths.lake).stage(DS, stage).finish(manifest)  # The newest again.


def parity_model(line: Line, sign: float) -> GMF:
    """score(u, i) = ± 1 where u and i have the same parity, else 0."""
    user_idx, item_idx = line.indexes()
    model = GMF(USERS, ITEMS, 2)
    with torch.no_grad():
        for table, index in ((model.user.weight, user_idx), (model.item.weight, item_idx)):
            table.zero_()
            for customer, place in index.items():
                table[place, customer % 2] = 1
        model.output.weight.fill_(sign)
        model.output.bias.zero_()
    return model


# ---- evaluate ----------------------------------------------------------------------------------------------


def test_the_planted_answer_is_found(evaluated: Outcome) -> None:
    """One item of the user's own parity is left among 16: HR@1 would be 1/16 by chance."""
    assert evaluated.metrics["full.hr@1"] > 0.9
    assert evaluated.metrics["full.hr@1"] > 3 * evaluated.metrics["popularity.full.hr@1"]
    assert evaluated.metrics["candidates.hr@1"] > 0.9


def test_evaluate_writes_what_it_reports(evaluated: Outcome) -> None:
    report = json.loads(Path(evaluated.outputs["metrics"]).read_text())
    assert report["n_users"] == USERS
    kinds = {"full": ("hr", "recall", "precision", "ndcg", "map"), "candidates": ("hr", "ndcg")}
    for protocol, alone in (("full", {"mrr"}), ("candidates", {"mrr", "auc"})):
        assert set(report[protocol]) == alone | {f"{m}@{k}" for m in kinds[protocol] for k in (1, 5, K)}
        for name, value in report[protocol].items():
            assert evaluated.metrics[f"{protocol}.{name}"] == value
            assert (
                evaluated.metrics[f"popularity.{protocol}.{name}"] == report["baselines"]["popularity"][protocol][name]
            )


def test_evaluating_again_finds_it_done(line: Line, evaluated: Outcome) -> None:
    again = evaluate(line.config(), DS)
    assert (again.status, again.run_key, dict(again.metrics), again.outputs) == (
        "already-done",
        evaluated.run_key,
        evaluated.metrics,
        evaluated.outputs,
    )


@pytest.mark.usefixtures("afterwards_the_trained_model")
def test_metrics_of_a_known_model(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """A model that knows parity puts the one unseen item of the user's own parity first: every metric is 1
    but for the glutton's, whose item is first as well. Nothing to warn of.
    """
    line.install("parity", parity_model(line, 1.0))
    metrics = evaluate(line.config(), DS).metrics
    for name in ("hr@1", "hr@5", f"hr@{K}", "ndcg@1", "ndcg@5", f"ndcg@{K}", "mrr"):
        assert metrics[f"full.{name}"] == metrics[f"candidates.{name}"] == 1.0, name
    assert line.current("evaluate").facts["beats_popularity"] is True
    assert "DOES NOT BEAT POPULARITY" not in caplog.text


@pytest.mark.usefixtures("afterwards_the_trained_model")
def test_a_model_worse_than_popularity_is_warned_of(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """Against parity: the held-out item is the last of 16 (of the glutton's 5, for which it is 5th, of its
    4 candidates likewise).
    """
    line.install("against", parity_model(line, -1.0))
    with caplog.at_level(logging.WARNING, "ncf_dist"):
        metrics = evaluate(line.config(), DS).metrics
    others = USERS - 1
    assert metrics["full.hr@1"] == metrics["candidates.hr@1"] == 0
    assert metrics["full.hr@5"] == metrics[f"full.hr@{K}"] == 1 / USERS
    assert metrics["full.ndcg@5"] == pytest.approx((1 / math.log2(5 + 1)) / USERS)
    assert metrics["full.mrr"] == pytest.approx((others / 16 + 1 / 5) / USERS)
    assert metrics["candidates.mrr"] == pytest.approx((others / 11 + 1 / 5) / USERS)
    assert "THE MODEL DOES NOT BEAT POPULARITY over the full catalogue in mrr, hr@1, ndcg@1, hr@5" in caplog.text
    assert line.current("evaluate").facts["beats_popularity"] is False


def without_test_rows(config: Config) -> None:
    lake = Lake(config.paths.lake)
    runs = lake.stage(DS, "prepare")
    root = runs.begin("p1")
    tables = {"test": table_info(TEST, [], root)}
    runs.finish(
        Manifest(
            stage="prepare",
            ds=DS,
            run_key="p1",
            root=root,
            config=stored("prepare", config),
            inputs={},
            tables=tables,
        )
    )
    runs = lake.stage(DS, "train")
    settings = stored("train", config)
    runs.finish(
        Manifest(stage="train", ds=DS, run_key="t1", root=runs.begin("t1"), config=settings, inputs={"prepare": "p1"})
    )


def test_a_night_that_trains_on_everything_has_nothing_to_judge(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = line.config(paths={"lake": str(tmp_path)}, split={"strategy": "none"})
    without_test_rows(config)
    assert [evaluate(config, DS).status for _ in range(2)] == ["done", "already-done"]
    assert "nothing is held out" in caplog.text


def test_an_empty_test_table_is_refused(line: Line, tmp_path: Path) -> None:
    """No user has enough items to hold one out."""
    config = line.config(paths={"lake": str(tmp_path)})
    without_test_rows(config)
    with pytest.raises(ContractError, match=r"test table is empty.*split\.min_interactions"):
        evaluate(config, DS)


@pytest.mark.parametrize("stage", [evaluate, score])
@pytest.mark.usefixtures("afterwards_the_trained_model")
def test_a_model_of_another_prepare_run_is_passed_over(line: Line, stage: Any) -> None:
    """It is newer, and no part of a line that this config leads to."""
    line.install("stale", parity_model(line, 1.0), prepare_run="another")
    done = Lake(line.config().paths.lake).stage(DS, stage.__name__).load(str(stage(line.config(), DS).run_key))
    assert done.inputs["train"] != "stale"
    assert done.inputs["prepare"] == line.current("prepare").run_key


@pytest.mark.parametrize("stage", [evaluate, score])
@pytest.mark.usefixtures("afterwards_the_trained_model")
def test_damaged_weights_are_refused(line: Line, stage: Any) -> None:
    run = line.install("damaged", parity_model(line, 1.0))
    path = Path(run.root) / "bundle" / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ContractError, match="damaged, rerun the job train"):
        stage(line.config(), DS)


@pytest.mark.parametrize("stage", [evaluate, score])
def test_a_night_that_was_not_trained_is_refused(line: Line, stage: Any) -> None:
    with pytest.raises(ContractError, match="run the job prepare first"):
        stage(line.config(), "2026-03-01")


# ---- score -------------------------------------------------------------------------------------------------


def test_every_user_gets_k_distinct_unseen_known_items_best_first(line: Line, scored: Outcome) -> None:
    table = line.table("score", "recommendations")
    assert table["user_id"].nunique() == USERS
    for _, rows in table.groupby("user_id"):
        rows = rows.sort_values("rank")
        unseen = set(range(ITEMS)) - set(liked_by(rows["user_id"].iloc[0]))
        assert rows["rank"].tolist() == list(range(1, min(K, len(unseen)) + 1))
        assert rows["item_id"].is_unique
        assert set(rows["item_id"]) <= unseen
        assert rows["score"].is_monotonic_decreasing
    assert np.isfinite(table["score"]).all()
    assert table["model_version"].unique().tolist() == [
        read_bundle(line.current("train").root + "/bundle").model_version
    ]


def test_whom_we_could_not_serve_in_full_is_counted(line: Line, scored: Outcome) -> None:
    table = line.table("score", "recommendations")
    assert (table["user_id"] == GLUTTON).sum() == 4
    facts = line.current("score").facts
    assert (facts["users"], facts["short_users"]) == (USERS, 1)
    assert scored.metrics["score.rows"] == len(table) == (USERS - 1) * K + 4


def test_files_hold_whole_users_in_order(line: Line, scored: Outcome) -> None:
    owners: dict[int, str] = {}
    for path in line.current("score").files("recommendations"):
        frame = read_table(path).to_pandas()
        assert frame[["user_id", "rank"]].equals(frame[["user_id", "rank"]].sort_values(["user_id", "rank"]))
        for user in frame["user_id"].unique():
            assert owners.setdefault(user, path) == path


def hashes(line: Line, config: Config) -> list[tuple[str, str]]:
    """Score afresh; the files of the table and their SHA-256."""
    remove(line.current("score").root)
    run = Lake(config.paths.lake).stage(DS, "score")
    assert score(config, DS).status == "done"
    return [(info.path, info.sha256) for info in run.newest().tables["recommendations"].files]


def test_the_table_is_the_same_bytes_with_any_number_of_tasks_and_blocks(line: Line, scored: Outcome) -> None:
    wanted = [(info.path, info.sha256) for info in line.current("score").tables["recommendations"].files]
    for settings in ({"tasks": 1, "users_per_block": 3}, {"tasks": 8, "users_per_block": 1}):
        assert hashes(line, line.config(score=settings)) == wanted, settings


def test_scoring_again_finds_it_done(line: Line, scored: Outcome) -> None:
    again = score(line.config(score={"tasks": 1, "users_per_block": 7}), DS)
    assert (again.status, again.run_key) == ("already-done", scored.run_key)
    assert again.extra["model_version"] == scored.extra["model_version"] == line.current("train").facts["model_version"]


def test_the_metric_is_about_what_ships(line: Line, evaluated: Outcome) -> None:
    """Scored with only train and validation masked, the table's own hit rate is evaluate's, to the last
    digit.
    """
    config = line.config(score={"seen": "train"})
    score(config, DS)
    table = line.table("score", "recommendations")
    hits = table[[item == liked_by(user)[-1] for user, item in zip(table["user_id"], table["item_id"], strict=True)]]
    for k in (1, 5, K):
        assert (hits["rank"] <= k).sum() / USERS == evaluated.metrics[f"full.hr@{k}"]
    gain = (1 / np.log2(hits["rank"] + 1)).sum() / USERS
    assert gain == pytest.approx(evaluated.metrics[f"full.ndcg@{K}"], rel=1e-12)
    assert score(line.config(), DS).status == "already-done"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_task_gives_the_same_rows_for_any_block_and_batch(tmp_path: Path, size: int) -> None:
    """The executor's function on its own, over a catalogue whose scores all differ: batches and blocks of
    1, 7 and 64 users against one.
    """
    torch.manual_seed(1)
    users, model = 64, GMF(64, 500, 32)
    config = Model(name="gmf", factors=32)
    torch.nn.init.normal_(model.user.weight)
    torch.nn.init.normal_(model.item.weight)
    bundle = save_bundle(str(tmp_path / "bundle"), model, config, users, 500, {})
    ids = pa.table({"item_id": pa.array(range(500, 1000)), "item_idx": pa.array(range(500), pa.int32())})
    item_file = write_parquet(ids, str(tmp_path), "items.parquet").path
    rows = pa.RecordBatch.from_pydict(
        {
            "_file": pa.array([user // 32 for user in range(users)], pa.int32()),
            "user_id": pa.array(range(users)),
            "user_idx": pa.array(range(users), pa.int32()),
            "item_idx": pa.array([[user, user + 1] for user in range(users)], pa.list_(pa.int32())),
            "test_item_idx": pa.array([[]] * users, pa.list_(pa.int32())),
            "by_model": pa.array([True] * users),
        }
    )

    def run(name: str, block: int, batches: list[pa.RecordBatch]) -> list[tuple[str, str]]:
        contract = recommendations(pa.int64(), pa.int64())
        settings = Score(k=10, users_per_block=block)
        items = (str(tmp_path / item_file),)
        spec = ScorePass(bundle, items, contract, str(tmp_path / name), settings, ItemLists())
        (stats,) = score_pass(spec)(batches)
        found = json.loads(stats.column("stats")[0].as_py())
        assert (found["counts"]["users"], found["counts"]["short_users"]) == (users, 0)
        return [(info["path"], info["sha256"]) for info in found["files"]]

    whole = run("whole", 1000, [rows])
    assert len(whole) == 2
    assert run("blocks", size, [rows]) == whole
    assert run("batches", 1000, [rows.slice(start, size) for start in range(0, users, size)]) == whole


# ---- what a person sees ------------------------------------------------------------------------------------


def test_demo_shows_ten_users_with_titles(line: Line, scored: Outcome) -> None:
    assert score(line.config(), DS).run_key == scored.run_key
    publish(line.config(publish={"require": ["users", "beats_popularity"]}), DS)
    blocks = demo.show(line.config()).split("user ")[1:]
    assert len(blocks) == 10
    titles = {item: f"Film {item} (19{item:02})" for item in range(ITEMS)}
    for block in blocks:
        head, *rest = block.splitlines()
        user = int(head.split()[0])
        assert head.split("liked: ")[1].split("; ") == [titles[item] for item in reversed(liked_by(user)[-4:])]
        offers = [row for row in rest if row.startswith("   ")]
        assert len(offers) == (4 if user == GLUTTON else K)
        assert all(any(title in row for title in titles.values()) for row in offers)
        assert not any(titles[item] in row for item in liked_by(user) for row in offers)
    assert f"published: {line.folder}" in blocks[-1]


def test_demo_before_anything_is_published(line: Line) -> None:
    with pytest.raises(ContractError, match="run the job nightly first"):
        demo.show(line.config(publish={"table": "nothing"}))


# ---- explicit feedback -------------------------------------------------------------------------------------


def test_errors_of_predicted_ratings_are_those_of_the_model(spark: SparkSession, tmp_path: Path) -> None:
    """From the log to metrics: ratings are a function of user and item, learned by a dot product in a range."""
    log = tmp_path / "ratings.dat"
    log.write_text(
        "".join(f"{u}::{i}::{1 + (u * i) % 5}::{u + i}\n" for u in range(1, 31) for i in range(1, 21) if (u + i) % 3)
    )
    config = Config.model_validate(
        {
            "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
            "input": {"path": str(log), "feedback": "explicit"},
            "split": {"strategy": "random"},
            "negatives": {"candidates": 3},
            "model": {"name": "mf", "factors": 4, "biases": True, "y_range": [0.5, 5.5]},
            "train": {"launcher": "none", "device": "cpu", "batch_size": 64, "lr": 0.02, "epochs": 3},
            "evaluate": {"als_rank": 2, "als_iterations": 1},
            "spark": {"master": "local[2]", "shuffle_partitions": 2},
        }
    )
    prepared = prepare(config, DS)
    train(config, DS)
    evaluated = evaluate(config, DS)
    metrics = evaluated.metrics
    test = pd.concat([pd.read_parquet(path) for path in Path(prepared.outputs["test"]).iterdir()])
    model = load_model(read_bundle(str(Lake(config.paths.lake).stage(DS, "train").newest().root + "/bundle")))
    with torch.inference_mode():
        predicted = model(*(torch.tensor(test[name].to_numpy()) for name in ("user_idx", "item_idx"))).numpy()
    error = predicted - test["rating"].to_numpy()
    assert metrics["rating.mse"] == pytest.approx(float((error**2).mean()), rel=1e-5)
    assert metrics["rating.mae"] == pytest.approx(float(np.abs(error).mean()), rel=1e-5)
    assert metrics["rating.rmse"] == pytest.approx(metrics["rating.mse"] ** 0.5)
    rows = pd.concat([pd.read_parquet(path) for path in Path(prepared.outputs["interactions"]).iterdir()])
    mean = rows.loc[rows["split"] != TEST_SPLIT, "rating"].mean()
    assert metrics["mean.rating.mse"] == pytest.approx(float(((mean - test["rating"]) ** 2).mean()), rel=1e-4)
    # Ratings are a function of user times item: no sum of offsets tells them, and 2 factors tell little more.
    assert 0 < metrics["biases.rating.rmse"] < 3
    assert 0 < metrics["als.rating.rmse"] < 3
    page = Path(evaluated.outputs["report"]).read_text()
    for name in ("the mean", "biases", "ALS"):
        assert name in re.search("<h1>(.*)</h1>", page)[1]  # type: ignore[index]
    assert len(test) > 50
