"""The section `split`: which rows are held out."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import PositiveInt, Section


class Split(Section):
    strategy: Literal["leave-one-out", "leave-k-out", "temporal", "random", "files", "none"] = "leave-one-out"
    """`leave-one-out`: each user's latest item is the test row, the one before it the validation row
    (He et al. 2017, section 4.1) · `leave-k-out`: the latest k, and the k before them · `temporal`: everything from one
    moment on · `random`: each row by its hash · `files`: what `split.test` holds · `none`: train on everything."""
    k: PositiveInt = 1
    """leave-k-out: rows of a user that are held out for the test, and as many for validation."""
    min_interactions: Annotated[int, Field(ge=3)] = 3
    """leave-one-out, leave-k-out: users with fewer items keep all of them in train: so few say little of a model."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """random: share of the rows that are held out for the test · temporal: the same, of the latest rows."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """random, temporal: share of the remaining rows that is held out for validation."""
    test_from: dt.date | None = None
    """temporal: the day (UTC) the test begins, in place of test_fraction."""
    validation_from: dt.date | None = None
    """temporal: the day (UTC) validation begins, in place of validation_fraction."""
    test: str | tuple[str, ...] | None = None
    """files: the test rows, in the format of the log; `input.path` is then the train rows."""
    candidates: str | tuple[str, ...] | None = None
    """files: given candidates, lines of `(user,item)`, then items, tab-separated (the NCF paper's test.negative);
    `null` draws them."""
    ties: Literal["hash", "file"] = "hash"
    """Order of a user's rows of equal time: by a `hash` of seed, user and item, whatever the order of the log, or as
    they stand in the `file` (files by their path), as papers do; then a shuffled log gives other splits."""
    validation: bool = True
    """Whether train gives up rows for validation, by the rule that makes the test (`files`: each user's latest).
    Without them the last epoch is kept: for the final fit, after the settings are chosen."""

    @model_validator(mode="after")
    def _fits_together(self) -> Split:
        least = 2 * self.k + 1
        if self.strategy == "leave-one-out" and self.k != 1:
            raise ValueError(f"split.k is {self.k} with leave-one-out: set split.strategy=leave-k-out")
        if self.strategy == "leave-k-out" and self.min_interactions < least:
            raise ValueError(
                f"split.min_interactions is {self.min_interactions} with split.k {self.k}; needed at least 2 k + 1 = "
                f"{least}, so that a row is left to train on"
            )
        if (self.strategy == "files") != (self.test is not None):
            raise ValueError(
                f"split.test is {self.test!r} with strategy {self.strategy}; needed the test file for `files`, "
                "and none otherwise"
            )
        if self.candidates is not None and self.strategy != "files":
            raise ValueError(f"split.candidates is set with strategy {self.strategy}; it needs strategy files")
        if self.strategy != "temporal" and (self.test_from or self.validation_from):
            raise ValueError(f"split.test_from is for strategy temporal, not {self.strategy}")
        if self.validation_from and not (self.test_from and self.validation_from < self.test_from):
            raise ValueError(f"split.validation_from is {self.validation_from}; needed a day before split.test_from")
        return self
