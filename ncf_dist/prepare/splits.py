"""The step split: which rows are held out. Rules work on blocks of whole users (NumPy); Spark finds a temporal split's
cutoffs once.

- leave-one-out, leave-k-out (He et al. 2017, section 4.1): a user's k latest rows are test rows, the k before them
  validation rows. Users with fewer than `min_interactions` items keep all of them in train.
- temporal: test rows are the latest of all, validation rows the latest of what is left.
- random: by a hash of (seed, user, item).
- files: rows of the test file are test rows; validation is each user's latest train row, where another is left.
- none: every row is a train row.

Equal times are ordered by a hash of (seed, user, item), or with split.ties=file as the rows stand in the log.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from ncf_dist.config import Config, Split
from ncf_dist.contracts import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT, day_start
from ncf_dist.prepare.filters import Filtered
from ncf_dist.sampling import IntArray, Purpose, hash64, hash64_column

LEAST = -(2**63)
DIGIT_BITS = 16


@dataclass(frozen=True)
class Cutoff:
    """Rows later than `time` are held out, and of those at that time the ones whose tie hash is at least `tie`."""

    time: int
    tie: int = LEAST

    def holds(self, time: IntArray, tie: IntArray) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = (time > self.time) | ((time == self.time) & (tie >= self.tie))
        return held


@dataclass(frozen=True)
class SplitRule:
    """A split, sent to the workers: the config, and for temporal splits where they cut."""

    split: Split
    seed: int
    test: Cutoff | None = None
    validation: Cutoff | None = None

    def __call__(
        self,
        user: IntArray,
        item: IntArray,
        timestamp: IntArray,
        part: npt.NDArray[np.int8],
        offsets: IntArray,
        place: IntArray | None = None,
    ) -> tuple[npt.NDArray[np.int8], int]:
        """((R,) split codes of `contracts`, users whose split a tie in time decided).

        user, item, timestamp, part: (R,) of whole users, and place where split.ties is file; offsets: (U+1,) where each
        begins.
        """
        code = np.full(len(user), TRAIN_SPLIT, dtype=np.int8)
        strategy, tied = self.split.strategy, 0
        tie = self.tie(user, item, place)
        if strategy in ("leave-one-out", "leave-k-out"):
            tied = leave_k(code, timestamp, tie, offsets, self.split.k, self.split.min_interactions)
        elif strategy == "temporal":
            assert self.test is not None
            tied = self._temporal(code, timestamp, tie, offsets)
        elif strategy == "random":
            test = self.split.test_fraction
            place = (hash64(self.seed, int(Purpose.SPLIT), user, item) >> 11) + 2**52
            code[place < int((test + (1 - test) * self.split.validation_fraction) * 2**53)] = VALIDATION_SPLIT
            code[place < int(test * 2**53)] = TEST_SPLIT
        elif strategy == "files":
            in_test = part == 1
            code[in_test] = TEST_SPLIT
            tied = _latest_of_train(code, timestamp, tie, offsets, ~in_test)
        if not self.split.validation:
            code[code == VALIDATION_SPLIT] = TRAIN_SPLIT
        return code, tied

    def tie(self, user: IntArray, item: IntArray, place: IntArray | None) -> IntArray:
        """(R,) what orders rows of equal time."""
        if self.split.ties == "file":
            assert place is not None, "rows came without their places in the log"
            return place
        tie: IntArray = hash64(self.seed, int(Purpose.TIME_TIE), user, item)
        return tie

    def _temporal(self, code: npt.NDArray[np.int8], time: IntArray, tie: IntArray, offsets: IntArray) -> int:
        at_cut = np.zeros(len(code), dtype=bool)
        for cutoff, held_out in ((self.validation, VALIDATION_SPLIT), (self.test, TEST_SPLIT)):
            if cutoff is not None:
                code[cutoff.holds(time, tie)] = held_out
                at_cut |= (time == cutoff.time) & (cutoff.tie != LEAST)
        return int((np.add.reduceat(at_cut, offsets[:-1], dtype=np.int64) > 0).sum())


def leave_k(
    code: npt.NDArray[np.int8], time: IntArray, tie: IntArray, offsets: IntArray, k: int, min_interactions: int
) -> int:
    """Mark each user's k latest rows as test and the k before them as validation; returns the users a tie decided."""
    order, back = latest_first(time, tie, offsets)
    sizes = np.diff(offsets)
    row = np.repeat(np.arange(len(sizes)), sizes)
    eligible = (sizes >= min_interactions)[row]
    code[order[eligible & (back < 2 * k)]] = VALIDATION_SPLIT
    code[order[eligible & (back < k)]] = TEST_SPLIT
    ordered = time[order]
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]) & (row[1:] == row[:-1])
    cut = eligible & same & ((back == k - 1) | (back == 2 * k - 1))
    return len(np.unique(row[cut]))


def _latest_of_train(
    code: npt.NDArray[np.int8], time: IntArray, tie: IntArray, offsets: IntArray, train: npt.NDArray[np.bool_]
) -> int:
    """Mark the latest train row of each user as validation, where the user has another one; returns the users a tie
    decided."""
    at = np.flatnonzero(train)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[at]
    users, sizes = np.unique(row, return_counts=True)
    inner = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order, back = latest_first(time[at], tie[at], inner)
    chosen = (back == 0) & np.repeat(sizes >= 2, sizes)
    code[at[order[chosen]]] = VALIDATION_SPLIT
    ordered = time[at][order]
    before = np.flatnonzero(chosen) - 1
    return int((ordered[before] == ordered[chosen]).sum()) if len(users) else 0


def latest_first(time: IntArray, tie: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """((R,) rows ordered by user, time and tie, (R,) how many rows of the user come after each)."""
    sizes = np.diff(offsets)
    row = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((tie, time, row))
    back = np.repeat(offsets[1:], sizes) - 1 - np.arange(len(time))
    return order, back


def split_rule(config: Config, rows: Filtered, indexed: DataFrame) -> SplitRule:
    """The rule of the config, with the cutoffs of a temporal split. indexed: the rows with user_idx and item_idx."""
    rule = SplitRule(config.split, config.seed)
    return temporal_rule(rule, rows.rows, indexed, rows.count) if config.split.strategy == "temporal" else rule


def temporal_rule(rule: SplitRule, rows: DataFrame, indexed: DataFrame, n: int) -> SplitRule:
    """The rule with its cutoffs. rows: the n unique rows; indexed: the same with user_idx and item_idx."""
    split = rule.split
    if split.test_from is not None:
        test = Cutoff(day_start(split.test_from))
        left = rows.where(F.col("timestamp") < test.time).count()
    else:
        left = n - round(n * split.test_fraction)
        test = _cut_at(rows, indexed, left, n, rule)
    validation = None
    if split.validation:
        if split.validation_from is not None:
            validation = Cutoff(day_start(split.validation_from))
        else:
            validation = _cut_at(rows, indexed, left - round(left * split.validation_fraction), n, rule)
    return replace(rule, test=test, validation=validation)


def _cut_at(rows: DataFrame, indexed: DataFrame, position: int, n: int, rule: SplitRule) -> Cutoff:
    """The cutoff below which exactly `position` of the n rows are."""
    if position >= n:
        return Cutoff(2**63 - 1)
    time = value_at(rows, F.col("timestamp"), position)
    earlier = rows.where(F.col("timestamp") < time).count()
    if earlier == position:
        return Cutoff(time)
    at_cut = indexed.where(F.col("timestamp") == time)
    hashed = hash64_column(rule.seed, int(Purpose.TIME_TIE), F.col("user_idx"), F.col("item_idx"))
    tie = F.col("place") if rule.split.ties == "file" else hashed
    return Cutoff(time, value_at(at_cut, tie, position - earlier))


def value_at(frame: DataFrame, key: Column, position: int) -> int:
    """The value at `position` (from 0) of `key` (bigint) in ascending order: exact, by radix select in four counting
    passes, with at most 2^16 counts on the driver."""
    ordered = key.bitwiseXOR(F.lit(-(2**63)).cast("bigint"))  # As unsigned numbers these sort like the signed ones.
    keys = frame.select(ordered.alias("k"))
    value = 0
    for shift in (48, 32, 16, 0):
        digit = F.shiftrightunsigned("k", shift).bitwiseAND(F.lit(2**DIGIT_BITS - 1)).cast("int")
        within = keys if shift == 48 else keys.where(F.shiftrightunsigned("k", shift + DIGIT_BITS) == F.lit(value))
        counts = sorted(
            (int(row["d"]), int(row["count"])) for row in within.groupBy(digit.alias("d")).count().collect()
        )
        for digit_value, count in counts:
            if position < count:
                value = (value << DIGIT_BITS) | digit_value
                break
            position -= count
        else:
            raise IndexError(f"position is {position} rows past the end")
    return value - 2**63


def split_facts(rule: SplitRule) -> dict[str, str]:
    """Where a temporal split cut, as ISO 8601 times in UTC."""
    cuts = {"test_cutoff": rule.test, "validation_cutoff": rule.validation}
    return {name: _iso(cut.time) for name, cut in cuts.items() if cut is not None and cut.time < 2**62}


def _iso(microseconds: int) -> str:
    return (dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=microseconds)).isoformat()
