"""What a log is, worked out on the driver before a row is read: its files, where their fields are, the units of work.

A unit is about 32 MiB of input: byte ranges of plain text (a line belongs to the range it begins in), whole files where
they are compressed or small, row groups of Parquet files. Units depend on the files alone, never on Spark's settings.
"""

from __future__ import annotations

import csv
import fnmatch
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.artifacts import filesystem, input_files
from ncf_dist.config import Input, SideTable
from ncf_dist.errors import ConfigError, InputError

UNIT_BYTES = 32 * 2**20
BOM = b"\xef\xbb\xbf"
COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
HEADER_LIMIT = 2**20

Field = str | int
"""A column's name, or its position in a line."""


@dataclass(frozen=True)
class Format:
    """How a family of files is written, and what its files are called in a folder."""

    kind: str
    """text | jsonl | parquet"""
    patterns: tuple[str, ...]
    others: tuple[str, ...] = ()
    separator: str = ","
    header: bool | None = False
    """None: the first line is a header if it holds the known names."""
    quote: bool = False
    fields: Mapping[str, Field] | None = None
    """Known places of user, item, rating and timestamp; None: the config names them."""
    count: int | None = None
    numbers: bool = False
    """Whether ids are numbers where the config does not say."""
    example: str = ""


_MOVIELENS = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
_NAMED = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"}
FORMATS = {
    "movielens-dat": Format(
        "text", ("*.dat",), ("users.dat", "movies.dat"), "::", False, False, _MOVIELENS, 4, True,
        "1::1193::5::978300760",
    ),
    "movielens-tsv": Format(
        "text", ("u.data", "*.tsv", "*.rating"), (), "\t", False, False, _MOVIELENS, 4, True,
        "196<TAB>242<TAB>3<TAB>881250949",
    ),
    "movielens-csv": Format(
        "text", ("*.csv",), ("movies.csv", "links.csv", "tags.csv"), ",", None, True, _NAMED, 4, True,
        "1,296,5.0,1147880044",
    ),
    "csv": Format("text", ("*.csv",), separator=",", header=True, quote=True),
    "tsv": Format("text", ("*.tsv", "*.txt"), separator="\t"),
    "jsonl": Format("jsonl", ("*.jsonl", "*.json", "*.ndjson")),
    "parquet": Format("parquet", ("*.parquet", "*.pq")),
}  # fmt: skip

_SIDES: dict[tuple[str, str], tuple[Format, str]] = {
    ("items", "movielens-dat"): (
        Format("text", ("movies.dat",), separator="::", fields={"id": 0, "title": 1}), "latin-1"
    ),
    ("items", "movielens-tsv"): (Format("text", ("u.item",), separator="|", fields={"id": 0, "title": 1}), "latin-1"),
    ("items", "movielens-csv"): (
        Format("text", ("movies.csv",), header=True, quote=True, fields={"id": "movieId", "title": "title"}), "utf-8"
    ),
    ("users", "movielens-dat"): (Format("text", ("users.dat",), separator="::", fields={"id": 0}), "latin-1"),
    ("users", "movielens-tsv"): (Format("text", ("u.user",), separator="|", fields={"id": 0}), "latin-1"),
}  # fmt: skip
"""Side tables that come with MovieLens, and their charset."""


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes start..end of plain text, row groups start..end of Parquet, or all of it (end None)."""

    file: int
    start: int = 0
    end: int | None = None
    first: int | None = None
    """Where the first record of a range begins, once it is known (prepare/records.py)."""


@dataclass(frozen=True)
class Source:
    """Everything a reader on an executor needs. columns: for each file, where each wanted field is."""

    files: tuple[str, ...]
    kind: str
    columns: tuple[dict[str, Field], ...]
    units: tuple[tuple[Piece, ...], ...]
    separator: str = ","
    quote: bool = False
    latin1: bool = False
    counts: tuple[int | None, ...] = ()
    """For each text file, fields of a whole line (None: at least up to the last wanted one)."""
    headers: tuple[bool, ...] = ()
    max_line_bytes: int = 65_536


def find_files(path: str | Sequence[str], patterns: Format | None, name: str) -> list[str]:
    """The files behind `path`, sorted, each once; of a folder or a glob those that the format's patterns choose.
    Raises InputError where there is none."""
    found: set[str] = set()
    for part in [path] if isinstance(path, str) else path:
        files = input_files(part)
        explicit = len(files) == 1 or any(c in part for c in "*?[")
        found.update(files if explicit or patterns is None else select_files(files, patterns, name))
    return sorted(found)


def select_files(files: list[str], form: Format, name: str) -> list[str]:
    """Of the files of a folder, those that belong to the format. Raises InputError."""
    names = {path: posixpath.basename(path) for path in files}
    plain = {path: strip_compression(base) for path, base in names.items()}
    chosen = [
        path
        for path, base in plain.items()
        if base not in form.others and any(fnmatch.fnmatch(base, pattern) for pattern in form.patterns)
    ]
    if not chosen:
        raise InputError(
            f"input folder holds {', '.join(sorted(names.values())[:5])}: no file of format {name}; "
            f"needed {' or '.join(form.patterns)}: set input.path to the ratings file, or input.format to what it is"
        )
    return chosen


def strip_compression(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix}" in COMPRESSION else name


def compression(path: str) -> str | None:
    return COMPRESSION.get(posixpath.splitext(path)[1])


def interactions_source(config: Input, files: Sequence[str]) -> Source:
    """The log's source; wanted fields are user, item, and rating and timestamp where there are any.
    Raises ConfigError, InputError."""
    form = FORMATS[config.format]
    wanted = form.fields or {k: v for k, v in config.columns.model_dump().items() if v is not None}
    return _source(
        form, files, dict(wanted), config.separator, config.header, config.fields, config.encoding == "latin-1",
        config.max_line_bytes,
    )  # fmt: skip


def side_source(kind: str, side: SideTable, family: str, files: Sequence[str]) -> Source:
    """The source of side table `kind`, items or users; wanted fields are id, title and those of `side.columns`."""
    form, encoding, wanted = _side_format(kind, side, family)
    return _source(
        form, files, wanted, side.separator, side.header, None, (side.encoding or encoding) == "latin-1", 2**20
    )


def side_files(kind: str, side: SideTable, family: str) -> list[str]:
    return find_files(side.path, _side_format(kind, side, family)[0], side.format or family)


def _side_format(kind: str, side: SideTable, family: str) -> tuple[Format, str, dict[str, Field]]:
    name = side.format or family
    form, encoding = _SIDES.get((kind, name), (FORMATS[name], "utf-8"))
    if name.startswith("movielens") and (kind, name) not in _SIDES:
        raise ConfigError(f"input.{kind} is of format {name}, which has no such table: set input.{kind}.format")
    known = dict(form.fields or {"id": f"{kind[:-1]}_id"})
    if side.id is not None:
        known["id"] = side.id
    if side.title is not None:
        known["title"] = side.title
    if kind == "users":
        known.pop("title", None)
    return form, encoding, known | {f"column {name}": column.source for name, column in side.columns.items()}


def _source(
    form: Format,
    files: Sequence[str],
    wanted: dict[str, Field],
    separator: str | None,
    header: bool | None,
    count: int | None,
    latin1: bool,
    max_line_bytes: int,
) -> Source:
    if form.kind != "text":
        if odd := [f"{k}: {v}" for k, v in wanted.items() if isinstance(v, int)]:
            raise ConfigError(f"columns {', '.join(odd)} are positions; {form.kind} needs names")
        if form.kind == "parquet":
            for path in files:
                _check_parquet(path, [str(name) for name in wanted.values()])
        return Source(tuple(files), form.kind, (wanted,) * len(files), plan(files, form.kind), latin1=latin1,
                      max_line_bytes=max_line_bytes)  # fmt: skip
    separator = separator or form.separator
    if form.quote and len(separator) != 1:
        raise ConfigError(f"input.separator is {separator!r}; needed one character, as quoted fields are known by it")
    expect = form.header if header is None else header
    heads = [_header(path, separator, form.quote, latin1, expect, wanted) for path in files]
    columns = [_positions(path, head, wanted) for path, head in zip(files, heads, strict=True)]
    counts = [count or form.count or (len(head) if head else None) for head in heads]
    return Source(
        tuple(files), "text", tuple(columns), plan(files, "text"), separator, form.quote, latin1, tuple(counts),
        tuple(head is not None for head in heads), max_line_bytes,
    )  # fmt: skip


def _header(
    path: str, separator: str, quote: bool, latin1: bool, expect: bool | None, wanted: Mapping[str, Field]
) -> list[str] | None:
    """The names in the first line of a text file, or None where it has no header."""
    if expect is False:
        return None
    line = first_line(path).decode("latin-1" if latin1 else "utf-8", errors="replace")
    try:
        names = next(csv.reader([line], delimiter=separator)) if quote else line.split(separator)
    except (StopIteration, csv.Error):
        names = []
    names = [name.strip() for name in names]
    if expect is None and not set(wanted.values()) <= set(names):
        return None
    return names


def _positions(path: str, head: list[str] | None, wanted: Mapping[str, Field]) -> dict[str, Field]:
    """Where each wanted field is in this file's lines."""
    if head is None:
        named = [place for place in wanted.values() if isinstance(place, str)]
        if not named:
            return dict(wanted)
        if dict(wanted) == _NAMED:
            return dict(_MOVIELENS)
        raise ConfigError(
            f"columns {', '.join(named)} are names, but {path} is read without a header; needed positions from 0, "
            "or input.header=true"
        )
    found: dict[str, Field] = {}
    for name, place in wanted.items():
        if isinstance(place, str) and place not in head:
            raise InputError(
                f"{path} has no column {place} for {name} (its first line names {', '.join(head[:20]) or 'none'}); "
                "needed a header with it: set input.columns, or input.header=false and positions"
            )
        found[name] = head.index(place) if isinstance(place, str) else place
    return found


def _check_parquet(path: str, wanted: Sequence[str]) -> None:
    fs, inner = filesystem(path)
    try:
        with fs.open(inner, "rb") as file:
            names = pq.read_schema(file).names
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}); set input.format to what it is") from None
    if missing := [name for name in wanted if name not in names]:
        raise InputError(f"{path} has no column {missing[0]} (it has {', '.join(names[:20])}); set input.columns")


def first_line(path: str) -> bytes:
    """The first line of a text file without its end and byte-order mark, cut at 1 MiB. Raises InputError."""
    fs, inner = filesystem(path)
    try:
        with fs.open(inner, "rb") as raw:
            stream = pa.CompressedInputStream(raw, compression(path)) if compression(path) else raw
            data = bytes(stream.read(HEADER_LIMIT))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read ({error}); mend the file or its name's ending") from None
    return data.removeprefix(BOM).split(b"\n", 1)[0].rstrip(b"\r")


def plan(files: Sequence[str], kind: str) -> tuple[tuple[Piece, ...], ...]:
    """Units of about UNIT_BYTES, in file order; small files share one."""
    units: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    size = 0
    for number, path in enumerate(files):
        for piece, cost in _pieces(number, path, kind):
            if held and size + cost > UNIT_BYTES:
                units.append(tuple(held))
                held, size = [], 0
            held.append(piece)
            size += cost
    if held:
        units.append(tuple(held))
    return tuple(units)


def _pieces(number: int, path: str, kind: str) -> list[tuple[Piece, int]]:
    fs, inner = filesystem(path)
    if kind == "parquet":
        with fs.open(inner, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
        groups = range(metadata.num_row_groups)
        return [(Piece(number, g, g + 1), int(metadata.row_group(g).total_byte_size)) for g in groups]
    size = int(fs.size(inner))
    if compression(path):
        return [(Piece(number), size * 4)]
    starts = range(0, size, UNIT_BYTES)
    return [(Piece(number, s, min(s + UNIT_BYTES, size)), min(UNIT_BYTES, size - s)) for s in starts]


def id_types(config: Input, files: Sequence[str]) -> tuple[pa.DataType, pa.DataType]:
    """The Arrow types of user_id and item_id: int64 or string."""
    form = FORMATS[config.format]
    found = []
    for given, column in ((config.user_type, config.columns.user), (config.item_type, config.columns.item)):
        if given is None and form.kind == "parquet":
            fs, inner = filesystem(files[0])
            with fs.open(inner, "rb") as file:
                kind = pq.read_schema(file).field(str(column)).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            given = "int" if pa.types.is_integer(kind) else "string"
        numbers = form.numbers if given is None else given == "int"
        found.append(pa.int64() if numbers else pa.string())
    return found[0], found[1]
