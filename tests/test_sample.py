"""doctor reads the first rows: it says what it found in each column, and names the key to change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ncf_dist.config import Config
from ncf_dist.doctor.check import Check
from ncf_dist.doctor.sample import samples

NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
PLACES = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
LINES = [f"{n % 7},{n % 11},{n % 5 + 1},{1_711_213_454 + n}" for n in range(20)]


def found(tmp_path: Path, lines: list[str], name: str = "log.csv", **section: Any) -> dict[str, Check]:
    (tmp_path / name).write_text("\n".join(lines))
    tree = {
        "paths": {"lake": "l"},
        "input": {"path": str(tmp_path / name), "format": "csv", "columns": NAMED, **section},
    }
    return {check.name: check for check in samples(Config.model_validate(tree), "2024-06-01")}


def test_each_column_is_told(tmp_path: Path) -> None:
    checks = found(tmp_path, ["u,i,r,t", *LINES])
    assert {check.status for check in checks.values()} == {"ok"}
    assert {name: check.detail for name, check in checks.items()} == {
        "input rows": "the first 20 fit",
        "input.columns.user": "u: string, 7 different",
        "input.columns.item": "i: string, 11 different, such as '0', '1', '2'",
        "input.columns.rating": "r: 1.0 to 5.0",
        "input.columns.timestamp": "t: 2024-03-23 17:04:14 to 2024-03-23 17:04:33",
    }


def test_a_thousand_rows_are_enough(tmp_path: Path) -> None:
    checks = found(tmp_path, ["u,i,r,t", *LINES * 200])
    assert checks["input rows"].detail == "the first 1,000 fit"


@pytest.mark.parametrize(
    ("ids", "section", "status"),
    [
        (["454.0", "7.0"], {}, "warn"),
        (["454.0", "7.0"], {"item_type": "int"}, "ok"),
        (["454.0", "7.5"], {}, "ok"),
        (["454.0", "a.0"], {}, "ok"),
        (["454", "7"], {}, "ok"),
    ],
)
def test_integers_that_were_written_as_floats_are_told(
    tmp_path: Path, ids: list[str], section: dict[str, Any], status: str
) -> None:
    check = found(tmp_path, ["u,i,r,t", *[f"a,{i},3,4" for i in ids]], **section)["input.columns.item"]
    assert check.status == status
    assert ("set input.item_type=int" in check.detail) == (status == "warn")


def test_a_log_that_is_not_there_is_for_another_check(tmp_path: Path) -> None:
    tree = {"paths": {"lake": "l"}, "input": {"path": str(tmp_path / "no.csv"), "format": "csv", "columns": NAMED}}
    assert list(samples(Config.model_validate(tree), "2024-06-01")) == []


BARE = {"header": False, "columns": PLACES}
MISTAKES: dict[str, tuple[list[str], dict[str, Any], str, str]] = {
    "a position past the line": (
        LINES, {**BARE, "columns": PLACES | {"timestamp": 7}}, "fail",
        "20 of the first 20 do not fit: {'too few fields': 20}, .*: input.columns.timestamp is 7: set input.separator "
        ".* or input.columns to positions from 0 to 3",
    ),
    "another separator": (
        [line.replace(",", ";") for line in LINES], BARE, "fail", "set input.separator .*',' makes 1 of that line",
    ),
    "a position past the header": (
        ["u,i,r,t", *LINES], {"columns": PLACES | {"item": 4}}, "fail",
        "has no position 4 for item: its first line has 4 fields, 0 to 3; set input.columns.item",
    ),
    "no such column": (["u,i,r,t", *LINES], {"columns": NAMED | {"user": "uid"}}, "fail", "no column uid .*s.user"),
    "text as numbers": (
        ["u,i,r,t", *["a" + line for line in LINES]], {"user_type": "int"}, "fail",
        "set input.user_type=string if ids are text",
    ),
    "dates as numbers": (["u,i,r,t", "1,2,3,2024-03-23 17:04:14"], {}, "fail", "set input.time_unit=iso if times"),
    "numbers as dates": (["u,i,r,t", *LINES], {"time_unit": "iso"}, "fail", "set input.time_unit to .*: s, ms or us"),
    "milliseconds as seconds": (
        ["u,i,r,t", *[f"{line}000" for line in LINES]], {}, "fail",
        "set input.time_unit to what the times count: ms or us",
    ),
    "one odd row": (
        ["u,i,r,t", *LINES, "1,2,good,4"], {"max_bad_fraction": 0.1}, "warn",
        "a night goes on without them; if they should fit, set input.columns.rating",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_the_key(tmp_path: Path, mistake: str) -> None:
    lines, section, status, message = MISTAKES[mistake]
    check = found(tmp_path, lines, **section)["input rows"]
    assert check.status == status
    assert re.search(message, check.detail), check.detail


@pytest.mark.parametrize(
    ("factor", "unit", "message"),
    [
        (
            1,
            "ms",
            "20 of 20 rows are from before 1995, and no row is later than 1970-01-20: is input.time_unit s. It is ms",
        ),
        (1_000, "us", "no row is later than 1970-01-20: is input.time_unit ms. It is us"),
        (0.01, "s", "no row is later than 1970-07-18: are input.time_unit .s. and input.columns.timestamp right"),
        (
            1.1,
            "s",
            "20 of 20 rows are from 2024-06-01 on, after this night's window: are --ds, input.until and",
        ),
    ],
)
def test_times_that_are_not_of_this_age_are_a_warning(tmp_path: Path, factor: float, unit: str, message: str) -> None:
    lines = [f"{n},1,1,{int(1_711_213_454 * factor)}" for n in range(20)]
    checks = found(tmp_path, ["u,i,r,t", *lines], time_unit=unit)
    assert re.search(message, checks["input.time_unit"].detail)
    assert checks["input.time_unit"].status == "warn"


def test_side_tables_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("sku,name,price\n1,One,2.5\n2,Two,dear\n,Three,1\n")
    side: dict[str, Any] = {"path": str(tmp_path / "items.csv"), "id": "sku", "title": "name"}
    side["columns"] = {"price": {"from": "price", "type": "float"}}
    checks = found(tmp_path, ["u,i,r,t", *LINES], items=side)
    assert (checks["items rows"].status, checks["input.items.id"].status) == ("warn", "ok")
    assert checks["input.items.id"].detail == "string, 2 different, such as '1', '2'"
    assert checks["input.items.columns.price"].detail == "double, 1 different, such as 2.5, 1 without"
    for wrong, message in (
        ({"id": "item"}, "no column item for id .*set input.items.id"),
        ({"title": "label"}, "no column label for title .*set input.items.title"),
        ({"columns": {"price": {"from": "cost"}}}, "no column cost .*set input.items.columns.price.from"),
        ({"id": 9}, "no position 9 for id: .*set input.items.id"),
        ({"separator": "::"}, "input.items.separator is '::'; needed one character"),
        ({"header": False}, "are names, but .* is read without a header; .*input.items.id.*input.items.header=true"),
    ):
        check = found(tmp_path, ["u,i,r,t", *LINES], items=side | wrong)["items rows"]
        assert check.status == "fail"
        assert re.search(message, check.detail), check.detail
        assert "input.columns" not in check.detail
    none = {"id": 2, "title": 1, "header": False, "columns": {}, "format": "tsv"}
    check = found(tmp_path, ["u,i,r,t", *LINES], items=side | none)["items rows"]
    assert (check.status, "set input.items.id to the column of the ids" in check.detail) == ("fail", True)


def test_json_and_what_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"who": {"id": n}, "i": n, "r": 1, "t": 1_711_213_454}) for n in range(3)]
    checks = found(tmp_path, lines, "log.jsonl", format="jsonl", columns=NAMED | {"user": "who.id"})
    assert checks["input.columns.user"].detail == "who.id: string, 3 different"
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("")
    (tmp_path / "raw" / "b.csv").write_text("u,i,r,t\n1,2,3,4")
    tree = {"paths": {"lake": "l"}, "input": {"path": str(tmp_path / "raw"), "format": "csv", "columns": NAMED}}
    checks = {check.name: check for check in samples(Config.model_validate(tree), "2024-06-01")}
    assert checks["input files"].detail.startswith("1 left out, such as ")
