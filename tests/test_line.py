"""The whole line through the real launcher:
`./spark-submit.sh JOB …` as a scheduler calls it, and what it says when something is wrong. Its night runs as a person
may see it, on a terminal and in a place that is odd in every way at once; what README and docs/ say one can do with
what a night has made is tried on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pyarrow.dataset as ds
import pytest
import yaml
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from ncf_dist import demo, last_line
from ncf_dist.config import load_config
from tests.snippets import Block, check, documented, spark_in
from tests.terminal import Terminal, gate

ROOT = Path(__file__).parent.parent
DS = "2026-01-02"
ODD_HOST = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
"""A machine of a name that nothing resolves."""
K = 5
USERS, ITEMS, TASTES = 60, 30, 3


def checkerboard() -> list[str]:
    """User u likes the items of taste u mod 3, all but one of them: the best unseen item is that one.

    Each user has the 9 of 10 items in an order of their own, so the held-out ones differ from user to user.
    """
    lines = []
    for user in range(USERS):
        liked = [item for item in range(ITEMS) if item % TASTES == user % TASTES]
        turn = user // TASTES % len(liked)
        for second, item in enumerate((liked[turn:] + liked[:turn])[:-1]):
            lines.append(f"{user + 1}::{item + 1}::5::{1_000_000 + second}")
    return lines


LAUNCHER, CONSOLE = str(ROOT / "spark-submit.sh"), str(ROOT / ".venv/bin/ncf-dist")


def run(config: Path, job: str, *args: str, program: str = LAUNCHER) -> tuple[int, dict[str, Any], str]:
    """(exit code, all that the job said by its last line of stdout, stderr)"""
    command = [program, job, "--config", str(config), *args]
    done = subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
    assert len(lines[-1]) < 1000
    return done.returncode, last_line.read(lines[-1]), done.stderr


def read(published: dict[str, Any]) -> pd.DataFrame:
    """The table as a consumer reads it, through the Delta log."""
    uris = DeltaTable(published["outputs"]["recommendations"]).file_uris()  # Of a local table quoted, without a scheme.
    return pd.concat([pd.read_parquet(unquote(uri)) for uri in uris])


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("spark-submit.sh needs .venv; run make install")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file beside its log, in a folder with a space, an umlaut and modules of Python's and ours, which neither
    driver nor Spark's workers nor ranks must take."""
    folder = tmp_path_factory.mktemp("line") / "Übung lake"
    for module in ("random.py", "psutil.py", "ncf_dist/__init__.py"):
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_text("raise SystemExit('taken from the working folder')\n")
    (folder / "ratings.dat").write_text("\n".join(checkerboard()) + "\n")
    tree = {
        "paths": {"lake": "lake/demo", "work": "wörk"},
        "input": {"path": "ratings.dat"},
        "negatives": {"draws": 2, "candidates": 10},
        "model": {"name": "gmf", "factors": 8},
        "train": {"ranks": 2, "batch_size": 32, "lr": 0.05, "epochs": 15, "patience": 15},
        "evaluate": {"ks": [1, 5, 10]},
        "score": {"k": K, "tasks": 2},
        "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return path


@dataclass(frozen=True)
class Seen:
    """What a night left: its folder, exit code, the last line of stdout, and what was on the terminal."""

    folder: Path
    code: int
    line: str
    screen: str


@pytest.fixture(scope="module")
def night(config: Path) -> Seen:
    """nightly on a terminal, in a POSIX locale, on a host whose name does not resolve."""
    python, opened = gate(config.parent.parent)
    host = ODD_HOST if subprocess.run([*ODD_HOST, "true"], capture_output=True).returncode == 0 else ()
    odd = {"SPARK_LOCAL_HOSTNAME": "no-such-host.invalid", "SPARK_LOCAL_IP": "no-such-host.invalid", "LC_ALL": "POSIX"}
    terminal = Terminal()
    with subprocess.Popen(
        [*host, LAUNCHER, "nightly", "--config", "line.yaml", "--ds", DS],
        cwd=config.parent,
        env={**os.environ, **odd, "PYSPARK_PYTHON": str(python), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        text=True,
    ) as process:
        while process.poll() is None and "[Stage " not in terminal.screen:
            time.sleep(0.05)
        opened.touch()
        out, _ = process.communicate(timeout=500)
    terminal.close()
    return Seen(config.parent, process.returncode, out.splitlines()[-1] if out else "", terminal.screen)


@pytest.fixture(scope="module")
def published(night: Seen) -> dict[str, Any]:
    assert night.code == 0, night.screen[-5000:]
    return last_line.read(night.line)


def test_nightly_publishes_k_unseen_items_for_every_user(config: Path, published: dict[str, Any]) -> None:
    assert published["status"] == "done"
    assert published["rows"] == {"input": USERS * 9, "accepted": USERS * 9, "duplicates": 0, "quarantined": {}}
    table = read(published)
    assert sorted(table["user_id"].unique()) == list(range(1, USERS + 1))
    seen = {(int(u), int(i)) for u, i in (line.split("::")[:2] for line in checkerboard())}
    for user, rows in table.groupby("user_id"):
        rows = rows.sort_values("rank")
        assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
        assert rows["item_id"].nunique() == K
        assert not seen & {(user, item) for item in rows["item_id"]}
        assert rows["score"].is_monotonic_decreasing


def test_the_planted_answer_is_found(published: dict[str, Any]) -> None:
    """Each user's one unseen item of their own taste: at the top for nearly all, where chance would give 1 in 21."""
    table = read(published)
    best = table[table["rank"] == 1]
    own_taste = (best["item_id"] - 1) % TASTES == (best["user_id"] - 1) % TASTES
    assert own_taste.mean() > 0.9
    assert published["metrics"]["full.hr@5"] > 3 * published["metrics"]["popularity.full.hr@5"]


def test_latest_json_serves_readers_without_delta(published: dict[str, Any]) -> None:
    root = Path(published["outputs"]["recommendations"])
    latest = json.loads((root / "latest.json").read_text())
    assert (latest["ds"], latest["version"], latest["rows"]) == (DS, published["version"], USERS * K)
    assert ds.dataset([str(root / file) for file in latest["files"]]).count_rows() == USERS * K


def test_the_same_night_again_is_already_published(config: Path, published: dict[str, Any]) -> None:
    code, report, log = run(config, "nightly", "--ds", DS)
    assert (code, report["status"], report["version"]) == (0, "already-done", published["version"])
    assert "already published" in log


def test_plain_spark_submit_runs_a_job(config: Path, published: dict[str, Any]) -> None:
    venv = ROOT / ".venv/bin"
    environment = {**os.environ, "PYSPARK_PYTHON": str(venv / "python"), "PYSPARK_DRIVER_PYTHON": str(venv / "python")}
    command = [str(venv / "spark-submit"), str(ROOT / "jobs/prepare.py"), "--config", str(config), "--ds", DS]
    done = subprocess.run(command, cwd=config.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "already-done"


# case: (settings of prepare, exit code, what the message must say)
BAD_INPUTS = {
    "missing file": (["input.path=nowhere.dat"], 3, ("nowhere.dat", "matches no file", "set input.path")),
    "empty file": (["input.path=empty.dat"], 3, ("empty.dat", "0 rows", "movielens-dat")),
    "empty folder": (["input.path=no-files"], 3, ("no-files", "empty folder", "set input.path")),
    "folder without the format's files": (["input.path=other"], 3, ("notes.txt", "movielens-dat", "input.format")),
    "wrong format": (["input.format=movielens-tsv"], 3, ("too few fields", "movielens-tsv", "input.format")),
    "unknown key": (["train.epoch=3"], 2, ("unknown key train.epoch", "did you mean train.epochs?")),
    "unwritable lake": (["paths.lake=a-file/lake"], 3, ("a-file/lake", "cannot be written", "paths.lake")),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_exits_with_its_code_and_one_message(config: Path, published: dict[str, Any], case: str) -> None:
    (config.parent / "empty.dat").write_text("")
    (config.parent / "a-file").write_text("")
    for folder, files in {"no-files": [], "other": ["notes.txt", "more.txt"]}.items():
        (config.parent / folder).mkdir(exist_ok=True)
        for name in files:
            (config.parent / folder / name).write_text("hello")
    settings, code, said = BAD_INPUTS[case]
    args = [part for setting in settings for part in ("--set", setting)]
    # One case through the launcher shows that spark-submit hands on the code; the others save its start.
    program = LAUNCHER if case == "missing file" else CONSOLE
    found, report, log = run(config, "prepare", "--ds", "2026-01-03", *args, program=program)
    assert (found, report["status"]) == (code, "failed")
    for words in said:
        assert words in report["error"]
    assert "Traceback" not in log
    assert DeltaTable(published["outputs"]["recommendations"]).version() == published["version"]


def test_a_bad_ds_is_refused(config: Path) -> None:
    code, report, _ = run(config, "prepare", "--ds", "2026-02-30", program=CONSOLE)
    assert code == 2
    assert "2026-02-30" in report["error"]
    assert "YYYY-MM-DD" in report["error"]


def test_a_model_that_cannot_fit_is_refused_before_it_starts(config: Path, published: dict[str, Any]) -> None:
    other = ("--set", "model.factors=9", "--set", "train.max_model_bytes=1000")
    code, report, _ = run(config, "train", "--ds", DS, *other, program=CONSOLE)
    assert code == 2
    for words in ("parameters", "GiB", "lower model.factors"):
        assert words in report["error"]
    assert DeltaTable(published["outputs"]["recommendations"]).version() == published["version"]


# ---- as a person sees it --------------------------------------------------------------------------------------------


def test_a_night_in_an_odd_place_is_published(night: Seen) -> None:
    assert night.code == 0, night.screen[-5000:]
    made = {path.parent.parent.name for path in night.folder.glob(f"lake/demo/runs/{DS}/*/*/manifest.json")}
    assert made == {"prepare", "train", "evaluate", "score"}
    assert (night.folder / "lake/demo/recommendations/latest.json").exists()


def test_its_line_is_short_and_names_the_rest(night: Seen) -> None:
    assert len(night.line.encode()) < 1000
    report, whole = json.loads(night.line), last_line.read(night.line)
    assert report["runs"].keys() == {"prepare", "train", "evaluate", "score"}
    assert all((Path(report["lake"]) / path / "manifest.json").exists() for path in report["runs"].values())
    assert report["outputs"] == {"recommendations": str(night.folder / "lake/demo/recommendations")}
    assert {"full.ndcg@10", "full.hr@10"} <= report["metrics"].keys()
    assert len(whole["metrics"]) > len(report["metrics"])
    assert whole["outputs"].keys() >= {"train", "bundle", "report", "recommendations"}
    assert whole["comparisons"][0].keys() >= {"difference", "interval"}


def test_a_person_sees_how_far_it_is(night: Seen) -> None:
    """Spark's bar and the training's, which go back to the beginning of their line."""
    assert re.search(r"\[Stage \d+:[=>]* +\(\d+ \+ \d+\) / \d+\]", night.screen)
    assert re.search(r"\repoch 1 of 15: +\d+%\|.*step", night.screen), night.screen[-5000:]
    assert re.search(
        r"epoch 2 of 15: loss [.\d]+, ndcg@10 [.\d]+( \(best\))?, [.\d]+( [kM])? samples/s, ", night.screen
    )
    for bad in ("Traceback", "Exception", "taken from the working folder"):
        assert bad not in night.screen


def test_log_lines_carry_the_date(night: Seen) -> None:
    lines = [line for line in re.split(r"[\r\n]+", night.screen) if re.search(r" (INFO|WARNING|ERROR|WARN) ", line)]
    assert len(lines) > 10
    assert all(re.match(r"(\x1b\[\w+)*\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)


def test_the_demo_ends_with_the_report(night: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(night.folder)
    *_, published, report = demo.show(load_config("line.yaml")).splitlines()
    assert published.startswith("published: ")
    assert Path(report.removeprefix("report: ")).name == "report.html"
    assert Path(report.removeprefix("report: ")).exists()


# ---- the documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", documented(), ids=str)
def test_what_the_documents_say_works_as_printed(block: Block, night: Seen, spark: SparkSession) -> None:
    with spark_in(spark, night.folder):
        check(block, night.folder, {"spark": spark})
