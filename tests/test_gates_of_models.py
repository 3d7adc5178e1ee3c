"""The gates of the model: bad models are refused on the very tables that evaluate makes, an equal one passes, one that
is 5 % worse does not, and where the model is refused the champion may rank."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gate_power import refusals
from ncf_dist.champion import CHAMPION, champion
from ncf_dist.config import Config, Gates
from ncf_dist.errors import ExitCode, GateRefused, ScoresNotFinite
from ncf_dist.evaluate import summary
from ncf_dist.evaluate.histogram import Histogram, on_common_bins
from ncf_dist.evaluate.ranks import rank_users
from ncf_dist.evaluate.sums import Ranks, Sums, file_sums
from ncf_dist.nightly import pipeline as line
from ncf_dist.nightly import stand_in
from ncf_dist.publish.gates import Comparison, Evaluated, Figures, Segment
from ncf_dist.publish.model import active, judge
from ncf_dist.publish.pipeline import publish
from ncf_dist.stage import Outcome
from ncf_dist.stored import typed
from tests.published import Night, good
from tests.test_evaluate import dense, spec_of, users_of

USERS, ITEMS, FACTORS = 1_500, 60, 6


# ---- bad models, ranked and summed up by evaluate's own code -----------------------------------------------


@cache
def world() -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(what users like, who is judged on what, how popular items are): each user's held-out item is drawn by taste."""
    rng = np.random.default_rng(4)
    users, items = rng.normal(size=(USERS, FACTORS)), rng.normal(size=(ITEMS, FACTORS))
    popular = rng.normal(size=ITEMS)
    taste = users @ items.T + 0.5 * popular
    chances = np.exp(1.5 * taste)
    held = [int(rng.choice(ITEMS, p=row / row.sum())) for row in chances]
    rows = [{"seen": [], "held": {item: sorted({*range(20)} - {item})}} for item in held]
    return torch.tensor(taste), users_of(rows), torch.tensor(popular).expand(USERS, -1)


def report(scores: torch.Tensor) -> Figures:
    """metrics.json of a model of these scores (U, I), beside popularity and a champion that knows the taste but for a
    little noise."""
    taste, users, popular = world()
    noise = torch.from_numpy(np.random.default_rng(5).normal(size=(USERS, ITEMS)))
    scorers = {"model": scores, "popularity": popular, CHAMPION: taste + 0.3 * noise}
    histograms = {"all": Histogram(), "held_out": Histogram(), "first": Histogram()}
    tables = {
        name: rank_users(name, dense(of.float()), users, 10, histograms if name == "model" else None)
        for name, of in scorers.items()
    }
    spec = spec_of(replicates=300, segments=("activity",))
    sums = file_sums({name: Ranks.of(table) for name, table in tables.items()}, np.ones(ITEMS, np.int64), spec)
    return figures(sums, ["popularity", CHAMPION], on_common_bins(histograms, 64))


def figures(sums: Sums, others: list[str], scores: dict[str, Any]) -> Figures:
    body = {
        "ks": [5, 10],
        **summary.of_scorer(sums, "model"),
        "comparisons": summary.comparisons(sums, others),
        "segments": summary.by_segment(sums, ("activity",), spec_of().deciles) if scores else {},
        "scores": scores,
    }
    return typed(Figures, json.loads(json.dumps(body)), more_keys=True)


def refused(found: Figures, **gates: Any) -> list[str]:
    return [verdict.check for verdict in judge(Gates(**gates), Evaluated("e1", found))]


def random_scores() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(6).normal(size=(USERS, ITEMS)))


def of_other_users() -> torch.Tensor:
    """As after a training on shuffled labels: everybody is given somebody else's taste."""
    return world()[0][torch.from_numpy(np.random.default_rng(7).permutation(USERS))]


def truncated() -> torch.Tensor:
    """Of the singular vectors, which stand for its factors, most are cut off."""
    left, size, right = torch.linalg.svd(world()[0], full_matrices=False)
    return left[:, :1] * size[:1] @ right[:1]


BAD = {
    "random": random_scores,
    "constant": lambda: torch.zeros(USERS, ITEMS),
    "shuffled labels": of_other_users,
    "item map off by one": lambda: world()[0].roll(1, dims=1),
    "truncated weights": truncated,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused(name: str) -> None:
    found = report(BAD[name]())
    assert CHAMPION in refused(found)
    assert ("scores" in refused(found)) == (name == "constant")
    assert "slices" in refused(found, slices={"activity": 0.1})
    (said,) = [v.message for v in judge(Gates(), Evaluated("e1", found)) if v.check == CHAMPION]
    assert "(evaluate run e1); needed at least" in said
    assert "gates.champion = 0.02" in said


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    with pytest.raises(ScoresNotFinite, match="model gives .* not finite") as caught:
        report(torch.full((USERS, ITEMS), torch.nan))
    assert isinstance(caught.value, GateRefused)
    assert (caught.value.exit_code, caught.value.extra["refused"]) == (ExitCode.GATE_REFUSED, ["scores"])


def test_an_equal_and_a_better_model_pass() -> None:
    taste = world()[0]
    noise = torch.from_numpy(np.random.default_rng(8).normal(size=(USERS, ITEMS)))
    for scores in (taste, taste + 0.3 * noise):
        assert refused(report(scores), beats=("popularity",), slices={"activity": 0.1}) == []


# ---- the power of the comparison ---------------------------------------------------------------------------


def test_a_challenger_that_is_five_percent_worse_is_refused_and_an_equal_one_is_not() -> None:
    """By 3.3 standard errors, with 4,000 users; benchmarks/gate_power.py draws the curve."""
    assert refusals(0.05, 40) >= 36
    assert refusals(0.0, 40) <= 4


def test_the_margin_is_what_may_be_lost_however_many_users_there_are() -> None:
    row = Comparison(CHAMPION, "full", "ndcg@10", -0.003, (-0.004, -0.002), 0.001)
    found = Figures([10], [row], full={"ndcg@10": 0.197})
    assert refused(found) == [], "1.5 % of 0.2, surely worse, within the margin"
    assert refused(found, champion=0.01) == [CHAMPION]
    assert refused(found, champion=None) == []
    by_chance = replace(row, difference=-0.02, p=0.2)
    assert refused(Figures([10], [by_chance], full={"ndcg@10": 0.18})) == []


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 0.5))
def test_the_rule(difference: float, p: float, theirs: float, margin: float) -> None:
    row = Comparison(CHAMPION, "full", "ndcg@10", difference, None, p)
    found = Figures([10], [row], full={"ndcg@10": theirs + difference})
    value = theirs + difference
    assert (refused(found, champion=margin) == [CHAMPION]) == (value < (value - difference) * (1 - margin) and p < 0.1)


def test_baselines_that_are_named_may_not_be_clearly_better() -> None:
    row = Comparison("item_to_item", "full", "ndcg@10", -0.01, (-0.02, -0.005))
    assert refused(Figures([10], [row])) == []
    assert refused(Figures([10], [row]), beats=("item_to_item",)) == ["beats"]
    assert refused(Figures([10], [replace(row, interval=(-0.02, 0.0))]), beats=("item_to_item",)) == []


def test_a_segment_of_few_users_is_not_judged_by_itself() -> None:
    segment = Segment("5–19", 500, {"ndcg@10": 0.1}, {"ndcg@10": 0.2}, {"ndcg@10": (0.09, 0.11)})
    for users, wanted in ((500, ["slices"]), (199, [])):
        found = Figures([10], [], segments={"activity": [replace(segment, users=users)]})
        assert refused(found, slices={"activity": 0.1}) == wanted
        assert refused(found) == []


def test_gates_that_are_off_are_not_active() -> None:
    assert active(Gates()) == ["champion", "scores"]
    assert active(Gates(champion=None, scores=False, beats=("ease",), slices={"activity": 0.1})) == ["beats", "slices"]


# ---- a night whose model is refused ------------------------------------------------------------------------


WORSE = {
    "ks": [10],
    "comparisons": [
        {"with": "popularity", "protocol": "full", "metric": "ndcg@10", "difference": 0.1, "interval": [0.05, 0.2]},
        {"with": "champion", "protocol": "full", "metric": "ndcg@10", "difference": -0.1, "interval": [-0.2, -0.05],
         "p": 0.001},
    ],
    "full": {"ndcg@10": 0.1},
}  # fmt: skip


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """The night before is published by its model, train run t0; tonight's model, t1, is ready to be judged."""
    before, night = Night(tmp_path, "2026-01-30"), Night(tmp_path)
    for each in (before, night):
        each.prepare()
        each.evaluate(report=WORSE if each is night else None)
    renamed(before, "t0")
    before.score()
    rewritten(before, "score", "s1", "t0")
    before.publish()
    night.score()
    return night


def renamed(night: Night, key: str) -> None:
    """Its train run t1 has this key, as every night's has its own."""
    runs = Path(night.lake.root, "runs", night.ds, "train")
    (runs / "t1").rename(runs / key)
    body = json.loads((runs / key / "manifest.json").read_text())
    named = {"run_key": key, "facts": {**body["facts"], "model_version": "m0"}}
    (runs / key / "manifest.json").write_text(json.dumps({**body, **named}))


def rewritten(night: Night, stage: str, key: str, train: str) -> None:
    path = Path(night.lake.root, "runs", night.ds, stage, key, "manifest.json")
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "inputs": {**body["inputs"], "train": train}}))


def test_the_champion_is_the_model_of_the_newest_published_night_before(night: Night) -> None:
    found = champion(night.lake, "recommendations", night.ds)
    assert found is not None
    assert (found.ds, found.run_key) == ("2026-01-30", "t0")
    assert champion(night.lake, "recommendations", "2026-01-30") is None, "a night is not its own champion"
    assert champion(night.lake, "elsewhere", night.ds) is None
    path = Path(night.lake.root, "runs/2026-01-30/train/t0/manifest.json")
    path.unlink()
    assert champion(night.lake, "recommendations", night.ds) is None


def test_publish_refuses_a_model_that_is_worse_than_the_champion(night: Night) -> None:
    with pytest.raises(
        GateRefused, match=r"champion: full.ndcg@10 is 0.1000, the champion's 0.2000 \(-50.0%\)"
    ) as caught:
        publish(night.config, night.ds)
    assert "set gates.champion=null" in str(caught.value)
    assert night.read() == []
    night.sections["gates"] = {"overrides": {"champion": "a new catalogue"}}
    night.config = night.configured()
    assert night.publish() == ("done", 1)


def stages(night: Night, monkeypatch: pytest.MonkeyPatch, finite: bool = True) -> list[str]:
    """nightly's stages find what the night has; score ranks by the model that it is given."""
    begun: list[str] = []

    def stage(name: str) -> Any:
        def run(config: Config, ds: str, given: Any = None) -> Outcome:
            begun.append(name)
            if name == "evaluate" and not finite:
                raise ScoresNotFinite("model gives held-out items scores that are not finite")
            if name == "score" and given["train"].run_key == "t0":
                night.score([(*row[:4], "m0", row[5]) for row in good()], key="s2", model_version="m0")
                rewritten(night, "score", "s2", "t0")
            return Outcome("done", name, manifest=night.lake.stage(ds, name).newest())

        return run

    named = {name: stage(name) for name in line.STAGES if name != "publish"}
    monkeypatch.setattr(line, "STAGES", {**named, "publish": publish})
    monkeypatch.setattr(stand_in, "objection", lambda *_: None)
    return begun


@pytest.mark.parametrize("finite", [True, False])
def test_a_refused_model_stops_the_night_before_anybody_is_ranked(
    night: Night, monkeypatch: pytest.MonkeyPatch, finite: bool
) -> None:
    begun = stages(night, monkeypatch, finite)
    gate = "champion" if finite else "scores"
    with pytest.raises(GateRefused, match=f"is not published and what is published stays: {gate}: ") as caught:
        line.nightly(night.config, night.ds)
    assert begun == ["prepare", "train", "evaluate"]
    assert caught.value.extra["refused"] == [gate]
    kept = json.loads(Path(night.lake.root, "runs", night.ds, "gates", "t1.json").read_text())
    assert (kept["train_run"], kept["blessed"], list(kept["refused"])) == ("t1", False, [gate])


@pytest.mark.parametrize("finite", [True, False])
def test_the_champion_ranks_where_the_model_is_refused(
    night: Night, monkeypatch: pytest.MonkeyPatch, finite: bool
) -> None:
    night.sections["gates"] = {"on_refusal": "champion"}
    night.sections["publish"] = {"require": ["users", "interactions", "beats_popularity", "evaluated"]}
    night.config = night.configured()
    stages(night, monkeypatch, finite)
    gate = "champion" if finite else "scores"
    outcome = line.nightly(night.config, night.ds)
    assert {row[4] for row in night.read()} == {"m0"}, "the table says which model"
    assert night.latest()["model_version"] == outcome.extra["model_version"] == "m0"
    assert outcome.extra["model_of"] == "2026-01-30"
    assert outcome.outputs["bundle"] == f"{night.lake.stage('2026-01-30', 'train').run_path('t0')}/bundle"
    warnings = outcome.extra["warnings"]
    assert any("the model of this night is refused, and the champion of 2026-01-30 ranks" in text for text in warnings)
    assert any("ranked by the champion, train run t0 of 2026-01-30" in text for text in warnings)
    assert outcome.extra["gates"][gate]["outcome"] == "refused", "what the champion's lists pass does not hide it"
    again = line.nightly(night.config, night.ds)
    assert (again.extra["version"], again.extra["stages"]["publish"]) == (1, "already-done")


def test_publish_alone_finds_what_the_champion_ranked(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the night was killed before its publication; once nothing speaks against tonight's model it is its own."""
    night.sections["gates"] = {"on_refusal": "champion"}
    night.config = night.configured()
    stages(night, monkeypatch)
    monkeypatch.setitem(line.STAGES, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        line.nightly(night.config, night.ds)
    alone = publish(night.config, night.ds)
    assert (alone.status, alone.run_key, alone.extra["version"]) == ("done", "s2", 1)
    assert {row[4] for row in night.read()} == {"m0"}
    assert any("ranked by the champion, train run t0 of 2026-01-30" in text for text in alone.extra["warnings"])
    assert publish(night.config, night.ds).status == "already-done"
    stopping = night.config.model_copy(update={"gates": Gates()})
    with pytest.raises(GateRefused, match="champion: "):
        publish(stopping, night.ds)
    night.sections["gates"] = {"on_refusal": "champion", "champion": None}
    assert publish(night.configured(), night.ds).run_key == "s1"
    assert {row[4] for row in night.read()} == {"m1"}


def killed(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_an_experiment_is_not_judged(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = stages(night, monkeypatch)
    line.nightly(night.config.model_copy(update={"run": "trial"}), night.ds)
    assert begun == ["prepare", "train", "evaluate", "score"]
