"""From columns of text to typed interactions: each row is whole, rejected with a reason, or of a user to be forgotten.

A row of a user to be forgotten is neither kept nor rejected, whatever is wrong with it. While the list of such users is
not empty, a rejected row whose user cannot be read goes to the quarantine without its text, which may name anybody. So
does one with too many or too few fields, where the user may be in another one than the one that is read.

A column is cast at once where that works, else in slices; only the odd rows of a slice are looked at one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.contracts import QUARANTINE
from ncf_dist.errors import InputError
from ncf_dist.prepare.chunks import Chunk, as_mask
from ncf_dist.prepare.forget import NOBODY, Forget
from ncf_dist.prepare.ids import typed_ids
from ncf_dist.prepare.separated import WRONG_SIZE
from ncf_dist.prepare.source import Source
from ncf_dist.prepare.values import MICROSECONDS, YEAR_2200, iso_times, moments, truths
from ncf_dist.sampling import IntArray

PLACE_BITS, FILE_BITS = 44, 18
LATE = "timestamp is at or after the end of the window"
"""The one reason that is no fault of the file: the log goes on after ds."""
FAR = "timestamp is after the year 2199"


@dataclass(frozen=True)
class RowSpec:
    """What a row must be; sent to the workers. until: microseconds since 1970, the first moment that is too late;
    part: 0 for the log, 1 for the split's test file; staging: the folder that rows are written to; places: whether
    rows keep their place in the log."""

    source: Source
    user_id: pa.DataType
    item_id: pa.DataType
    time_unit: str
    until: int
    rating_range: tuple[float, float] | None
    staging: str
    part: int = 0
    forget: Forget = NOBODY
    places: bool = False

    def __post_init__(self) -> None:
        if self.places and len(self.source.files) > 2**FILE_BITS:
            raise InputError(
                f"split.ties is file, and the log has {len(self.source.files):,} files; needed at most "
                f"{2**FILE_BITS:,}: join files, or set split.ties=hash"
            )

    @property
    def schema(self) -> pa.Schema:
        """Accepted rows on their way to the tables. part: 0, or 1 where the row is from the test file; place: where it
        stands in the log (`_place`), on demand."""
        kinds = {
            "user_id": self.user_id, "item_id": self.item_id, "rating": pa.float32(), "timestamp": pa.int64(),
            "part": pa.int8(),
        }  # fmt: skip
        if self.places:
            kinds["place"] = pa.int64()
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def typed(chunk: Chunk, spec: RowSpec) -> tuple[pa.Table, pa.Table | None]:
    """(the whole rows, the rejected ones or None). Rows of users to be forgotten are in neither."""
    size = len(chunk.place)
    columns = {
        "user_id": typed_ids(chunk, "user", spec.user_id),
        "item_id": typed_ids(chunk, "item", spec.item_id),
        "rating": _rating(chunk, spec.rating_range),
        "timestamp": _timestamp(chunk, spec.time_unit, spec.until),
        "part": pa.array(np.full(size, spec.part, dtype=np.int8)),
    }
    if spec.places:
        columns["place"] = pa.array(_place(chunk, spec.part))
    rejected = chunk.rejected()
    forgotten = spec.forget.among(columns["user_id"])
    if not rejected.any() and not forgotten.any():
        return pa.table(list(columns.values()), schema=spec.schema), None
    keep = pa.array(~rejected & ~forgotten)
    rows = pa.table([column.filter(keep) for column in columns.values()], schema=spec.schema)
    at = np.flatnonzero(rejected & ~forgotten)
    if not len(at):
        return rows, None
    hidden = spec.forget.hides(columns["user_id"].take(pa.array(at)))
    if _user_may_be_shifted(spec, chunk.file):
        hidden |= np.isin(chunk.reason[at], WRONG_SIZE)
    texts = ["" if hide else text for hide, text in zip(hidden, chunk.raw.take(at), strict=True)]
    rejects = pa.table(
        [
            pa.array([spec.source.files[chunk.file]] * len(at), pa.string()),
            pa.array(chunk.place[at], pa.int64()),
            pa.array(chunk.reason[at], pa.string()),
            pa.array(texts, pa.string()),
        ],
        schema=QUARANTINE.schema,
    )
    return rows, rejects


def _user_may_be_shifted(spec: RowSpec, file: int) -> bool:
    """Whether a line with a wrong number of fields may hold the user elsewhere: it is not in the first field, or ids to
    be forgotten hold the separator themselves."""
    listed, place = spec.forget.ids, spec.source.columns[file].get("user")
    if listed is None or not isinstance(place, int):
        return False
    inside = pa.types.is_string(listed.type) and pc.match_substring(listed, spec.source.separator)
    return place > 0 or bool(inside and pc.any(inside).as_py())


def _place(chunk: Chunk, part: int) -> IntArray:
    """(R,) numbers that ascend as rows stand in the log, the test file after it: 18 bits of the file's number, 44 of
    where in the file a row begins."""
    return chunk.place.astype(np.int64) + (part << PLACE_BITS + FILE_BITS) + (chunk.file << PLACE_BITS)


def _rating(chunk: Chunk, bounds: tuple[float, float] | None) -> pa.Array:
    if "rating" not in chunk.columns:
        return pa.array(np.ones(len(chunk.place), dtype=np.float32))
    values, ok = truths(chunk.columns["rating"])
    finite = np.isfinite(values)
    chunk.reject(~ok, "rating is not a number")
    chunk.reject(~finite, "rating is not finite")
    if bounds is not None:
        low, high = (np.float32(bound) for bound in bounds)
        chunk.reject((values < low) | (values > high), "rating is out of range")
    # Plus zero: -0.0 and 0.0 are equal, but not the same bytes.
    return pa.array(np.where(finite, values, 0).astype(np.float32) + np.float32(0))


def _timestamp(chunk: Chunk, unit: str, until: int) -> pa.Array:
    """Microseconds since 1970; 0 where the log has no times."""
    if "timestamp" not in chunk.columns:
        return pa.array(np.zeros(len(chunk.place), dtype=np.int64))
    column = chunk.columns["timestamp"]
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s") if pa.types.is_date32(column.type) else pa.timestamp("ms"))
    if pa.types.is_timestamp(column.type):
        missing = as_mask(pc.is_null(column))
        chunk.reject(missing, "timestamp is null")
        # In the column's own unit: a year that microseconds cannot hold must not wrap around to a plausible one.
        values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
        scale = MICROSECONDS.get(column.type.unit, 1)
        values = values // 1_000 if column.type.unit == "ns" else values
    elif unit == "iso":
        values, ok = iso_times(column)
        chunk.reject(~ok, "timestamp is not ISO 8601")
        scale = 1
    else:
        values, ok = moments(column, MICROSECONDS[unit])
        chunk.reject(~ok, "timestamp is not an integer")
        scale = 1
    chunk.reject(values < 0, "timestamp is negative")
    implausible = values >= YEAR_2200 // scale
    chunk.reject(implausible, FAR)
    microseconds = np.where(implausible | (values < 0), 0, values) * scale
    chunk.reject(microseconds >= until, LATE)
    return pa.array(microseconds)
