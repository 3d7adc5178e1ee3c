"""The section `sweep`: which settings the job sweep searches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ncf_dist.config.section import PositiveInt, Section


class Range(Section):
    """Numbers from `low` to `high`; whole ones where both ends are."""

    low: int | float
    """The least of them."""
    high: int | float
    """The most of them."""
    log: bool = False
    """Spread evenly over orders of magnitude."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            needed = "low below high" + (", and low above 0 with log" if self.log else "")
            raise ValueError(f"a range of sweep.space is {self.low} to {self.high}; needed {needed}")
        return self


Choice = Annotated[list[int | float | str | bool | None], Field(min_length=1)]


class Sweep(Section):
    space: dict[str, Range | Choice] = Field(default={})
    """What is searched: settings of `model`, `train`, `loader` and `parts` by their whole names, each a list of values
    or a range: `train.lr: {low: 0.0003, high: 0.03, log: true}`."""
    trials: PositiveInt = 20
    """Models that are trained."""
    metric: str = "validation.ndcg@10"
    """What the best one is best in: a metric of the job train, of validation rows. Those of errors and losses are
    minimised, all others maximised."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,40}$")] = "sweep"
    """Beginning of the experiments' names (`--run`), which end in a digest of their settings."""
