"""Who else is told of a night: what each sink says, and that none stops a night. What needs the extra `ops` is skipped
without it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import attempts
from ncf_dist.attempts import Listeners, Record
from ncf_dist.errors import GateRefused, InputError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.nightly import pipeline
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.stage import Outcome
from tests.test_attempts import fails, made
from tests.test_cli import DS, Shell, shell
from tests.test_last_line import details

__all__ = ["shell"]  # A fixture.

OPS = "the extra ops is not installed: pip install ncf-dist[ops]"
STAGES = {name: made(name) for name in ("prepare", "train", "evaluate", "score")}
STAGES["evaluate"] = made("evaluate", model_version="mf-1")
STAGES["publish"] = made("publish", version=3, gates={"users": {"outcome": "passed"}})


@pytest.fixture
def told(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """told(settings, stages) → (exit code, details) of a night whose sinks these settings turn on."""

    def run(sections: dict[str, Any], stages: Any = STAGES) -> tuple[int, dict[str, Any]]:
        shell.conf.write_text(json.dumps({**json.loads(shell.conf.read_text()), **sections}))
        monkeypatch.setattr(pipeline, "STAGES", stages)
        for check in ("check_ahead", "check_data", "check_model"):  # What these stages claim to have made is not there.
            monkeypatch.setattr(pipeline, check, lambda *_: None)
        code, report = shell.run(nightly, job="nightly")
        return code, details(report)

    return run


# ---- Prometheus ----------------------------------------------------------------------------------------------


def samples(path: Path) -> dict[str, float]:
    """Each sample of the file, by its name and labels other than the job."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(path.read_text())
    return {
        " ".join(
            [sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "job")]
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_textfile_says_how_the_last_attempt_went(told: Any, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason=OPS)
    path = tmp_path / "folder" / "nightly.prom"
    assert told({"sinks": {"prometheus": str(tmp_path / "folder" / "{job}.prom")}})[0] == 0
    good = samples(path)
    assert good["ncf_exit_code"] == 0
    assert good["ncf_table_version"] == 3
    assert good["ncf_table_rows score rows"] == 10
    assert good["ncf_table_bytes score rows"] == 200
    assert good["ncf_metric score.figure"] == 1.5
    assert good["ncf_gate_ok users"] == good["ncf_stage_ok train"] == 1
    assert good["ncf_last_success_timestamp_seconds"] == good["ncf_last_attempt_timestamp_seconds"]
    told({}, {**STAGES, "train": fails(InputError("x"))})
    bad = samples(path)
    assert (bad["ncf_exit_code"], bad["ncf_stage_ok train"], bad["ncf_stage_ok prepare"]) == (3, 0, 1)
    assert bad["ncf_last_success_timestamp_seconds"] == good["ncf_last_success_timestamp_seconds"], "it is kept"
    assert bad["ncf_last_attempt_timestamp_seconds"] > good["ncf_last_attempt_timestamp_seconds"]


def rewrite(path: str, stop: Any) -> None:
    from ncf_dist.sinks.prometheus_sink import Textfile

    record = Record(attempt="a", job="nightly", ds=DS, began="2026-01-31T00:00:00+00:00", code=attempts.code())
    number = 0
    while not stop.is_set():
        number += 1
        metrics = {f"m{n}": float(n) for n in range(number % 200)}
        Textfile(path).ended(record.model_copy(update={"metrics": metrics, "exit_code": 0}))


def test_a_textfile_always_parses_while_it_is_rewritten(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason=OPS)
    path, context = tmp_path / "ncf.prom", multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=rewrite, args=(str(path), stop))
    writer.start()
    try:
        while not path.exists():
            assert writer.is_alive()
        sizes = Counter[int]()
        for _ in range(1000):
            found = samples(path)
            assert found["ncf_exit_code"] == 0
            sizes[len(found)] += 1
    finally:
        stop.set()
        writer.join()
    assert len(sizes) > 5, "it was rewritten meanwhile"


# ---- OpenLineage ---------------------------------------------------------------------------------------------


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lineage_names_what_each_stage_read_and_made(told: Any, tmp_path: Path) -> None:
    pytest.importorskip("openlineage.client", reason=OPS)
    path = tmp_path / "lineage.jsonl"
    told({"sinks": {"openlineage": str(path), "namespace": "shop"}})
    found = events(path)
    ended = {event["job"]["name"]: event for event in found if event["eventType"] == "COMPLETE"}
    assert ended.keys() == {"nightly", *(f"nightly.{name}" for name in STAGES)}
    assert [d["name"] for d in ended["nightly.prepare"]["inputs"]] == ["log"]
    assert [d["name"] for d in ended["nightly.publish"]["inputs"]] == ["score.rows"]
    assert [d["name"] for d in ended["nightly.publish"]["outputs"]] == ["recommendations"]
    [made_by_score] = ended["nightly.score"]["outputs"]
    assert (made_by_score["namespace"], made_by_score["name"]) == ("shop", "score.rows")
    assert made_by_score["outputFacets"]["outputStatistics"]["rowCount"] == 10
    parents = {e["run"]["facets"]["parent"]["run"]["runId"] for name, e in ended.items() if name != "nightly"}
    assert parents == {ended["nightly"]["run"]["runId"]}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["done", "refused", "failed", "killed", "killed in a stage"]), min_size=1, max_size=5))
def test_every_start_has_one_end(tmp_path_factory: pytest.TempPathFactory, ends: list[str]) -> None:
    """Complete, or fail; of what was killed the next attempt tells."""
    pytest.importorskip("openlineage.client", reason=OPS)
    from ncf_dist.sinks.openlineage_sink import Lineage

    root = tmp_path_factory.mktemp("lake")
    lake, path = Lake(str(root)), root / "events"
    listeners = Listeners({"openlineage": lambda: Lineage(str(path), "n", ("log",), "recommendations")})
    for end in [*ends, "done"]:
        attempt = attempts._begin(lake, DS, "nightly", None, listeners)
        with attempt.stage("prepare") as stage:
            stage.status = "done"
        if end == "killed in a stage":
            attempt.stage("train").__enter__()
        elif end == "done":
            attempt.ended(Outcome("done"))
        elif end != "killed":
            error = GateRefused("worse") if end == "refused" else InputError("no log")
            attempt.failed(error.exit_code, error)
    assert listeners.warnings == []
    found = events(path)
    starts = Counter(event["run"]["runId"] for event in found if event["eventType"] == "START")
    completed = Counter(event["run"]["runId"] for event in found if event["eventType"] == "COMPLETE")
    failed = Counter(event["run"]["runId"] for event in found if event["eventType"] == "FAIL")
    assert starts == completed + failed
    assert set(starts.values()) == {1}
    assert len(failed) == sum({"done": 0, "killed in a stage": 2}.get(end, 1) for end in ends)


# ---- MLflow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["tonight's", "its refit", "an earlier night's"])
def test_a_published_model_is_the_registered_champion(
    ranks: str, told: Any, shell: Shell, tmp_path: Path, monkeypatch: Any
) -> None:
    """ranks: whose bundle the readers' lists are of; tonight's stage train made `train-key` in any case."""
    pytest.importorskip("mlflow", reason=OPS)
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # Where MLflow puts its artifacts.
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    lake = Lake(str(shell.lake))
    for night, key in ((DS, "train-key"), (DS, "refit-key"), ("2026-01-30", "old-key")):
        stage = lake.stage(night, "train")
        bundle = Path(stage.begin(key), "bundle", "bundle.json")
        bundle.parent.mkdir()
        bundle.write_text(json.dumps({"of": key}))
        root = stage.run_path(key)
        stage.finish(Manifest(stage="train", ds=night, run_key=key, root=root, config={}, inputs={}))
    report_file = shell.lake / "runs" / DS / "evaluate/evaluate-key/report.html"
    report_file.parent.mkdir(parents=True)
    report_file.write_text("<p>")
    evaluated, scored = made("evaluate"), made("score", model_version="m1")
    keys = {
        "tonight's": {"train": "train-key"},
        "its refit": {"train": "train-key", "refit": "refit-key"},
        "an earlier night's": {"train": "old-key"},
    }

    def with_metrics(*given: Any) -> Outcome:
        found = evaluated(*given)
        return Outcome(found.status, found.run_key, {}, {"full.hr@10": 0.25}, {"model_version": "m0"}, found.manifest)

    def ranked(*given: Any) -> Outcome:
        found = scored(*given)
        assert found.manifest is not None
        return dataclasses.replace(found, manifest=dataclasses.replace(found.manifest, inputs=keys[ranks]))

    stages = {**STAGES, "refit": made("refit"), "evaluate": with_metrics, "score": ranked}
    code, report = told({"tracking": {"uri": uri}, "train": {"refit": ranks == "its refit"}}, stages)
    assert (code, report["warnings"]) == (0, [])
    client = MlflowClient(uri)
    champion = client.get_model_version_by_alias("ncf-dist", "champion")
    assert champion.tags == {"ds": DS, "model_version": "m1"}
    assert champion.run_id is not None
    run = client.get_run(champion.run_id)
    assert run.data.metrics["full.hr_at_10"] == 0.25
    assert run.data.params["model.name"] == "neumf"
    assert run.info.status == "FINISHED"
    names = {file.path for folder in ("bundle", "report") for file in client.list_artifacts(champion.run_id, folder)}
    assert names == {"bundle/bundle.json", "report/report.html"}
    copy = client.download_artifacts(champion.run_id, "bundle/bundle.json", str(tmp_path))
    assert json.loads(Path(copy).read_text()) == {"of": keys[ranks].get("refit", keys[ranks]["train"])}
    told({"tracking": {"uri": uri}}, {"prepare": fails(InputError("no log"))})
    assert client.get_model_version_by_alias("ncf-dist", "champion").version == champion.version
    statuses = Counter(run.info.status for run in client.search_runs(["1"]))
    assert statuses == {"FINISHED": 1, "FAILED": 1}


# ---- none stops a night --------------------------------------------------------------------------------------


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("module", "sections"),
    [
        ("prometheus_client", {"sinks": {"prometheus": "/proc/ncf.prom"}}),
        ("openlineage.client", {"sinks": {"openlineage": "/proc/events"}}),
        ("openlineage.client", {"sinks": {"openlineage": NOBODY}}),
        ("mlflow", {"tracking": {"uri": NOBODY}}),
        ("mlflow", {"tracking": {"uri": "nonsense://x"}}),
    ],
)
def test_a_dead_sink_is_a_warning(told: Any, shell: Shell, module: str, sections: dict[str, Any]) -> None:
    pytest.importorskip(module, reason=OPS)
    code, report = told(sections)
    assert (code, report["status"]) == (0, "done")
    [warning] = report["warnings"]
    assert "is told no more of this attempt (" in warning
    assert attempts.read(Lake(str(shell.lake)), DS)[-1].warnings == [warning]
    code, report = told(sections, {"prepare": fails(InputError("no log"))})
    assert code == 3, "nor does it hide what was wrong"
    assert "no log" in report["error"]


@pytest.mark.parametrize(
    ("module", "sections"),
    [
        ("prometheus_client", {"sinks": {"prometheus": "x.prom"}}),
        ("openlineage", {"sinks": {"openlineage": "events"}}),
        ("mlflow", {"tracking": {"uri": "sqlite:///x.db"}}),
    ],
)
def test_a_package_that_is_missing_is_named(
    told: Any, module: str, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, report = told(sections)
    assert code == 0
    assert "install the extra ops of ncf-dist" in report["warnings"][0]


def test_what_is_off_imports_nothing(told: Any) -> None:
    heavy = {"prometheus_client", "openlineage", "mlflow"}
    before = heavy & set(sys.modules)
    assert told({})[0] == 0
    assert heavy & set(sys.modules) == before


def test_secrets_and_places_stay_out_of_warnings(told: Any) -> None:
    pytest.importorskip("openlineage.client", reason=OPS)
    _, report = told({"sinks": {"openlineage": "http://me:hunter22@127.0.0.1:9/x?token=abcdef"}})
    assert "hunter22" not in json.dumps(report)
    assert "abcdef" not in json.dumps(report)
