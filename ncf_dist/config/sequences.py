"""The section `sequences`: tables of what users did in order of time, for models of histories."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ncf_dist.config.section import NonNegativeInt, Section


class Sequences(Section):
    length: Annotated[int, Field(ge=0, le=1_000)] = 0
    """Items that a model of histories looks back on (L): windows of train items have one more, the last to be
    predicted. 0: no tables of order are made."""
    steps: Annotated[int, Field(ge=1, le=10)] = 10
    """Two items of a user count as one following the other where they are at most this many rows apart; the nearer, the
    more they count (1 / distance)."""
    next_items: NonNegativeInt = 400
    """Items kept for each item of those that follow it, the most counted first. 0: they are not counted."""
