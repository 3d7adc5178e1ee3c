"""Days, weeks, months and years (UTC): the unit in which times are counted is chosen by how long they span.

Times are microseconds since 1970. A period is a whole number: days, weeks (from Monday), months or years since the one
that holds 1 January 1970.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ncf_dist.contracts import DAY

IntArray = npt.NDArray[np.int64]

LONGEST = {"day": 31 * DAY, "week": 26 * 7 * DAY, "month": 3_653 * DAY}
"""The longest span that is counted in this unit; a longer one is counted in the next, at last in years."""
UNITS = (*LONGEST, "year")
_MONDAY = 3
"""1 January 1970 was a Thursday, three days after a Monday."""


def unit_of(first: int, last: int) -> str:
    """The unit for times from `first` to `last`."""
    return next((unit for unit, most in LONGEST.items() if last - first <= most), "year")


def period_codes(timestamp: IntArray, unit: str) -> IntArray:
    """(S,) the period that each time falls into."""
    days = timestamp.astype(np.int64) // DAY
    if unit == "day":
        return days
    if unit == "week":
        return (days + _MONDAY) // 7
    codes: IntArray = days.astype("datetime64[D]").astype(f"datetime64[{unit[0].upper()}]").astype(np.int64)
    return codes


def period_name(code: int, unit: str) -> str:
    """`2025-06-30` for a day, and for the week that begins on it; `2025-06`; `2025`."""
    if unit in ("day", "week"):
        return str(np.datetime64(7 * code - _MONDAY if unit == "week" else code, "D"))
    return str(np.datetime64(code, unit[0].upper()))
