"""Odd rows by the thousand: mutated lines of every input.format, read and prepared. No exception, and no row lost.

    JAVA_HOME=$(./spark-submit.sh --java-home) .venv/bin/python benchmarks/fuzz_rows.py [--lines 20000] [--seed 1]

Two thirds of the lines of a sound log are mutated: bytes flipped, cut, repeated, and replaced by what has broken
readers (quotes, NULs, half surrogates, bytes of no charset, 5,000 digits, 30,000 brackets, times beyond the year
9999, ...). In Parquet it is the values, in columns of many types. Each log is read whole, and in some 60 ranges, in
this process: both must give the same rows and rejects, one a line where fields have no quotes, and none by the last
resort for rows that raise. Then a night is prepared of it, whose accounting must hold: input = accepted + duplicates +
quarantined. Prints one table; exits 1 at the first fault.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.config import Config, Input
from ncf_dist.errors import InputError
from ncf_dist.prepare import input_files
from ncf_dist.prepare.chunks import UNREADABLE
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.id_types import id_types
from ncf_dist.prepare.ingest import read_one
from ncf_dist.prepare.interactions import RowSpec
from ncf_dist.prepare.records import read_ranges
from ncf_dist.prepare.source import FileRange, Source

ROOT = Path(__file__).parent.parent
NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
PLACED = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
TOKENS = [
    *(b'"', b'""', b'"\n', b',"', b",", b"\t", b"::", b"\\", b"\0", b"\n", b"\r", b"\r\n", b" ", b"-", b"+", b"{"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud83d", b"\\u0000", b"\xef\xbb\xbf", "\u0663\u2028\u00e9".encode()),
    *(b"NaN", b"-Infinity", b"null", b"NULL", b"\\N", b"true", b"1e999", b"1e-9", b"0x1F", b"1_0", b".", b"9" * 30),
    *(b"9223372036854775808", b"-9223372036854775808", b"9999-12-31T23:59:60Z", b"10000-01-01", b"2023-02-29 24:00"),
]  # fmt: skip
HUGE = [b"9" * 5_000, b"[" * 30_000, b'{"a":' * 10_000, b"x" * 70_000, b"\0" * 4_096]


def mutate(line: bytes, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 4)):
        at, to = sorted(rng.integers(0, len(line) + 1, 2).tolist())
        token = HUGE[rng.integers(len(HUGE))] if rng.random() < 0.002 else TOKENS[rng.integers(len(TOKENS))]
        changed = [
            line[:at] + token + line[at:],
            line[:at] + token + line[to:],
            line[:at] + line[to:],
            line[:to] + line[at:],
            line[:at] + bytes(rng.integers(0, 256, 1, np.uint8)) + line[at + 1 :],
            line[:at],
        ]
        line = changed[rng.integers(len(changed))]
    return line


def row(n: int, rng: np.random.Generator) -> tuple[str, str, str, str]:
    user, item = (str(value) for value in rng.integers(0, 60, 2))
    return user, item, str(rng.integers(1, 11) / 2), str(1_000_000_000 + n)


def csv_line(fields: Sequence[str], rng: np.random.Generator) -> str:
    return ",".join(f'"{field}"' if rng.random() < 0.3 else field for field in fields)


def noted(fields: Sequence[str], rng: np.random.Generator) -> str:
    return csv_line(fields, rng) + (',"a ""note"",\nof two lines"' if rng.random() < 0.2 else ",plain")


@dataclass(frozen=True)
class Form:
    """A kind of log. line: a sound one of some fields; head: of the file; options: of the config's section input."""

    line: Callable[[Sequence[str], np.random.Generator], str]
    options: dict[str, Any]
    head: str = ""


TEXTS = {
    "movielens-dat": Form(lambda f, _: "::".join(f), {}),
    "movielens-tsv": Form(lambda f, _: "\t".join(f), {}),
    "movielens-csv": Form(csv_line, {}, "userId,movieId,rating,timestamp\n"),
    "csv": Form(noted, {"columns": NAMED}, "u,i,r,t,note\n"),
    "csv latin-1": Form(noted, {"columns": NAMED, "encoding": "latin-1", "user_type": "int"}, "u,i,r,t,note\n"),
    "tsv": Form(lambda f, _: "\t".join(f), {"columns": PLACED}),
    "tsv iso": Form(
        lambda f, _: "\t".join([*f[:3], str(np.datetime64(int(f[3]), "s"))]), {"columns": PLACED, "time_unit": "iso"}
    ),
    "jsonl": Form(
        lambda f, _: json.dumps({"u": f[0], "i": int(f[1]), "r": float(f[2]), "t": int(f[3]), "x": "\U0001f600"}),
        {"columns": NAMED},
    ),
    "jsonl int": Form(lambda f, _: json.dumps(dict(zip("uirt", f, strict=True))),
                      {"columns": NAMED, "user_type": "int", "item_type": "int"}),
}  # fmt: skip

ODD_INTEGERS = [0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 10**12, 253_402_300_800, 7_258_118_400]
ODD_FLOATS = [0.0, -0.0, 0.5, float("nan"), float("inf"), -1e308, 2.0**53, 1e-320]


def texts(n: int, rng: np.random.Generator) -> pa.Array:
    """Text of which some is not UTF-8."""
    raw = [str(value).encode() for value in rng.integers(0, 60, n)]
    return pa.array([mutate(x, rng) if rng.random() < 0.3 else None if rng.random() < 0.02 else x for x in raw])


def integers(n: int, rng: np.random.Generator) -> list[int]:
    return [ODD_INTEGERS[rng.integers(len(ODD_INTEGERS))] if rng.random() < 0.2 else 10**9 + k for k in range(n)]


def numbers(n: int, rng: np.random.Generator) -> list[float]:
    return [ODD_FLOATS[rng.integers(len(ODD_FLOATS))] if rng.random() < 0.2 else float(k % 60) for k in range(n)]


TYPES: dict[str, Callable[[int, np.random.Generator], pa.Array]] = {
    "string": lambda n, rng: texts(n, rng).view(pa.string()),
    "large_string": lambda n, rng: texts(n, rng).cast(pa.large_binary()).view(pa.large_string()),
    "binary": texts,
    "dictionary": lambda n, rng: texts(n, rng).dictionary_encode(),
    "int64": lambda n, rng: pa.array(integers(n, rng), pa.int64()),
    "uint64": lambda n, rng: pa.array([abs(value) for value in integers(n, rng)], pa.uint64()),
    "double": lambda n, rng: pa.array(numbers(n, rng)),
    "decimal": lambda n, rng: pa.array([Decimal(value) for value in integers(n, rng)], pa.decimal128(38, 2)),
    "bool": lambda n, rng: pa.array((rng.random(n) < 0.5).tolist()),
    "list": lambda n, rng: pa.array([[value] for value in integers(n, rng)]),
    "date": lambda n, rng: pa.array(rng.integers(-(2**31), 2**31, n).astype(np.int32)).cast(pa.date32()),
    "ms": lambda n, rng: pa.array(integers(n, rng)).cast(pa.timestamp("ms")),
    "us": lambda n, rng: pa.array(integers(n, rng)).cast(pa.timestamp("us", "UTC")),
    "ns": lambda n, rng: pa.array(integers(n, rng)).cast(pa.timestamp("ns")),
    "null": lambda n, rng: pa.nulls(n),
}
USUAL = ("string", "int64", "double", "ms")
"""The types of the Parquet log that a night is prepared of: user, item, rating, timestamp."""


def write_text(name: str, lines: int, seed: int, folder: Path) -> tuple[Input, int | None]:
    """(the section input, how many rows there must be, or None where records may hold line breaks)."""
    rng, form = np.random.default_rng(seed), TEXTS[name]
    body = [form.line(row(n, rng), rng).encode() for n in range(lines)]
    data = b"\n".join(mutate(line, rng) if rng.random() < 2 / 3 else line for line in body)
    path = folder / "log.txt"
    path.write_bytes(form.head.encode() + data)
    config = Input.model_validate({"path": str(path), "format": name.split(" ")[0], **form.options})
    rows = data.count(b"\n") + (not data.endswith(b"\n"))
    return config, None if FORMATS[config.format].quote else rows


def write_parquet(kinds: Sequence[str], lines: int, seed: int, folder: Path, **options: Any) -> tuple[Input, int]:
    rng = np.random.default_rng(seed)
    table = pa.table({name: TYPES[kind](lines, rng) for name, kind in zip("uirt", kinds, strict=True)})
    pq.write_table(table, folder / "log.parquet", row_group_size=max(1, lines // 3))
    path = str(folder / "log.parquet")
    return Input.model_validate({"path": path, "format": "parquet", "columns": NAMED, **options}), lines


@dataclass(frozen=True)
class Rows:
    """What came of a log: rows and rejects by reason, and a digest of all their values, in order."""

    accepted: int
    reasons: dict[str, int]
    digest: str

    @property
    def total(self) -> int:
        return self.accepted + sum(self.reasons.values())


def read(config: Input, staging: Path, range_bytes: int | None = None) -> Rows:
    """The log as prepare's tasks read it, in ranges of `range_bytes` where that is given."""
    path = str(config.path)
    source = interactions_source(config, input_files.InputFiles((path,)))
    if range_bytes:
        size = Path(path).stat().st_size
        ranges = [(FileRange(0, at, min(size, at + range_bytes)),) for at in range(0, size, range_bytes)]
        source = replace(source, units=tuple(ranges))
    types = id_types(config, input_files.InputFiles((path,)))
    spec = RowSpec(source, *types, config.time_unit, 2**62, config.rating_range, str(staging))

    def each(known: Source, units: Sequence[int]) -> list[dict[str, Any]]:
        return [read_one(replace(spec, source=known), unit) for unit in units]

    units = read_ranges(source, each)
    digest = hashlib.sha256()
    counts = dict.fromkeys(("rows", "rejects"), 0)
    for kind in counts:
        for unit in units:
            for file in unit["files"][kind]:
                table = pq.ParquetFile(file).read()
                counts[kind] += table.num_rows
                digest.update("\n".join(map(repr, table.to_pylist())).encode() + b"\n")
    reasons: collections.Counter[str] = collections.Counter()
    for unit in units:
        reasons.update(unit["reasons"])
    total = sum(unit["rows"] for unit in units)
    assert total == counts["rows"] + counts["rejects"], f"{total} rows became {counts}"
    assert sum(reasons.values()) == counts["rejects"], f"{reasons} are not {counts['rejects']} rejects"
    return Rows(counts["rows"], dict(sorted(reasons.items())), digest.hexdigest())


def check_text(name: str, lines: int, seed: int, folder: Path) -> tuple[Input, Rows]:
    """Raises AssertionError where a row was lost, or came out otherwise in ranges; others are a reader's fault."""
    config, rows = write_text(name, lines, seed, folder)
    found = read(config, folder / "whole")
    assert rows in (None, found.total), f"{found.total} rows of {rows} lines"
    assert UNREADABLE not in found.reasons, f"a reader raised: {found.reasons}"
    size = Path(str(config.path)).stat().st_size
    again = read(config, folder / "ranges", max(300, size // 61))
    assert found == again, f"in ranges: {again}, whole: {found}"
    return config, found


def check_parquet(lines: int, seed: int, folder: Path) -> tuple[Input, Rows]:
    """Every type in every column once; returns what came of the usual ones. A type that the driver refuses is fine."""
    for shift, kind in enumerate(TYPES):
        kinds = [list(TYPES)[(shift + k) % len(TYPES)] for k in (0, 3, 7, 11)]
        for options in ({}, {"user_type": "string", "item_type": "int"}, {"item_type": "string", "time_unit": "iso"}):
            try:
                config, rows = write_parquet(kinds, lines // 20, seed, folder, **options)
                assert read(config, folder / kind).total == rows, f"rows were lost in {kinds}"
            except InputError:
                continue
    config, rows = write_parquet(USUAL, lines, seed, folder)
    found = read(config, folder / "usual")
    assert found.total == rows, f"{found.total} rows of {rows}"
    return config, found


def check_prepare(config: Input, found: Rows, folder: Path) -> dict[str, Any]:
    """The accounting of a whole night."""
    from ncf_dist.prepare.pipeline import prepare

    tree = {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "input": config.model_dump(mode="json") | {"max_bad_fraction": 1.0},
        "negatives": {"candidates": 5, "per_positive": 1},
        "spark": {"shuffle_partitions": 4},
    }
    rows: dict[str, Any] = prepare(Config.model_validate(tree), "2099-01-01").extra["rows"]
    quarantined = sum(rows["quarantined"].values())
    assert rows["input"] == rows["accepted"] + rows["duplicates"] + quarantined == found.total, f"{rows}, read: {found}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=20_000, help="mutated lines a format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--read-only", action="store_true", help="prepare no night")
    args = parser.parse_args()
    print(f"{'format':14} {'rows':>8} {'accepted':>9} {'duplicates':>11} {'quarantined':>12} {'reasons':>8}")
    results: dict[str, Any] = {}
    for name in (*TEXTS, "parquet"):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            check = check_parquet if name == "parquet" else lambda *given, name=name: check_text(name, *given)
            config, found = check(args.lines, args.seed, folder)
            rows = {} if args.read_only else check_prepare(config, found, folder)
        bad = sum(found.reasons.values())
        print(
            f"{name:14} {found.total:8,} {rows.get('accepted', found.accepted):9,} {rows.get('duplicates', '-'):>11} "
            f"{bad:12,} {len(found.reasons):8}",
            flush=True,
        )
        results[name] = {"rows": found.total, "quarantined": found.reasons, **rows}
    path = ROOT / "benchmarks/results/fuzz_rows.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"lines": args.lines, "seed": args.seed, "formats": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
