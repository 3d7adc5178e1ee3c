"""The coarse time between two interactions, as models of histories read it: one of 64 codes."""

from __future__ import annotations

import numpy as np

from ncf_dist.sampling import IntArray

GAP_CODES = 64
_LEAST: IntArray = np.array([round(10**6 * 2 ** (step / 2)) for step in range(GAP_CODES - 1)], dtype=np.int64)
"""(63,) the least microseconds of each code from 1 on: two codes a doubling, from a second to 68 years."""


def gap_code(microseconds: IntArray) -> IntArray:
    """0 for less than a second, then two codes a doubling. By look-up among integers: no processor rounds otherwise.

    >>> gap_code(np.array([0, 999_999, 1_000_000, 2_000_000, 86_400_000_000])).tolist()
    [0, 0, 1, 3, 33]
    """
    return np.searchsorted(_LEAST, microseconds, side="right").astype(np.int64)
