"""The ways in which other people write the same log: each reads as the log that was meant, or says what it is."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncf_dist.config import Input
from ncf_dist.errors import InputError
from ncf_dist.prepare import source
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.id_types import id_types
from ncf_dist.prepare.ingest import read_one
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.interactions import RowSpec
from ncf_dist.prepare.values import iso_times

UNTIL = 2**62
NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
NOON = 1_711_213_454
Rows = list[tuple[Any, ...]]


def an_input(path: Path | str, **options: Any) -> Input:
    return Input.model_validate({"path": str(path), "format": "csv", "columns": NAMED, **options})


def read(tmp_path: Path, config: Input) -> tuple[Rows, Rows]:
    """((user, item, rating, microseconds) of the whole rows, (place, reason) of the others), read in this process."""
    files = find_files(config.path, FORMATS[config.format], config.format)
    spec = RowSpec(
        interactions_source(config, files), *id_types(config, files), config.time_unit, UNTIL, config.rating_range,
        str(tmp_path / "staging"),
    )  # fmt: skip
    shutil.rmtree(tmp_path / "staging", ignore_errors=True)
    stats = [read_one(spec, unit) for unit in range(len(spec.source.units))]
    assert not [unit["error"] for unit in stats if "error" in unit]
    good, bad = ([path for unit in stats for path in unit["files"][kind]] for kind in ("rows", "rejects"))
    rows = [tuple(row.values())[:4] for path in good for row in pq.ParquetFile(path).read().to_pylist()]
    rejects = [tuple(row.values())[1:3] for path in bad for row in pq.ParquetFile(path).read().to_pylist()]
    assert sum(unit["rows"] for unit in stats) == len(rows) + len(rejects)
    return rows, rejects


def written(folder: Path, name: str, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder


# ---- numbers that became floats ----------------------------------------------------------------------------


def test_ids_that_pandas_made_floats_are_the_integers_they_were(tmp_path: Path) -> None:
    frame = pd.DataFrame({"u": [10_000_000_001, None, 2**53], "i": [1, 2, 3], "r": [1, 2, 3], "t": [NOON] * 3})
    assert frame["u"].dtype == float
    frame.to_parquet(tmp_path / "a.parquet")
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.parquet", format="parquet"))
    assert [row[0] for row in rows] == [10_000_000_001, 2**53]
    assert rejects == [(1, "user id is null")]
    frame.to_csv(tmp_path / "a.csv", index=False)
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.csv", user_type="int"))
    assert [row[0] for row in rows] == [10_000_000_001, 2**53]
    assert [reason for _, reason in rejects] == ["empty user id"]
    rows, _ = read(tmp_path, an_input(tmp_path / "a.parquet", format="parquet", user_type="string"))
    assert [row[0] for row in rows] == ["10000000001", str(2**53)], "a whole number is no fraction as text either"


FLOATS: dict[Any, str | int] = {
    454.0: 454,
    -3.0: -3,
    0.0: 0,
    2.0**53: 2**53,
    -(2.0**53): -(2**53),
    454.5: "user id is not an integer",
    2.0**53 + 2: "user id is an inexact float",
    1e300: "user id is an inexact float",
    float("inf"): "user id is not an integer",
    float("nan"): "user id is null",
    None: "user id is null",
}


@pytest.mark.parametrize("alone", [True, False])
def test_of_float_ids_the_whole_and_exact_ones_are_integers(tmp_path: Path, alone: bool) -> None:
    for values in [[value] for value in FLOATS] if alone else [list(FLOATS)]:
        count = len(values)
        columns = {"u": pa.array(values, pa.float64()), "i": [1] * count, "r": [1] * count, "t": [NOON] * count}
        written(tmp_path / "log", "a.parquet", **columns)
        rows, rejects = read(tmp_path, an_input(tmp_path / "log", format="parquet", user_type="int"))
        assert [row[0] for row in rows] == [FLOATS[v] for v in values if isinstance(FLOATS[v], int)]
        assert [reason for _, reason in rejects] == [FLOATS[v] for v in values if isinstance(FLOATS[v], str)]


def test_narrow_floats_are_exact_less_far_and_decimals_farther(tmp_path: Path) -> None:
    for kind, limit in ((pa.float32(), 2**24), (pa.float64(), 2**53)):
        values = pa.array([float(limit), float(limit) * 2], pa.float64()).cast(kind)
        written(tmp_path / "log", "a.parquet", u=values, i=[1, 1], r=[1, 1], t=[NOON] * 2)
        rows, rejects = read(tmp_path, an_input(tmp_path / "log", format="parquet"))
        assert ([row[0] for row in rows], rejects) == ([limit], [(1, "user id is an inexact float")])
    ids = [Decimal("9223372036854775807.00"), Decimal("1.50"), None, Decimal("9223372036854775808.00")]
    written(tmp_path / "log", "a.parquet", u=pa.array(ids, pa.decimal128(30, 2)), i=[1] * 4, r=[1] * 4, t=[NOON] * 4)
    rows, rejects = read(tmp_path, an_input(tmp_path / "log", format="parquet"))
    assert [row[0] for row in rows] == [2**63 - 1]
    bad = "user id is not an integer"
    assert rejects == [(1, bad), (2, "user id is null"), (3, bad)]


# ---- times -------------------------------------------------------------------------------------------------

TIMES: dict[str, str] = {
    "2024-03-23 17:04:14": "iso",
    "2024-03-23 17:04:14 UTC": "iso",
    "2024-03-23 17:04:14 GMT": "iso",
    "2024-03-23 17:04:14Z": "iso",
    "2024-03-23T17:04:14z": "iso",
    "2024-03-23 17:04:14+00": "iso",
    "2024-03-23 18:04:14+01": "iso",
    "2024-03-23 12:04:14-05": "iso",
    "2024-03-23 18:04:14 +0100": "iso",
    "2024-03-23 18:04:14 +01:00": "iso",
    "2024-03-23 17:04:14.000000 UTC": "iso",
    str(NOON): "s",
    f"{NOON}.0": "s",
    f"{NOON}.": "s",
    "1.711213454e9": "s",
    "1.711213454E+09": "s",
    f"{NOON}000.0": "ms",
    f"{NOON}000000": "us",
}


@pytest.mark.parametrize("alone", [True, False])
def test_a_moment_is_read_however_it_is_spelled(tmp_path: Path, alone: bool) -> None:
    for unit in ("iso", "s", "ms", "us"):
        texts = [text for text, of in TIMES.items() if of == unit]
        for lines in [[text] for text in texts] if alone else [texts]:
            (tmp_path / "log.csv").write_text("u,i,r,t\n" + "".join(f'1,2,3,"{text}"\n' for text in lines))
            rows, rejects = read(tmp_path, an_input(tmp_path / "log.csv", time_unit=unit))
            assert (rows, rejects) == ([("1", "2", 3.0, NOON * 10**6)] * len(lines), []), lines


def test_a_date_is_no_zone_and_half_a_zone_is_no_time() -> None:
    texts = ["2024-03-23", "2024-03-23 17:04 UTC", "17:04:14+00", "UTC", "2024-03-23 17:04:14 CET"]
    values, ok = iso_times(pa.array(texts))
    assert ok.tolist() == [True, True, False, False, False]
    assert values[0] == NOON // 86_400 * 86_400 * 10**6


def test_seconds_may_have_a_fraction(tmp_path: Path) -> None:
    """time.time() writes them so; to a microsecond, as far as a double goes."""
    (tmp_path / "log.jsonl").write_text(
        "".join(
            json.dumps({"u": 1, "i": 2, "r": 3, "t": t}) + "\n" for t in (NOON + 0.25, f"{NOON}.123456", 1.5e9, -0.5)
        )
    )
    rows, rejects = read(tmp_path, an_input(tmp_path / "log.jsonl", format="jsonl"))
    assert [row[3] for row in rows] == [NOON * 10**6 + 250_000, NOON * 10**6 + 123_456, 15 * 10**14]
    assert [reason for _, reason in rejects] == ["timestamp is negative"]
    written(tmp_path / "log", "a.parquet", u=[1] * 3, i=[1] * 3, r=[1] * 3, t=[NOON + 0.25, np.nan, np.inf])
    rows, rejects = read(tmp_path, an_input(tmp_path / "log", format="parquet"))
    assert [row[3] for row in rows] == [NOON * 10**6 + 250_000]
    assert [reason for _, reason in rejects] == ["timestamp is not an integer"] * 2


MOMENT = dt.datetime(2024, 3, 23, 17, 4, 14)
TYPES: dict[str, tuple[pa.Array, int]] = {
    **{f"timestamp[{unit}]": (pa.array([MOMENT], pa.timestamp(unit)), NOON) for unit in ("s", "ms", "us", "ns")},
    "with a zone": (pa.array([MOMENT], pa.timestamp("ns")).cast(pa.timestamp("ns", "UTC")), NOON),
    "date32": (pa.array([MOMENT.date()], pa.date32()), NOON // 86_400 * 86_400),
    "date64": (pa.array([MOMENT.date()], pa.date64()), NOON // 86_400 * 86_400),
    "uint32": (pa.array([NOON], pa.uint32()), NOON),
    "uint64": (pa.array([NOON], pa.uint64()), NOON),
    "double": (pa.array([float(NOON)]), NOON),
    "decimal": (pa.array([Decimal(NOON)], pa.decimal128(20, 3)), NOON),
    "text": (pa.array([str(NOON)]), NOON),
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_moment_is_read_of_any_type(tmp_path: Path, kind: str) -> None:
    column, seconds = TYPES[kind]
    folder = written(tmp_path / "log", "a.parquet", u=[1], i=[1], r=[1], t=column)
    rows, rejects = read(tmp_path, an_input(folder, format="parquet"))
    assert (rows, rejects) == ([(1, 1, 1.0, seconds * 10**6)], [])


# ---- other types -------------------------------------------------------------------------------------------


def test_true_and_false_are_ratings_of_one_and_zero(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", "a.parquet", u=[1] * 3, i=[1] * 3, r=[True, False, None], t=[NOON] * 3)
    rows, rejects = read(tmp_path, an_input(folder, format="parquet"))
    assert ([row[2] for row in rows], rejects) == ([1.0, 0.0], [(2, "rating is not a number")])
    (tmp_path / "a.csv").write_text(f"u,i,r,t\n1,1,true,{NOON}\n1,1, False ,{NOON}\n1,1,yes,{NOON}\n1,1,4.5,{NOON}\n")
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.csv"))
    assert ([row[2] for row in rows], [r for _, r in rejects]) == ([1.0, 0.0, 4.5], ["rating is not a number"])
    (tmp_path / "a.jsonl").write_text('{"u": 1, "i": 1, "r": true, "t": 5}\n{"u": true, "i": 1, "r": 1, "t": 5}\n')
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.jsonl", format="jsonl"))
    assert ([row[2] for row in rows], len(rejects)) == ([1.0], 1), "a truth is no id"


def test_unsigned_ids_that_fit_are_read(tmp_path: Path) -> None:
    ids = pa.array([2**63 - 1, 2**63, None, 0], pa.uint64())
    folder = written(tmp_path / "log", "a.parquet", u=ids, i=[1] * 4, r=[1] * 4, t=[NOON] * 4)
    rows, rejects = read(tmp_path, an_input(folder, format="parquet"))
    assert [row[0] for row in rows] == [2**63 - 1, 0]
    assert rejects == [(1, "user id is not an integer"), (2, "user id is null")]


def test_fields_inside_of_others_have_names_with_dots(tmp_path: Path) -> None:
    bodies = [
        {"who": {"id": 7}, "product": {"sku": {"code": "a"}}},
        {"who": {"id": 8}, "product": {"sku": None}},
        {"who": 9, "product": {"sku": {"code": "a"}}},
        {"who": {"id": 7}, "product": {"sku": {"code": "b"}}, "product.sku.code": "literal"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(body) + "\n" for body in bodies))
    columns = {"user": "who.id", "item": "product.sku.code"}
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.jsonl", format="jsonl", columns=columns))
    assert [row[:2] for row in rows] == [("7", "a"), ("7", "literal")]
    assert [reason for _, reason in rejects] == ["item id is null", "user id is null"]
    folder = written(tmp_path / "log", "a.parquet", who=[{"id": 7}, None], product=[{"sku": {"code": "a"}}] * 2)
    rows, rejects = read(tmp_path, an_input(folder, format="parquet", columns=columns))
    assert ([row[:2] for row in rows], rejects) == ([(7, "a")], [(1, "user id is null")])
    with pytest.raises(InputError, match="a.parquet has no column product.id .*set input.columns.item"):
        read(tmp_path, an_input(folder, format="parquet", columns=columns | {"item": "product.id"}))
    with pytest.raises(InputError, match="has struct<.*> in column who; needed .* input.columns.user .* as who.id"):
        read(tmp_path, an_input(folder, format="parquet", columns=columns | {"user": "who"}))


# ---- text --------------------------------------------------------------------------------------------------

TEXT = "u,i,r,t\n" + "".join(f"ü{n},i{n % 7},3,{NOON}\n" for n in range(50))
CHARSETS: dict[str, Callable[[], bytes]] = {
    "UTF-16, little end first": lambda: b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "UTF-16, big end first": lambda: b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-16, Windows line ends": lambda: TEXT.replace("\n", "\r\n").encode("utf-16"),
    "UTF-32": lambda: TEXT.encode("utf-32"),
    "carriage returns alone": lambda: TEXT.replace("\n", "\r").encode(),
    "carriage returns alone, none at the end, a byte-order mark": lambda: (
        TEXT.rstrip().replace("\n", "\r").encode("utf-8-sig")
    ),
    "UTF-16, carriage returns": lambda: TEXT.encode("utf-16"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("charset", CHARSETS)
def test_text_is_read_however_it_is_encoded(
    tmp_path: Path, charset: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "UNIT_BYTES", 100)
    data = CHARSETS[charset]()
    path = tmp_path / ("log.csv.GZIP" if packed else "log.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    rows, rejects = read(tmp_path, an_input(path))
    assert (rows, rejects) == ([(f"ü{n}", f"i{n % 7}", 3.0, NOON * 10**6) for n in range(50)], [])


def test_what_is_no_utf_16_is_a_rejected_row(tmp_path: Path) -> None:
    whole = TEXT.encode("utf-16")
    for data, bad in ((whole + b"x", 1), (whole.replace("ü7".encode("utf-16-le"), b"\x00\xd8u\x00"), 1)):
        (tmp_path / "log.csv").write_bytes(data)
        rows, rejects = read(tmp_path, an_input(tmp_path / "log.csv"))
        assert len(rows) >= 49
        assert [reason for _, reason in rejects] == ["text is not in the charset"] * bad


def test_parquet_under_other_names(tmp_path: Path) -> None:
    for name in ("a.parquet.gzip", "b.PARQUET", "c.pq", "d.snappy.parquet", "e.parquet.zst"):
        written(tmp_path / "log", name, u=[1], i=[1], r=[1], t=[NOON])
    assert len(read(tmp_path, an_input(tmp_path / "log", format="parquet"))[0]) == 5
    written(tmp_path, "single.parquet.gz", u=[1], i=[1], r=[1], t=[NOON])
    assert len(read(tmp_path, an_input(tmp_path / "single.parquet.gz", format="parquet"))[0]) == 1


# ---- folders that say a column -----------------------------------------------------------------------------


def test_a_folder_named_key_is_value_gives_its_files_a_column(tmp_path: Path) -> None:
    for day, shop in (("2024-03-23", "7"), ("2024-03-24", "%C3%BC%2F1"), ("2024-03-25", "__HIVE_DEFAULT_PARTITION__")):
        written(tmp_path / "log" / f"day={day}" / f"shop={shop}", "a.parquet", u=[1], i=[2])
    columns = {"user": "u", "item": "shop", "timestamp": "day"}
    rows, rejects = read(tmp_path, an_input(tmp_path / "log", format="parquet", columns=columns, time_unit="iso"))
    start = NOON // 86_400 * 86_400
    assert rows == [(1, "7", 1.0, start * 10**6), (1, "ü/1", 1.0, (start + 86_400) * 10**6)]
    assert rejects == [(0, "item id is null")]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_column_of_numbers_in_folder_names_is_one_of_numbers(tmp_path: Path, form: str) -> None:
    for item in ("7", "12"):
        folder = tmp_path / "log" / f"i={item}"
        written(folder, "a.parquet", u=[1], r=[3])
        (folder / "a.csv").write_text("u,r\n1,3\n")
        (folder / "a.jsonl").write_text('{"u": 1, "r": 3}\n')
    columns = {"user": "u", "item": "i", "rating": "r"}
    rows, rejects = read(tmp_path, an_input(tmp_path / "log", format=form, columns=columns))
    numbers = form == "parquet"
    assert rejects == []
    assert (
        sorted(row[:3] for row in rows) == [(1, 7, 3.0), (1, 12, 3.0)]
        if numbers
        else [("1", "12", 3.0), ("1", "7", 3.0)]
    )


def test_a_files_own_column_goes_before_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "log" / "i=9"
    written(folder, "a.parquet", u=[1], i=[2])
    (folder / "a.csv").write_text("u,i\n1,2\n")
    for form in ("parquet", "csv"):
        rows, _ = read(tmp_path, an_input(tmp_path / "log", format=form, columns={"user": "u", "item": "i"}))
        assert [str(row[1]) for row in rows] == ["2"]


# ---- types of all files ------------------------------------------------------------------------------------

NONE: list[int] = []


def types_of(folder: Path, before: Any = (None, None), **options: Any) -> list[str]:
    config = an_input(folder, format="parquet", columns={"user": "u", "item": "i"}, **options)
    return [str(kind) for kind in id_types(config, find_files(str(folder), FORMATS["parquet"], "parquet"), before)]


def test_types_are_those_of_all_files_that_hold_something(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "log", "00.parquet", u=pa.array(NONE, pa.string()), i=pa.array(NONE, pa.null()))
    assert types_of(folder) == ["string", "string"], "no evidence at all"
    assert types_of(folder, (pa.int64(), pa.string())) == ["int64", "string"], "what the index has"
    written(folder, "01.parquet", u=pa.array([None, None], pa.float64()), i=pa.array([None, None], pa.string()))
    assert types_of(folder, (pa.string(), pa.int64())) == ["string", "int64"], "gaps are no evidence"
    written(folder, "02.parquet", u=pa.array([1, 2]), i=pa.array([1.0, None]))
    assert types_of(folder) == ["int64", "int64"]
    assert types_of(folder, user_type="string") == ["string", "int64"]
    assert caplog.text == ""
    written(folder, "03.parquet", u=pa.array(["a"]).dictionary_encode(), i=pa.array([1], pa.decimal128(5, 0)))
    assert types_of(folder) == ["string", "int64"]
    assert "user ids are read as text, as the files differ: " in caplog.text
    assert "02.parquet has int64 in column u" in caplog.text
    assert "03.parquet has string in column u" in caplog.text
    rows, rejects = read(tmp_path, an_input(folder, format="parquet", columns={"user": "u", "item": "i"}))
    assert rows == [("1", 1, 1.0, 0), ("a", 1, 1.0, 0)]
    assert [reason for _, reason in rejects] == ["user id is null", "user id is null", "item id is null"]


def test_a_file_without_rows_may_lack_columns(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", "00.parquet", other=pa.array(NONE, pa.int64()))
    written(folder, "01.parquet", u=[1], i=[2])
    assert read(tmp_path, an_input(folder, format="parquet", columns={"user": "u", "item": "i"}))[0] == [(1, 2, 1.0, 0)]


def test_ids_that_change_their_type_are_an_error_that_helps(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", "a.parquet", u=["7"], i=[2])
    with pytest.raises(
        InputError,
        match="user ids of tonight's log are text .*a.parquet has string in column u.*, those of the index .* are "
        "integers; needed one type for ever: set input.user_type=int",
    ):
        types_of(folder, (pa.int64(), pa.int64()))
    assert types_of(folder, (pa.int64(), pa.int64()), user_type="int") == ["int64", "int64"]
    with pytest.raises(
        InputError, match="item ids .* are integers .*input.item_type is set.* set input.item_type=string"
    ):
        types_of(folder, (pa.string(), pa.string()), item_type="int")
    with pytest.raises(InputError, match="user ids .* are text .*format csv has them so"):
        id_types(an_input("x"), find_files(str(folder), None, "csv"), (pa.int64(), None))
