"""The whole line through the real launcher:
`./spark-submit.sh JOB …` as a scheduler calls it, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest
import yaml
from deltalake import DeltaTable

from ncf_dist import last_line

ROOT = Path(__file__).parent.parent
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
    return pd.concat([pd.read_parquet(uri) for uri in DeltaTable(published["outputs"]["recommendations"]).file_uris()])


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("spark-submit.sh needs .venv; run make install")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file beside its log; both belong to a folder of their own."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "ratings.dat").write_text("\n".join(checkerboard()) + "\n")
    tree = {
        "paths": {"lake": "lake", "work": "work"},
        "input": {"path": "ratings.dat"},
        "negatives": {"draws": 2, "candidates": 10},
        "model": {"name": "gmf", "factors": 8},
        "train": {"ranks": 2, "batch_size": 32, "lr": 0.05, "epochs": 15, "patience": 15},
        "evaluate": {"ks": [1, 5]},
        "score": {"k": K, "tasks": 2},
        "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def published(config: Path) -> dict[str, Any]:
    code, report, log = run(config, "nightly", "--ds", "2026-01-02")
    assert code == 0, log[-5000:]
    return report


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
    assert (latest["ds"], latest["version"], latest["rows"]) == ("2026-01-02", published["version"], USERS * K)
    assert ds.dataset([str(root / file) for file in latest["files"]]).count_rows() == USERS * K


def test_the_same_night_again_is_already_published(config: Path, published: dict[str, Any]) -> None:
    code, report, log = run(config, "nightly", "--ds", "2026-01-02")
    assert (code, report["status"], report["version"]) == (0, "already-done", published["version"])
    assert "already published" in log


def test_plain_spark_submit_runs_a_job(config: Path, published: dict[str, Any]) -> None:
    venv = ROOT / ".venv/bin"
    environment = {**os.environ, "PYSPARK_PYTHON": str(venv / "python"), "PYSPARK_DRIVER_PYTHON": str(venv / "python")}
    command = [str(venv / "spark-submit"), str(ROOT / "jobs/prepare.py"), "--config", str(config), "--ds", "2026-01-02"]
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
    code, report, _ = run(config, "train", "--ds", "2026-01-02", *other, program=CONSOLE)
    assert code == 2
    for words in ("parameters", "GiB", "lower model.factors"):
        assert words in report["error"]
    assert DeltaTable(published["outputs"]["recommendations"]).version() == published["version"]
