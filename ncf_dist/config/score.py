"""The section `score`: which recommendations are made, and for whom."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from ncf_dist.config.section import PositiveInt, Section

IdList = str | tuple[str | int, ...]


class Score(Section):
    k: PositiveInt = 10
    """Recommendations a user (K)."""
    form: Literal["long", "lists"] = "long"
    """`long`: a row a recommendation · `lists`: a row a user, with a list of them."""
    seen: Literal["all", "train"] = "all"
    """Which of a user's items are not recommended again: `all` of them before ds, or only those of `train` and
    validation, to compare with evaluate."""
    allow_items: IdList | None = None
    """Recommend only these items: their ids, or a text file with one id a line. Ids that no item has are counted."""
    deny_items: IdList = ()
    """Never recommend these items; given as `allow_items` are."""
    active_since: dt.date | PositiveInt | None = None
    """Only users with an interaction on or after this day (UTC), or in this many days before ds. Users without any
    interaction are not active."""
    fallback_days: PositiveInt | None = 30
    """Known users without train rows tonight get the items with the most interactions in this many days before ds:
    users of earlier nights, users of `input.users` that never interacted, users with nothing but test rows. `null`
    leaves them out."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products. Scores are stored as float32."""
    users_per_block: PositiveInt = 512
    """Users that a worker scores at once. Its memory grows with this and with the catalogue."""
    tasks: PositiveInt | None = None
    """Spark tasks of the scoring job; default: one a file of the table."""
