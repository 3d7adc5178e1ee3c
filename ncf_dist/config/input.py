"""The section `input`: the interaction log, its side tables, and which rows count."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ncf_dist.config.section import PositiveInt, Section

InputFormat = Literal["movielens-dat", "movielens-tsv", "movielens-csv", "csv", "tsv", "jsonl", "parquet"]
IdType = Literal["int", "string"]
Place = str | Annotated[int, Field(ge=0)]
"""Where a field is: a column's name (header, JSON key, Parquet column), or its position in a line, from 0."""


class Columns(Section):
    """Where an interaction's fields are. Formats of MovieLens know their own."""

    user: Place = "user_id"
    """The customer's user id."""
    item: Place = "item_id"
    """The customer's item id."""
    rating: Place | None = None
    """`null`: the log has no ratings; every row counts as 1."""
    timestamp: Place | None = None
    """`null`: the log has no times; a hash decides what is latest."""


class SideColumn(Section):
    """One typed column of a side table. A value that is not of its type is null, and counted."""

    source: Place = Field(alias="from")
    """Where it is in the file."""
    type: Literal["string", "int", "float", "bool"] = "string"
    """What it becomes."""


class SideTable(Section):
    """Facts about users or items, carried along beside the index."""

    path: str | tuple[str, ...]
    """A file, a folder, a glob, or several."""
    format: InputFormat | None = None
    """Default: the family of `input.format`."""
    separator: str | None = None
    """Text formats: what parts the fields; default: the format's own."""
    header: bool | None = None
    """Text formats: whether the first line names the columns; default: the format's own."""
    encoding: Literal["utf-8", "latin-1"] | None = None
    """Default: the format's own."""
    id: Place | None = None
    """The customer's id; default: the format's own, or `user_id` or `item_id`."""
    title: Place | None = None
    """Items: what people call it, shown in reports; default: the format's own, or none."""
    columns: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], SideColumn] = Field(default={})
    """Further columns by the name they get."""


def _by_path(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


SideOrPath = Annotated[SideTable | None, BeforeValidator(_by_path)]
"""A side table, or its path alone."""


class Input(Section):
    path: str | tuple[str, ...]
    """The interaction log: a file, a folder of them, a glob, or several of these."""
    format: InputFormat = "movielens-dat"
    """`movielens-dat`: user::item::rating::seconds · `movielens-tsv`: the same with tabs (u.data) ·
    `movielens-csv`: ratings.csv · `csv`: RFC 4180 lines with a header · `tsv`: tabs, no header, no quotes ·
    `jsonl`: one JSON object a line · `parquet`. Text may be compressed (.gz, .bz2, .zst)."""
    columns: Columns = Columns()
    """For `csv`, `tsv`, `jsonl` and `parquet`."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text formats: what parts the fields; default: the format's own."""
    header: bool | None = None
    """Text formats: whether the first line of each file names the columns; default: the format's own."""
    fields: PositiveInt | None = None
    """Text formats without a header: fields of a whole line; default: up to the last one that `columns` names."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    """Text formats: the charset. Lines that do not fit it go to the quarantine."""
    user_type: IdType | None = None
    """Whether user ids are numbers (int64) or kept as text; default: `int` for MovieLens, the column's type for
    Parquet, else `string`."""
    item_type: IdType | None = None
    """As `user_type`, for item ids."""
    time_unit: Literal["s", "ms", "us", "iso"] = "s"
    """The unit of timestamps, which count from 1970, or `iso` for ISO 8601 text (UTC where it names no zone). Parquet's
    own timestamps have their unit with them."""
    max_line_bytes: PositiveInt = 65_536
    """Longer lines go to the quarantine, so that one line cannot fill a reader's memory."""
    rating_range: tuple[float, float] | None = None
    """Lowest and highest rating there is; others go to the quarantine."""
    items: SideOrPath = None
    """Optional item side table; as a path alone: movies.dat, u.item or movies.csv of the log's family."""
    users: SideOrPath = None
    """Optional user side table; as a path alone: users.dat or u.user of the log's family."""
    feedback: Literal["implicit", "explicit"] = "implicit"
    """`implicit`: a row is a positive, contrasted with negatives · `explicit`: the rating itself is learned."""
    forget: str | None = None
    """A text file of user ids, one a line: these users' rows are left out and counted as `forgotten`, and the users
    leave the index and what is published. The ids themselves are not written here,
    because every run's manifest would keep them."""
    min_rating: float | None = None
    """Implicit only: rows with a lower rating are not positives. `null` keeps every row."""
    since: dt.date | None = None
    """Rows from before this day (UTC) are left out."""
    until: dt.date | None = None
    """Rows from this day on (UTC) are the future and go to the quarantine; default: ds itself, so that a night sees
    what happened before it."""
    allow_items: tuple[str | int, ...] | None = None
    """Only these items."""
    deny_items: tuple[str | int, ...] = ()
    """Never these items."""
    max_user_interactions: PositiveInt | None = None
    """Keep only so many of a user's latest rows: one crawler must not outweigh a thousand people."""
    k_core: PositiveInt = 1
    """Leave out users and items with fewer rows than this, repeatedly, until each has as many (1: keep all)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Above this share of quarantined rows the job exits 3: the file is not what the config says it is. Rows from
    `until` on are not counted: a log that goes on after ds is sound."""

    @property
    def filters(self) -> bool:
        """Whether any rule leaves sound rows out."""
        wanted = (self.since, self.min_rating, self.allow_items, self.max_user_interactions)
        return any(rule is not None for rule in wanted) or bool(self.deny_items) or self.k_core > 1

    @field_validator("forget", mode="before")
    @classmethod
    def _no_ids(cls, given: Any) -> Any:
        if given is None or isinstance(given, str):
            return given
        # What was given is not shown.
        raise ValueError(
            "input.forget holds ids; needed the path of a text file with one id a line: ids in the config would stay "
            "in every run's manifest"
        )

    @model_validator(mode="after")
    def _makes_sense(self) -> Input:
        if self.feedback == "explicit" and self.min_rating is not None:
            raise ValueError(
                f"input.min_rating is {self.min_rating} with feedback explicit, which learns every rating: "
                "leave it out, or set input.feedback=implicit"
            )
        if self.feedback == "explicit" and not self.format.startswith("movielens") and self.columns.rating is None:
            raise ValueError(
                "input.feedback is explicit and input.columns.rating is not set; needed the column of the ratings"
            )
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError(f"input.since is {self.since} and input.until {self.until}; needed an earlier since")
        taken: dict[Place, str] = {}
        for name, place in self.columns.model_dump().items():
            if place is None:
                continue
            if isinstance(place, int) and self.fields is not None and place >= self.fields:
                raise ValueError(
                    f"input.columns.{name} is {place} with input.fields {self.fields}; needed a position from 0 to "
                    f"{self.fields - 1}"
                )
            if (other := taken.setdefault(place, name)) != name:
                raise ValueError(
                    f"input.columns.{other} and input.columns.{name} are both {place!r}; needed two columns"
                )
        if self.rating_range is not None and self.rating_range[0] > self.rating_range[1]:
            raise ValueError(f"input.rating_range is {list(self.rating_range)}; needed [lowest, highest]")
        return self
