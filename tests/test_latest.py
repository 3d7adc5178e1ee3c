"""What users did last is read as the table has it: the latest known items, in order, with the gaps between them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist.contracts import RECENT
from ncf_dist.gaps import gap_code
from ncf_dist.models.latest import latest

User = list[tuple[int, int, int]]
USERS = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 2), st.integers(0, 10**9)), max_size=7), max_size=6
)
"""Users' rows (item, split, seconds since the one before), oldest first."""


@settings(deadline=None)
@given(USERS, st.integers(0, 2), st.integers(1, 5))
def test_the_latest_known_items_in_order(users: list[User], last_split: int, length: int) -> None:
    times = [np.cumsum([10**6 * wait for _, _, wait in rows]).astype(int).tolist() for rows in users]
    columns = [
        list(range(len(users))),
        [[item for item, _, _ in rows] for rows in users],
        times,
        [[split for _, split, _ in rows] for rows in users],
    ]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, RECENT.schema, strict=True)], schema=RECENT.schema)
    found = latest(table, last_split, length)
    assert found.items.shape == found.gaps.shape == (len(users), length)
    for user, rows in enumerate(users):
        known = [(item, time) for (item, split, _), time in zip(rows, times[user], strict=True) if split <= last_split]
        known = known[-length:]
        gaps = [0, *(int(gap_code(np.array(b - a))) for (_, a), (_, b) in itertools.pairwise(known))]
        empty = [0] * (length - len(known))
        assert found.length[user] == len(known)
        assert found.items[user].tolist() == [item for item, _ in known] + empty
        assert found.gaps[user].tolist() == gaps[: len(known)] + empty
