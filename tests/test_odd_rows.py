"""One row never ends the night: whatever a row holds, it comes out typed, or in the quarantine with its reason, and its
neighbours are read as fast as ever.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_rows
from ncf_dist.prepare import charset, given_candidates, reading, side_tables, values
from ncf_dist.prepare.charset import NOT_IN_CHARSET
from ncf_dist.prepare.chunks import SLICE, UNREADABLE, Chunk, Raw, row_by_row
from ncf_dist.prepare.source import Source, plan
from tests.test_reading import csv_input, log, read

law = settings(deadline=None, max_examples=100)
HUGE = "9" * 5_000
DEEP = "[" * 30_000


def reasons(tmp_path: Path, config: Any) -> list[tuple[int, str]]:
    """(place, reason) of the rejected rows of a log whose other rows are users 1 and 2."""
    good, bad = read(tmp_path, config)
    assert [str(row[0]) for row in good] == ["1", "2"]
    return [(place, reason) for place, reason, _ in bad]


# ---- text --------------------------------------------------------------------------------------------------

JSON = {
    '{"u": "moon\\ud83d", "i": 2, "r": 3, "t": 4}': NOT_IN_CHARSET,
    '{"u": 1, "i": "\\ude00\\ud83d", "r": 3, "t": 4}': NOT_IN_CHARSET,
    '{"u": 1, "i": 2, "r": 3, "t": "\\udfff"}': NOT_IN_CHARSET,
    f'{{"u": 1, "i": 2, "r": 3, "t": 4, "x": {DEEP}': "JSON is nested too deeply",
    DEEP: "JSON is nested too deeply",
    f'{{"u": {DEEP + "]" * 30_000}, "i": 2, "r": 3, "t": 4}}': "JSON is nested too deeply",
    f'{{"u": 1, "i": 2, "r": 3, "t": {HUGE}}}': "timestamp is not an integer",
    f'{{"u": 1, "i": 2, "r": {HUGE}, "t": 4}}': "rating is not finite",
    '{"u": NaN, "i": 2, "r": 3, "t": 4}': "user id is null",
    '{"u": 1, "i": -Infinity, "r": 3, "t": 4}': "a field is neither text nor a number",
    '{"u": 1, "i": 2, "r": Infinity, "t": 4}': "rating is not finite",
    '{"u": 1, "i": 2, "r": 3, "t": NaN}': "timestamp is not an integer",
    '{"u": "a\\u0000b", "i": 2, "r": 3, "t": 4}': "user id holds a NUL character",
    '{"u": 1, "i": "\\u0000", "r": 3, "t": 4}': "item id holds a NUL character",
}


@pytest.mark.parametrize("line", JSON, ids=lambda line: line[:30])
def test_a_json_line_that_python_or_arrow_cannot_hold_is_one_rejected_row(tmp_path: Path, line: str) -> None:
    good = ['{"u": "1", "i": "\\ud83d\\ude00", "r": 3, "t": 4}', '{"u": 2, "i": 2, "r": 3, "t": 4}']
    config = csv_input(log(tmp_path, "\n".join([good[0], line, good[1]])), format="jsonl")
    assert reasons(tmp_path, config) == [(len(good[0]) + 1, JSON[line])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{HUGE},2,3,4", "user id is not an integer"),
        (f"1,-{HUGE},3,4", "item id is not an integer"),
        (f"1,2,{HUGE},4", "rating is not finite"),
        (f"1,2,3,{HUGE}", "timestamp is not an integer"),
        ("1\0,2,3,4", "user id is not an integer"),
        ("1,2,3\0,4", "rating is not a number"),
        ("1,2,3,4\0", "timestamp is not an integer"),
        ("\0" * 40, "too few fields"),
    ],
    ids=lambda text: text[:20].replace("\0", "0"),
)
def test_a_line_of_numbers_that_are_none(tmp_path: Path, line: str, reason: str) -> None:
    config = csv_input(log(tmp_path, f"u,i,r,t\n1,2,3,4\n{line}\n2,2,3,4"), user_type="int", item_type="int")
    assert reasons(tmp_path, config) == [(16, reason)]


def test_leading_zeros_and_signs_do_not_make_an_integer_longer(tmp_path: Path) -> None:
    path = log(tmp_path, f"u,i,r,t\n{'0' * 5_000}1,+{2**63 - 1},3,4\n2,{-(2**63)},3,4\n")
    found, bad = read(tmp_path, csv_input(path, user_type="int", item_type="int"))
    assert (bad, [row[:2] for row in found]) == ([], [(1, 2**63 - 1), (2, -(2**63))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10000-01-01T00:00:00", "timestamp is not ISO 8601"),
        ("9999-12-31T23:59:59", "timestamp is after the year 2199"),
        ("0001-01-01T00:00:00+23:59", "timestamp is negative"),
        ("0000-12-31", "timestamp is negative"),
        ("2023-02-29", "timestamp is not ISO 8601"),
        ("2024-01-01T25:00:00Z", "timestamp is not ISO 8601"),
        ("2024-01-01\0", "timestamp is not ISO 8601"),
        ("2024-01-01T00:00:00+99:99", "timestamp is not ISO 8601"),
    ],
)
def test_times_that_no_clock_shows(tmp_path: Path, text: str, reason: str) -> None:
    path = log(tmp_path, f"u,i,r,t\n1,2,3,2024-01-01\n1,2,3,{text}\n2,2,3,2024-01-01T00:00:00Z")
    assert reasons(tmp_path, csv_input(path, time_unit="iso")) == [(25, reason)]


# ---- Parquet -----------------------------------------------------------------------------------------------


def parquet_input(tmp_path: Path, columns: dict[str, pa.Array], **options: Any) -> Any:
    n = len(next(iter(columns.values())))
    table = {"u": pa.array(range(n)), "i": pa.array(["i"] * n), "r": pa.array([1.0] * n), "t": pa.array([1] * n)}
    pq.write_table(pa.table(table | columns), tmp_path / "log.parquet")
    return csv_input(str(tmp_path / "log.parquet"), format="parquet", **options)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
@pytest.mark.parametrize("column", ["u", "i"])
def test_parquet_text_that_is_not_utf8_is_rejected_as_in_csv(tmp_path: Path, kind: str, column: str) -> None:
    raw = pa.array([b"1", b"caf\xe9", None, b"2"], pa.large_binary() if kind.startswith("large") else pa.binary())
    text = {"string": pa.string(), "large_string": pa.large_string()}.get(kind)
    values = raw.view(text) if text else raw
    if kind == "dictionary":
        values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), raw.filter(raw.is_valid()).view(pa.string()))
    config = parquet_input(tmp_path, {column: values}, user_type="string", item_type="string")
    found, bad = read(tmp_path, config)
    assert [row["ui".index(column)] for row in found] == ["1", "2"]
    name = {"u": "user", "i": "item"}[column]
    assert [row[:2] for row in bad] == [(1, NOT_IN_CHARSET), (2, f"{name} id is null")]
    assert json.loads(bad[0][2])[column] in ("caf\N{REPLACEMENT CHARACTER}", str(b"caf\xe9")), "shown for people"


@pytest.mark.parametrize("unit", ["ms", "us"])
@pytest.mark.parametrize("zone", [None, "Europe/Vienna"])
def test_times_beyond_the_year_9999_are_rejected_and_none_wraps_around(
    tmp_path: Path, unit: str, zone: str | None
) -> None:
    second = {"ms": 10**3, "us": 10**6}[unit]
    far = int((np.datetime64("12024-01-01", "s") - np.datetime64(0, "s")).astype(int)) * second
    times = pa.array([1, far, 2**63 - 1, 2**62, 2, -1, -(2**63)]).cast(pa.timestamp(unit, zone))
    config = parquet_input(tmp_path, {"t": times, "u": pa.array([1, 0, 0, 0, 2, 0, 0])})
    late, early = "timestamp is after the year 2199", "timestamp is negative"
    assert reasons(tmp_path, config) == [(1, late), (2, late), (3, late), (5, early), (6, early)]


def test_nanoseconds_are_cut_to_microseconds(tmp_path: Path) -> None:
    times = pa.array([1_700_000_000_123_456_789, -1], pa.timestamp("ns"))
    found, bad = read(tmp_path, parquet_input(tmp_path, {"t": times}))
    assert ([row[3] for row in found], [row[1] for row in bad]) == ([1_700_000_000_123_456], ["timestamp is negative"])


def test_a_column_that_nothing_is_made_of_rejects_its_rows_not_the_job(tmp_path: Path) -> None:
    found, bad = read(tmp_path, parquet_input(tmp_path, {"u": pa.array([[1], [2], None])}, user_type="string"))
    assert found == []
    assert [row[:2] for row in bad] == [(n, UNREADABLE) for n in range(3)]
    assert json.loads(bad[0][2])["u"] == [1]


# ---- the last resort ---------------------------------------------------------------------------------------


def chunk_of(values: list[str]) -> Chunk:
    column = pa.array(values, pa.string())
    return Chunk(0, np.arange(len(values)), Raw(column), {"x": column}, np.full(len(values), None, dtype=object))


@law
@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.sets(st.sampled_from("abcdefgh"), max_size=3))
def test_only_rows_that_raise_by_themselves_are_unreadable(values: list[str], fatal: set[str]) -> None:
    """Every row comes out once, in order, and the work is asked about log2(R) times for each row that raises."""
    calls = 0

    def work(chunk: Chunk) -> list[tuple[int, str | None]]:
        nonlocal calls
        calls += 1
        if fatal & set(chunk.columns["x"].to_pylist()):
            chunk.reject(np.ones(len(chunk.place), dtype=bool), "half done")
            raise RuntimeError("no")
        return list(zip(chunk.place.tolist(), chunk.reason.tolist(), strict=True))

    found = [row for part in row_by_row(chunk_of(values), work) for row in part]
    assert found == [(n, UNREADABLE if value in fatal else None) for n, value in enumerate(values)]
    assert calls <= 2 + 3 * sum(value in fatal for value in values) * (1 + np.ceil(np.log2(max(2, len(values)))))


def test_work_that_can_do_nothing_is_asked_three_times() -> None:
    calls: list[int] = []

    def work(chunk: Chunk) -> list[str]:
        calls.append(len(chunk.place))
        if (chunk.reason == None).any() or not len(chunk.place):  # noqa: E711 - elementwise
            raise TypeError("no such type")
        return list(chunk.reason)

    [found] = row_by_row(chunk_of(["a"] * 1_000), work)
    assert (found, calls) == ([UNREADABLE] * 1_000, [1_000, 0, 1_000])


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_what_is_no_row_s_fault_ends_the_read(error: type[Exception]) -> None:
    def work(chunk: Chunk) -> None:
        raise error

    with pytest.raises(error):
        list(row_by_row(chunk_of(["a", "b"]), work))


@pytest.mark.parametrize("where", ["values.floats", "json_lines.json.JSONDecoder.decode", "reading.json_fields"])
def test_a_row_on_which_our_own_code_raises_is_quarantined_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A fault of ours that nobody has thought of: a RuntimeError at the rating 777,777."""
    owner, name = where.rsplit(".", 1)
    target: Any = {"values": values, "reading": reading, "json_lines.json.JSONDecoder": json.JSONDecoder}[owner]
    real = getattr(target, name)

    def fragile(*given: Any, **named: Any) -> Any:
        if "777777" in str(given):
            raise RuntimeError("sevens")
        return real(*given, **named)

    monkeypatch.setattr(target, name, fragile)
    lines = [json.dumps({"u": u, "i": 1, "r": r, "t": 1}) for u, r in (("1", 2), ("x", 777777), ("2", 3))]
    config = csv_input(log(tmp_path, "\n".join(lines)), format="jsonl")
    assert reasons(tmp_path, config) == [(len(lines[0]) + 1, UNREADABLE)]


# ---- side tables and candidates ----------------------------------------------------------------------------


def side_rows(path: Path, kind: str, **columns: pa.DataType) -> list[dict[str, Any]]:
    """Every row of a side table with id `id` and column a field each."""
    wanted: dict[str, Any] = {"id": "id", "title": "title", **{f"column {name}": name for name in columns}}
    files = (str(path),)
    source = Source(files, kind, (wanted,), plan(files, kind))
    spec = side_tables.SideSpec(source, pa.string(), {"title": pa.string(), **columns})
    units = [pa.RecordBatch.from_pydict({"id": [0]})]
    return [row for batch in side_tables.side_pass(spec)(units) for row in batch.to_pylist()]


def test_a_bad_title_is_counted_not_fatal(tmp_path: Path) -> None:
    lines = ['{"id": "a", "title": "A"}', '{"id": "b", "title": "\\ud800"}', f'{{"id": "c", "title": {DEEP}']
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    found = side_rows(tmp_path / "items.jsonl", "jsonl")
    assert [(row["id"], row["_unusable"]) for row in found if not row["_unusable"]] == [("a", False)]
    assert [row["_unusable"] for row in found] == [False, True, True]

    titles = pa.array([b"A", b"\xff", b"C"]).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "title": titles}), tmp_path / "items.parquet")
    found = side_rows(tmp_path / "items.parquet", "parquet")
    assert [(row["title"], row["_unusable"]) for row in found] == [("A", False), (None, True), ("C", False)]


def test_a_side_table_s_values_that_raise_are_counted(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"], "title": ["A", "B"], "year": pa.array([[1], None])})
    pq.write_table(table, tmp_path / "items.parquet")
    found = side_rows(tmp_path / "items.parquet", "parquet", year=pa.int64())
    assert [row["_unusable"] for row in found] == [True, True]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
@pytest.mark.parametrize("line", [b"(1,2)\t9223372036854775808", b"(1,2)\t" + HUGE.encode(), b"(1,2)\t3\xff"])
def test_a_candidate_that_is_no_id_is_named(tmp_path: Path, line: bytes, kind: pa.DataType) -> None:
    files = (log(tmp_path, b"(1,2)\t3\n" + line),)
    source = Source(files, "text", ({"line": 0},), plan(files, "text"), "\t", counts=(None,), headers=(False,))
    schema = pa.schema([(n, kind) for n in ("user_id", "item_id", "candidate")] + [("bad", pa.string())])
    batches = given_candidates._pass(source, schema)([pa.RecordBatch.from_pydict({"id": [0]})])
    found = [row["bad"] for batch in batches for row in batch.to_pylist()]
    sound = kind == pa.string() and line.isascii()
    assert found == [None, None if sound else f"8 of {files[0]}"], "the place; what the line holds names a person"


# ---- only odd rows are slow --------------------------------------------------------------------------------

ROWS = 50_000
ODD: dict[str, tuple[Any, Any, list[str], str]] = {
    "integers": (values.integers, str, [" 5", "+7", "x1", HUGE, str(2**63)], "_odd_integers"),
    "floats": (values.floats, lambda n: f"{n}.5", [" 5", "bad", "1_0", "nan "], "_floats_one_by_one"),
    "times": (values.iso_times, lambda n: f"2024-01-{n % 28 + 1:02d}T00:00:00Z", ["soon", "20240131", ""], "_iso"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_value_does_not_send_its_neighbours_the_slow_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50,000 values five are odd: they alone (of ratings: their slices) reach what is slow. Calls, not seconds."""
    read_column, good, odd, slow = ODD[kind]
    texts = [good(n) for n in range(ROWS)]
    for at, text in enumerate(odd):
        texts[(at * 12_347 + 11) % ROWS] = text
    real, seen = getattr(values, slow), Counter[str]()

    def counted(given: Any) -> Any:
        seen[slow] += 1 if isinstance(given, str) else len(given)
        return real(given)

    monkeypatch.setattr(values, slow, counted)
    found, ok = read_column(pa.array(texts))
    assert 0 < seen[slow] <= len(odd) * (SLICE if kind == "floats" else 1)
    alone = [read_column(pa.array([value])) for value in odd]
    for (value, good_one), at in zip(alone, range(len(odd)), strict=True):
        row = (at * 12_347 + 11) % ROWS
        assert ok[row] == good_one[0]
        assert not ok[row] or np.array_equal(found[row], value[0], equal_nan=True)
    assert ok.sum() == ROWS - len(odd) + sum(good_one[0] for _, good_one in alone)


def test_a_broken_byte_does_not_send_its_neighbours_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = charset._is_utf8

    def counted(value: bytes) -> bool:
        nonlocal calls
        calls += 1
        return real(value)

    monkeypatch.setattr(charset, "_is_utf8", counted)
    values = [b"value %d" % n for n in range(ROWS)]
    values[777], values[40_000] = b"\xff", "ü".encode()[:1]
    broken = charset.not_utf8(pa.array(values))
    assert broken is not None
    assert np.flatnonzero(broken).tolist() == [777, 40_000]
    assert calls <= 2 * SLICE


@law
@given(
    st.lists(
        st.one_of(
            st.datetimes(dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31)).map(lambda t: t.isoformat()),
            st.datetimes(timezones=st.timezones()).map(lambda t: t.isoformat()),
            st.from_regex(
                r"20[0-9]{2}-[0-3][0-9]-[0-3][0-9]([T ][0-2][0-9](:[0-9]{2}){0,2}(\.[0-9]{1,9})?)?Z?", fullmatch=True
            ),
            st.text(max_size=6),
        )
    )
)
def test_a_time_means_the_same_alone_and_among_others(texts: list[str]) -> None:
    together = values.iso_times(pa.array(texts, pa.string()))
    for text, value, good in zip(texts, *together, strict=True):
        [alone], [good_alone] = values.iso_times(pa.array([text]))
        assert (value, good) == (alone, good_alone), text


def test_a_latin1_letter_does_not_send_its_neighbours_the_slow_way(tmp_path: Path) -> None:
    """Text in latin-1 is moved to UTF-8 as one block: every letter, wherever it stands."""
    texts = ["plain", "é", "", "aüb", "".join(map(chr, range(160, 256))), "end"]
    path = log(tmp_path, "\n".join(f"{n},x{text},1,1" for n, text in enumerate(texts)).encode("latin-1"))
    config = csv_input(path, encoding="latin-1", header=False, columns={"user": 0, "item": 1, "rating": 2})
    found, bad = read(tmp_path, config)
    assert (bad, [row[1] for row in found]) == ([], [f"x{text}" for text in texts])


# ---- odd rows by the thousand ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", fuzz_rows.TEXTS)
def test_a_thousand_mutated_lines_are_each_a_row_or_a_reject(tmp_path: Path, form: str) -> None:
    """No exception, the same in ranges as whole, and the accounting exact; benchmarks/fuzz_rows.py reads 20,000."""
    _, found = fuzz_rows.check_text(form, 1_000, 7, tmp_path)
    assert found.accepted > 300
    assert len(found.reasons) > 4


def test_a_thousand_mutated_values_of_parquet_columns_of_every_type(tmp_path: Path) -> None:
    _, found = fuzz_rows.check_parquet(1_000, 7, tmp_path)
    assert found.reasons[NOT_IN_CHARSET] > 20
    assert found.total == 1_000


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("form", [*fuzz_rows.TEXTS, "parquet"])
def test_mutated_logs(tmp_path: Path, form: str, seed: int) -> None:
    if form == "parquet":
        fuzz_rows.check_parquet(5_000, seed, tmp_path)
    else:
        fuzz_rows.check_text(form, 5_000, seed, tmp_path)
