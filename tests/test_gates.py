"""Nothing bad is published: what a night must pass to replace the one that readers see, and what they see then."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist import cli
from ncf_dist.config import Gate, Publish
from ncf_dist.contracts import INTERACTIONS
from ncf_dist.errors import ContractError, ExitCode, GateRefused
from ncf_dist.files import remove
from ncf_dist.lake import Lake
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish import commits, judging, runs
from ncf_dist.publish.gates import Comparison, Evaluated, Facts, Figures, Published, judge
from ncf_dist.publish.pipeline import publish
from ncf_dist.score.pipeline import score
from ncf_dist.train.pipeline import train
from tests.published import Night, good
from tests.shop import shop

GATES = get_args(Gate)

# ---- from facts to verdicts --------------------------------------------------------------------------------


def report(interval: Any, ks: tuple[int, ...] = (5, 10), metric: str = "ndcg@10", difference: float = 0.0) -> Figures:
    return Figures(list(ks), [Comparison("popularity", "full", metric, difference, interval)])


GOOD = Facts("s2", "t2", 100, 50, Published("2026-01-30", "s1", 90), Evaluated("e2", report([0.0, 0.1])), True)
numbers = st.floats(-1, 1)
counts = st.integers(0, 10**9)
reports = st.one_of(
    st.none(),
    st.builds(report, st.one_of(st.none(), st.tuples(numbers, numbers).map(sorted), st.just([math.nan, math.nan]))),
    st.just(report([-1.0, -0.5], metric="hr@10")),
    st.just(Figures([1], [])),
)
facts = st.builds(
    Facts,
    score_run=st.just("s2"),
    train_run=st.just("t2"),
    rows=counts,
    model_users=counts,
    published=st.one_of(st.none(), st.builds(Published, st.just("2026-01-30"), st.just("s1"), st.none() | counts)),
    evaluated=st.one_of(st.none(), st.builds(Evaluated, st.just("e2"), reports)),
    held_out=st.booleans(),
)


def found(facts: Facts, require: tuple[str, ...] = GATES) -> dict[str, bool]:
    """By check: whether it refuses."""
    return {verdict.check: verdict.refuses for verdict in judge(facts, require)}


def test_nothing_speaks_against_a_good_night() -> None:
    assert judge(GOOD, GATES) == []
    assert judge(dataclasses.replace(GOOD, published=None), GATES) == [], "the first night has nothing to be held to"


@given(facts, st.sets(st.sampled_from(GATES)))
def test_each_gate_is_a_function_of_its_facts_and_can_be_left_out(facts: Facts, require: set[str]) -> None:
    every = found(facts)
    assert found(facts, tuple(require)) == {name: v for name, v in every.items() if name in {"rows", *require}}
    assert every.get("rows", False) == (facts.rows == 0)

    before = facts.published
    if before is None:
        assert "users" not in every
    elif before.model_users is None:
        assert every["users"] is False
    else:
        assert every.get("users", False) == (2 * facts.model_users < before.model_users)

    assert every.get("evaluated") == (None if facts.evaluated else facts.held_out)

    rows = facts.evaluated.figures.comparisons if facts.evaluated and facts.evaluated.figures else []
    row = next((row for row in rows if row.metric == "ndcg@10"), None)
    if row is None or row.interval is None or math.isnan(row.interval[0]):
        assert every["beats_popularity"] is False, "nothing to compare is said"
    else:
        assert every.get("beats_popularity", False) == (row.interval[1] < 0)


def test_the_headline_is_the_one_of_the_report() -> None:
    """NDCG at 10, or at the largest K there is."""
    for ks, metric in (((1, 5), "ndcg@5"), ((20, 10), "ndcg@10"), ((20, 50), "ndcg@50")):
        judged = Evaluated("e2", report([-0.2, -0.1], ks, metric=metric))
        assert found(dataclasses.replace(GOOD, evaluated=judged)) == {"beats_popularity": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 0}, ("score run s2 has 0 rows; needed at least 1", "score.active_since")),
        ({"model_users": 44}, ("ranked for 44 users", "s2", "needed 45, half of the 90 of ds 2026-01-30 (run s1)")),
        (
            {"published": Published("2026-01-30", "s1", 90, 900), "interactions": 449},
            ("kept 449 interactions", "s2", "needed 450, half of the 900 of ds 2026-01-30 (run s1)", "is complete"),
        ),
        ({"evaluated": None}, ("judged train run t2", "score run s2", "run the job evaluate")),
        (
            {"evaluated": Evaluated("e2", report([-0.2, -0.1], difference=-0.15))},
            ("full.ndcg@10 is -0.1500", "-0.2000 to -0.1000", "evaluate run e2", "wholly below 0", "report.html"),
        ),
    ],
)
def test_a_refusal_names_value_bound_run_and_remedy(change: dict[str, Any], said: tuple[str, ...]) -> None:
    (verdict,) = [v for v in judge(dataclasses.replace(GOOD, **change), GATES) if v.refuses]
    assert all(words in verdict.message for words in said), verdict.message


@given(st.none() | counts, st.none() | counts)
def test_a_log_that_was_cut_off_is_refused_though_it_names_every_user(now: int | None, then: int | None) -> None:
    before = Published("2026-01-30", "s1", 90, then)
    verdicts = found(dataclasses.replace(GOOD, published=before, interactions=now))
    assert verdicts == ({"interactions": True} if now is not None and then is not None and 2 * now < then else {})


@given(st.none() | st.tuples(numbers, numbers).map(sorted), st.none() | st.tuples(numbers, numbers).map(sorted))
def test_ratings_predicted_worse_than_their_mean_are_a_warning(ratings: Any, ranking: Any) -> None:
    """RMSE: lower is better. Whatever it ranks, a model of ratings is refused by neither."""
    rows = [
        Comparison("mean", "rating", "rmse", 0.0, ratings),
        Comparison("popularity", "full", "ndcg@10", 0.0, ranking),
    ]
    judged = Evaluated("e2", Figures([10], rows, "explicit"))
    verdicts = judge(dataclasses.replace(GOOD, evaluated=judged), GATES)
    assert not any(verdict.refuses for verdict in verdicts)
    said = [verdict.message for verdict in verdicts if "worse than their mean" in verdict.message]
    assert bool(said) == (ratings is not None and ratings[0] > 0)
    assert all("evaluate run e2" in message and "model.biases" in message for message in said)


# ---- a night that is refused -------------------------------------------------------------------------------


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """The night before is published, and tonight is ready to be."""
    before, night = Night(tmp_path, "2026-01-30"), Night(tmp_path)
    for each in (before, night):
        each.config = each.configured(require=Publish().require)
        each.prepare()
        each.evaluate()
        each.score()
    assert before.publish() == ("done", 0)
    return night


def only_ann(night: Night) -> None:
    night.score(good()[:2], key="s2", cuts=(), active_since=night.ds, users=1)


def refusal(night: Night, match: str) -> GateRefused:
    """Publication is refused, and what readers see is what they saw."""
    before = {path: path.read_bytes() for path in night.table.rglob("*") if path.is_file()}
    with pytest.raises(GateRefused, match=match) as caught:
        night.publish()
    assert {path: path.read_bytes() for path in night.table.rglob("*") if path.is_file()} == before
    assert caught.value.exit_code == ExitCode.GATE_REFUSED
    assert caught.value.status == "refused"
    gates: Any = caught.value.extra.pop("gates")
    refused: Any = caught.value.extra["refused"]
    assert {gate for gate, of in gates.items() if of["outcome"] == "refused"} == {*refused}
    return caught.value


def test_a_good_night_replaces_the_one_before(night: Night) -> None:
    outcome = publish(night.config, night.ds)
    gates = outcome.extra.pop("gates")  # type: ignore[attr-defined]
    assert {of["outcome"] for of in gates.values()} == {"passed", "unknown"}
    assert (outcome.status, outcome.extra) == ("done", {"version": 1, "warnings": []})


def test_an_empty_night_replaces_nothing_whatever_is_required(night: Night) -> None:
    night.score([], key="s2", cuts=(), active_since="2026-02-01", users=0)
    for require in (Publish().require, ()):
        night.config = night.configured(require=require)
        assert "publish.require" not in str(refusal(night, "stays: rows: score run s2 has 0 rows"))


def test_a_later_evaluation_without_popularity_hides_nothing(night: Night) -> None:
    """Not of runs, and not where nightly hands its own on."""
    night.evaluate((-0.3, -0.2), key="e2")
    blind = night.evaluate(key="e3", report={"ks": [10], "comparisons": []})
    refusal(night, r"stays: beats_popularity: .* \(evaluate run e2 of train run t1\)")
    made = {name: night.lake.stage(night.ds, name).newest() for name in ("prepare", "train", "score")}
    with pytest.raises(GateRefused, match="evaluate run e2 of train run t1"):
        publish(night.config, night.ds, {**made, "evaluate": blind})


def test_a_night_of_few_interactions_is_refused(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    known = runs.published_interactions(night.lake, "2026-01-30", "s1")
    assert known == night.lake.stage("2026-01-30", "prepare").load("p1").table(INTERACTIONS).rows
    assert runs.published_interactions(night.lake, "2026-01-30", "gone") is None
    asked: list[tuple[Any, ...]] = []

    def twice_and_one(*which: Any) -> int:
        asked.append(which[1:])
        return 2 * known + 1

    monkeypatch.setattr(judging, "published_interactions", twice_and_one)
    error = refusal(
        night, f"interactions: prepare kept {known} interactions for score run s1; needed {known + 1}, half"
    )
    assert (asked, error.extra) == ([("2026-01-30", "s1")], {"refused": ["interactions"], "warnings": []})


def test_a_night_of_few_users_is_refused_by_the_count_in_the_commit(night: Night) -> None:
    only_ann(night)
    error = refusal(
        night, r"users: the model ranked for 1 users in score run s2; needed 2, half of the 4 of ds 2026-01-30"
    )
    assert error.extra == {"refused": ["users"], "warnings": []}
    night.config = night.configured(require=("beats_popularity", "evaluated"))
    assert night.publish() == ("done", 1)
    # From now on the smaller night is the measure.
    after = Night(night.root, "2026-02-01")
    after.config = night.configured(require=Publish().require)
    after.prepare()
    after.evaluate()
    only_ann(after)
    assert after.publish() == ("done", 2)


def test_a_night_without_a_count_is_said_not_held_against_the_next(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As earlier versions published them."""
    shutil.rmtree(night.table)
    before = Night(night.root, "2026-01-30")
    with monkeypatch.context() as patch:
        real = commits.CommitProperties

        def older(custom_metadata: dict[str, Any], **rest: Any) -> Any:
            known = {
                k: v for k, v in custom_metadata.items() if k not in ("ncf.files", "ncf.model_users", "ncf.digest")
            }
            return real(custom_metadata=known, **rest)

        patch.setattr(commits, "CommitProperties", older)
        before.publish()
    assert before.latest()["model_users"] is None
    only_ann(night)
    with caplog.at_level(logging.WARNING, "ncf_dist"):
        outcome = publish(night.config, night.ds)
    (warning,) = outcome.extra["warnings"]
    assert "users: ds 2026-01-30, which is published, does not say how many users" in warning
    assert warning in caplog.text
    assert night.latest()["model_users"] == 1


def test_a_model_below_popularity_is_refused(night: Night) -> None:
    night.evaluate((-0.02, -0.01))
    error = refusal(
        night, r"beats_popularity: full.ndcg@10 is .* -0.0200 to -0.0100 \(evaluate run e1 of train run t1\)"
    )
    assert "leave beats_popularity out of publish.require" in str(error)
    night.evaluate((-0.02, 0.0))
    assert night.publish() == ("done", 1)


def test_a_model_of_ratings_is_not_held_to_popularitys_ranking() -> None:
    """It learns to predict ratings, and its lists may well be worse: the night is told so, and published."""
    worse = dataclasses.replace(report([-0.2, -0.1]), feedback="explicit")
    night = dataclasses.replace(GOOD, evaluated=Evaluated("e2", worse))
    assert found(night) == {"beats_popularity": False}
    assert found(dataclasses.replace(night, evaluated=Evaluated("e2", report([-0.2, -0.1])))) == {
        "beats_popularity": True
    }


@pytest.mark.parametrize("interval", [None, (math.nan, math.nan)])
def test_nothing_to_compare_is_a_warning(night: Night, interval: Any) -> None:
    night.evaluate(interval)
    (warning,) = publish(night.config, night.ds).extra["warnings"]
    assert "beats_popularity: the model is not compared with popularity: evaluate run e1 has no interval" in warning


def test_the_model_that_ships_is_the_one_that_was_judged(night: Night) -> None:
    remove(night.lake.stage(night.ds, "evaluate").root)
    night.evaluate(train="another")
    error = refusal(
        night, "evaluated: no finished evaluate run of this ds judged train run t1, .*: run the job evaluate"
    )
    assert ["beats_popularity" in text for text in error.extra["warnings"]] == [True]  # type: ignore[attr-defined]
    night.evaluate(key="e2")
    assert night.publish() == ("done", 1)


def test_where_nothing_is_held_out_there_is_nothing_to_judge_by(night: Night) -> None:
    remove(night.lake.stage(night.ds, "evaluate").root)
    night.prepare(strategy="none")
    warnings = publish(night.config, night.ds).extra["warnings"]
    assert [text.partition(":")[0] for text in warnings] == ["beats_popularity", "evaluated"]
    assert all("nothing is held out (split.strategy none)" in text for text in warnings)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"ks": [], "comparisons": []}', '{"ks": [10], "comparisons": [{"with": 7}]}']
)
def test_figures_that_cannot_be_read_are_named(night: Night, text: str) -> None:
    run = night.evaluate()
    Path(run.root, "metrics.json").write_text(text)
    with pytest.raises(ContractError, match=r"metrics.json cannot be read .* evaluate run e1: remove .* rerun the job"):
        night.publish()


def test_the_scheduler_is_told(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    only_ann(night)
    path = night.root / "conf.yaml"
    path.write_text(night.config.model_dump_json(by_alias=True))
    args = ["--config", str(path), "--ds", night.ds]
    assert cli.run_job("publish", publish, args) == 4
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["status"], line["refused"], line["warnings"]) == ("refused", ["users"], [])
    assert "what is published stays" in line["error"]
    assert cli.run_job("publish", publish, [*args, "--set", "publish.require=[beats_popularity]"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"] == []


# ---- a log that stopped ------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_log_that_stopped_leaves_the_old_night(spark: SparkSession, tmp_path: Path) -> None:
    """Twenty users whose last interactions are of 19 May; three weeks later nobody was active in three days. The suite
    has the like in tests/test_score.py, by its own tables."""
    config = shop(tmp_path, score={"active_since": 3})
    for job in (prepare, train, score, publish):
        job(config, "2024-05-20")
    latest = (tmp_path / "lake/recommendations/latest.json").read_bytes()
    for job in (prepare, train, score):
        job(config, "2024-06-10")
    assert Lake(config.paths.lake).stage("2024-06-10", "score").newest().facts["users"] == 0
    with pytest.raises(
        GateRefused, match="ds 2024-06-10 is not published and what is published stays: rows: .* 0 rows"
    ):
        publish(config, "2024-06-10")
    assert (tmp_path / "lake/recommendations/latest.json").read_bytes() == latest
    assert json.loads(latest)["rows"] > 0
