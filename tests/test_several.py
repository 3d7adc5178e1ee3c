"""Several nights by one command: which ones, in which order, and what a scheduler is told."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import several
from ncf_dist.cli import parser, run_job
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, GateRefused, InputError, NcfError, StaleRun
from ncf_dist.lake import Lake
from ncf_dist.nightly import pipeline
from ncf_dist.nightly.pipeline import nightly
from ncf_dist.publish.pipeline import publish
from ncf_dist.stage import Outcome
from tests.published import Night
from tests.test_cli import Report, Shell, shell
from tests.test_last_line import details

__all__ = ["shell"]  # A fixture.

NIGHTS = [f"2026-01-{day:02}" for day in (28, 29, 30, 31)]
WEEK = ("--from", NIGHTS[0], "--to", NIGHTS[-1])


class Nights(list[str]):
    """A night that notes its ds, holds it, and ends as `fails` says."""

    def __init__(self, fails: Mapping[str, Exception]) -> None:
        self.fails = dict(fails)

    def __call__(self, config: Config, ds: str) -> Outcome:
        with pytest.raises(NcfError, match="another run holds"), Lake(config.paths.lake).hold(ds):
            pass
        self.append(ds)
        if ds in self.fails:
            raise self.fails[ds]
        return Outcome("done", f"key of {ds}", extra={"warnings": [f"so be it, {ds}"]})


def run(shell: Shell, job: Callable[..., Outcome], *arguments: str) -> tuple[int, Report]:
    return shell.call(lambda: run_job("nightly", job, ["--config", str(shell.conf), *arguments]))


def asked_for(*arguments: str) -> list[str]:
    return several.nights(parser("nightly").parse_args(["--config", "x", *arguments]))


def test_nights_run_in_order(shell: Shell) -> None:
    job = Nights({})
    code, report = run(shell, job, *WEEK)
    assert (code, report["status"], report["ds"], list(job)) == (0, "done", None, NIGHTS)
    assert report["nights"] == dict.fromkeys(NIGHTS, "done")
    assert details(report)["warnings"] == [f"{ds}: so be it, {ds}" for ds in NIGHTS]


def test_nights_run_as_given(shell: Shell) -> None:
    job, given = Nights({}), [NIGHTS[at] for at in (2, 0, 3, 2)]
    assert run(shell, job, *(word for ds in given for word in ("--ds", ds)))[0] == 0
    assert list(job) == given[:3], "and each once"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([GateRefused, InputError, StaleRun, ValueError, None]), min_size=2, max_size=6))
def test_a_failed_night_stops_none(tmp_path_factory: pytest.TempPathFactory, kinds: list[Any]) -> None:
    """Every night is tried; the exit code is that of the first that failed, and the line says how each ended."""
    wanted = [f"2026-01-{day + 1:02}" for day in range(len(kinds))]
    job = Nights({ds: kind(f"trouble in {ds}") for ds, kind in zip(wanted, kinds, strict=True) if kind})
    with pytest.MonkeyPatch.context() as patch:
        root, lines = tmp_path_factory.mktemp("lake"), list[str]()
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        shell = Shell(root, _Lines(lines))  # type: ignore[arg-type]
        code, report = run(shell, job, "--from", wanted[0], "--to", wanted[-1])
    codes = [int(kind.exit_code) if issubclass(kind, NcfError) else 1 for kind in kinds if kind]
    assert list(job) == wanted
    assert code == (codes[0] if codes else 0)
    for ds, kind in zip(wanted, kinds, strict=True):
        status = "done" if kind is None else getattr(kind, "status", "failed")
        assert report["nights"][ds] == status
        [own] = (root / "lake" / "runs" / ds / "jobs").iterdir()
        assert f'"status": "{status}"' in own.read_text(), "a file of its own for each"
        assert kind is None or f"trouble in {ds}" in str(details(report)["error"])


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def readouterr(self) -> Any:
        class Captured:
            out, err = "\n".join(self.lines), ""

        return Captured


def test_with_stop_no_night_follows_one_that_failed(shell: Shell) -> None:
    job = Nights({NIGHTS[1]: GateRefused("not good enough")})
    code, report = run(shell, job, *WEEK, "--stop")
    assert (code, report["status"], list(job)) == (4, "refused", NIGHTS[:2])
    assert list(report["nights"].values()) == ["done", "refused", "not-started", "not-started"]
    assert "2 were not started (--stop)" in report["error"]


def test_the_same_command_does_what_is_left(shell: Shell) -> None:
    job = Nights({NIGHTS[1]: InputError("no log")})
    assert run(shell, job, *WEEK)[0] == 3
    job.fails.clear()
    assert run(shell, job, *WEEK)[0] == 0


def test_a_request_to_stop_ends_all(shell: Shell) -> None:
    started: list[str] = []

    def job(config: Config, ds: str) -> Outcome:
        started.append(ds)
        if ds == NIGHTS[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return Outcome("done")

    code, report = run(shell, job, *WEEK)
    assert (code, started) == (75, NIGHTS[:2])
    assert "2 of 4 nights not started" in report["error"]
    assert report["nights"][NIGHTS[0]] == "done"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--from", NIGHTS[0]], "needed --from and --to"),
        (["--to", NIGHTS[0]], "needed --from and --to"),
        ([*WEEK, "--ds", NIGHTS[0]], "needed --from and --to"),
        (["--from", NIGHTS[1], "--to", NIGHTS[0]], "needed a first night that is not after the last one"),
        (["--from", NIGHTS[0], "--to", "2999-01-01"], "add --allow-future"),
        (["--from", "yesterday", "--to", NIGHTS[0]], "needed a date that exists"),
    ],
)
def test_nights_that_make_no_sense_are_refused(arguments: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        asked_for(*arguments)


def test_months_and_years_pass() -> None:
    assert asked_for("--from", "2024-02-28", "--to", "2024-03-01") == ["2024-02-28", "2024-02-29", "2024-03-01"]
    assert asked_for("--from", "2025-12-31", "--to", "2026-01-01") == ["2025-12-31", "2026-01-01"]
    assert len(asked_for()) == 1, "today"


def test_other_jobs_take_one_night(shell: Shell, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --from"):
        parser("prepare").parse_args(["--config", "x", *WEEK])


# ---- with a published table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "failing"), [(4, 1), pytest.param(10, 2, marks=pytest.mark.soak)])
def test_nights_backfilled_in_any_order_are_all_right(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, failing: int
) -> None:
    """Some fail once, and the same command does what is left. latest.json never goes back."""
    made = [Night(tmp_path, f"2026-01-{day:02}", numbers=True) for day in range(1, count + 1)]
    for night in made:
        night.prepare()
        night.score(key=f"s{night.ds}")
    shell.conf.write_text(made[0].config.model_dump_json(by_alias=True))
    order = [night.ds for night in random.Random(3).sample(made, count)]
    broken, newest = {made[at].ds for at in range(1, failing + 1)}, list[str]()

    def publish_once_broken(config: Config, ds: str, given: Any = None) -> Outcome:
        if ds in broken:
            broken.remove(ds)
            raise InputError("the disk is full")
        outcome = publish(config, ds)
        newest.append(made[0].latest()["ds"])
        return outcome

    monkeypatch.setattr(pipeline, "STAGES", {"publish": publish_once_broken})
    arguments = [word for ds in order for word in ("--ds", ds)]
    assert run(shell, nightly, *arguments)[0] == 3
    code, report = run(shell, nightly, *arguments)
    assert (code, len(report["nights"])) == (0, count)
    assert sum(status == "done" for status in report["nights"].values()) == failing, "the others are found done"
    assert newest == sorted(newest)
    assert newest[-1] == made[-1].ds
    for night in made:
        assert night.read() == made[0].read(made[0].ds)
