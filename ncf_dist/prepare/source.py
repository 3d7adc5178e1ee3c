"""What a log is, worked out on the driver before a row is read: its files, where their fields are, the units of work.

A unit is about 32 MiB of input: byte ranges of plain text (a line belongs to the range it begins in), whole files where
they are compressed or small, row groups of Parquet files. Units depend on the files alone, never on Spark's settings.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat

import pyarrow as pa

from ncf_dist.config import Input, SideTable
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.files import filesystem
from ncf_dist.prepare.files import Found, find_files
from ncf_dist.prepare.footers import Footer, footer
from ncf_dist.prepare.formats import FORMATS, NAMED, SIDES, UNNAMED, Field, Format, compression
from ncf_dist.prepare.streams import HEADER_LIMIT, SNIFFED, Written, head, wide

UNIT_BYTES = 32 * 2**20
log = logging.getLogger(__name__)


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
    """Everything a reader on an executor needs. columns: for each file, where each wanted field is; values: for each
    file, the wanted fields that are the same in all its rows, as its folder or table says."""

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
    written: tuple[Written, ...] = ()
    """For each text file, how it is written; none: plain."""
    values: tuple[Mapping[str, pa.Scalar], ...] = ()

    def how(self, file: int) -> Written:
        return self.written[file] if self.written else "plain"


@dataclass(frozen=True)
class Wanted:
    """What is looked for in each file, and what the config calls it. key: `input` or a side table's."""

    places: Mapping[str, Field]
    key: str = "input"
    separator: str | None = None
    header: bool | None = None
    count: int | None = None
    latin1: bool = False
    max_line_bytes: int = 65_536
    names: Mapping[str, str] = field(default_factory=dict)
    """Field → its key in the config; default: `<key>.columns.<field>`."""

    def key_of(self, name: str) -> str:
        return self.names.get(name, f"{self.key}.columns.{name}")


def interactions_source(config: Input, files: Found) -> Source:
    """The log's source; wanted fields are user, item, and rating and timestamp where there are any.
    Raises ConfigError, InputError."""
    form = FORMATS[config.format]
    places = form.fields or {k: v for k, v in config.columns.model_dump().items() if v is not None}
    wanted = Wanted(
        places, "input", config.separator, config.header, config.fields, config.encoding == "latin-1",
        config.max_line_bytes,
    )  # fmt: skip
    return _source(form, files, wanted)


def side_source(kind: str, side: SideTable, family: str, files: Found) -> Source:
    """The source of side table `kind`, items or users; wanted fields are id, title and those of `side.columns`."""
    form, encoding, places = _side_format(kind, side, family)
    key = f"input.{kind}"
    names = {"id": f"{key}.id", "title": f"{key}.title"}
    names |= {f"column {name}": f"{key}.columns.{name}.from" for name in side.columns}
    latin1 = side.encoding == "latin-1" if side.encoding else encoding == "latin-1" and not _all_utf8(files.paths)
    return _source(form, files, Wanted(places, key, side.separator, side.header, None, latin1, 2**20, names))


def side_files(kind: str, side: SideTable, family: str) -> Found:
    return find_files(
        side.path, _side_format(kind, side, family)[0], side.format or family, f"input.{kind}.path"
    )  # fmt: skip


def _side_format(kind: str, side: SideTable, family: str) -> tuple[Format, str, dict[str, Field]]:
    name = side.format or family
    form, encoding = SIDES.get((kind, name), (FORMATS[name], "utf-8"))
    if name.startswith("movielens") and (kind, name) not in SIDES:
        raise ConfigError(f"input.{kind} is of format {name}, which has no such table: set input.{kind}.format")
    known = dict(form.fields or {"id": f"{kind[:-1]}_id"})
    if side.id is not None:
        known["id"] = side.id
    if side.title is not None:
        known["title"] = side.title
    if kind == "users":
        known.pop("title", None)
    return form, encoding, known | {f"column {name}": column.source for name, column in side.columns.items()}


def _all_utf8(files: Iterable[str]) -> bool:
    """Whether a side table is UTF-8 although its family is Latin-1 (MovieLens 10M): titles of Latin-1 are not."""
    try:
        for path in files:
            fs, inner = filesystem(path)
            fs.cat_file(inner).decode()
    except UnicodeDecodeError:
        return False
    return True


def _source(form: Format, files: Found, wanted: Wanted) -> Source:
    if form.kind != "text" and (odd := [name for name, place in wanted.places.items() if isinstance(place, int)]):
        raise ConfigError(
            f"columns {', '.join(f'{wanted.key_of(k)}: {wanted.places[k]}' for k in odd)} are positions; "
            f"{form.kind} needs names"
        )
    given = [_given(path, files, wanted) for path in files.paths]
    if form.kind == "parquet":
        return _parquet_source(files, given, wanted)
    rest = [{k: v for k, v in wanted.places.items() if k not in known} for known in given]
    limit = HEADER_LIMIT if form.header is not False or wanted.header else SNIFFED
    heads = [head(path, limit) for path in files.paths]
    how = tuple(written for _, written in heads)
    source = Source(
        files.paths, form.kind, tuple(rest), plan(files.paths, form.kind, how), latin1=wanted.latin1,
        max_line_bytes=wanted.max_line_bytes, written=how, values=tuple(given),
    )  # fmt: skip
    if form.kind == "jsonl":
        return source
    separator = wanted.separator or form.separator
    if form.quote and len(separator) != 1:
        raise ConfigError(
            f"{wanted.key}.separator is {separator!r}; needed one character, as quoted fields are known by it"
        )
    names = [
        _header(data, separator, form.quote, "latin-1" if wanted.latin1 and not wide(how) else "utf-8",
                form.header if wanted.header is None else wanted.header, wanted.places)
        for data, how in heads
    ]  # fmt: skip
    counts = [wanted.count or form.count or (len(header) if header else None) for header in names]
    columns, values = [], []
    for path, header, known in zip(files.paths, names, given, strict=True):
        # A column that the file has itself goes before one that its folder's name says.
        own = {k for k in known if header is not None and wanted.places[k] in header}
        values.append({k: v for k, v in known.items() if k not in own})
        places = {k: v for k, v in wanted.places.items() if k not in values[-1]}
        columns.append(_positions(path, header, replace(wanted, places=places)))
    return replace(
        source, columns=tuple(columns), values=tuple(values), separator=separator, quote=form.quote,
        counts=tuple(counts), headers=tuple(header is not None for header in names),
    )  # fmt: skip


def _given(path: str, files: Found, wanted: Wanted) -> dict[str, pa.Scalar]:
    """The wanted fields that the folder of a file, or the log of its table, says."""
    known = files.values.get(path, {})
    return {name: known[str(place)] for name, place in wanted.places.items() if str(place) in known}


def _parquet_source(files: Found, given: Sequence[Mapping[str, pa.Scalar]], wanted: Wanted) -> Source:
    footers = [footer(path) for path in files.paths]
    columns: list[dict[str, Field]] = []
    values: list[dict[str, pa.Scalar]] = []
    for found, known in zip(footers, given, strict=True):
        own = {name: place for name, place in wanted.places.items() if found.type_of(str(place)) is not None}
        missing = [name for name in wanted.places if name not in own and name not in known]
        if missing and found.rows:
            place = wanted.places[missing[0]]
            raise InputError(
                f"{found.path} has no column {place} (it has {', '.join(found.names[:20])}); set "
                f"{wanted.key_of(missing[0])} to one of these"
            )
        columns.append(own)
        values.append({name: value for name, value in known.items() if name not in own})
    units = _units(_row_groups(number, found) for number, found in enumerate(footers))
    return Source(files.paths, "parquet", tuple(columns), units, values=tuple(values))


def _header(
    data: bytes, separator: str, quote: bool, charset: str, expect: bool | None, places: Mapping[str, Field]
) -> list[str] | None:
    """The names in the first line of a text file, or None where it has no header."""
    if expect is False:
        return None
    line = data.split(b"\n", 1)[0].rstrip(b"\r").decode(charset, errors="replace")
    try:
        # A quoted name may hold a line break.
        lines = io.StringIO(data.decode(charset, errors="replace"), newline="\n")
        names = next(csv.reader(lines, delimiter=separator)) if quote else line.split(separator)
    except (StopIteration, csv.Error):
        names = []
    names = [name.strip() for name in names]
    if expect is None and not set(places.values()) <= set(names):
        return None
    return names


def _positions(path: str, header: list[str] | None, wanted: Wanted) -> dict[str, Field]:
    """Where each wanted field is in this file's lines."""
    if header is None:
        named = [place for place in wanted.places.values() if isinstance(place, str)]
        if not named:
            return dict(wanted.places)
        if dict(wanted.places) == NAMED:
            return dict(UNNAMED)
        raise ConfigError(
            f"columns {', '.join(named)} are names, but {path} is read without a header; needed positions from 0 "
            f"({', '.join(wanted.key_of(name) for name in wanted.places)}), or {wanted.key}.header=true"
        )
    found: dict[str, Field] = {}
    for name, place in wanted.places.items():
        key = wanted.key_of(name)
        if isinstance(place, int) and place >= len(header):
            raise InputError(
                f"{path} has no position {place} for {name}: its first line has {len(header)} fields, 0 to "
                f"{len(header) - 1}; set {key} to one of these, or {wanted.key}.separator to what parts them"
            )
        if isinstance(place, str) and place not in header:
            raise InputError(
                f"{path} has no column {place} for {name} ({_told(header)}); "
                f"needed a header with it: set {key}, or {wanted.key}.header=false and positions"
            )
        found[name] = header.index(place) if isinstance(place, str) else place
    return found


def _told(header: Sequence[str]) -> str:
    """A first line for a message; one that is a row of data is about a person."""
    if any(re.fullmatch(r"(?=.*\d)[-+.:\d\sTZ]+|.*@.*", name) for name in header):
        return f"its first line has {len(header)} fields, and looks like a row and not like names"
    return f"its first line names {', '.join(header[:20]) or 'none'}"


def place_of(name: str, place: int) -> str:
    """Where a row of format `name` begins. A message says this instead of what is there, which is about a person."""
    return f"{'row' if FORMATS[name].kind == 'parquet' else 'the line at byte'} {place:,}"


def plan(
    files: Sequence[str], kind: str, written: Iterable[Written] = repeat("plain")
) -> tuple[tuple[Piece, ...], ...]:
    """Units of about UNIT_BYTES, in file order; small files share one."""
    if kind == "parquet":
        return _units(_row_groups(number, footer(path)) for number, path in enumerate(files))
    return _units(_pieces(number, path, how) for number, (path, how) in enumerate(zip(files, written, strict=False)))


def _row_groups(number: int, found: Footer) -> list[tuple[Piece, int]]:
    return [(Piece(number, group, group + 1), size) for group, size in found.groups]


def _units(pieces: Iterable[Sequence[tuple[Piece, int]]]) -> tuple[tuple[Piece, ...], ...]:
    """pieces: of each file, with their bytes."""
    units: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    size = 0
    for piece, cost in (each for of_file in pieces for each in of_file):
        if held and size + cost > UNIT_BYTES:
            units.append(tuple(held))
            held, size = [], 0
        held.append(piece)
        size += cost
    if held:
        units.append(tuple(held))
    return tuple(units)


def _pieces(number: int, path: str, how: Written) -> list[tuple[Piece, int]]:
    fs, inner = filesystem(path)
    size = int(fs.size(inner))
    if compression(path):
        return [(Piece(number), size * 4)]
    if wide(how):
        return [(Piece(number), size)]
    starts = range(0, size, UNIT_BYTES)
    return [(Piece(number, s, min(s + UNIT_BYTES, size)), min(UNIT_BYTES, size - s)) for s in starts]


def id_types(
    config: Input, files: Found, before: tuple[pa.DataType | None, pa.DataType | None] = (None, None)
) -> tuple[pa.DataType, pa.DataType]:
    """The Arrow types of user_id and item_id, int64 or string: what the config says, else what the columns of all files
    are (empty ones are no evidence), else what the index has. before: the types of the index that this night extends.
    Raises InputError where they differ from it: an id keeps its type for ever."""
    form = FORMATS[config.format]
    footers = [footer(path) for path in files.paths] if form.kind == "parquet" else []
    found = []
    for side, known in zip(("user", "item"), before, strict=True):
        given, why = getattr(config, f"{side}_type"), f"input.{side}_type is set"
        if given is None and form.kind == "parquet":
            given, why = _evidence(side, str(getattr(config.columns, side)), footers, files)
            if given is None and known is not None:
                given = "int" if known == pa.int64() else "string"
        elif given is None:
            given, why = "int" if form.numbers else "string", f"format {config.format} has them so"
        kind = pa.int64() if given == "int" else pa.string()
        if known is not None and known != kind:
            other = "int" if known == pa.int64() else "string"
            words = {"int": "integers", "string": "text"}
            raise InputError(
                f"{side} ids of tonight's log are {words[given or 'string']} ({why}), those of the index that this "
                f"night extends are {words[other]}; needed one type for ever: set input.{side}_type={other} to read "
                "them as such, or paths.lake to a new lake"
            )
        found.append(kind)
    return found[0], found[1]


def _evidence(side: str, column: str, footers: Sequence[Footer], files: Found) -> tuple[str | None, str]:
    """What the files say of an id's type, and which file says so; int where all of them are numbers."""
    said: dict[str, str] = {}
    for found in footers:
        kind = found.type_of(column)
        if kind is None and column in files.values.get(found.path, {}):
            kind = _type_of_value(files.values[found.path][column])
        if found.rows and kind is not None and not pa.types.is_null(kind) and not found.all_null(column):
            if pa.types.is_nested(kind):
                raise InputError(
                    f"{found.path} has {kind} in column {column}; needed a number or text: set input.columns.{side} to "
                    f"a column of such, or to a field inside of it, as {column}.id"
                )
            numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
            said.setdefault("int" if numbers else "string", f"{found.path} has {kind} in column {column}")
    if len(said) > 1:
        log.warning("%s ids are read as text, as the files differ: %s", side, "; ".join(said.values()))
    given = next((kind for kind in ("string", "int") if kind in said), None)
    return given, said.get(given or "", "")


def _type_of_value(value: pa.Scalar) -> pa.DataType:
    """The type of a folder's value: a name of digits is a number, as Spark has it."""
    text = value.as_py()
    if pa.types.is_string(value.type) and (text is None or text.lstrip("-").isdecimal()):
        return pa.null() if text is None else pa.int64()
    return value.type
