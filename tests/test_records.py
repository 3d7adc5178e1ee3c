"""Records of several lines: what Python's csv module wrote is read back as it reads it, wherever the file is cut; and a
quote that does not end costs its record alone.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ncf_dist.prepare import reading, records, source
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.input_files import InputFiles
from ncf_dist.prepare.records import Quotes, read_ranges, whole_records, with_whole_files
from ncf_dist.prepare.source import FileRange, Source
from tests.test_reading import _split, csv_input, log, read

law = settings(deadline=None, max_examples=100)
OPEN = "a quoted field does not end"
FIELD = st.text(st.sampled_from(list('ab",;\n\r ü€')), max_size=6)
BYTES = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", "bc", "ü", '"\n', ',"', '",']), max_size=50)
SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 21, 10**6])


def cut(data: bytes, quotes: Quotes, size: int, block: int) -> list[tuple[int, bytes]]:
    """(offset, record) of data that is read in ranges of `size` bytes, in blocks of `block`."""
    ranges = [(FileRange(0, at, min(at + size, len(data))),) for at in range(0, len(data), size)]

    def range_of(known: Source, number: int) -> dict[str, Any]:
        [piece] = known.units[number]
        stream = io.BytesIO(data)
        found: list[tuple[int, bytes]] = []
        first = piece.first
        if first is None:
            first = quotes.guess(stream, piece.start) if piece.start else 0
        ranges = whole_records(stream, first, piece.end, quotes, block)
        while True:
            try:
                offset, lines, starts, ends = next(ranges)
            except StopIteration as done:
                return {"unit": number, "spans": [(first, done.value)], "found": found}
            found += [(offset + s, lines[s:e]) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]

    def each(known: Source, units: Sequence[int]) -> list[dict[str, Any]]:
        return [range_of(known, number) for number in units]

    whole = Source(("x",), "text", ({},), tuple(ranges), quote=True)
    return [record for stats in read_ranges(whole, each) for record in stats["found"]]


def written(rows: Sequence[Sequence[str]], quoting: Any, end: str, separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator=end, delimiter=separator).writerows(rows)
    return out.getvalue()


@law
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(FIELD, min_size=n, max_size=n), min_size=1, max_size=12)),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(",;€"),
    SIZES,
    SIZES,
    st.booleans(),
)
def test_what_csv_wrote_is_read_as_csv_reads_it(
    rows: list[list[str]], quoting: Any, end: str, separator: str, size: int, block: int, counted: bool
) -> None:
    text = written(rows, quoting, end, separator)
    quotes = Quotes(separator, "utf-8", 1_000, len(rows[0]) if counted else None)
    expected = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    assume(expected == rows)  # It does not read back each carriage return that it wrote.
    found = cut(text.encode(), quotes, size, block)
    parsed = [next(csv.reader([record.decode()], delimiter=separator, strict=True)) for _, record in found]
    assert parsed == expected
    assert b"".join(record for _, record in found) == text.encode()
    assert [at for at, _ in found] == [sum(len(r) for _, r in found[:n]) for n in range(len(found))]


@law
@given(BYTES, SIZES, SIZES, st.sampled_from([3, 10, 1_000]), st.sampled_from([None, 2]))
def test_any_text_is_cut_into_the_same_records_wherever_a_range_begins(
    parts: list[str], size: int, block: int, max_bytes: int, fields: int | None
) -> None:
    """Nothing is lost, nothing comes twice; and a record is its first line, or a whole of at most max_bytes."""
    data = "".join(parts).encode()
    found = cut(data, Quotes(",", "utf-8", max_bytes, fields), size, block)
    expected = one_by_one(data, max_bytes)
    assert [at for at, _ in found] == [at for at, _ in expected]
    for (_, record), (_, whole) in zip(found, expected, strict=True):
        assert record == whole or (max_bytes < len(record) and whole.startswith(record)), "too long a line may be cut"


def one_by_one(data: bytes, max_bytes: int) -> list[tuple[int, bytes]]:
    """The rule in other words, for a reader that holds everything."""
    found: list[tuple[int, bytes]] = []
    at, lines = 0, _split(data)
    while lines:
        count = 1
        for n in range(1, len(lines) + 1):
            record = b"".join(lines[:n])
            if len(record.removesuffix(b"\n").removesuffix(b"\r") if record.endswith(b"\n") else record) > max_bytes:
                break
            try:
                next(csv.reader([line.decode() for line in lines[:n]], strict=True))
            except csv.Error as error:
                if "unexpected end" in str(error):
                    continue
                break
            count = n
            break
        found.append((at, b"".join(lines[:count])))
        at += len(found[-1][1])
        lines = lines[count:]
    return found


PLAIN = st.text(st.sampled_from(list("ab ü")), min_size=1, max_size=4)
INNER = st.builds(lambda a, b, c: a + b + c, PLAIN, st.text(st.sampled_from(list('a",\n')), max_size=5), PLAIN)


@law
@given(
    st.lists(st.tuples(PLAIN, INNER), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(['x,"never', '"a"b,c', 'x,"a""'])), max_size=3)
    | st.lists(st.tuples(st.integers(0, 12), st.sampled_from(['x,"', '"'])), max_size=1),
    SIZES,
)
def test_a_quote_that_does_not_end_costs_its_record_alone(
    rows: list[tuple[str, str]], bad: list[tuple[int, str]], size: int
) -> None:
    """Whatever stands around it is read as if it were not there. (Two quotes at line ends would be one field.)"""
    lines = [written([row], csv.QUOTE_MINIMAL, "\n") for row in rows]
    mixed = [*lines]
    for at, line in bad:
        mixed.insert(min(at, len(mixed)), line + "\n")
    found = [record.decode() for _, record in cut("".join(mixed).encode(), Quotes(",", "utf-8", 1_000, 2), size, 64)]
    closed = {line + "\n" for _, line in bad}
    assert [record for record in found if record not in closed] == [line for line in lines if line not in closed]


# ---- through the reader ------------------------------------------------------------------------------------

NOTES = ["plain", "two\nlines", 'a "word", and\r\nmore', "9999,501,5,1710000000,fine", "\n\n,\n", "é" * 20]


@pytest.mark.parametrize("size", [7, 50, 2**25])
@pytest.mark.parametrize("form", ["csv", "latin-1", "movielens-csv", "no header", "gzip", "byte-order mark"])
def test_line_breaks_in_fields_are_read_and_no_half_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, form: str
) -> None:
    """Ranges of any size give the rows that csv.reader gives; a rejected one is placed where its record begins."""
    monkeypatch.setattr(source, "UNIT_BYTES", size)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    names = ["userId", "movieId", "rating", "timestamp"] if form == "movielens-csv" else ["u", "i", "r", "t", "note"]
    rows = [[str(n), f"i{n}\n{n}" if form != "movielens-csv" else str(n), "4", str(n + 1), note] for n, note in
            enumerate(NOTES * 2)]  # fmt: skip
    rows[7][2] = "good\nor bad"
    rows[10][0] = ""
    text = written([names, *(row[: len(names)] for row in rows)], csv.QUOTE_MINIMAL, "\n")
    options: dict[str, Any] = {"format": form} if form == "movielens-csv" else {}
    if form == "no header":
        text = text.split("\n", 1)[1]
        options = {"header": False, "columns": {"user": 0, "item": 1, "rating": 2, "timestamp": 3}}
    data = text.encode("latin-1" if form == "latin-1" else "utf-8")
    data = b"\xef\xbb\xbf" + data if form == "byte-order mark" else data
    options |= {"encoding": "latin-1"} if form == "latin-1" else {}
    path = log(tmp_path, gzip.compress(data) if form == "gzip" else data, "log.csv.gz" if form == "gzip" else "log.csv")
    found, bad = read(tmp_path, csv_input(path, **options))
    kind = int if form == "movielens-csv" else str
    expected = [(kind(u), kind(i), float(r), int(t) * 10**6) for u, i, r, t, _ in rows if u and r == "4"]
    assert found == expected
    raw = written([rows[7][: len(names)]], csv.QUOTE_MINIMAL, "\n")
    empty = "user id is not an integer" if form == "movielens-csv" else "empty user id"
    assert [row[1] for row in bad] == ["rating is not a number", "empty user id" if form else empty]
    assert bad[0][0] == data.index(raw.encode("latin-1" if form == "latin-1" else "utf-8"))
    assert bad[0][2] == raw.rstrip("\n")


def test_a_column_s_name_may_hold_a_line_break(tmp_path: Path) -> None:
    path = log(tmp_path, '"the\nuser",i,r,t\n1,2,3,4\n')
    found, bad = read(tmp_path, csv_input(path, columns={"user": "the\nuser", "item": "i"}))
    assert (bad, [row[:2] for row in found]) == ([], [("1", "2")])


@pytest.mark.parametrize("size", [30, 400, 2**25])
def test_an_open_quote_far_from_its_end_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The next quote is behind max_line_bytes, or nowhere: the lines between are rows."""
    monkeypatch.setattr(source, "UNIT_BYTES", size)
    lines = [f"{n},i,3,{n}" for n in range(60)]
    lines[20], lines[50] = '20,"i,3,20', '50,i,3,"50'
    path = log(tmp_path, "\n".join(["u,i,r,t", *lines]))
    found, bad = read(tmp_path, csv_input(path, max_line_bytes=200))
    assert [row[0] for row in found] == [str(n) for n in range(60) if n not in (20, 50)]
    assert [row[1:] for row in bad] == [(OPEN, lines[20]), (OPEN, lines[50])]
    text = Path(path).read_text()
    assert [row[0] for row in bad] == [text.index(lines[20]), text.index(lines[50])]


def test_a_record_longer_than_a_line_may_be_is_not_read_whole(tmp_path: Path) -> None:
    """At most max_line_bytes a record: one byte more, and it is taken for a quote that does not end."""
    head, good = "u,i,r,t,note\n", '1,2,3,4,"{}\n"\n'
    room = 60 - len(good.format("").rstrip("\n"))
    for more, count in ((0, 1), (1, 0)):
        text = head + good.format("x" * (room + more))
        found, bad = read(tmp_path, csv_input(log(tmp_path, text), max_line_bytes=60))
        assert len(found) == count
        assert [row[1] for row in bad] == ([] if count else [OPEN, OPEN])


def test_a_field_of_a_megabyte_is_a_field(tmp_path: Path) -> None:
    """The csv module's own limit is 131,072 characters."""
    path = log(tmp_path, 'u,i,r,t,note\n1,2,3,4,"' + "long\n" * 200_000 + '"\n5,6,3,8,x\n')
    found, bad = read(tmp_path, csv_input(path, max_line_bytes=2**21))
    assert ([row[0] for row in found], bad) == (["1", "5"], [])


def test_a_range_is_read_again_only_where_its_guess_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is right in usual text. Where fields hold lines that look like records, one more round does."""
    monkeypatch.setattr(source, "UNIT_BYTES", 1_000)
    rows = [[str(n), f'"{n}"', "3", "1", "some\nlines, and\nmore" if n % 3 == 0 else "plain"] for n in range(2_000)]
    for notes, rounds in ((["plain"] * 2_000, 1), ([row[4] for row in rows], 1), (["x\n1,2,3,4,5\n"] * 2_000, 2)):
        lines = [[*row[:4], note] for row, note in zip(rows, notes, strict=True)]
        path = log(tmp_path, written([["u", "i", "r", "t", "note"], *lines], csv.QUOTE_MINIMAL, "\n"))
        made = interactions_source(csv_input(path), InputFiles((path,)))
        reads: list[int] = []

        def each(known: Source, units: Sequence[int], reads: list[int] = reads) -> list[dict[str, Any]]:
            reads.append(len(units))
            found = []
            for n in units:
                spans: list[records.RecordSpan] = []
                total = sum(len(chunk.place) for chunk in reading.read_unit(known, known.units[n], spans))
                found.append({"unit": n, "spans": spans, "rows": total})
            return found

        assert sum(stats["rows"] for stats in read_ranges(made, each)) == 2_000
        assert reads[0] == len(made.units) > 40
        assert len(reads) == rounds


class Counted(np.ndarray[Any, np.dtype[np.int64]]):
    """An array that adds up how many of its elements were copied out or picked."""

    touched = 0

    def tolist(self) -> Any:
        Counted.touched += self.size
        return super().tolist()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(key, slice):  # A slice is a view: nothing is copied yet.
            Counted.touched += int(np.size(found))
        return found


@pytest.mark.parametrize("line", [b'u,"x\ny",1\n', b'u,5" disk,1\n', b'u,"x"y,1\n', b'u,"x""\n",1\n'])
def test_the_work_on_odd_records_grows_with_the_text_not_with_its_square(
    line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Picked elements, not seconds: a few for each line, however many lines the block has."""
    real = records.lines_of
    monkeypatch.setattr(records, "lines_of", lambda block: tuple(part.view(Counted) for part in real(block)))
    for count in (500, 4_000):
        Counted.touched = 0
        starts, ends, rest = Quotes(",", "utf-8", 1_000).records(line * count, True)
        assert (len(starts), len(ends), rest) == (count, count, len(line) * count)
        assert 0 < Counted.touched <= 12 * count * line.count(b"\n")


def test_files_of_a_side_table_with_quotes_stay_whole() -> None:
    """Nobody reads their ranges again."""
    units = ((FileRange(0, 0, 5),), (FileRange(0, 5, 9), FileRange(1, 0, 3)), (FileRange(2),))
    cut_up = Source(("a", "b", "c"), "text", ({},) * 3, units, quote=True)
    assert with_whole_files(cut_up).units == ((FileRange(0, 0, 9),), (FileRange(1, 0, 3),), (FileRange(2),))
    plain = Source(("a", "b", "c"), "text", ({},) * 3, units)
    assert with_whole_files(plain) is plain
