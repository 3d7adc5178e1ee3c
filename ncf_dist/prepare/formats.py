"""The formats of `input.format`: how each is written, and which files of a folder have it."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

COMPRESSION = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd"}

Field = str | int
"""A column's name, or its position in a line."""

PAPERS = (
    "readme", "readme.txt", "license", "license.txt", "checksums.txt", "*.md", "*.html", "*.pdf", "*.pl", "*.sh",
)  # fmt: skip
"""Files that are packed beside data and are not data: left out without a warning."""


@dataclass(frozen=True)
class Format:
    """How a family of files is written, and how its files are named (in lower case)."""

    kind: str
    """text | jsonl | parquet"""
    patterns: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Names of the family's files that hold no interactions."""
    separator: str = ","
    header: bool | None = False
    """None: the first line is a header if it holds the known names."""
    quote: bool = False
    fields: Mapping[str, Field] | None = None
    """Where user, item, rating and timestamp are; None: the config says it."""
    count: int | None = None
    numbers: bool = False
    """Whether ids are integers where the config does not say."""
    example: str = ""

    def holds(self, path: str) -> bool:
        """Whether a file has this format, by its name; case and the ending of a compression do not matter."""
        name = _plain_name(path)
        return not self.companion(path) and any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def companion(self, path: str) -> bool:
        """Whether a file is known to hold something else: tags, a side table, a README."""
        name = _plain_name(path)
        return any(fnmatchcase(name, pattern) for pattern in (*self.others, *PAPERS))


_MOVIELENS = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
NAMED = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"}
UNNAMED = _MOVIELENS
_PARQUET_CODECS = ("gzip", "gz", "snappy", "zstd", "zst", "brotli", "lz4")
FORMATS = {
    "movielens-dat": Format(
        "text", ("*.dat",), ("users.dat", "movies.dat", "tags.dat"), "::", False, False, _MOVIELENS, 4, True,
        "1::1193::5::978300760",
    ),
    "movielens-tsv": Format(
        "text", ("u.data", "*.tsv", "*.rating"),
        ("u.item", "u.user", "u.genre", "u.info", "u.occupation", "*.base", "*.test"), "\t", False, False, _MOVIELENS,
        4, True, "196<TAB>242<TAB>3<TAB>881250949",
    ),
    "movielens-csv": Format(
        "text", ("*.csv",), ("movies.csv", "links.csv", "tags.csv", "genome-scores.csv", "genome-tags.csv"),
        ",", None, True, NAMED, 4, True, "1,296,5.0,1147880044",
    ),
    "csv": Format("text", ("*.csv",), separator=",", header=True, quote=True),
    "tsv": Format("text", ("*.tsv", "*.txt"), separator="\t"),
    "jsonl": Format("jsonl", ("*.jsonl", "*.json", "*.ndjson")),
    "parquet": Format(
        "parquet", ("*.parquet", "*.parq", "*.pq", *(f"*.parquet.{codec}" for codec in _PARQUET_CODECS))
    ),
}  # fmt: skip

SIDES: dict[tuple[str, str], tuple[Format, str]] = {
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
"""Side tables that come with MovieLens, and the charset of those that are not UTF-8."""


def compression(path: str) -> str | None:
    """How a text file is compressed, by its ending."""
    return COMPRESSION.get(posixpath.splitext(path)[1].lower())


def _plain_name(path: str) -> str:
    """The name in lower case, without the ending of a compression. `.parquet.gz` stays: Parquet compresses inside."""
    name = posixpath.basename(path).lower()
    stem = posixpath.splitext(name)[0] if compression(name) else name
    return name if stem.endswith(".parquet") else stem
