"""make nightly-demo: the week itself is a soak test; here are the parts that need no night."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ncf_dist import week
from ncf_dist.config import load_config

ROOT = Path(__file__).parent.parent


def test_a_cut_log_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    log = tmp_path / "ratings.dat"
    log.write_bytes(b"".join(b"%d::1::5::1\n" % user for user in range(20)))
    short = week.cut(log, 0.1)
    assert short.read_bytes() == b"0::1::5::1\n1::1::5::1\n"
    assert log.read_bytes().count(b"\n") == 20


def test_a_step_that_ends_otherwise_ends_the_week(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A night that is published in spite of its gates must not look like one that was refused."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        '#!/bin/sh\necho \'{"job": "nightly", "ds": "2023-06-20", "status": "done", "details": null}\'\n'
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(week, "LAUNCHER", launcher)
    assert week.Week("x.yaml").run(0, "nightly")["status"] == "done"
    with pytest.raises(SystemExit, match="nightly ended with 0; needed 4: its log is above"):
        week.Week("x.yaml").run(4, "nightly")


def test_the_made_up_users_still_come_in_these_nights() -> None:
    config: Any = load_config(str(ROOT / "conf/nightly-demo.yaml"), [])
    assert config.fetch.dataset == "synthetic"
    assert week.FIRST.isoformat() == "2023-06-20"


@pytest.mark.soak
def test_the_whole_week(tmp_path: Path) -> None:
    places = {"paths.lake": tmp_path / "lake", "paths.work": tmp_path / "work"}
    text = (ROOT / "conf/nightly-demo.yaml").read_text().replace("lake/nightly-demo", str(places["paths.lake"]))
    config = tmp_path / "week.yaml"
    config.write_text(text.replace("work/nightly-demo", str(places["paths.work"])))
    done = subprocess.run(
        [sys.executable, "-m", "ncf_dist.week", "--config", str(config)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "killed while it trained" in done.stdout
