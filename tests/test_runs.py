"""The job runs: the models of a night beside one another, with what they were judged by and made with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncf_dist import cli
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo
from ncf_dist.refits import name_of
from ncf_dist.runs.leaderboard import Entry, leaderboard, text_table
from ncf_dist.stage import stored
from tests.published import Night

DS = "2026-01-31"


class Experiments:
    """Runs of one night without tables."""

    def __init__(self, root: Path) -> None:
        self.night = Night(root, DS)
        self.lake = self.night.lake

    def run(self, stage: str, key: str, inputs: dict[str, Any], seconds: float, name: str | None = None, **fields: Any):
        runs = self.lake.stage(DS, stage)
        root = runs.begin(key)
        config = fields.pop("config", stored(stage, self.night.config))
        made = Manifest(stage=stage, ds=DS, run_key=key, root=root, config=config, inputs=inputs, seconds=seconds)
        return runs.finish(dataclasses.replace(made, name=name, **fields))

    def model(self, key: str, name: str | None = None, prepare: str = "p1", **train: Any) -> None:
        settings = stored("train", self.night.config)
        config = {**settings, "train": {**settings["train"], **train}}
        facts = {"model_version": f"mf-{key}"}
        seen = {"validation.ndcg@10": 0.3}
        self.run("train", key, {"prepare": prepare}, 60.0, name, config=config, facts=facts, metrics=seen)

    def judged(
        self, key: str, value: float, name: str | None = None, rows: str = "same", interval: bool = True
    ) -> None:
        """An evaluation of train run `key`, as evaluate writes it."""
        row = {"with": "popularity", "protocol": "full", "metric": "ndcg@10", "difference": value - 0.1, "p": 0.01}
        row["interval"] = [value - 0.12, value - 0.08] if interval else None
        report: dict[str, Any] = {"ks": [5, 10, 20], "comparisons": [{**row, "metric": "hr@10"}, row]}
        if interval:
            report["intervals"] = {"full": {"ndcg@10": [value - 0.01, value + 0.01]}}
        figures = {"full.ndcg@10": value, "full.hr@10": 2 * value}
        run = self.run(
            "evaluate", f"e-{key}", {"train": key, "prepare": "p1"}, 9.0, name,
            metrics=figures, facts={"judged_on": {"test": rows}}, tables={"ranks": TableInfo("ranks", "f", ())},
        )  # fmt: skip
        Path(run.root, "metrics.json").write_text(json.dumps(report))


@pytest.fixture
def night(tmp_path: Path) -> Experiments:
    night = Experiments(tmp_path)
    night.run("prepare", "p1", {}, 30.0)
    night.model("usual")
    night.judged("usual", 0.2)
    night.model("fast", "fast", lr=0.01, epochs=3)
    night.judged("fast", 0.15, "fast")
    night.model("wide", "wide", epochs=50)
    night.judged("wide", 0.25, "wide", interval=False)
    night.model("waiting", "not-judged", lr=0.5)
    return night


def test_models_are_listed_best_first_with_what_they_differ_in(night: Experiments) -> None:
    found = leaderboard(night.lake, DS)
    assert [entry.name for entry in found] == ["wide", None, "fast", "not-judged"]
    assert [entry.value for entry in found] == [0.25, 0.2, 0.15, None]
    assert [entry.settings for entry in found] == [
        *({"train.epochs": 50}, {}, {"train.epochs": 3, "train.lr": 0.01}, {"train.lr": 0.5})
    ]
    usual = found[1]
    assert usual.interval == pytest.approx((0.19, 0.21))
    assert usual.above_popularity == pytest.approx(0.1)
    assert usual.above_interval == pytest.approx((0.08, 0.12))
    assert (usual.metric, usual.hit_rate, usual.validation) == ("full.ndcg@10", 0.4, 0.3)
    assert found[3].validation == 0.3, "though it was not judged"
    assert usual.seconds == {"prepare": 30.0, "train": 60.0, "evaluate": 9.0}
    assert found[0].interval is None


def test_a_setting_of_production_that_an_experiment_leaves_at_its_default_is_a_difference(tmp_path: Path) -> None:
    night = Experiments(tmp_path)
    night.run("prepare", "p1", {}, 1.0)
    night.model("usual", lr=0.3)
    night.model("plain", "plain")
    (plain,) = (entry for entry in leaderboard(night.lake, DS) if entry.name)
    assert plain.settings == {"train.lr": None}
    assert "train.lr=its default" in text_table([plain])


def test_models_that_were_judged_on_other_rows_are_marked(night: Experiments) -> None:
    night.model("other", "other")
    night.judged("other", 0.9, "other", rows="others")
    found = leaderboard(night.lake, DS)
    assert [entry.comparable for entry in found][:3] == [True, False, False], "the first one is the measure"
    lines = text_table(found).splitlines()
    assert "~0.2500" in lines[2]
    assert lines[-1] == "~ judged on other rows than the first: not to be compared with it"


def test_the_table_has_a_line_a_model(night: Experiments) -> None:
    head, *lines = text_table(leaderboard(night.lake, DS)).splitlines()
    assert "NDCG@10" in head
    words = "production mf-usual 0.2000 0.1900–0.2100 +0.1000 0.0800–0.1200 0.4000 0.3000 1 min 39 s"
    assert lines[1].split() == words.split()
    assert lines[2].endswith("train.epochs=3, train.lr=0.01")
    assert len(lines) == 4


def test_a_refit_is_listed_as_that_of_the_run_that_was_judged(night: Experiments) -> None:
    """Of production's and of an experiment's; an experiment whose name only looks like one is none."""
    refits = {"usual": "again", "wide": "wider"}
    for key, its in refits.items():
        night.model(its, name_of(night.lake.stage(DS, "train").load(key)), stop_after=2)
    night.model("other", "refit-of-nothing")
    found = leaderboard(night.lake, DS)
    assert {entry.train: entry.refit_of for entry in found if entry.refit_of} == {"again": "usual", "wider": "wide"}
    lines = {line.split("  ")[0]: line for line in text_table(found).splitlines()}
    assert {"refit of mf-usual", "refit of mf-wide", "refit-of-nothing"} <= lines.keys()
    assert "mf-again" in lines["refit of mf-usual"]
    assert lines["refit of mf-usual"].endswith("train.stop_after=2"), "and by what it differs"


def test_damaged_figures_hide_no_model(night: Experiments) -> None:
    run = night.lake.stage(DS, "evaluate").load("e-fast")
    Path(run.root, "metrics.json").write_text("{")
    found = {entry.name: entry for entry in leaderboard(night.lake, DS)}
    assert found["fast"].value is None
    assert found["wide"].value == 0.25


def test_the_job_prints_a_table_or_json(night: Experiments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"paths": {"lake": night.lake.root}, "input": {"path": "x"}}))
    command = ["runs", "--config", str(config), "--ds", DS]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "not-judged" in err
    last = json.loads(out)
    assert (last["best"], last["model_version"], last["metrics"]["full.ndcg@10"]) == ("wide", "mf-wide", 0.25)
    assert cli.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[0])
    assert [run["name"] for run in shown["runs"]] == ["wide", None, "fast", "not-judged"]
    assert set(shown["runs"][0]) == {field.name for field in dataclasses.fields(Entry)}
    assert cli.main(["runs", "--config", str(config), "--ds", "2026-02-01"]) == 0
    assert "has no finished model of 2026-02-01" in capsys.readouterr().err
