"""A night that fails shows no person: no user's id and no raw line is in the log, the last line, the attempt, the file
of details, lineage or metrics. (The tables of the lake are what holds them.)"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.publish.pipeline import publish
from tests.published import SEEN, Night, changed, good

MARK = "person4711"


def everything(root: Path, config: Config, job: str, function: Any, said: Callable[[], str]) -> tuple[int, str]:
    """(exit code, all that the job left outside the tables). said: the log and stdout."""
    tree = json.loads(config.model_dump_json(by_alias=True))
    tree["sinks"] = {"prometheus": str(root / "told" / "x.prom"), "openlineage": str(root / "told" / "events")}
    (root / "conf.json").write_text(json.dumps(tree))
    code = run_job(job, function, ["--config", str(root / "conf.json"), "--ds", "2026-01-31"])
    files = [*root.glob("lake/runs/*/attempts/*"), *root.glob("lake/runs/*/jobs/*"), *root.glob("told/*")]
    assert len(files) >= 2 + 2 * (importlib.util.find_spec("openlineage") is not None)
    return code, said() + "".join(path.read_text() for path in files)


@pytest.mark.parametrize(
    "line",
    [
        f"{MARK}::bread::5",  # too few fields
        f"{MARK}::bread::5::{MARK}",  # a time that is none
        f"{MARK}\x00::\xff::::",
    ],
)
def test_rows_that_do_not_fit(
    spark: SparkSession, tmp_path: Path, make_config: Callable[..., Config], capfd: Any, caplog: Any, line: str
) -> None:
    log = tmp_path / "ratings.dat"
    rows = [f"{MARK}{n}::{n % 7}::5::{n}" for n in range(20)] + [line.replace(MARK, f"{MARK}{n}") for n in range(20)]
    log.write_text("\n".join(rows), encoding="latin-1")
    config = make_config(log, input={"path": str(log), "format": "movielens-dat", "user_type": "string"})
    code, text = everything(tmp_path, config, "nightly", nightly, lambda: caplog.text + "".join(capfd.readouterr()))
    assert code == 3
    assert "do not fit" in text
    assert MARK not in text


@pytest.mark.parametrize("at", [3])
@pytest.mark.parametrize(
    "columns",
    [{"reason": "luck"}, {"item_id": "grapes"}, {"score": float("nan")}, {"user_id": f"{MARK}-of-nobody"}, {}],
)
def test_offers_that_break_a_promise(tmp_path: Path, at: int, columns: dict[str, Any], capfd: Any, caplog: Any) -> None:
    names = {user: f"{MARK}-{user}" for user in SEEN}
    night = Night(tmp_path)
    night.id = lambda name: names.get(name, name)  # type: ignore[method-assign]
    night.prepare()
    night.score(changed(at, **columns) if columns else good()[:at])
    code, text = everything(
        tmp_path, night.config, "publish", publish, lambda: caplog.text + "".join(capfd.readouterr())
    )
    assert code == 3
    assert "rerun the job score" in text
    assert MARK not in text
