"""The stateless hash sampler: one definition, the same draw in Spark SQL, NumPy and torch.

Every random choice of the line is a function of (seed, purpose, user, item, code), so it does not depend on partitions,
order, retries or the engine that draws it.

- `hash64` is XXH64 of 8-byte integers, chained as Spark's built-in `xxhash64(col, …)` chains them (each hash seeds the
  next, the first seed is 42; Yann Collet's xxHash specification, section XXH64). It works on Python ints, NumPy int64
  arrays and torch int64 tensors: all three wrap (Python ints are wrapped here), and shifts are made logical by masks.
- A draw below n is `hash mod n` (floor modulus of the signed hash); its bias is below n / 2^64.
- A negative is uniform over the items a user has not interacted with: rank r = hash mod (I - |seen|), then the r-th
  unseen item, found in the user's sorted seen items. No rejection, so heavy users cost what light ones do.
- A weighted negative is the same on a longer line: item i owns weight(i) consecutive ranks (integers), so it is drawn
  with exactly weight(i) over the weight of all unseen items. Uniform is weight 1.
- Candidates are drawn without replacement by Floyd's algorithm
  (Bentley & Floyd, "A sample of brilliance", CACM 30(9), 1987).

Letters: U users, M draws, I items, S seen items of all users together.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pyspark.sql import Column

IntArray = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """Keeps the streams of different choices apart. Values are part of the stored data: never renumber."""

    NEGATIVE = 1
    CANDIDATE = 2
    TIME_TIE = 3
    TRAIN_ORDER = 4
    SYNTHETIC = 5
    SPLIT = 7
    USER_CAP = 8
    BOOTSTRAP = 9
    SHARED_NEGATIVE = 16
    EXAMPLE = 24
    WINDOW_ORDER = 25


class Stream(IntEnum):
    """Keeps the trainer's streams of a seed apart. Trained weights depend on the values: never renumber."""

    FILES = 1
    """The order of an epoch's files."""
    ROWS = 2
    """The order of the rows of some files."""
    DROPOUT = 3
    PART_WEIGHTS = 4
    """The users whose validation rows the weights of item-to-item parts are chosen on."""


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


_P1 = _signed(0x9E3779B185EBCA87)
_P2 = _signed(0xC2B2AE3D27D4EB4F)
_P3 = _signed(0x165667B19E3779F9)
_P4 = _signed(0x85EBCA77C2B2AE63)
_P5 = _signed(0x27D4EB2F165667C5)
_FIRST_SEED = 42


def _wrap(value: Any) -> Any:
    return _signed(value) if isinstance(value, int) else value


def _shift_right(value: Any, bits: int) -> Any:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _rotate_left(value: Any, bits: int) -> Any:
    return _wrap(value << bits) | _shift_right(value, 64 - bits)


def _mix(value: Any, seed: Any) -> Any:
    lane = _wrap(_rotate_left(_wrap(value * _P2), 31) * _P1)
    h = _wrap(seed + _signed(_P5 + 8)) ^ lane
    h = _wrap(_wrap(_rotate_left(h, 27) * _P1) + _P4)
    h = _wrap((h ^ _shift_right(h, 33)) * _P2)
    h = _wrap((h ^ _shift_right(h, 29)) * _P3)
    return h ^ _shift_right(h, 32)


def hash64(*parts: Any, seed: Any = _FIRST_SEED) -> Any:
    """Signed 64-bit hash of integers, int64 arrays or int64 tensors (broadcast together),
    equal to Spark's `xxhash64` of BIGINTs.

    `hash64(a, b)` is `hash64(b, seed=hash64(a))`: a common prefix can be hashed once.
    """
    for part in parts:
        seed = _mix(int(part) if isinstance(part, (int, np.integer)) else part, seed)
    return seed


def hash64_column(*parts: int | Column) -> Column:
    """`hash64` as a Spark expression; int parts are literals, columns are cast to BIGINT."""
    from pyspark.sql import functions as F

    return F.xxhash64(*[F.lit(int(p)).cast("bigint") if isinstance(p, int) else p.cast("bigint") for p in parts])


def code(draw: int, slot: int) -> int:
    """The last part of a draw's key: which draw, and which negative of it."""
    return (draw << 32) | slot


class Weighted(NamedTuple):
    """Integer item weights as prefix sums. cumulative: (I+1,) weight of all items below; spent: (S+1,) of all seen
    items before (all users in one line). int64 arrays or tensors."""

    cumulative: Any
    spent: Any


def unseen_items(
    rank: Any,
    row: Any,
    gaps: Any,
    offsets: Any,
    stride: int,
    searchsorted: Any = np.searchsorted,
    weighted: Weighted | None = None,
) -> Any:
    """The item at position `rank` among the items that user `row` has not seen.

    rank, row: (M,) int64, 0 <= rank < what `unseen_total` says of row. gaps: (S,) from `seen_gaps` or `weighted_gaps`.
    offsets: (U+1,) where each user's seen items start. stride: total weight of the catalogue + 1 (uniform: I + 1).
    Returns (M,) int64 item indexes. NumPy arrays, or torch tensors with torch.searchsorted.

    The j-th seen item (from 0) of a user, s_j, has s_j - j unseen items below it. So the unseen item of rank r has as
    many seen items below it as there are j with s_j - j <= r. With weights, positions stand in place of items.
    """
    first = offsets[row]
    below = searchsorted(gaps, rank + row * stride, side="right") - first
    if weighted is None:
        return rank + below
    position = rank + weighted.spent[first + below] - weighted.spent[first]
    return searchsorted(weighted.cumulative, position, side="right") - 1


def seen_gaps(seen: IntArray, offsets: IntArray, stride: int) -> IntArray:
    """(S,) ascending keys for `unseen_items`: s_j - j of each user, moved into a range of its own.

    seen: (S,) item indexes, ascending and distinct within each user; offsets: (U+1,).
    """
    counts = np.diff(offsets)
    within = np.arange(len(seen), dtype=np.int64) - np.repeat(offsets[:-1], counts)
    row = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    gaps: IntArray = seen - within + row * stride
    return gaps


def weighted_gaps(seen: IntArray, offsets: IntArray, weights: IntArray) -> tuple[IntArray, Weighted]:
    """`seen_gaps` and the prefix sums for items of these weights; the stride is the sum of weights + 1.

    weights: (I,) positive int64. Raises ValueError where users x weight would not fit 63 bits.
    """
    cumulative = np.concatenate([[0], np.cumsum(weights)]).astype(np.int64)
    counts, stride = np.diff(offsets), int(cumulative[-1]) + 1
    if len(counts) * stride >= 2**63:
        raise ValueError(f"{len(counts):,} users x weight {stride:,} do not fit 63 bits; needed fewer users at a time")
    spent = np.concatenate([[0], np.cumsum(weights[seen])]).astype(np.int64)
    row = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    gaps: IntArray = cumulative[seen] - (spent[:-1] - spent[offsets[:-1]][row]) + row * stride
    return gaps, Weighted(cumulative, spent)


def unseen_total(offsets: Any, n_items: int, weighted: Weighted | None = None) -> Any:
    """(U,) how many items each user has not seen, or what they weigh."""
    if weighted is None:
        return n_items - (offsets[1:] - offsets[:-1])
    return weighted.cumulative[-1] - (weighted.spent[offsets[1:]] - weighted.spent[offsets[:-1]])


def negatives(
    seed: int,
    draw: int,
    slot: int,
    user: IntArray,
    item: IntArray,
    row: IntArray,
    seen: IntArray,
    offsets: IntArray,
    n_items: int,
) -> IntArray:
    """(M,) one negative for each positive (user, item):
    uniform over the items its user, `row` in `offsets`, has not seen.

    Raises ValueError when a user has seen the whole catalogue: there is no negative to draw.
    """
    drawn: IntArray = negatives_of(
        prefix(seed, user, item), draw, slot, row, seen_gaps(seen, offsets, n_items + 1), offsets, n_items
    )
    return drawn


def prefix(seed: int, user: Any, item: Any) -> Any:
    """(M,) the part of a negative's key that all draws and slots share."""
    return hash64(seed, int(Purpose.NEGATIVE), user, item)


def negatives_of(
    key: Any,
    draw: int,
    slot: Any,
    row: Any,
    gaps: Any,
    offsets: Any,
    n_items: int,
    searchsorted: Any = np.searchsorted,
    weighted: Weighted | None = None,
) -> Any:
    """`negatives` from its prepared parts, for NumPy or torch; what a loop over draws and slots calls."""
    unseen = unseen_total(offsets, n_items, weighted)[row]
    if len(unseen) and int(unseen.min()) <= 0:
        raise ValueError(
            "a user who has seen the whole catalogue has no negatives; leave such users out of the train rows"
        )
    rank = hash64(code(draw, slot), seed=key) % unseen
    stride = n_items + 1 if weighted is None else int(weighted.cumulative[-1]) + 1
    return unseen_items(rank, row, gaps, offsets, stride, searchsorted, weighted)


def candidates(
    seed: int,
    k: int,
    user: IntArray,
    item: IntArray,
    row: IntArray,
    seen: IntArray,
    offsets: IntArray,
    n_items: int,
) -> tuple[IntArray, IntArray]:
    """For each held-out positive (user, item), k distinct items its user has never interacted with.

    `seen` must hold the positive too. Returns (values, offsets (M+1,)):
    a user with fewer than k unseen items gets all of them.
    """
    gaps = seen_gaps(seen, offsets, n_items + 1)
    values, sizes = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    step = max(1, _CANDIDATES_AT_ONCE // max(1, k))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        size, chosen = _floyd(seed, k, user[part], item[part], n_items - np.diff(offsets)[row[part]])
        values.append(unseen_items(chosen, np.repeat(row[part], size), gaps, offsets, n_items + 1))
        sizes.append(size)
    return np.concatenate(values), np.cumsum(np.concatenate(sizes))


_CANDIDATES_AT_ONCE = 2**22


def _floyd(seed: int, k: int, user: IntArray, item: IntArray, unseen: IntArray) -> tuple[IntArray, IntArray]:
    """((M,) candidates of each positive, their ranks among its user's `unseen` items, in one line)."""
    size = np.minimum(unseen, k)
    key = hash64(seed, int(Purpose.CANDIDATE), user, item)
    chosen = np.full((len(user), k), -1, dtype=np.int64)
    for slot in range(k):
        # Floyd: the upper end grows by one each step; a number that was drawn before is replaced
        # by the upper end itself.
        upper = unseen - size + slot
        active = slot < size
        drawn = hash64(slot, seed=key) % (np.maximum(upper, 0) + 1)
        repeated = (chosen[:, :slot] == drawn[:, None]).any(axis=1)
        chosen[:, slot] = np.where(active, np.where(repeated, upper, drawn), -1)
    return size, chosen[chosen >= 0]
