"""Inputs that gave wrong rows, lost rows or showed a person: each reads rightly, or says what is wrong with it."""

from __future__ import annotations

import datetime as dt
import gzip
import itertools
import logging
import os
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from ncf_dist.errors import InputError
from ncf_dist.inputs import listed_ids, listing
from ncf_dist.prepare import values
from ncf_dist.prepare.chunks import SLICE, Chunk, Raw
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.ids import typed_ids
from ncf_dist.prepare.ingest import read_one
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.interactions import RowSpec
from ncf_dist.prepare.side_tables import SideSpec, typed
from ncf_dist.prepare.source import Source
from tests.test_spellings import NOON, an_input, read, written

# ---- Parquet -------------------------------------------------------------------------------------------------------


def test_times_of_96_bits_do_not_wrap_around(tmp_path: Path) -> None:
    """As nanoseconds in 64 bits, 2609 would be 2024, and 1600 would be 2184."""
    times = [dt.datetime(2609, 1, 1), dt.datetime(2024, 3, 23, 17, 4, 14, 7), dt.datetime(1600, 1, 1)]
    table = pa.table({"u": [1, 2, 3], "i": [1] * 3, "r": [1] * 3, "t": pa.array(times, pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    rows, rejects = read(tmp_path, an_input(tmp_path / "a.parquet", format="parquet"))
    assert rows == [(2, 1, 1.0, NOON * 10**6 + 7)]
    assert rejects == [(0, "timestamp is after the year 2199"), (2, "timestamp is negative")]


def a_table(folder: Path, **columns: Any) -> Path:
    """A Delta table with users a, b, c; b was deleted: its row is still in a file."""
    base = {"u": ["a", "b", "c"], "i": ["x", "y", "z"], "r": [1.0, 2.0, 3.0], "t": [NOON] * 3}
    write_deltalake(str(folder), pa.table(base | columns), partition_by=sorted(columns))
    DeltaTable(str(folder)).delete("u = 'b'")
    return folder


def users_of(tmp_path: Path, path: Path | str) -> list[str]:
    rows, rejects = read(tmp_path, an_input(path, format="parquet"))
    assert rejects == []
    return sorted(row[0] for row in rows)


def test_files_with_types_that_this_arrow_does_not_know_are_read_by_their_parquet_schema(tmp_path: Path) -> None:
    """delta-rs rewrites files with text as Utf8View; the same file may also come without its table."""
    table = a_table(tmp_path / "table")
    unknown = []
    for path in table.glob("*.parquet"):
        try:
            pq.ParquetFile(path)
        except pa.ArrowException:
            unknown.append(path)
    assert unknown, "the case that this test is about"
    assert users_of(tmp_path, table) == ["a", "c"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.parquet").write_bytes(unknown[0].read_bytes())
    assert users_of(tmp_path, plain) == ["a", "c"]
    (plain / "a.parquet").write_bytes(unknown[0].read_bytes()[:-9] + b"\xff" * 5 + b"PAR1")
    with pytest.raises(InputError, match="a.parquet is not a Parquet file"):
        users_of(tmp_path, plain)


@pytest.mark.parametrize("way", ["folder", "file", "input.path", "input.path, a file", "glob"])
def test_a_link_into_a_delta_table_brings_no_deleted_row_back(tmp_path: Path, way: str) -> None:
    part = a_table(tmp_path / "table", day=["1", "1", "1"]) / "day=1"
    assert len(list(part.glob("*.parquet"))) == 2
    [live] = find_files(str(tmp_path / "table"), FORMATS["parquet"], "parquet").paths
    log = tmp_path / "log"
    if way.startswith("input.path"):
        log.symlink_to(live if "file" in way else part)
    else:
        log.mkdir()
        for n, file in enumerate(part.glob("*.parquet")):
            if way == "file":
                (log / f"{n}.parquet").symlink_to(file)
        if way != "file":
            (log / "monday").symlink_to(part)
    path = f"{log}/*/*.parquet" if way == "glob" else log
    assert users_of(tmp_path, path) == ["a", "c"]
    files = find_files(str(path), FORMATS["parquet"], "parquet")
    assert (files.paths, list(files.versions)) == ((live,), [str(tmp_path / "table")])
    assert files.values[live]["day"].as_py() == "1", "the column that the folder says is known behind a link, too"
    [dead] = {str(file) for file in part.glob("*.parquet")} - {live}
    (tmp_path / "dead.parquet").symlink_to(dead)
    with pytest.raises(InputError, match=r"dead.parquet is not a live file of the Delta table .*/table \(version 1\)"):
        users_of(tmp_path, tmp_path / "dead.parquet")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    names = ["u", "i", "r", "t", "x", "x"]
    pq.write_table(pa.table([["a"], ["x"], [1.0], [NOON], [1], [2]], names=names), tmp_path / "a.parquet")
    assert users_of(tmp_path, tmp_path / "a.parquet") == ["a"], "one that nobody wants may be"
    columns = {"user": "x", "item": "i", "rating": "r", "timestamp": "t"}
    with pytest.raises(InputError, match="a.parquet has 2 columns named x; needed one"):
        read(tmp_path, an_input(tmp_path / "a.parquet", format="parquet", columns=columns))


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("_delta_log/", "the Delta table .* cannot be read by its log"),
        ("metadata/v1.metadata.json.gz", "Apache Iceberg"),
    ],
)
def test_a_table_s_folder_is_no_plain_folder(tmp_path: Path, mark: str, message: str) -> None:
    written(tmp_path / "log", "a.parquet", u=[1], i=[1], r=[1], t=[NOON])
    (tmp_path / "log" / mark).parent.mkdir(exist_ok=True)
    (tmp_path / "log" / mark).mkdir() if mark.endswith("/") else (tmp_path / "log" / mark).write_bytes(b"")
    for path in (tmp_path / "log", tmp_path, tmp_path / "log" / "a.parquet"):
        with pytest.raises(InputError, match=message):
            find_files(str(path), FORMATS["parquet"], "parquet")


def test_a_live_file_that_is_gone_is_said_to_be_one(tmp_path: Path) -> None:
    table = a_table(tmp_path / "table")
    [live] = find_files(str(table), FORMATS["parquet"], "parquet").paths
    os.unlink(live)
    with pytest.raises(InputError, match=r"No such file, and version 1 of the Delta table .*table has it .*; needed"):
        find_files(str(table), FORMATS["parquet"], "parquet")


# ---- ids -----------------------------------------------------------------------------------------------------------

NUMBERS: list[tuple[Any, list[Any], list[str | None]]] = [
    (pa.float64(), [454.0, 1.5, float("inf"), 2.0**53 + 2, 1e300, float("nan"), None, -0.0],
     ["454", None, None, None, None, None, None, "0"]),
    (pa.float32(), [454.0, 2.0**24 + 2], ["454", None]),
    (pa.decimal128(38, 18), [Decimal(0), Decimal(5), Decimal("1.5"), Decimal("-1E-10"), None, -(10**19)],
     ["0", "5", None, None, None, str(-(10**19))]),
    (pa.string(), ["a", "NULL", "\\N", "null", "a\0b", " ", "nan"], ["a", None, None, None, None, None, "nan"]),
    (pa.int64(), [7, None], ["7", None]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "wanted"), NUMBERS)
def test_an_id_is_the_same_in_a_log_and_a_side_table_as_text_and_as_an_integer(
    kind: pa.DataType, given: list[Any], wanted: list[str | None]
) -> None:
    """454, 454.0 and a decimal 454.00 are one id; what has a fraction or may have been rounded is none."""

    def chunk(name: str) -> Chunk:
        reason = np.full(len(given), None, dtype=object)
        return Chunk(0, np.arange(len(given)), Raw(), {name: pa.array(given, kind)}, reason)

    of_log = chunk("user")
    ids = typed_ids(of_log, "user", pa.string())
    good = ~of_log.rejected()
    assert [value if fine else None for value, fine in zip(ids.to_pylist(), good, strict=True)] == wanted
    if not pa.types.is_string(kind):
        as_number = chunk("user")
        typed_ids(as_number, "user", pa.int64())
        fits = [text is not None and abs(int(text)) < 2**63 for text in wanted]
        assert (~as_number.rejected()).tolist() == fits
        assert all(of_log.reason[~good] == as_number.reason[~good])
    side = typed(chunk("id"), SideSpec(Source(("x",), "parquet", ({},), ()), pa.string(), {})).to_pydict()
    assert side["_unusable"] == [text is None for text in wanted]
    assert [value for value, bad in zip(side["id"], side["_unusable"], strict=True) if not bad] == [
        text for text in wanted if text is not None
    ]


ODD_SIGNS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


def test_a_list_of_ids_is_split_where_a_line_ends_and_nowhere_else(tmp_path: Path) -> None:
    """Python's splitlines() has eight more ends of a line, which may be inside of an id."""
    ids = [f"a{sign}b" for sign in ODD_SIGNS]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "list").write_bytes(end.join([*ids, "", "  c  "]).encode())
        assert listed_ids(str(tmp_path / "list")) == tuple(sorted([*ids, "c"]))
    forget = Forget.read(str(tmp_path / "list"), pa.string())
    assert forget.among(pa.array([*ids, *(f"{sign}c{sign}" for sign in ODD_SIGNS), "a", "b"])).tolist() == [
        *[True] * 16, False, False,
    ]  # fmt: skip


# ---- nothing of a person is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"anna.huber,toy-story\nu12345,heat\n", "its first line has 2 fields, none of such a name"),
        (b"anna huber\n", "its first line has 1 field, none"),
        (gzip.compress(b"u,i,r,t\nanna,x,1,1\n", mtime=0), "its first line is no text: is the file compressed"),
        (b"U,Item,r,t\nanna,x,1,1\n", "its first line names U, Item, r, t"),
        (b"user;item\nanna;x\n", "its first line has 1 field"),
        (b"0,1,2,3\n", "its first line has 4 fields"),
    ],
    ids=["a row", "one field", "compressed", "names", "another separator", "positions"],
)
def test_only_a_line_of_names_is_shown(tmp_path: Path, data: bytes, shown: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError) as refused:
        read(tmp_path, an_input(tmp_path / "a.csv", columns={"user": "u", "item": "i", "timestamp": "t"}))
    assert f"({shown}" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("anna", "u12345", "\x1f", "\ufffd"))


def rejects_of(tmp_path: Path, head: str, lines: list[str], forget: Forget) -> list[tuple[str, str]]:
    """(reason, text) of what goes to the quarantine."""
    path = tmp_path / f"log-{len(list(tmp_path.iterdir()))}.csv"
    path.write_text("\n".join([head, *lines]))
    config = an_input(path)
    source = interactions_source(config, find_files(config.path, FORMATS["csv"], "csv"))
    spec = RowSpec(source, pa.string(), pa.string(), "s", 2**62, None, f"{path}-staging", forget=forget)
    files = read_one(spec, 0)["files"]["rejects"]
    return [(row["reason"], row["raw"]) for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def test_a_row_in_which_the_user_may_have_moved_is_kept_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("anna\n")
    (tmp_path / "joined").write_text("anna,huber\n")
    one, joined = (Forget.read(str(tmp_path / name), pa.string()) for name in ("list", "joined"))
    moved = ["x,y,anna,1,1", "anna,1,1"]
    few, many = "too few fields", "too many fields"
    assert rejects_of(tmp_path, "i,u,r,t", [*moved, "x,b,bad,1"], one) == [
        (many, ""), (few, ""), ("rating is not a number", "x,b,bad,1"),
    ]  # fmt: skip
    assert rejects_of(tmp_path, "i,u,r,t", moved, Forget()) == [(many, moved[0]), (few, moved[1])]
    assert rejects_of(tmp_path, "u,i,r,t", ["b,x,y,1,1", "b,1"], one) == [(many, "b,x,y,1,1"), (few, "b,1")]
    assert rejects_of(tmp_path, "u,i,r,t", ["anna,huber,x,1,1"], joined) == [(many, "")]


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charset", ["utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("bad", [0x110000, 0xD800, 0xFFFFFFFF])
def test_a_character_that_is_none_costs_its_line_alone(tmp_path: Path, charset: str, bad: int) -> None:
    """In UTF-32 as in UTF-16, in the first block and after it: 4 MiB are 150,000 lines."""
    mark, broken = "\ufeff".encode(charset), bad.to_bytes(4, "little" if charset.endswith("le") else "big")
    for before in (3, 150_000):
        lines = "u,i,r,t\n" + "".join(f"a{n},x,1,1\n" for n in range(before))
        rest = "".join(f"b{n},x,1,1\n" for n in range(5))
        data = mark + lines.encode(charset) + broken + ",y,1,1\n".encode(charset) + rest.encode(charset)
        (tmp_path / "log.csv").write_bytes(data)
        rows, rejects = read(tmp_path, an_input(tmp_path / "log.csv"))
        assert len(rows) == before + 5
        assert rejects == [(len(lines), "text is not in the charset")]


def test_dates_that_no_calendar_has_do_not_send_their_neighbours_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts, not seconds: two a slice, and none that fails."""
    rows, casts = 20 * SLICE, Counter[str]()
    real = values._iso_cast

    def counted(text: pa.Array, kind: pa.DataType) -> Any:
        casts["all"] += 1
        return real(text, kind)

    monkeypatch.setattr(values, "_iso_cast", counted)
    texts = ["2024-02-30T00:00:00Z" if n % 10 == 7 else "2024-02-29T23:59:59Z" for n in range(rows)]
    _, ok = values.iso_times(pa.array(texts))
    assert np.flatnonzero(~ok).tolist() == list(range(7, rows, 10))
    assert casts["all"] <= 1 + 3 * 20


def test_a_date_is_sorted_out_exactly_where_arrow_refuses_it() -> None:
    """Every day of months that may have it or not, in years that are leap and not; every edge of a clock and a zone."""
    days = [f"{y:04}-{m:02}-{d:02}" for y in (0, 4, 1900, 2000, 2023, 2024, 2100, 9999) for m in range(14) for d in
            (0, 1, 9, 10, 19, 20, 28, 29, 30, 31, 32, 99)]  # fmt: skip
    clocks = [f"T{h:02}:{m:02}:{s:02}" for h, m, s in itertools.product((0, 9, 19, 23, 24), (0, 59, 60), (0, 59, 60))]
    zones = ["Z", "+00", "-23:59", "+24:00", "+23:60", "-0930", "+99"]
    texts = [*days, *(f"{day}T00:00Z" for day in days), *("2024-03-23" + c + z for c in clocks for z in ["", *zones])]
    found, ok = values._iso_one_by_one(pa.array(texts))
    for text, value, fine in zip(texts, found.tolist(), ok.tolist(), strict=True):
        zone = "UTC" if "T" in text and (text[-1] == "Z" or "+" in text or "-" in text[10:]) else None
        try:
            wanted = pa.array([text]).cast(pa.timestamp("us", zone)).cast(pa.int64())[0].as_py()
        except pa.ArrowInvalid:
            wanted = None
        assert (value if fine else None) == wanted, text


# ---- which files ---------------------------------------------------------------------------------------------------

A_ROW = b"u,i,r,t\n1,2,3,4\n"


def test_a_file_whose_ending_is_in_capitals_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.csv", "B.CSV", "c.Csv.GZ", "D.txt"):
        (tmp_path / name).write_bytes(A_ROW)
    for pattern, left in (
        ("*.csv", ["B.CSV"]),
        ("*.csv*", ["B.CSV", "c.Csv.GZ"]),
        ("?.CSV", ["a.csv"]),
        ("[a-c].csv", []),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            files = find_files(
                f"{tmp_path}/{pattern}" if pattern != "A*" else f"{tmp_path}/?.CSV", FORMATS["csv"], "csv"
            )
        left = ["a.csv"] if pattern == "A*" else left
        assert [Path(path).name for path in files.left_out] == left
        assert all(name in caplog.text for name in left)
        assert ("but for capital letters" in caplog.text) == bool(left)


def test_the_folders_of_a_pattern_that_exist_are_no_patterns(tmp_path: Path) -> None:
    for folder in ("d[1]", "d1", "e*f", "exf"):
        (tmp_path / folder / "g[2]").mkdir(parents=True)
        for name in ("a.csv", "g[2]/b.csv", "g[2]/.hidden.csv"):
            (tmp_path / folder / name).write_bytes(A_ROW)
    for pattern, wanted in (
        ("d[1]/*.csv", ["d[1]/a.csv"]),
        ("d[1]/g[2]/*", ["d[1]/g[2]/b.csv"]),
        ("d[1]/**/b.csv", ["d[1]/g[2]/b.csv"]),
        ("e*f/?.csv", ["e*f/a.csv"]),
        ("d?/*.csv", ["d1/a.csv"]),
        ("[de]*/a.csv", ["d1/a.csv", "d[1]/a.csv", "e*f/a.csv", "exf/a.csv"]),
    ):
        found = [os.path.relpath(path, tmp_path) for path in listing(f"{tmp_path}/{pattern}").files]
        assert found == wanted, pattern


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "parquet", "tsv"])
def test_a_file_without_a_byte_among_others_holds_no_rows(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    row = {
        "csv": A_ROW,
        "csv.gz": gzip.compress(A_ROW),
        "jsonl": b'{"u": 1, "i": 2, "r": 3, "t": 4}',
        "tsv": b"1\t2\t3\t4",
    }
    (folder / f"a.{form}").write_bytes(gzip.compress(b"") if form == "csv.gz" else b"")
    if form == "parquet":
        written(folder, "b.parquet", u=["1"], i=["2"], r=[3], t=[4])
    else:
        (folder / f"b.{form}").write_bytes(row[form])
    options: dict[str, Any] = {"format": form.removesuffix(".gz")}
    if form == "tsv":
        options["columns"] = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
    with caplog.at_level(logging.WARNING):
        rows, rejects = read(tmp_path, an_input(folder, **options))
    assert (rows, rejects) == ([("1", "2", 3.0, 4 * 10**6)], [])
    assert ("1 of 2 files are empty" in caplog.text) == (form != "jsonl")
