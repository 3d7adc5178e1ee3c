"""What `doctor --cluster` makes of what it finds on executors; and what one process finds, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist.doctor import executors
from ncf_dist.doctor.check import Check
from ncf_dist.doctor.executors import PROBE, Place, here, judged, lake_seen, looking

DRIVER = here()
FACTS = st.sampled_from(["python", "code", "torch", "pyarrow", "pyspark"])


def named(found: Sequence[Check], name: str) -> Check | None:
    return next((check for check in found if check.name == name), None)


def changed(place: Place, fact: str) -> Place:
    if fact in place.packages:
        return replace(place, packages={**place.packages, fact: "0.1"})
    return replace(place, python="0.1") if fact == "python" else replace(place, code="0.1")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sets(FACTS)), min_size=1, max_size=6))
def test_a_difference_is_named_once_with_all_who_have_it(tasks: list[tuple[str, set[str]]]) -> None:
    """And nothing else fails."""
    found = []
    for host, facts in tasks:
        place = replace(DRIVER, host=host, folder=f"/{host}")
        for fact in facts:
            place = changed(place, fact)
        found.append(place)
    checks = list(judged(DRIVER, found, "/lake"))
    assert {check.name for check in checks if check.status == "fail"} == {
        f"executors' {fact}" for _, facts in tasks for fact in facts
    }
    for fact in {fact for _, facts in tasks for fact in facts}:
        check = named(checks, f"executors' {fact}")
        assert check is not None
        hosts = sorted({host for host, facts in tasks if fact in facts})
        ours = DRIVER.packages.get(fact) or getattr(DRIVER, fact)
        assert check.detail.startswith(f"0.1 on {', '.join(hosts)}, {ours} here: needed the driver's: run make package")
    first = named(checks, "executors")
    assert first is not None
    assert first.detail.startswith(f"{len({host for host, _ in tasks})} on ")
    assert f"{len(tasks)} tasks at once" in first.detail


def test_a_package_that_is_missing_and_another_processor_are_said() -> None:
    place = replace(DRIVER, host="one", packages={**DRIVER.packages, "torch": None}, processor="Other 1")
    checks = list(judged(DRIVER, [replace(DRIVER, host="two"), place], "/lake"))
    assert "None on one" in named(checks, "executors' torch").detail  # type: ignore[union-attr]
    processors = named(checks, "executors' processors")
    assert processors is not None
    assert processors.status == "warn"
    assert "Other 1" in processors.detail


def test_a_lake_that_is_not_the_drivers_is_found_from_there(tmp_path: Path) -> None:
    """Each process reads what the driver wrote, and the driver finds what each wrote."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    (ours / f"{PROBE}x").write_text("x")
    (other / f"{PROBE}y").write_text("z")
    good = lake_seen(str(ours), "x")
    assert Path(str(good["wrote"])).read_text() == "x"
    assert lake_seen(str(other), "x") == {"wrong": "does not see what the driver has just written there"}
    assert lake_seen(str(other), "y") == {"wrong": "has something else than the driver there"}
    assert "cannot read or write there" in str(lake_seen("nosuch://bucket/lake", "x")["wrong"])

    place = replace(DRIVER, host="one", wrote=good["wrote"])
    assert executors._seen_again(place) == place
    Path(str(good["wrote"])).unlink()
    lost = executors._seen_again(place)
    checks = list(judged(DRIVER, [lost, replace(DRIVER, host="two")], "/lake"))
    assert [check.status for check in checks] == ["ok", "fail"]
    assert checks[1].detail == (
        "/lake: one writes what the driver does not see there: needed a place that all machines reach: set paths.lake"
    )
    assert checks[1].place == "data"


def test_a_task_says_what_its_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "STAY_S", 0)
    (tmp_path / f"{PROBE}x").write_text("x")
    batch = pa.RecordBatch.from_pydict({"id": [0]})
    [said] = looking(str(tmp_path), "x")([batch])
    found = json.loads(said.column("stats")[0].as_py())
    memory = found.pop("memory")
    assert memory is None or memory > 0
    assert Path(found.pop("wrote")).exists()
    wanted = {**asdict(DRIVER)}
    del wanted["memory"], wanted["wrote"]
    assert found == wanted
    assert None not in found["packages"].values()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "An error occurred while calling None.X.\n: java.lang.IllegalStateException: no master\n\tat a",
            "IllegalState",
        ),
        ('Job aborted\n  java.io.IOException: Cannot run program "./x/python"\n  at b', "Cannot run program"),
        ("An error occurred while calling o1.x", "An error occurred"),
        ("", "no message"),
    ],
)
def test_why_executors_do_not_answer_is_said(text: str, told: str) -> None:
    assert told in executors._reason(text)
