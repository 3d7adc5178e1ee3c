"""A log of many days, made by NumPy, and what prepare would say of each of its nights: enough to try the gates of the
data over many nights without Spark. `tests/test_profile.py` holds prepare to the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo

WINDOW = 30
"""Days of the log that a night reads."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Interactions: who, what, how much, on which day (a fraction is the time of day); bad: rows that prepare puts into
    the quarantine."""

    user: Ints
    item: Ints
    rating: npt.NDArray[np.float64]
    day: npt.NDArray[np.float64]
    bad: int = 0

    def where(self, mask: npt.NDArray[np.bool_]) -> Rows:
        return replace(self, user=self.user[mask], item=self.item[mask], rating=self.rating[mask], day=self.day[mask])

    def __len__(self) -> int:
        return len(self.user)


def a_day(rng: np.random.Generator, day: int, users: int, items: int, rows: int) -> Rows:
    """A long tail of items, of which new ones come; users of unequal activity; a weekend has 40 % more rows."""
    size = rng.poisson(rows * (1.4 if day % 7 >= 5 else 1.0) * rng.lognormal(0, 0.08))
    activity = 1 / (1 + np.arange(users)) ** 0.5
    place = np.arange(items) * 389 % 1009  # Neighbours in the index are not alike in popularity.
    popularity = 1 / (1 + place) ** 0.9 * rng.lognormal(0, 0.2, items)
    return Rows(
        rng.choice(users, size, p=activity / activity.sum()),
        rng.choice(items, size, p=popularity / popularity.sum()),
        rng.choice(np.arange(1, 6), size, p=(0.06, 0.11, 0.26, 0.35, 0.22)).astype(float),
        day + rng.random(size),
        int(rng.binomial(size, 0.002)),
    )


def a_log(
    seed: int, days: int, users: int = 3000, items: int = 600, rows: int = 1500, growth: float = 0.02
) -> list[Rows]:
    """A day each."""
    rng = np.random.default_rng(seed)
    sizes = [(1 + growth) ** day for day in range(days)]
    return [a_day(rng, day, int(users * g), int(items * g**0.3), int(rows * g)) for day, g in enumerate(sizes)]


def joined(parts: list[Rows]) -> Rows:
    def of(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return Rows(of("user"), of("item"), of("rating"), of("day"), sum(part.bad for part in parts))


def night(log: list[Rows], day: int, change: Callable[[Rows], Rows]) -> Rows:
    """What prepare keeps of the window that ends with `day`, after `change` has spoilt the log."""
    rows = change(joined(log[max(0, day - WINDOW) : day]))
    _, first = np.unique(rows.user * 2**32 + rows.item, return_index=True)
    return rows.where(np.isin(np.arange(len(rows)), first))


def manifest(rows: Rows, day: int, before: Rows | None, known: set[int]) -> Manifest:
    """As prepare would leave it. before: of the last published night; known: users that have a number already."""
    profile: dict[str, Any] = {
        "new_users_a_day": float(len(set(rows.user.tolist()) - known)) if known else None,
        "quarantine": rows.bad / (len(rows) + rows.bad),
        "age_days": float(day - rows.day.max()) if len(rows) else None,
        "vanished": vanished(before, rows) if before is not None else None,
        "ratings": counts(rating_bins(rows.rating)),
        "items": counts(rows.item % 64),
    }
    info = TableInfo("interactions", "", (FileInfo("0.parquet", len(rows), 1, 1, ""),))
    return Manifest(
        stage="prepare", ds="", run_key=f"p{day}", root="", config={}, inputs={}, tables={"interactions": info},
        facts={"profile": profile},
    )  # fmt: skip


def vanished(before: Rows, rows: Rows) -> float:
    gone = ~np.isin(before.user, rows.user) | ~np.isin(before.item, rows.item)
    return float(gone.mean())


def rating_bins(rating: npt.NDArray[np.float64]) -> Ints:
    """1 + 14 + ⌊7 log2 |rating|⌋ between 1 and 127, with the rating's sign; 0 for 0."""
    with np.errstate(divide="ignore"):
        octave = np.floor(7 * np.log2(np.abs(rating)))
    place = np.clip(octave, -14, 112) + 15
    return np.where(rating == 0, 0, place * np.sign(rating)).astype(np.int64)


def counts(bins: Ints) -> dict[str, int]:
    return {str(place): count for place, count in sorted(Counter(bins.tolist()).items())}
