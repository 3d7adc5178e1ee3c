"""The section `parts`: item-to-item parts of the scores, beside what the model itself gives."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from ncf_dist.config.section import PositiveInt, Section

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _each_once(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not weights or len(set(weights)) != len(weights):
        raise ValueError(f"weights of a part are {list(weights)}; needed at least one, and each once")
    return weights


Weights = Annotated[
    tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...],
    AfterValidator(_each_once),
]


class Counts(Section):
    """What follows what, as prepare counts it."""

    weights: Weights = (0.6, 0.0, 0.15, 0.3, 1.2)
    """What the part is multiplied by, beside the model's own scores. The one that is the best on the validation rows is
    chosen, 0 leaves the part out; without validation rows it is the first."""
    half_life: Positive = 2.0
    """Items after which one of a user's items is worth half as much."""
    last: PositiveInt = 20
    """A user's latest items that count, at most."""
    smoothing: Positive = 20.0
    """How much is known of an item before anything follows it: the higher, the less a rare pair is worth."""


class Ease(Section):
    """EASE (Steck 2019), each item's largest weights."""

    weights: Weights = (5.0, 0.0, 1.25, 2.5, 10.0)
    """As those of `parts.counts`."""
    half_life: Positive = 30.0
    """Items after which one of a user's items is worth half as much."""
    last: PositiveInt = 200
    """A user's latest items that count, at most."""
    kept: PositiveInt = 200
    """Weights kept of each item, the largest ones."""
    ridge: Positive = 1000.0
    """L2 regularisation (λ)."""
    gram_bytes: PositiveInt = 4 * 2**30
    """Most memory that fitting may take; it grows with the square of the catalogue."""


class Parts(Section):
    """Beside what the model itself gives, scores may have parts that are looked up by a user's latest items."""

    counts: Counts | None = None
    """What follows what: `{}` for the part with its defaults, `null` for none. Needs `sequences.length` and
    `sequences.next_items`."""
    ease: Ease | None = None
    """EASE over what a user did last: `{}` or `null`, likewise. Needs `sequences.length`."""

    @property
    def named(self) -> bool:
        """Whether there are any."""
        return self.counts is not None or self.ease is not None
