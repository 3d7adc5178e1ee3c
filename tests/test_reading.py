"""Reading a log: no byte is lost wherever a file is cut, every row comes out whole or with the first thing wrong with
it, and the same log written in other ways gives the same rows.
"""

from __future__ import annotations

import bz2
import csv
import datetime as dt
import gzip
import io
import json
import math
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist.config import Columns, Input
from ncf_dist.contracts import day_start
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.prepare import reading, source
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.id_types import id_types
from ncf_dist.prepare.ingest import read_one
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.interactions import LATE, RowSpec
from ncf_dist.prepare.records import read_ranges, whole_lines
from ncf_dist.prepare.values import floats, integers, iso_times

law = settings(deadline=None, max_examples=150)
UNTIL = 2**62
NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
Rows = list[tuple[Any, ...]]

# ---- lines -------------------------------------------------------------------------------------------------


@law
@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"d" * 9]), max_size=40),
    st.lists(st.integers(0, 120)),
    st.integers(1, 16),
)
def test_lines_belong_to_the_range_they_begin_in(parts: list[bytes], cuts: list[int], block: int) -> None:
    """Ranges of one file, however cut, give each line once, whole, with its offset."""
    data = b"".join(parts)
    ends = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found: list[tuple[int, bytes]] = []
    for start, end in pairwise(ends):
        for offset, lines in whole_lines(io.BytesIO(data), start, end, 1000, block):
            for line in lines.splitlines(keepends=True) if b"\r" not in lines else _split(lines):
                found.append((offset, line))
                assert start <= offset < end
                offset += len(line)
    assert found == list(zip(np.cumsum([0, *map(len, _split(data))]).tolist(), _split(data), strict=False))


def _split(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def test_a_line_without_end_is_cut_and_memory_stays_small() -> None:
    """20 bytes allowed in blocks of 8: the monster comes cut to 22, and the line after it is whole."""
    data = b"good\n" + b"x" * 1000 + b"\nlast\n"
    found = list(whole_lines(io.BytesIO(data), 0, None, 20, 8))
    assert found[0] == (0, b"good\n")
    assert b"".join(block for _, block in found[1:-1]) == b"x" * 22
    assert found[-1] == (5 + 1001, b"last\n")
    assert list(whole_lines(io.BytesIO(data), 100, 900, 20, 8)) == []
    assert list(whole_lines(io.BytesIO(data), 100, len(data), 20, 8)) == [(1006, b"last\n")]


# ---- rows --------------------------------------------------------------------------------------------------


def read(tmp_path: Path, config: Input, until: int = UNTIL) -> tuple[Rows, Rows]:
    """(rows, rejected rows without their file) of a log, read in this process."""
    files = find_files(config.path, FORMATS[config.format], config.format)
    spec = RowSpec(
        interactions_source(config, files), *id_types(config, files), config.time_unit, until, config.rating_range,
        str(tmp_path / "staging"),
    )  # fmt: skip
    stats = read_ranges(spec.source, lambda source, units: [read_one(replace(spec, source=source), n) for n in units])
    good, bad = ([path for unit in stats for path in unit["files"][kind]] for kind in ("rows", "rejects"))
    rows = [tuple(row.values())[:4] for path in good for row in pq.ParquetFile(path).read().to_pylist()]
    rejects = [tuple(row.values())[1:] for path in bad for row in pq.ParquetFile(path).read().to_pylist()]
    assert sum(unit["rows"] for unit in stats) == len(rows) + len(rejects)
    assert sum(sum(unit["reasons"].values()) for unit in stats) == len(rejects)
    return rows, rejects


def log(tmp_path: Path, data: str | bytes, name: str = "log.csv") -> str:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def csv_input(path: str, **options: Any) -> Input:
    return Input.model_validate({"path": path, "format": "csv", "columns": NAMED, **options})


GOOD = [("7", "ä b", 4.5, 1_000), ("8", "c,d", 3.0, 2_000), ("9", 'e"f', 1.0, 3_000)]


def as_csv(rows: Rows, quoting: Any = csv.QUOTE_MINIMAL, end: str = "\n") -> str:
    out = io.StringIO()
    writer = csv.writer(out, quoting=quoting, lineterminator=end)
    writer.writerows([("u", "i", "r", "t"), *rows])
    return out.getvalue()


def parquet(rows: Rows, path: Path, types: dict[str, pa.DataType]) -> bytes:
    columns = dict(zip("uirt", zip(*rows, strict=True), strict=True))
    table = pa.table({name: pa.array(columns[name], types.get(name)) for name in "tiru"})
    pq.write_table(table, path, row_group_size=2)
    return path.read_bytes()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue())


def iso(microseconds: int) -> str:
    return str(np.datetime64(microseconds, "us"))


WAYS: dict[str, Callable[[Path], tuple[str, dict[str, Any]]]] = {
    "csv": lambda p: (log(p, as_csv(GOOD)), {}),
    "csv, all quoted, Windows line ends": lambda p: (log(p, as_csv(GOOD, csv.QUOTE_ALL, "\r\n")), {}),
    "csv with a byte-order mark": lambda p: (log(p, b"\xef\xbb\xbf" + as_csv(GOOD).encode()), {}),
    "csv in latin-1": lambda p: (log(p, as_csv(GOOD).encode("latin-1")), {"encoding": "latin-1"}),
    "csv, semicolons, no header": lambda p: (
        log(p, as_csv(GOOD).replace("c,d", "cXd").replace('"', "").replace(",", ";").replace("X", ",")
            .replace("ef", 'e"f').split("\n", 1)[1].replace('e"f', '"e""f"')),
        {"separator": ";", "header": False, "columns": {"user": 0, "item": 1, "rating": 2, "timestamp": 3}},
    ),
    "tsv": lambda p: (
        log(p, "".join(f"{t}\t{i}\t{u}\t{r}\n" for u, i, r, t in GOOD), "log.tsv"),
        {"format": "tsv", "columns": {"user": 2, "item": 1, "rating": 3, "timestamp": 0}},
    ),
    "two characters between fields": lambda p: (
        log(p, "".join(f"{u}||{i}||{r}||{t}\n" for u, i, r, t in GOOD), "log.tsv"),
        {"format": "tsv", "separator": "||", "columns": {"user": 0, "item": 1, "rating": 2, "timestamp": 3}},
    ),
    "json lines": lambda p: (
        log(p, "".join(json.dumps({"t": t, "i": i, "x": [1], "u": int(u), "r": r}) + "\n" for u, i, r, t in GOOD)),
        {"format": "jsonl"},
    ),
    "json lines, ISO times, gzip": lambda p: (
        log(p, gzip.compress("".join(json.dumps({"u": u, "i": i, "r": str(r), "t": iso(t * 10**6)}) + "\n"
                                     for u, i, r, t in GOOD).encode()), "log.jsonl.gz"),
        {"format": "jsonl", "time_unit": "iso"},
    ),
    "csv, milliseconds, bz2": lambda p: (
        log(p, bz2.compress(as_csv([(u, i, r, t * 1000) for u, i, r, t in GOOD]).encode()), "log.csv.bz2"),
        {"time_unit": "ms"},
    ),
    "csv, microseconds, zstd": lambda p: (
        log(p, zstd(as_csv([(u, i, r, t * 10**6) for u, i, r, t in GOOD]).encode()), "log.csv.zst"),
        {"time_unit": "us"},
    ),
    "parquet": lambda p: (log(p, parquet(GOOD, p / "x", {}), "log.parquet"), {"format": "parquet"}),
    "parquet, numbers, timestamps, dictionaries": lambda p: (
        log(p, parquet([(int(u), i, r, np.datetime64(t, "s").astype(object)) for u, i, r, t in GOOD], p / "x",
                       {"u": pa.int16(), "i": pa.dictionary(pa.int8(), pa.string()), "r": pa.float64(),
                        "t": pa.timestamp("ms", "Europe/Vienna")}), "log.parquet"),
        {"format": "parquet", "user_type": "string"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_log_gives_the_same_rows_however_it_is_written(tmp_path: Path, way: str) -> None:
    path, options = WAYS[way](tmp_path)
    rows, rejects = read(tmp_path, csv_input(path, **options))
    assert rejects == []
    assert rows == [(u, i, r, t * 1_000_000) for u, i, r, t in GOOD]


def test_ids_are_numbers_where_the_config_says_so(tmp_path: Path) -> None:
    path = log(tmp_path, "u,i,r,t\n007, 5 ,1,1\n-3,+9223372036854775807,2,2\n")
    rows, _ = read(tmp_path, csv_input(path, user_type="int", item_type="int"))
    assert rows == [(7, 5, 1.0, 10**6), (-3, 2**63 - 1, 2.0, 2 * 10**6)]
    rows, _ = read(tmp_path, csv_input(path, item_type="string"))
    assert [row[:2] for row in rows] == [("007", " 5 "), ("-3", "+9223372036854775807")], "text stays as it came"


def test_parquet_ids_have_the_type_of_their_column_and_uuids_are_text(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=n) for n in (5, 2**127)]
    table = pa.table({"u": pa.array([i.bytes for i in ids], pa.binary(16)), "i": pa.array([1, 2], pa.uint8())})
    pq.write_table(table, tmp_path / "log.parquet")
    config = Input(path=str(tmp_path / "log.parquet"), format="parquet", columns=Columns(user="u", item="i"))
    rows, rejects = read(tmp_path, config)
    assert rejects == []
    assert rows == [(str(ids[0]), 1, 1.0, 0), (str(ids[1]), 2, 1.0, 0)], "no ratings: 1 each; no times: 0"


# ---- what is wrong with a row ------------------------------------------------------------------------------

BAD: dict[bytes, str] = {
    b"1,2,3": "too few fields",
    b"": "too few fields",
    b"1,2,3,4,5": "too many fields",
    b'1,"2,3,4': "a quoted field does not end",
    b'1,"2",3': "too few fields",
    b'1,"2"x,3,4': "a quoted field is followed by other text",
    b",2,3,4": "empty user id",
    b"1,  ,3,4": "empty item id",
    b"\\N,2,3,4": "user id is null",
    b"1,NULL,3,4": "item id is null",
    b"one,2,3,4": "user id is not an integer",
    b"0x1F,2,3,4": "user id is not an integer",
    b"1.5,2,3,4": "user id is not an integer",
    b"nan,2,3,4": "user id is null",
    b"1,9223372036854775808,3,4": "item id is not an integer",
    b"1,2,,4": "rating is not a number",
    b"1,2,4f,4": "rating is not a number",
    b"1,2,1_0,4": "rating is not a number",
    b"1,2,NaN,4": "rating is not finite",
    b"1,2,-inf,4": "rating is not finite",
    b"1,2,1e39,4": "rating is not finite",
    b"1,2,5.5,4": "rating is out of range",
    b"1,2,0.4,4": "rating is out of range",
    b"1,2,3,noon": "timestamp is not an integer",
    b"1,2,3,": "timestamp is not an integer",
    b"1,2,3,-1": "timestamp is negative",
    b"1,2,3,99999999999": "timestamp is after the year 2199",
    b"1,2,3,9223372036854775807": "timestamp is after the year 2199",
    b"1,2,3,2000": LATE,
    b"1,2\xff,3,4": "text is not in the charset",
    b"1,2," + b"3" * 100 + b",4": "line is too long",
}


@pytest.mark.parametrize("alone", [True, False])
def test_every_kind_of_bad_row_is_rejected_for_the_first_thing_wrong(tmp_path: Path, alone: bool) -> None:
    """One at a time among good rows, and all together; the place is where the line starts."""
    for batch in [[bad] for bad in BAD] if alone else [list(BAD)]:
        lines = [b"u,i,r,t", b"1,2,3,4", *batch, b'1,"3",.5,1999']
        config = csv_input(
            log(tmp_path, b"\n".join(lines)), user_type="int", item_type="int", rating_range=(0.5, 5), max_line_bytes=60
        )
        rows, rejects = read(tmp_path, config, until=2000 * 10**6)
        assert rows == [(1, 2, 3.0, 4 * 10**6), (1, 3, 0.5, 1999 * 10**6)]
        starts = np.cumsum([0, *[len(line) + 1 for line in lines]]).tolist()
        assert rejects == [
            (start, BAD[line], line.decode(errors="replace"))
            for start, line in zip(starts, lines, strict=False)
            if line in BAD
        ]


def test_a_monster_line_is_one_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    path = log(tmp_path, b"u,i,r,t\n1,2,3,4\n" + b"z" * 5000 + b"\n5,6,1,8\n")
    rows, rejects = read(tmp_path, csv_input(path, max_line_bytes=50))
    assert [row[0] for row in rows] == ["1", "5"]
    assert rejects == [(16, "line is too long", "z" * 52)]


def test_a_rejected_line_is_kept_to_a_thousand_characters(tmp_path: Path) -> None:
    [(_, _, raw)] = read(tmp_path, csv_input(log(tmp_path, "u,i,r,t\n" + "é" * 3000)))[1]
    assert raw == "é" * 1000


def test_json_lines_that_are_no_rows(tmp_path: Path) -> None:
    lines = {
        '{"u": 1, "i": 2, "r": 3, "t": 4': "line is not a JSON object",
        "[1, 2, 3, 4]": "line is not a JSON object",
        '{"u": null, "i": 2, "r": 3, "t": 4}': "user id is null",
        '{"u": 1, "r": 3, "t": 4}': "item id is null",
        '{"u": [1], "i": 2, "r": 3, "t": 4}': "a field is neither text nor a number",
        '{"u": 1, "i": true, "r": 3, "t": 4}': "a field is neither text nor a number",
        '{"u": 1, "i": 2, "r": NaN, "t": 4}': "rating is not finite",
        '{"u": 1, "i": 2, "r": null, "t": 4}': "rating is not a number",
        '{"u": 1, "i": 2, "r": 3, "t": "4.5x"}': "timestamp is not an integer",
    }
    rows, rejects = read(tmp_path, csv_input(log(tmp_path, "\n".join(lines)), format="jsonl"))
    assert rows == []
    assert [(raw, reason) for _, reason, raw in rejects] == list(lines.items())


def test_parquet_rows_that_are_none(tmp_path: Path) -> None:
    table = pa.table(
        {
            "u": pa.array([1, None, 3, 4, 5, 6], pa.int64()),
            "i": pa.array(["a", "b", None, "", "e", "f"]),
            "r": pa.array([1.0, 2.0, 3.0, 4.0, math.nan, None]),
            "t": pa.array([1, 2, 3, 4, 5, 6], pa.timestamp("s")),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    rows, rejects = read(tmp_path, csv_input(str(tmp_path / "log.parquet"), format="parquet"))
    assert rows == [(1, "a", 1.0, 10**6)]
    assert [(place, reason) for place, reason, _ in rejects] == [
        (1, "user id is null"),
        (2, "item id is null"),
        (3, "empty item id"),
        (4, "rating is not finite"),
        (5, "rating is not a number"),
    ]
    assert json.loads(rejects[0][2]) == {"i": "b", "r": 2.0, "t": "1970-01-01 00:00:02", "u": None}


# ---- values ------------------------------------------------------------------------------------------------


@law
@given(st.lists(st.one_of(st.integers(-(2**64), 2**64).map(str), st.text(max_size=4), st.floats().map(repr))))
def test_integers_of_text_are_those_that_python_reads_without_its_extras(texts: list[str]) -> None:
    values, ok = integers(pa.array(texts, pa.string()))
    for text, value, good in zip(texts, values.tolist(), ok.tolist(), strict=True):
        plain = text.strip(" \t\n\r\f\v")
        if re.fullmatch("[+-]?[0-9]+", plain):
            whole = -(2**63) <= int(plain) < 2**63
        else:  # as a float is written: an integer as far as floats are exact
            written = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", plain)
            whole = bool(written) and abs(Decimal(plain)) <= 2**53 and Decimal(plain) % 1 == 0
        assert good == whole, text
        assert not good or value == Decimal(plain)


@law
@given(st.lists(st.one_of(st.floats(width=32).map(repr), st.integers().map(str), st.text(max_size=3))))
def test_floats_of_text_are_the_nearest_float32(texts: list[str]) -> None:
    values, ok = floats(pa.array(texts, pa.string()))
    for text, value, good in zip(texts, values, ok.tolist(), strict=True):
        try:
            expected = np.float32(float(text)) if text.isascii() and "_" not in text else None
        except ValueError:
            expected = None
        except OverflowError:
            expected = np.float32(math.inf)
        assert good == (expected is not None), text
        if expected is not None and np.isfinite(expected):
            assert value == expected


def test_iso_times_with_and_without_zone_and_fraction() -> None:
    noon = 1_577_934_245_000_000
    texts = {
        "2020-01-02T03:04:05": noon,
        "2020-01-02 03:04:05": noon,
        "2020-01-02T03:04:05Z": noon,
        "2020-01-02T05:04:05+02:00": noon,
        "2020-01-02T03:04:05.25": noon + 250_000,
        "2020-01-02": noon - (3 * 3600 + 4 * 60 + 5) * 10**6,
        "2020-13-02": None,
        "yesterday": None,
        "": None,
    }
    for chosen in (list(texts), *[[text] for text in texts]):
        values, ok = iso_times(pa.array(chosen))
        found = [value if good else None for value, good in zip(values.tolist(), ok.tolist(), strict=True)]
        assert found == [texts[text] for text in chosen]


# ---- the source --------------------------------------------------------------------------------------------


def test_units_cut_big_files_join_small_ones_and_keep_compressed_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "UNIT_BYTES", 100)
    sizes = {"a.csv": 250, "b.csv": 30, "c.csv": 60, "d.csv.gz": 70, "e.csv": 0}
    files = [log(tmp_path, b"x" * size, name) for name, size in sizes.items()]
    units = [[(p.file, p.start, p.end) for p in unit] for unit in source.plan(files, "text")]
    assert units == [[(0, 0, 100)], [(0, 100, 200)], [(0, 200, 250), (1, 0, 30)], [(2, 0, 60)], [(3, 0, None)]]


def test_columns_are_found_by_the_header_of_each_file(tmp_path: Path) -> None:
    log(tmp_path, "u,i,r,t\n1,2,3,4\n", "a.csv")
    log(tmp_path, 't,"i",x,u,r\n4,2,0,1,3\n', "b.csv")
    rows, _ = read(tmp_path, csv_input(str(tmp_path)))
    assert rows == [("1", "2", 3.0, 4 * 10**6)] * 2


@pytest.mark.parametrize(
    ("name", "data", "options", "error", "message"),
    [
        ("a.csv", "user,item\n", {}, InputError, "has no column u for user .its first line names user, item.; needed"),
        ("a.csv", "", {}, InputError, "has no column u for user .its first line names none."),
        ("a.csv", "", {}, InputError, "it is empty.; needed a header and rows: look at what writes .* of input.path"),
        ("a.csv", "\n", {}, InputError, "it is empty.; needed a header and rows: look at what writes"),
        ("a.csv", "1,2\n", {"header": False}, ConfigError, "columns u, i, r, t are names, but .*needed positions"),
        ("a.csv", "x", {"separator": "::"}, ConfigError, "input.separator is '::'; needed one character"),
        ("a.csv", "x", {"format": "parquet"}, InputError, "a.csv is not a Parquet file"),
        ("a.json", "{}", {"format": "jsonl", "columns": {"user": 0}}, ConfigError, "are positions; jsonl needs names"),
        ("a.csv.gz", "not gzip", {}, InputError, "a.csv.gz cannot be read"),
    ],
)
def test_a_log_that_is_not_what_the_config_says(
    tmp_path: Path, name: str, data: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, csv_input(log(tmp_path, data, name), **options))


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"u": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"has no column i \(it has u\)"):
        read(tmp_path, csv_input(str(tmp_path / "a.parquet"), format="parquet"))


def test_a_file_that_breaks_off_is_an_error_not_an_end(tmp_path: Path) -> None:
    whole = gzip.compress(as_csv([(str(n), str(n), 1, n) for n in range(200_000)]).encode())
    config = csv_input(log(tmp_path, whole[: len(whole) // 2], "log.csv.gz"))
    files = find_files(config.path, FORMATS["csv"], "csv")
    spec = RowSpec(interactions_source(config, files), pa.string(), pa.string(), "s", UNTIL, None, str(tmp_path))
    assert "log.csv.gz cannot be read" in read_one(spec, 0)["error"]


def test_a_day_starts_at_midnight_utc() -> None:
    assert day_start(dt.date(1970, 1, 2)) == 24 * 3600 * 10**6
