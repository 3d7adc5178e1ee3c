"""Which finished runs a stage builds on: laws over random histories, and the messages where there is none."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ncf_dist import files, lake
from ncf_dist.config import Config
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.stage import LINE, StageRun, decisive, find_upstream, production_runs, stored

DS = "2026-01-31"


def config(lake: str = "unused", **sections: Any) -> Config:
    return Config.model_validate({"paths": {"lake": lake}, "input": {"path": "log"}, **sections})


@dataclass
class Line:
    """Stages that make nothing but their manifest."""

    lake: str = field(default_factory=lambda: f"memory://{uuid.uuid4().hex}")

    def run(self, stage: str, ds: str = DS, **sections: Any) -> Manifest:
        chosen = config(self.lake, **sections)
        upstream = find_upstream(Lake(self.lake), chosen, ds, stage) if LINE[stage].builds_on else {}
        inputs = {name: run.run_key for name, run in upstream.items()}
        life = StageRun(stage, chosen, ds, inputs)
        if done := life.find():
            return done
        life.begin()
        return life.finish()

    def upstream(self, stage: str, ds: str = DS, **sections: Any) -> dict[str, Manifest]:
        return find_upstream(Lake(self.lake), config(self.lake, **sections), ds, stage)


def test_an_experiment_never_becomes_what_production_publishes() -> None:
    """The fault this rule was made for: `train --set model.name=mf`, then `score` and `publish` with the unchanged
    config, published the mf."""
    line = Line()
    line.run("prepare")
    neumf = line.run("train")
    score = line.run("score")
    mf = line.run("train", model={"name": "mf"})
    trial = line.run("train", model={"name": "mf"}, run="trial")
    assert len({neumf.run_key, mf.run_key, trial.run_key}) == 3, "a name makes a run of its own"
    assert line.upstream("score")["train"] == neumf
    assert line.upstream("publish") == {"score": score, "train": neumf, "prepare": line.upstream("train")["prepare"]}
    assert line.upstream("score", model={"name": "mf"})["train"] == mf
    assert line.upstream("score", model={"name": "mf"}, run="trial")["train"] == trial
    assert line.upstream("score", run="another")["train"] == neumf, "it may build on production's runs"


def test_what_does_not_decide_the_bytes_does_not_part_the_line() -> None:
    line = Line()
    line.run("prepare")
    trained = line.run("train", train={"ranks": 2, "timeout_s": 60}, loader={"cache": "host"})
    assert line.upstream("score", train={"ranks": 4}, spark={"shuffle_partitions": 3})["train"] == trained


def test_negatives_that_are_not_read_do_not_part_the_line() -> None:
    line = Line()
    prepared = line.run("prepare", negatives={"per_positive": 2})
    online: dict[str, Any] = {"negatives": {"per_positive": 5}, "train": {"negatives": "online"}}
    assert line.upstream("train", **online)["prepare"] == prepared
    assert line.upstream("train", train={"loss": "sampled_softmax"})["prepare"] == prepared
    with pytest.raises(ContractError, match="negatives.per_positive=2, this config says its default"):
        line.upstream("train")
    with pytest.raises(ContractError, match="negatives.alpha=its default, this config says 0.5"):
        line.upstream("train", negatives={"alpha": 0.5}, train={"loss": "sampled_softmax"})


def test_a_log_that_grew_or_a_newer_version_does_not_break_the_line() -> None:
    """Neither the files of the input nor our version are asked, and a stored config that lacks a setting, as an older
    version wrote it, has it at its default."""
    line = Line()
    run = line.run("prepare")
    path = f"{run.root}/manifest.json"
    body = json.loads(files.read_bytes(path))
    body["inputs"], body["version"] = {"interactions": "other files"}, "0.0.1"
    body["config"]["split"].pop("min_interactions")
    body["config"]["layout"].pop("min_files")
    files.write_bytes(path, json.dumps(body).encode())
    assert line.upstream("train")["prepare"].run_key == run.run_key


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({}, {}, f"runs/{DS}/prepare has no finished run; needed the output of prepare .* run the job prepare first"),
        (
            {"prepare": {}},
            {"split": {"min_interactions": 7}},
            "the newest run of prepare, was made with split.min_interactions=its default, this config says 7; ",
        ),
        (
            {"prepare": {"input": {"path": "log", "columns": {"user": "u"}}}},
            {},
            "newest run of prepare, was made with input.columns.user='u', this config says its default; needed a run",
        ),
        ({"prepare": {}}, {}, "/train has no finished run; needed the output of train"),
        (
            {"prepare": {}, "train": {}},
            {"model": {"name": "mf"}},
            "was made with model.name=its default, this config says 'mf'; .*: rerun the job train",
        ),
    ],
)
def test_the_first_setting_that_differs_is_named(made: dict[str, Any], asked: Any, message: str) -> None:
    line = Line()
    for stage, sections in made.items():
        line.run(stage, **sections)
    with pytest.raises(ContractError, match=message):
        line.upstream("score", **asked)


def test_a_run_whose_own_upstream_does_not_fit_is_refused() -> None:
    line = Line()
    line.run("prepare", split={"min_interactions": 7})
    line.run("train", split={"min_interactions": 7})
    line.run("prepare")
    with pytest.raises(ContractError, match="the newest run of train, was made from runs .*: rerun the job train"):
        line.upstream("score")


def test_nightly_hands_on_what_it_made_and_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    made = {stage: line.run(stage) for stage in ("prepare", "train", "score")}
    monkeypatch.setattr(lake.StageRuns, "finished", lambda self: pytest.fail("a look-up"))
    for stage, rule in LINE.items():
        if rule.builds_on:
            found = find_upstream(Lake(line.lake), config(line.lake), DS, stage, made)
            assert found == {name: made[name] for name in rule.builds_on}


def test_production_runs_leave_experiments_out_and_go_back_in_time() -> None:
    line = Line()
    nights = {ds: line.run("prepare", ds) for ds in ("2026-01-02", "2026-01-01", "2026-01-04")}
    line.run("prepare", "2026-01-03", run="trial")
    assert list(production_runs(Lake(line.lake), "prepare")) == [nights[ds] for ds in sorted(nights, reverse=True)]
    assert list(production_runs(Lake(line.lake), "prepare", before="2026-01-02")) == [nights["2026-01-01"]]


CHOICES: dict[str, list[dict[str, Any]]] = {
    "prepare": [{}, {"split": {"min_interactions": 7}}],
    "train": [{}, {"model": {"factors": 3}}, {"train": {"lr": 0.5}}],
    "score": [{}, {"score": {"k": 3}}],
}
chosen = st.fixed_dictionaries({stage: st.sampled_from(choices) for stage, choices in CHOICES.items()})
names = st.sampled_from([None, None, "a", "b"])


def tree(choice: dict[str, dict[str, Any]], name: str | None) -> dict[str, Any]:
    merged = {section: values for stage in choice.values() for section, values in stage.items()}
    return {**merged, **({"run": name} if name else {})}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["prepare", "train", "score"]), chosen, names), max_size=14), chosen, names)
def test_what_is_found_is_the_newest_run_of_this_configs_own_line(
    history: list[tuple[str, dict[str, Any], str | None]], asked: dict[str, Any], name: str | None
) -> None:
    """Against a model: a list of (stage, settings of its line, name), in order of their end."""
    line, ended = Line(), dict[tuple[str, str], Manifest]()
    for stage, choice, run_name in history:
        try:
            made = line.run(stage, **tree(choice, run_name))
        except ContractError:
            continue
        ended.setdefault((stage, made.run_key), made)

    def own(run: Manifest) -> bool:
        """Whether the run and all that it was made from are of the settings asked for, and of a name that may be."""
        wanted = config(line.lake, **tree(asked, name))
        parents = [ended[stage, str(run.inputs[stage])] for stage in LINE[run.stage].builds_on]
        return (
            run.name in (None, name)
            and decisive(run.stage, stored(run.stage, wanted)) == decisive(run.stage, run.config)
            and all(own(parent) for parent in parents)
        )

    for stage in ("train", "score", "publish"):
        nearest = LINE[stage].builds_on[0]
        fitting = [run for run in ended.values() if run.stage == nearest and own(run)]
        expected = [run for run in fitting if run.name == name] or fitting
        try:
            found = line.upstream(stage, **tree(asked, name))
        except ContractError:
            assert not expected
        else:
            assert found[nearest] == expected[-1]
            for above in LINE[nearest].builds_on:
                assert found[above].run_key == found[nearest].inputs[above]


def test_every_setting_that_is_passive_exists() -> None:
    whole = config().model_dump()
    for rule in LINE.values():
        assert set(rule.sections) <= set(Config.model_fields)
        for section, keys in rule.passive.items():
            assert keys <= set(whole[section])
