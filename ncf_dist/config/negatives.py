"""The section `negatives`: items that a user has not seen, drawn beside the seen ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ncf_dist.config.section import NonNegativeInt, Section


class Negatives(Section):
    per_positive: NonNegativeInt = 4
    """Negatives drawn for each positive (N)."""
    draws: NonNegativeInt = 4
    """Independent draws kept in the train table; epoch e reads draw `e mod draws`. 0 keeps none: the trainer draws them
    itself (train.negatives=online)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of an item as a negative: its train popularity to this power; 0 is uniform."""
    candidates: NonNegativeInt = 99
    """Unseen items that a held-out positive is ranked among (the NCF protocol)."""
