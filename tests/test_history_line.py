"""A model that looks back, over a small night: evaluate and score rank by the same latest items, whatever the tasks and
blocks, and a user alone gets the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession

from ncf_dist.ancestry import DIGESTS
from ncf_dist.bundle import Bundle, read_bundle, save_bundle
from ncf_dist.config import Config, Model
from ncf_dist.contracts import RECENT
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.known import known_users, where_known
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.evaluate.ranks import model_scores, popularity_scores, rank_users
from ncf_dist.files import remove
from ncf_dist.item_item.part import Part
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import MF, Users, build_model
from ncf_dist.parquet import read_table
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.audit import audit
from ncf_dist.publish.pipeline import publish
from ncf_dist.recent import check_recent
from ncf_dist.refit.pipeline import refit
from ncf_dist.score.pipeline import forecast, score
from ncf_dist.score.plan import Plan
from ncf_dist.score.ranker import Ranker, users_of
from ncf_dist.score.task_rows import users_to_rank
from ncf_dist.scoring import ModelScorer, PopularityScorer
from ncf_dist.stage import Outcome, stored
from tests.test_evaluate import users_of as judged_of
from tests.test_scoring import blocks_of
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

    @property
    def n_items(self) -> int:
        return int(self.current("prepare").facts["items"])

    def install(self) -> Bundle:
        torch.manual_seed(1)
        config, rng, items = self.config().model, np.random.default_rng(1), self.n_items
        parts = [
            Part("counts", 0.5, 2.0, 3, matrix(rng, items, 0.3, True)),
            Part("ease", 2.0, 30.0, LENGTH, matrix(rng, items, 0.4, False)),
        ]
        model = build_model(config, USERS, items)
        self.store("t1", lambda path, facts: save_bundle(path, model, config, USERS, items, facts, parts))
        return read_bundle(f"{self.current('train').root}/bundle")

    def store(self, key: str, save: Callable[[str, dict[str, Any]], Bundle]) -> Manifest:
        """A finished run of train, with the bundle that `save` makes of (its path, its facts)."""
        prepared, runs = self.current("prepare"), Lake(self.config().paths.lake).stage(DS, "train")
        run = runs.begin(key)
        save(f"{run}/bundle", {"prepare_run": prepared.run_key, "ds": DS, DIGESTS: prepared.facts[DIGESTS]})
        stored_config, inputs = stored("train", self.config()), {"prepare": prepared.run_key}
        return runs.finish(Manifest(stage="train", ds=DS, run_key=key, root=run, config=stored_config, inputs=inputs))


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
    bundle, night = read_bundle(f"{trained(line, 't1').root}/bundle"), line.current("prepare")
    check_recent(bundle, night)
    assert bundle.looks_back == LENGTH
    tables = {name: table for name, table in night.tables.items() if name != RECENT.name}
    with pytest.raises(ContractError, match="looks back on 6 items of a user, .* has kept none; needed as many: set"):
        check_recent(bundle, replace(night, tables=tables))
    fewer = replace(night, facts={**night.facts, "sequences": {"length": 5}})
    with pytest.raises(ContractError, match="has kept 5; .* sequences.length=6 and rerun the job prepare"):
        check_recent(bundle, fewer)


# ---- a refit ---------------------------------------------------------------------------------------------------------


def test_a_refit_learns_the_held_out_items_and_ranks_by_all_of_them(
    line: Line, spark: SparkSession, evaluated: Outcome
) -> None:
    """Its windows end with everybody's latest item, where those of the judged model end with the last train item."""
    config = line.config(train={"refit": True}, publish={"require": []})
    prepared, judged = line.current("prepare"), trained(line, "t1")
    given = {"prepare": prepared, "train": judged}
    said = refit(config, DS, given)
    again = said.manifest
    assert again is not None
    every = Lake(line.config().paths.lake).stage(DS, "prepare").load(again.made_from("prepare"))
    user_id, item_id = line.ids("user"), line.ids("item")
    for run, held_out in ((prepared, 2), (every, 0)):
        ends = {}
        for row in rows_of(run, "sequences"):
            if row["window"] == 0:
                ends[user_id[row["user_idx"]]] = np.frombuffer(row["items"], "<i4")[row["length"] - 1]
        long = [user for user in range(USERS) if len(history_of(user)) > 5]  # Of others less may be held out.
        assert [item_id[ends[user]] for user in long] == [history_of(user)[-1 - held_out] for user in long]
    plan = Plan.of(config, DS, given)
    assert (plan.bundle.model_version, plan.since) == (said.extra["model_version"], None)
    rows = users_to_rank(spark, plan.prepare, plan.bundle, config.score, DS).sort("user_idx").toArrow()
    batch = rows.combine_chunks().to_batches()[0]
    latest = users_of(batch, plan.spec("unused", plan.products(spark))).latest
    assert latest is not None
    for row, length, items in zip(batch.to_pylist(), latest.length.tolist(), latest.items.tolist(), strict=True):
        assert [item_id[item] for item in items[:length]] == history_of(row["user_id"])[-LENGTH:]
    scored = score(config, DS, given).manifest
    assert scored is not None
    assert scored.facts["refit"]["of"] == read_bundle(f"{judged.root}/bundle").model_version
    assert {row["model_version"] for row in rows_of(scored, "recommendations")} == {said.extra["model_version"]}


# ---- a model of an earlier night -------------------------------------------------------------------------------------


NEXT = "2026-02-01"
NEWCOMERS = {1000: [3, 7, 2000, 11], 1001: [2000, 2001, 2002, 2003]}
"""Of the next night: user 1001 did nothing with an item that the model knows."""


@pytest.fixture(scope="module")
def later(line: Line) -> Manifest:
    """The night after, whose index goes on from the first's."""
    log, kept = line.folder / "ratings.dat", (line.folder / "ratings.dat").read_text()
    rows = [f"{u}::{i}::5::{2_000_000 + at}\n" for u, items in NEWCOMERS.items() for at, i in enumerate(items)]
    log.write_text(kept + "".join(rows))
    prepare(line.config(), NEXT)
    log.write_text(kept)
    return Lake(line.config().paths.lake).stage(NEXT, "prepare").newest()


def trained(line: Line, kind: str) -> Manifest:
    return Lake(line.config().paths.lake).stage(DS, "train").load(kind)


@pytest.fixture(scope="module")
def of_ids(line: Line) -> Manifest:
    torch.manual_seed(2)
    model = Model(name="mf", factors=8)
    weights = MF(USERS, line.n_items, 8, biases=False, std=1.0)
    return line.store("ids", lambda path, facts: save_bundle(path, weights, model, USERS, line.n_items, facts))


def rows_of(run: Manifest, name: str) -> list[dict[str, Any]]:
    return pa.concat_tables([read_table(path) for path in run.files(name)]).to_pylist()


@pytest.mark.parametrize(("kind", "by_model"), [("t1", {1000}), ("ids", set())])
@pytest.mark.usefixtures("of_ids")
def test_tonights_users_are_ranked_by_an_earlier_nights_model(
    line: Line, later: Manifest, kind: str, by_model: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Those whom it does not know by what they did, where the model can, else by popularity; items that it does not
    know are offered to nobody. All of it is said, and the audit of publish agrees."""
    config, given = line.config(score={"seen": "train"}), {"prepare": later, "train": trained(line, kind)}
    outcome = score(config, NEXT, given)
    run = outcome.manifest
    assert run is not None
    offers = rows_of(run, "recommendations")
    reason = {row["user_id"]: row["reason"] for row in offers}
    assert {user for user in NEWCOMERS if reason[user] == "model"} == by_model
    assert {reason[user] for user in range(USERS)} == {"model"}
    assert max(row["item_id"] for row in offers) < ITEMS
    assert run.facts["earlier_model"]["new_users"] == 2
    assert run.facts["earlier_model"]["new_items"] == later.facts["items"] - line.n_items >= 4
    assert (run.metrics["score.new_users"], run.metrics["score.new_by_model"]) == (2, len(by_model))
    [warning] = outcome.extra["warnings"]
    assert f"is of {DS}: 2 users have come since" in warning
    assert warning in caplog.text
    assert score(config, NEXT, given).extra["warnings"] == [warning]
    given = {**given, "score": run}
    assert publish(line.config(publish={"table": kind, "require": []}), NEXT, given).status == "done"
    unsaid = replace(run, facts={name: fact for name, fact in run.facts.items() if name != "earlier_model"})
    with pytest.raises(ContractError, match=r"needed 'model': they have train rows|rows; needed"):
        audit(unsaid, later, str(line.folder))


def test_evaluate_judges_an_earlier_nights_model_as_score_ranks(line: Line, later: Manifest) -> None:
    given = {"prepare": later, "train": trained(line, "t1")}
    judged, shipped = (stage(line.config(score={"seen": "train"}), NEXT, given).manifest for stage in (evaluate, score))
    assert judged is not None
    assert shipped is not None
    assert judged.facts["unknown_users"] == 1
    assert judged.facts["earlier_model"] == shipped.facts["earlier_model"]
    user_id, item_id = (
        {row[f"{kind}_idx"]: row[f"{kind}_id"] for row in rows_of(later, f"{kind}_index")} for kind in ("user", "item")
    )
    mine: dict[int, list[int]] = {}
    for row in sorted(rows_of(shipped, "recommendations"), key=lambda row: row["rank"]):
        mine.setdefault(row["user_id"], []).append(row["item_id"])
    ranks = {user_id[row["user_idx"]]: row for row in rows_of(judged, "ranks") if row["scorer"] == "model"}
    assert {1000, 1001} <= ranks.keys()
    for user, row in ranks.items():
        if user != 1001:  # Score's fallback counts other days than evaluate's popularity.
            assert [item_id[item] for item in row["top"]] == mine[user]
    assert ranks[1001]["full_rank"] == [later.facts["items"]], "an item that the model does not know comes last"


def test_a_model_of_other_users_and_items_is_refused(line: Line, later: Manifest) -> None:
    """Whatever its sizes are: no step leads to its index, and the content is another."""
    facts = {"prepare_run": "elsewhere", "ds": DS, DIGESTS: {"users": "1-0", "items": "1-0"}}
    weights = MF(USERS, line.n_items, 2, biases=False)
    model = Model(name="mf", factors=2)
    stray = line.store("stray", lambda path, _: save_bundle(path, weights, model, USERS, line.n_items, facts))
    for stage in (score, evaluate):
        with pytest.raises(ContractError, match=r"does not extend .*; needed .*: rerun the job train for this night"):
            stage(line.config(), NEXT, {"prepare": later, "train": stray})


def test_what_an_earlier_model_knows_over_several_blocks() -> None:
    """It knows 3 of 5 users and 20 of 50 items: blocks and single items say the same of each."""
    torch.manual_seed(3)
    model, counts = MF(3, 20, 4, biases=False, std=1.0).requires_grad_(False), np.random.default_rng(1).permutation(50)
    bundle = Bundle("", Model(name="mf", factors=4), "mf-1", 3, 20, "", {})
    judged = replace(
        judged_of([{"seen": [0], "held": {held: []}} for held in (5, 30, 31, 7, 45)]), users=Users(torch.arange(5))
    )
    with blocks_of(8, 16):
        popular = PopularityScorer(counts)
        score = where_known(
            model_scores(ModelScorer(model, 20)), lambda users: popularity_scores(popular, users), bundle, 50
        )
        assert known_users(judged, bundle).tolist() == [True, True, True, False, False]
        scores = score(judged)
        blocks = torch.cat(list(scores.blocks()), 1)
        table = rank_users("model", score, judged, 50)
    assert blocks.shape == (5, 64)
    assert (blocks[:, 20:] == -torch.inf).all()
    own = ModelScorer(model, 20).scores(Users(torch.arange(3)))
    torch.testing.assert_close(blocks[:3, :20], own)
    assert torch.equal(blocks[3:, :20], popular.places[:20].expand(2, -1))
    asked = torch.tensor([19, 20, 3, 49, 3])
    with blocks_of(8, 16):
        assert torch.equal(score(judged).of(asked), blocks[:, asked])
    ranks = table["full_rank"].to_pylist()
    assert [ranks[user] for user in (1, 2, 4)] == [[50], [50], [50]]
    assert [ranks[user][0] <= 19 for user in (0, 3)] == [True, True]
    assert all(set(top) == set(range(1, 20)) for top in table["top"].to_pylist())
