"""Every table that one stage hands to another: columns, types, key and meaning.
The only home of table and column names.

`user_id`/`item_id` are the customer's, kept as they came (int64 or string); `user_idx`/`item_idx` are int32 below the
sizes that prepare states as its facts `users` and `items`: every item has one of 0..items-1; of 0..users-1 some have no
user any more, where users were forgotten (input.forget). No number is given twice. No column is nullable. Lists hold
indexes in ascending order unless said otherwise.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.errors import ContractError

USER_INDEX, ITEM_INDEX, USERS, ITEMS, UNSEEN_USERS = "user_index", "item_index", "users", "items", "unseen_users"
"""Tables whose columns depend on the log's types of ids. Others go by their contract: `HISTORY.name`."""
INDEX = pa.int32()
INDEX_LIST = pa.list_(pa.field("element", INDEX, nullable=False))
LONG_LIST = pa.list_(pa.field("element", pa.int64(), nullable=False))
FLOAT_LIST = pa.list_(pa.field("element", pa.float32(), nullable=False))
SPLIT_CODE = pa.field("element", pa.int8(), nullable=False)


@dataclass(frozen=True)
class Contract:
    """One table: its name, schema, key columns, meaning, and the job to rerun when a stored table does not match."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    meaning: str
    made_by: str

    @property
    def columns(self) -> list[str]:
        return list(self.schema.names)

    @property
    def fingerprint(self) -> str:
        """A short hash of names and types, kept in the manifest."""
        return schema_fingerprint(self.schema)

    def check(self, found: pa.Schema) -> None:
        """Raise ContractError unless `found` has these columns, in this order, with these types."""
        for name in self.columns:
            if name not in found.names:
                self._fail(f"column {name} is missing (found {', '.join(found.names) or 'none'})")
            wanted, got = self.schema.field(name).type, found.field(name).type
            if not _same_type(wanted, got):
                self._fail(f"column {name} is {got}, needed {wanted}")
        if found.names != self.columns:
            self._fail(f"columns are {', '.join(found.names)}; needed exactly {', '.join(self.columns)}")

    def _fail(self, what: str) -> None:
        raise ContractError(f"table {self.name}: {what}; rerun the job {self.made_by}")


def schema_fingerprint(schema: pa.Schema) -> str:
    text = ";".join(f"{field.name}:{field.type}" for field in schema)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _same_type(wanted: pa.DataType, got: pa.DataType) -> bool:
    if pa.types.is_list(wanted) and pa.types.is_list(got):
        return bool(wanted.value_type == got.value_type)
    return bool(wanted == got)


def _contract(name: str, columns: dict[str, pa.DataType], key: tuple[str, ...], made_by: str, meaning: str) -> Contract:
    schema = pa.schema([pa.field(column, kind, nullable=False) for column, kind in columns.items()])
    return Contract(name, schema, key, meaning, made_by)


def user_index(id_type: pa.DataType) -> Contract:
    """Customer's user id to index; append-only from night to night, but for users to be forgotten."""
    meaning = "every user ever seen, but those to be forgotten"
    return _contract(USER_INDEX, {"user_id": id_type, "user_idx": INDEX}, ("user_id",), "prepare", meaning)


def item_index(id_type: pa.DataType) -> Contract:
    """Customer's item id to dense index; append-only from night to night."""
    return _contract(
        ITEM_INDEX, {"item_id": id_type, "item_idx": INDEX}, ("item_id",), "prepare", "every item ever seen"
    )


def items(id_type: pa.DataType, columns: Mapping[str, pa.DataType] | None = None) -> Contract:
    """The item side table of the items that have an index; absent where the config names none.
    `columns`: what the config carries along; null where the side table has no (good) value."""
    return _side(ITEMS, {"item_idx": INDEX, "item_id": id_type, "title": pa.string()}, columns, "what items are")


def users(id_type: pa.DataType, columns: Mapping[str, pa.DataType] | None = None) -> Contract:
    """The user side table of the users that have an index; absent where the config names none."""
    return _side(USERS, {"user_idx": INDEX, "user_id": id_type}, columns, "who users are")


def unseen_users(id_type: pa.DataType) -> Contract:
    """Users of the user side table that never interacted, so have no index; absent where the config names none."""
    return _contract(UNSEEN_USERS, {"user_id": id_type}, ("user_id",), "prepare", "known users without an index")


def _side(
    name: str, fixed: dict[str, pa.DataType], columns: Mapping[str, pa.DataType] | None, meaning: str
) -> Contract:
    base = _contract(name, fixed, (next(iter(fixed)),), "prepare", meaning)
    further = [pa.field(column, kind) for column, kind in (columns or {}).items()]
    return Contract(name, pa.schema([*base.schema, *further]), base.key, meaning, base.made_by)


INTERACTIONS = _contract(
    "interactions",
    {
        "user_idx": INDEX,
        "item_idx": INDEX,
        "rating": pa.float32(),
        "timestamp": pa.int64(),
        "split": pa.int8(),
    },
    ("user_idx", "item_idx"),
    "prepare",
    "every accepted interaction after deduplication; split is 0 train, 1 validation, 2 test; "
    "timestamp in microseconds since 1970 (0 where the log has none)",
)
TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = 0, 1, 2
DAY = 86_400_000_000
"""Microseconds, as timestamps count them."""


def day_start(day: dt.date) -> int:
    """The timestamp at which a day (UTC) begins: 1970-01-02 → 86,400,000,000."""
    return (day - dt.date(1970, 1, 1)).days * DAY


HISTORY = _contract(
    "history",
    {"user_idx": INDEX, "item_idx": INDEX_LIST, "test_item_idx": INDEX_LIST},
    ("user_idx",),
    "prepare",
    "what each user has seen: train and validation items, and apart from them the held-out test items",
)

RECENT = _contract(
    "recent",
    {"user_idx": INDEX, "item_idx": INDEX_LIST, "timestamp": LONG_LIST, "split": pa.list_(SPLIT_CODE)},
    ("user_idx",),
    "prepare",
    "what each user did last, oldest first, with its time and split: the latest sequences.length train items, and as "
    "many of train and validation, and of all; absent where sequences.length is 0",
)


def sequences(length: int) -> Contract:
    """Windows of a user's train items in order of time, trainer-ready. Window 0 ends with the user's latest item, and
    the next one ends where it begins, so that every item but the user's first is to be predicted once. `items` and
    `gaps` are fixed-width binary, which one NumPy call decodes: length + 1 little-endian int32, and as many bytes;
    what is past `length` is 0, and so is the gap of a window's first item: a gap is within the window."""
    return _contract(
        "sequences",
        {
            "user_idx": INDEX,
            "window": INDEX,
            "length": INDEX,
            "items": pa.binary(4 * (length + 1)),
            "gaps": pa.binary(length + 1),
        },
        ("user_idx", "window"),
        "prepare",
        "one window of a user's train items a row, oldest first, with the coarse time since the item before "
        "(gaps.gap_code), in hashed order, equal rows and one row group a file",
    )


NEXT_ITEMS = _contract(
    "next_items",
    {"item_idx": INDEX, "next_item_idx": INDEX, "weight": pa.int64()},
    ("item_idx", "next_item_idx"),
    "prepare",
    "what follows what in train rows: pairs of items at most sequences.steps apart in a user's row, each worth "
    "STEP_UNIT // distance; an item's sequences.next_items heaviest, heaviest first",
)

NEXT_TOTALS = _contract(
    "next_totals",
    {"item_idx": INDEX, "train_rows": pa.int64(), "weight": pa.int64()},
    ("item_idx",),
    "prepare",
    "of every item the train rows, and the weight of all that follows it, kept in next_items or not",
)
STEP_UNIT = 2520
"""The least number that 1 to 10 divide: distance weights 1 / d are whole numbers of it, and sums have no order."""

ITEM_STATS = _contract(
    "item_stats",
    {"item_idx": INDEX, "train_count": pa.int64()},
    ("item_idx",),
    "prepare",
    "train and validation interactions of every item; the popularity baseline; "
    "ordered by item_idx, 0 for items with none",
)

POPULARITY = _contract(
    "popularity",
    {"item_idx": INDEX, "recent": pa.int64(), "total": pa.int64()},
    ("item_idx",),
    "score",
    "interactions of every item that has any: in the last score.fallback_days before ds, and in all; "
    "absent where there is no fallback",
)

ITEM_WEIGHTS = _contract(
    "item_weights",
    {"item_idx": INDEX, "weight": pa.int64()},
    ("item_idx",),
    "prepare",
    "what every item weighs as a negative: train popularity to the power of negatives.alpha, in integers; "
    "absent where negatives are uniform",
)


def held_out(name: str) -> Contract:
    """`validation` or `test`: a held-out interaction, its rating, and the unseen items it is ranked among
    (unordered, without repeats)."""
    return _contract(
        name,
        {"user_idx": INDEX, "item_idx": INDEX, "rating": pa.float32(), "candidates": INDEX_LIST},
        ("user_idx", "item_idx"),
        "prepare",
        "one held-out interaction a row with its candidates",
    )


VALIDATION = held_out("validation")
TEST = held_out("test")

QUARANTINE = _contract(
    "quarantine",
    {"file": pa.string(), "place": pa.int64(), "reason": pa.string(), "raw": pa.string()},
    ("file", "place"),
    "prepare",
    "every rejected row: its file, the byte it starts at in the (decompressed) text or its row number in a Parquet "
    "file, why, and the line itself (cut at 1,000 characters; none where input.forget is set and whose it is cannot be "
    "read)",
)


def negative_column(draw: int, slot: int) -> str:
    """Name of the train column that holds negative `slot` of draw `draw`."""
    return f"neg_{draw}_{slot}"


def train(per_positive: int, draws: int, explicit: bool = False) -> Contract:
    """Trainer-ready rows. Negatives are scalar columns, one a (draw, slot): Petastorm turns a list column
    into a matrix row by row in Python, about thirty times slower than it hands over a scalar column, and an
    epoch reads only its own draw. With no draws none are stored: the trainer draws them. Explicit feedback has
    ratings in their place."""
    if explicit:
        more = {"rating": pa.float32()}
    else:
        more = {negative_column(d, s): INDEX for d in range(draws) for s in range(per_positive)}
    return _contract(
        "train",
        {"user_idx": INDEX, "item_idx": INDEX, **more},
        ("user_idx", "item_idx"),
        "prepare",
        "one train row each with its negatives or its rating, in hashed order, equal rows and one row group a file",
    )


Form = Literal["long", "lists"]
MODEL, POPULAR = "model", "popular"
"""The reasons of a recommendation: the model's score, or popularity where the model knows nothing of the user."""
PARTITION = "ds"
"""The published table's partition column: a part of its files' paths, not a column within them."""


def recommendations(user_id: pa.DataType, item_id: pa.DataType, form: Form = "long") -> Contract:
    """The product: K rows a user, rank 1 is best, scores finite and not increasing with rank; or one row a user with a
    list of the same. Published, it has the column `ds` before these. A user has one reason: `model` (scores are the
    model's) or `popular` (scores are counts of interactions)."""
    offer = {"rank": pa.int32(), "item_id": item_id, "score": pa.float32()}
    if form == "long":
        columns = {"user_id": user_id, **offer, "model_version": pa.string(), "reason": pa.string()}
        key: tuple[str, ...] = ("user_id", "rank")
    else:
        fields = [pa.field(name, kind, nullable=False) for name, kind in {**offer, "reason": pa.string()}.items()]
        offers = pa.list_(pa.field("element", pa.struct(fields), nullable=False))
        columns, key = {"user_id": user_id, "items": offers, "model_version": pa.string()}, ("user_id",)
    return _contract("recommendations", columns, key, "score", "top K unseen items of every user")


def in_long_form(table: pa.Table) -> pa.Table:
    """Recommendations of either form as rows of the long one."""
    if "items" not in table.column_names:
        return table
    lists = table["items"].combine_chunks()
    user = pc.list_parent_indices(lists)
    offers = dict(zip((field.name for field in lists.type.value_type), pc.list_flatten(lists).flatten(), strict=True))
    columns = {name: table[name].take(user) for name in ("user_id", "model_version")} | offers
    return pa.table({name: columns[name] for name in _LONG_COLUMNS})


_LONG_COLUMNS = ("user_id", "rank", "item_id", "score", "model_version", "reason")


RANKS = _contract(
    "ranks",
    {
        "user_idx": INDEX,
        "scorer": pa.string(),
        "seen_items": INDEX,
        "item_idx": INDEX_LIST,
        "timestamp": LONG_LIST,
        "rating": FLOAT_LIST,
        "score": FLOAT_LIST,
        "full_rank": INDEX_LIST,
        "candidates": INDEX_LIST,
        "greater": INDEX_LIST,
        "equal": INDEX_LIST,
        "top": INDEX_LIST,
    },
    ("user_idx", "scorer"),
    "evaluate",
    "what evaluate saw of each user with held-out items, one row a scorer: how many train and validation items; the "
    "held-out items with their timestamp, rating, score, rank in the catalogue, and how many candidates there were, "
    "beat them and tied with them (lists of one order); and the items of the longest list, best first",
)
