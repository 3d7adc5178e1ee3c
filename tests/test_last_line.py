"""The last line of stdout: under 1 kB and JSON whatever a job has to say, and a file beside it that has all of it."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ncf_dist import last_line
from ncf_dist.config import Config
from ncf_dist.errors import GateRefused, InputError
from ncf_dist.manifests import Manifest
from ncf_dist.nightly import pipeline
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.stage import Outcome
from tests.published import Night
from tests.test_cli import DS, ROOT, Report, Shell, done, raises, shell

__all__ = ["shell"]  # A fixture.

ALWAYS = {"job", "ds", "run_key", "status", "outputs", "metrics", "details", "seconds"}
BASE: Report = {"job": "nightly", "ds": DS, "run_key": None, "status": "done", "outputs": {}, "metrics": {}}
BASE |= {"seconds": 1234.567, "details": None}

words = st.text(max_size=40) | st.text(min_size=200, max_size=3000) | st.sampled_from(["Ü" * 400, "\ud800", "👍" * 999])
numbers = st.integers() | st.floats() | st.booleans() | st.none()
trees = st.recursive(
    words | numbers,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(words, inner, max_size=5),
    max_leaves=20,
)
reports = st.fixed_dictionaries(
    {
        "job": st.sampled_from(["nightly", "evaluate"]),
        "ds": st.none() | st.just(DS),
        "run_key": st.none() | words,
        "status": st.sampled_from(["done", "already-done", "refused", "failed"]),
        "outputs": st.dictionaries(words, words, max_size=30),
        "metrics": st.dictionaries(words, numbers | trees, max_size=60),
        "seconds": st.floats(0, 1e7),
        "details": st.none() | words,
    },
    optional={
        "error": words,
        "traceback": words,
        "warnings": st.lists(words, max_size=40),
        "runs": st.dictionaries(words, words, max_size=6),
        "lake": words,
        "rows": st.dictionaries(words, st.integers() | st.dictionaries(words, st.integers(), max_size=20), max_size=5),
        "version": st.integers(),
        "model_version": words,
        "checks": trees,
        "Ü" * 100: trees,
    },
)


@given(reports)
@example({**BASE, "error": "e" * 100_000, "warnings": ["w" * 10_000] * 1000})
@example({**BASE, "metrics": {"": math.nan, "x": math.inf}, "lake": "/l" * 300, "details": "/l" * 300 + "/d"})
@example({**BASE, "metrics": {"x": 1.7976931348623157e308}})
@settings(max_examples=500, deadline=None)
def test_whatever_a_job_says_the_line_is_short_and_parses(report: Report) -> None:
    text = last_line.line(report)
    assert len(text.encode()) < 1000
    assert "\n" not in text

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(text, parse_constant=no_constant)
    assert found.keys() >= ALWAYS
    assert (found["job"], found["ds"], found["status"]) == (report["job"], report["ds"], report["status"])
    if "error" in report:
        assert 0 < len(found["error"] or "-") <= 300 or not report["error"].strip()
    for name, path in found["outputs"].items():
        assert report["outputs"][name] == path, "a path is there whole or not at all"


def night(lake: str, **more: Any) -> Report:
    """A night of ordinary size."""
    stages = ("prepare", "train", "evaluate", "score")
    runs = {stage: f"{lake}/runs/{DS}/{stage}/3f02db1970705726" for stage in stages}
    metrics = {f"{kind}@{k}": 0.123456789 for kind in ("full.hr", "full.ndcg", "full.map") for k in (5, 10, 20)}
    metrics |= {f"{who}.{name}": 0.03 for who in ("popularity", "ease", "als") for name in list(metrics)}
    tables = ("train", "validation", "test", "history", "interactions", "user_index", "quarantine", "item_stats")
    outputs = {name: f"{runs['prepare']}/{name}" for name in tables}
    return {
        **BASE,
        "run_key": "3f02db1970705726",
        "lake": lake,
        "details": f"{lake}/runs/{DS}/jobs/20260201T020304-nightly-123456.json",
        "outputs": {**outputs, "recommendations": f"{lake}/recommendations"},
        "metrics": {"validation.ndcg@10": 0.2, "train.samples_per_s": 1958000.123, **metrics},
        "rows": {"input": 1000209, "accepted": 1000000, "duplicates": 200, "quarantined": {"a rating is missing": 9}},
        "version": 17,
        "model_version": "neumf-283a6d53dd11",
        "runs": runs,
        "stages": dict.fromkeys([*stages, "publish"], "done"),
        **more,
    }


@pytest.mark.parametrize("lake", ["/data/lake", "s3://bucket/team/recommendations/lake", "/home/Müller/" + "x" * 50])
def test_a_night_says_what_a_scheduler_needs(lake: str) -> None:
    whole = night(lake, warnings=["users: nothing is published to compare with, so this was not checked"])
    found = json.loads(last_line.line(whole))
    for key in ("rows", "version", "model_version", "warnings", "run_key", "lake"):
        assert found[key] == whole[key]
    assert found["outputs"] == {"recommendations": f"{lake}/recommendations"}, "not one a table"
    assert {name: f"{lake}/{path}" for name, path in found["runs"].items()} == whole["runs"]
    assert f"{lake}/{found['details']}" == whole["details"]
    assert list(found["metrics"])[:4] == [
        "full.ndcg@10",
        "popularity.full.ndcg@10",
        "full.hr@10",
        "popularity.full.hr@10",
    ]
    assert found["metrics"]["full.ndcg@10"] == 0.12346


def test_a_long_error_keeps_its_beginning_and_its_remedy() -> None:
    error = "ratings.dat has 7 bad rows" + ", and another" * 100 + "; needed fewer: raise input.max_bad_fraction"
    found = json.loads(last_line.line({**BASE, "error": error}))["error"]
    assert len(found) == 300
    assert found.startswith("ratings.dat has 7 bad rows")
    assert found.endswith("needed fewer: raise input.max_bad_fraction")


def test_many_warnings_are_counted() -> None:
    found = json.loads(last_line.line({**BASE, "warnings": [f"warning {n}: " + "w" * 90 for n in range(9)]}))
    assert found["warnings"][0].startswith("warning 0: ")
    assert int(found["warnings"][-1].removesuffix(" more")) == 10 - len(found["warnings"])


# ---- the file -----------------------------------------------------------------------------------------------


def details(report: Report) -> Report:
    """What the file that a line names holds."""
    path = os.path.join(report.get("lake", ""), report["details"])
    return dict(json.loads(Path(path).read_text()))


def long_winded(config: Config, ds: str) -> Outcome:
    outputs = {f"table{n}": f"/somewhere/{n}" for n in range(100)}
    return Outcome(
        "done", "k1", outputs, {"full.hr@10": 1 / 3}, {"warnings": ["w" * 900] * 3, "intervals": {"a": [1, 2]}}
    )


def test_the_file_has_all_that_a_job_said(shell: Shell) -> None:
    code, report = shell.run(long_winded)
    assert code == 0
    found = details(report)
    assert len(found["outputs"]) == 100
    assert found["metrics"] == {"full.hr@10": 1 / 3}
    assert found["warnings"] == ["w" * 900] * 3
    assert found["intervals"] == {"a": [1, 2]}
    assert found["command"][:2] == ["prepare", "--config"]
    assert (found["exit_code"], found["seconds"]) == (0, report["seconds"])
    assert report["details"].startswith(f"runs/{DS}/jobs/")
    assert last_line.read(json.dumps(report)) == found


@pytest.mark.parametrize("error", [InputError("é" * 5000, rows={"input": 7}), KeyError("ü" * 5000)])
def test_the_file_has_the_whole_error_and_where_it_was_raised(
    shell: Shell, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    code, report = shell.run(raises(error))
    found = details(report)
    assert str(error) in found["error"]
    assert len(report["error"]) <= 300
    assert "in job\n    raise error" in found["traceback"]
    assert found["exit_code"] == code
    assert any(str(error) in record.getMessage() + str(record.exc_text) for record in caplog.records), "stderr has it"


def test_each_attempt_has_a_file_of_its_own_in_its_own_night(shell: Shell) -> None:
    for more in ([], ["--ds", "2026-02-01"]):
        assert shell.run(done, *more)[0] == 0
    assert len(list(shell.lake.glob("runs/*/jobs/*-prepare-*.json"))) == 2
    assert shell.run(done, job="doctor")[0] == 0
    assert len(list(shell.work.glob("jobs/*-doctor-*.json"))) == 1, "it makes nothing in the lake"


def test_where_the_lake_cannot_be_written_the_work_folder_has_it(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, report = shell.run(done, "--set", f"paths.lake={tmp_path}/file")
    assert code == 3
    assert Path(report["details"]).parent == shell.work / "jobs"
    assert details(report)["error"] == report["error"]


def test_where_nothing_can_be_written_the_log_has_it(
    shell: Shell, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    places = [f"paths.lake={tmp_path}/file", f"paths.work={tmp_path}/file"]
    with caplog.at_level(logging.WARNING):
        code, report = shell.run(long_winded, *(word for place in places for word in ("--set", place)), job="fetch")
    assert (code, report["status"], report["details"]) == (0, "done", None)
    said = next(r.getMessage() for r in caplog.records if "is in no file, so here it is: " in r.getMessage())
    assert len(json.loads(said.partition("here it is: ")[2])["outputs"]) == 100


def test_without_a_config_nothing_is_written(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, report = shell.run(done, "--set", "train.epoch=3")
    assert (code, report["details"]) == (2, None)
    assert list(tmp_path.rglob("*.json")) == []


def test_secrets_are_not_in_the_file(shell: Shell) -> None:
    url = "http://user:hunter22@host/log?token=abcdef"
    code, report = shell.run(raises(InputError(f"{url} cannot be read")), "--set", f"input.path={url}")
    assert code == 3
    text = json.dumps(details(report))
    assert "hunter22" not in text
    assert "abcdef" not in text


# ---- nightly ------------------------------------------------------------------------------------------------


def test_a_night_that_fails_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(config: Config, ds: str, given: Any = None) -> Outcome:
        run = Manifest(stage="prepare", ds=ds, run_key="p1", root="/lake/p1", config={}, inputs={})
        return Outcome.of(run, warnings=["prepare warns"], rows={"input": 7})

    def refused(config: Config, ds: str, given: Any = None) -> Outcome:
        raise GateRefused("not good enough", warnings=["publish warns"], refused=["users"])

    monkeypatch.setattr(pipeline, "STAGES", {"prepare": prepared, "publish": refused})
    with pytest.raises(GateRefused) as caught:
        nightly(Night(tmp_path).config, DS)
    assert caught.value.extra["stages"] == {"prepare": "done", "publish": "refused"}
    assert caught.value.extra["warnings"] == ["prepare warns", "publish warns"]
    assert caught.value.extra["runs"] == {"prepare": "/lake/p1"}
    assert (caught.value.extra["rows"], caught.value.extra["refused"]) == ({"input": 7}, ["users"])


def test_the_runs_of_a_night_are_named_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(name: str) -> Any:
        run = Manifest(stage=name, ds=DS, run_key="k", root=f"/lake/{name}", config={}, inputs={})
        return lambda config, ds, given=None: Outcome.of(run)

    monkeypatch.setattr(pipeline, "STAGES", {name: stage(name) for name in ("prepare", "train")})
    assert nightly(Night(tmp_path).config, DS).runs == {"prepare": "/lake/prepare", "train": "/lake/train"}


def test_the_launchers_own_line_has_the_same_keys() -> None:
    text = (ROOT / "spark-submit.sh").read_text()
    assert all(f'"{key}":' in text for key in ALWAYS)
