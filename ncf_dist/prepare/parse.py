"""From lines of text to typed rows, or to the quarantine with a reason. No line is lost.

Lines are read as text and split here: Spark's CSV reader fills short records with nulls and cuts long ones
without a word. A row is either accepted (all columns typed and non-null, `reason` null) or rejected (`reason`
says why, `raw` holds the line).
"""

from __future__ import annotations

import fnmatch
import posixpath
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist.config import Input
from ncf_dist.errors import InputError
from ncf_dist.spark_io import spark_path

RAW_LIMIT = 1_000


@dataclass(frozen=True)
class TextFormat:
    """A family of interaction logs: separator, the header it starts with (if any),
    and what its files are called in a folder."""

    separator: str
    header: str | None
    patterns: tuple[str, ...]
    others: tuple[str, ...]
    id_type: pa.DataType
    example: str


FORMATS = {
    "movielens-dat": TextFormat(
        "::", None, ("*.dat",), ("users.dat", "movies.dat"), pa.int64(), "1::1193::5::978300760"
    ),
    "movielens-tsv": TextFormat("\t", None, ("u.data", "*.tsv"), (), pa.int64(), "196<TAB>242<TAB>3<TAB>881250949"),
    "movielens-csv": TextFormat(
        ",",
        "userId,movieId,rating,timestamp",
        ("*.csv",),
        ("movies.csv", "links.csv", "tags.csv"),
        pa.int64(),
        "1,296,5.0,1147880044",
    ),
}


def select_files(files: list[str], format_name: str) -> list[str]:
    """Of the files of a folder, those that belong to the format; a single file is taken as it is. Raises InputError."""
    if len(files) == 1:
        return files
    form = FORMATS[format_name]
    names = {path: posixpath.basename(path) for path in files}
    chosen = [
        p
        for p, n in names.items()
        if n not in form.others and any(fnmatch.fnmatch(n, pattern) for pattern in form.patterns)
    ]
    if not chosen:
        raise InputError(
            f"input folder holds {', '.join(sorted(names.values())[:5])}: no file of format {format_name}; "
            f"needed {' or '.join(form.patterns)}: set input.path to the ratings file, or input.format to what it is"
        )
    return chosen


def read_interactions(spark: SparkSession, files: list[str], config: Input) -> DataFrame:
    """One row a line: file, raw, user_id, item_id, rating, timestamp, reason (null where the line is good).

    Header lines of formats that have one are not rows.
    """
    form = FORMATS[config.format]
    lines = spark.read.text([spark_path(file) for file in files]).select(
        F.col("value").alias("raw"), F.col("_metadata.file_path").alias("file")
    )
    if form.header is not None:
        lines = lines.where(F.trim("raw") != form.header)
    fields = F.split("raw", _literal_pattern(form.separator), -1)
    named = lines.select(
        "file",
        "raw",
        F.size(fields).alias("n"),
        *[F.get(fields, F.lit(i)).alias(c) for i, c in enumerate("uirt")],
    )
    typed = named.select(
        "file",
        "raw",
        "n",
        *[F.trim(c).alias(c) for c in "uirt"],
        F.expr("try_cast(u as bigint)").alias("user_id"),
        F.expr("try_cast(i as bigint)").alias("item_id"),
        # Plus zero: -0.0 and 0.0 are equal, but not the same bytes.
        F.expr("try_cast(r as float) + float(0)").alias("rating"),
        F.expr("try_cast(t as bigint)").alias("timestamp"),
    )
    return typed.select("file", "raw", "user_id", "item_id", "rating", "timestamp", _reason().alias("reason"))


def _literal_pattern(separator: str) -> str:
    return "".join(f"\\{c}" if not c.isalnum() and not c.isspace() else c for c in separator)


def _reason() -> Column:
    """The first thing wrong with a line, or null."""
    rules: list[tuple[Column, str]] = [
        (F.col("n") < 4, "too few fields"),
        (F.col("n") > 4, "too many fields"),
        (F.col("u") == "", "empty user id"),
        (F.col("i") == "", "empty item id"),
        (F.col("user_id").isNull(), "user id is not an integer"),
        (F.col("item_id").isNull(), "item id is not an integer"),
        # A cast takes what a Java program may write, 5d and 0x1p3.
        (F.col("rating").isNull() | F.col("r").rlike(r"[0-9.][dDfF]$|[xX]"), "rating is not a number"),
        (F.isnan("rating") | F.col("rating").isin(float("inf"), float("-inf")), "rating is not finite"),
        (F.col("timestamp").isNull(), "timestamp is not an integer"),
        (F.col("timestamp") < 0, "timestamp is negative"),
    ]
    reason = F.lit(None).cast("string")
    for condition, text in reversed(rules):
        reason = F.when(condition, F.lit(text)).otherwise(reason)
    return reason


def positives(rows: DataFrame, config: Input) -> DataFrame:
    """Accepted rows as positives: user_id, item_id, rating, timestamp."""
    good = rows.where(F.col("reason").isNull())
    if config.min_rating is not None:
        good = good.where(F.col("rating") >= config.min_rating)
    return good.select("user_id", "item_id", "rating", "timestamp")


def quarantine(rows: DataFrame) -> DataFrame:
    """Rejected rows: file, reason, raw (cut; bytes that are not UTF-8 are shown as U+FFFD, as readers refuse them)."""
    raw = F.decode(F.encode(F.substring("raw", 1, RAW_LIMIT), "UTF-8"), "UTF-8")
    return rows.where(F.col("reason").isNotNull()).select("file", "reason", raw.alias("raw"))


def read_titles(spark: SparkSession, files: list[str], format_name: str) -> DataFrame:
    """The item side table of the same family: item_id, title. Lines without a usable id are left out."""
    form, files = FORMATS[format_name], [spark_path(file) for file in files]
    if format_name == "movielens-csv":
        table = spark.read.csv(files, header=True, escape='"').select(F.col("movieId").alias("i"), F.col("title"))
    else:
        separator = "|" if format_name == "movielens-tsv" else form.separator
        encoding = "ISO-8859-1" if format_name != "movielens-csv" else "UTF-8"
        table = spark.read.csv(files, sep=separator, header=False, encoding=encoding, quote="").select(
            F.col("_c0").alias("i"), F.col("_c1").alias("title")
        )
    rows = table.select(F.expr("try_cast(i as bigint)").alias("item_id"), F.coalesce("title", F.lit("")).alias("title"))
    return rows.where(F.col("item_id").isNotNull()).groupBy("item_id").agg(F.min("title").alias("title"))
