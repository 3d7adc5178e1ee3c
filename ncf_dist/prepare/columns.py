"""Where the wanted fields are in each file of a log or side table: worked out on the driver before a row is read.

A field is wanted by the name of its column, or by its position in a line. Names are looked up in each file's own header
or schema, so files of one log may order their columns differently.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ncf_dist.config import Input, SideTable
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.files import filesystem
from ncf_dist.prepare.footers import footer
from ncf_dist.prepare.formats import FORMATS, NAMED, SIDES, UNNAMED, Field, Format
from ncf_dist.prepare.input_files import InputFiles, find_files
from ncf_dist.prepare.source import Source, plan, row_group_units
from ncf_dist.prepare.streams import HEADER_LIMIT, SNIFFED, head, wide

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is looked for in each file, and what the config calls it. places: field → name or position of its column;
    key: `input` or a side table's."""

    places: Mapping[str, Field]
    key: str = "input"
    separator: str | None = None
    header: bool | None = None
    count: int | None = None
    latin1: bool = False
    max_line_bytes: int = 65_536
    keys: Mapping[str, str] = field(default_factory=dict)
    """Field → its key in the config; default: `<key>.columns.<field>`."""

    def key_of(self, name: str) -> str:
        return self.keys.get(name, f"{self.key}.columns.{name}")


# ---- what is wanted


def interactions_source(config: Input, files: InputFiles) -> Source:
    """The log's source; wanted fields are user, item, and rating and timestamp where there are any.
    Raises ConfigError, InputError."""
    form = FORMATS[config.format]
    places = form.fields or {k: v for k, v in config.columns.model_dump().items() if v is not None}
    wanted = Wanted(
        places, "input", config.separator, config.header, config.fields, config.encoding == "latin-1",
        config.max_line_bytes,
    )  # fmt: skip
    return _source(form, files, wanted)


def side_source(kind: str, side: SideTable, family: str, files: InputFiles) -> Source:
    """The source of side table `kind`, items or users; wanted fields are id, title and those of `side.columns`."""
    form, encoding, places = _side_format(kind, side, family)
    key = f"input.{kind}"
    keys = {"id": f"{key}.id", "title": f"{key}.title"}
    keys |= {f"column {name}": f"{key}.columns.{name}.from" for name in side.columns}
    latin1 = side.encoding == "latin-1" if side.encoding else encoding == "latin-1" and not _all_utf8(files.paths)
    return _source(form, files, Wanted(places, key, side.separator, side.header, None, latin1, 2**20, keys))


def candidates_source(files: Sequence[str]) -> Source:
    """The source of lists of candidates: lines as they are."""
    places: dict[str, Field] = {"line": 0}
    return Source(
        tuple(files), "text", (places,) * len(files), plan(files, "text"), "\t", counts=(None,) * len(files),
        headers=(False,) * len(files), max_line_bytes=2**24,
    )  # fmt: skip


def side_files(kind: str, side: SideTable, family: str) -> InputFiles:
    """The files of side table `kind`. family: the format of the log. Raises ConfigError, InputError."""
    form, _, _ = _side_format(kind, side, family)
    return find_files(side.path, form, side.format or family, f"input.{kind}.path")


def _side_format(kind: str, side: SideTable, family: str) -> tuple[Format, str, dict[str, Field]]:
    """(format, charset, where the wanted fields are)."""
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
    """Whether a side table is UTF-8 although its family is Latin-1 (MovieLens 10M): text in Latin-1 with a letter
    beyond ASCII is hardly ever valid UTF-8."""
    try:
        for path in files:
            fs, inner = filesystem(path)
            fs.cat_file(inner).decode()
    except UnicodeDecodeError:
        return False
    return True


# ---- where it is


def _source(form: Format, files: InputFiles, wanted: Wanted) -> Source:
    if form.kind != "text" and (odd := [name for name, place in wanted.places.items() if isinstance(place, int)]):
        raise ConfigError(
            f"columns {', '.join(f'{wanted.key_of(k)}: {wanted.places[k]}' for k in odd)} are positions; "
            f"{form.kind} needs names"
        )
    given = [_given(path, files, wanted) for path in files.paths]
    if form.kind == "parquet":
        return _parquet_source(files, given, wanted)
    limit = HEADER_LIMIT if form.header is not False or wanted.header else SNIFFED
    heads = [head(path, limit) for path in files.paths]
    written = tuple(how for _, how in heads)
    rest = [{k: v for k, v in wanted.places.items() if k not in known} for known in given]
    source = Source(
        files.paths, form.kind, tuple(rest), plan(files.paths, form.kind, written), latin1=wanted.latin1,
        max_line_bytes=wanted.max_line_bytes, written=written, values=tuple(given),
    )  # fmt: skip
    if form.kind == "jsonl":
        return source
    return _separated_source(source, form, [data for data, _ in heads], wanted)


def _separated_source(source: Source, form: Format, heads: Sequence[bytes], wanted: Wanted) -> Source:
    """The source of separated text. source: with the values that folders give; heads: the first bytes of each file."""
    separator = wanted.separator or form.separator
    if form.quote and len(separator) != 1:
        raise ConfigError(
            f"{wanted.key}.separator is {separator!r}; needed one character, as quoted fields are known by it"
        )
    expect = form.header if wanted.header is None else wanted.header
    headers = [
        _header(data, separator, form.quote, "latin-1" if wanted.latin1 and not wide(source.how(file)) else "utf-8",
                expect, wanted.places)
        for file, data in enumerate(heads)
    ]  # fmt: skip
    columns, values = [], []
    empty = _without_bytes(source.files, [not data for data in heads], wanted.key)
    for path, header, known, nothing in zip(source.files, headers, source.values, empty, strict=True):
        # A column that the file has itself goes before one that its folder's name says.
        own = {k for k in known if header is not None and wanted.places[k] in header}
        values.append({k: v for k, v in known.items() if k not in own})
        places = {k: v for k, v in wanted.places.items() if k not in values[-1]}
        columns.append({} if nothing else _positions(path, header, replace(wanted, places=places)))
    counts = (wanted.count or form.count or (len(header) if header else None) for header in headers)
    return replace(
        source, columns=tuple(columns), values=tuple(values), separator=separator, quote=form.quote,
        counts=tuple(counts), headers=tuple(header is not None for header in headers),
    )  # fmt: skip


def _without_bytes(files: Sequence[str], empty: Sequence[bool], key: str) -> Sequence[bool]:
    """Which files hold nothing, not even names of columns, as other files do hold something: tasks that got no rows
    write such. They are logged. None where all are empty: that is a fault of the input."""
    if all(empty):
        return [False] * len(files)
    if names := [path for path, nothing in zip(files, empty, strict=True) if nothing]:
        log.warning("%s: %d of %d files are empty: %s", key, len(names), len(files), ", ".join(names[:5]))
    return empty


def _given(path: str, files: InputFiles, wanted: Wanted) -> dict[str, pa.Scalar]:
    """The wanted fields that the folder of a file, or the log of its table, says."""
    known = files.values.get(path, {})
    return {name: known[str(place)] for name, place in wanted.places.items() if str(place) in known}


def _parquet_source(files: InputFiles, given: Sequence[Mapping[str, pa.Scalar]], wanted: Wanted) -> Source:
    footers = [footer(path) for path in files.paths]
    columns: list[dict[str, Field]] = []
    values: list[dict[str, pa.Scalar]] = []
    _without_bytes(files.paths, [read.metadata is None for read in footers], wanted.key)
    for read, known in zip(footers, given, strict=True):
        own = {name: place for name, place in wanted.places.items() if read.type_of(str(place)) is not None}
        missing = [name for name in wanted.places if name not in own and name not in known]
        if missing and read.rows:
            place = wanted.places[missing[0]]
            raise InputError(
                f"{read.path} has no column {place} (it has {', '.join(read.names[:20])}); set "
                f"{wanted.key_of(missing[0])} to one of these"
            )
        columns.append(own)
        values.append({name: value for name, value in known.items() if name not in own})
    return Source(files.paths, "parquet", tuple(columns), row_group_units(footers), values=tuple(values))


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
    """The position of each wanted field in this file's lines."""
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
    positions: dict[str, Field] = {}
    for name, place in wanted.places.items():
        key = wanted.key_of(name)
        if isinstance(place, int) and place >= len(header):
            raise InputError(
                f"{path} has no position {place} for {name}: its first line has {len(header)} fields, 0 to "
                f"{len(header) - 1}; set {key} to one of these, or {wanted.key}.separator to what parts them"
            )
        if isinstance(place, str) and place not in header:
            remedy = f"a header with it: set {key}, {wanted.key}.separator, or {wanted.key}.header=false and positions"
            if not any(header):
                remedy = f"a header and rows: look at what writes the file, or leave it out of {wanted.key}.path"
            raise InputError(
                f"{path} has no column {place} for {name} ({_header_for_message(header, wanted)}); needed {remedy}"
            )
        positions[name] = header.index(place) if isinstance(place, str) else place
    return positions


def _header_for_message(header: Sequence[str], wanted: Wanted) -> str:
    """The names in a first line. Nothing of a line that may be a row, which is about a person: it is one of names where
    a wanted column or field is among them. Nothing of bytes that are no text."""
    if not any(header):
        return "its first line names none: it is empty"
    if any(sign == "\ufffd" or not (sign.isprintable() or sign.isspace()) for name in header for sign in name):
        return "its first line is no text: is the file compressed, and its name does not say so?"
    known = {name.casefold() for pair in wanted.places.items() for name in pair if isinstance(name, str)}
    if known.isdisjoint(name.casefold() for name in header):
        return f"its first line has {len(header)} field{'s'[: len(header) > 1]}, none of such a name: it may be a row"
    return f"its first line names {', '.join(header[:20])}"
