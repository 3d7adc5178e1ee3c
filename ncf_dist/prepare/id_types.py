"""Whether user ids and item ids are integers or text: an id keeps its type for ever."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from ncf_dist.config import Input
from ncf_dist.errors import InputError
from ncf_dist.prepare.footers import Footer, footer
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import InputFiles

log = logging.getLogger(__name__)


class IdTypes(NamedTuple):
    """The Arrow types of user_id and item_id: int64 or string."""

    user: pa.DataType
    item: pa.DataType


def id_types(
    config: Input, files: InputFiles, before: tuple[pa.DataType | None, pa.DataType | None] = (None, None)
) -> IdTypes:
    """What the config says, else what the columns of all files are (empty ones are no evidence), else what the index
    has. before: the types of the index that this night extends. Raises InputError where they differ from it."""
    parquet = FORMATS[config.format].kind == "parquet"
    footers = [footer(path) for path in files.paths] if parquet else []
    user, item = (
        _id_type(side, config, footers, files, known) for side, known in zip(("user", "item"), before, strict=True)
    )
    return IdTypes(user, item)


def _id_type(
    side: str, config: Input, footers: Sequence[Footer], files: InputFiles, before: pa.DataType | None
) -> pa.DataType:
    form = FORMATS[config.format]
    given, why = getattr(config, f"{side}_type"), f"input.{side}_type is set"
    if given is None and form.kind == "parquet":
        given, why = _evidence(side, str(getattr(config.columns, side)), footers, files)
        if given is None and before is not None:
            given = "int" if before == pa.int64() else "string"
    elif given is None:
        given, why = "int" if form.numbers else "string", f"format {config.format} has them so"
    kind = pa.int64() if given == "int" else pa.string()
    if before is not None and before != kind:
        other = "int" if before == pa.int64() else "string"
        words = {"int": "integers", "string": "text"}
        raise InputError(
            f"{side} ids of tonight's log are {words[given or 'string']} ({why}), those of the index that this "
            f"night extends are {words[other]}; needed one type for ever: set input.{side}_type={other} to read "
            "them as such, or paths.lake to a new lake"
        )
    return kind


def _evidence(side: str, column: str, footers: Sequence[Footer], files: InputFiles) -> tuple[str | None, str]:
    """What the files say of an id's type, and which file says so; int where all of them are numbers."""
    said: dict[str, str] = {}
    for read in footers:
        kind = read.type_of(column)
        if kind is None and column in files.values.get(read.path, {}):
            kind = _type_of_value(files.values[read.path][column])
        if read.rows and kind is not None and not pa.types.is_null(kind) and not read.all_null(column):
            if pa.types.is_nested(kind):
                raise InputError(
                    f"{read.path} has {kind} in column {column}; needed a number or text: set input.columns.{side} to "
                    f"a column of such, or to a field inside of it, as {column}.id"
                )
            numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
            said.setdefault("int" if numbers else "string", f"{read.path} has {kind} in column {column}")
    if len(said) > 1:
        log.warning("%s ids are read as text, as the files differ: %s", side, "; ".join(said.values()))
    given = next((kind for kind in ("string", "int") if kind in said), None)
    return given, said.get(given or "", "")


def _type_of_value(value: pa.Scalar) -> pa.DataType:
    """The type of a folder's value: a name of digits is a number, as in Spark's partition discovery."""
    text = value.as_py()
    if pa.types.is_string(value.type) and (text is None or text.lstrip("-").isdecimal()):
        return pa.null() if text is None else pa.int64()
    return value.type
