"""Poisson bootstrap over users: intervals and paired p-values from sums that tasks can add up.

In each of B replicates a user counts w times, w ~ Poisson(1). For many users this is the bootstrap's multinomial
resampling (Hanley & MacGibbon 2006; over distributed data: Chamandy et al. 2012). A weight is a hash of (seed, user,
replicate). So a user has the same weight for every scorer, differences between scorers are paired, and no weight
depends on the task that computes it. Letters: B replicates, U users.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ncf_dist.sampling import Purpose, hash64

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CONFIDENCE = 0.95
_MOST = 20
"""P(Poisson(1) > 20) is below 1e-20, less than a 64-bit hash can tell."""


def _thresholds() -> IntArray:
    """(20,) signed hashes from which on a weight is at least 1, 2, … 20."""
    total, below = 0.0, []
    for count in range(_MOST):
        total += math.exp(-1.0) / math.factorial(count)
        below.append(min(2**63 - 1, int(total * 2**64) - 2**63))
    return np.array(below, dtype=np.int64)


_THRESHOLDS = _thresholds()


def poisson_weights(seed: int, user: IntArray, replicates: int) -> FloatArray:
    """(B, U) how often each user counts in each replicate."""
    prefix = hash64(seed, int(Purpose.BOOTSTRAP), user)
    drawn = hash64(np.arange(replicates, dtype=np.int64)[:, None], seed=prefix[None, :])
    return np.searchsorted(_THRESHOLDS, drawn, side="right").astype(np.float64)


def interval(replicates: FloatArray) -> list[float] | None:
    """The 95 % percentile interval (Efron & Tibshirani 1993, section 13.3); None without replicates. NaN replicates,
    in which nobody was drawn, are left out."""
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return None
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(finite, (tail, 1 - tail))]


def p_value(differences: FloatArray) -> float | None:
    """Two-sided p of "no difference" from the replicates (B,) of a paired difference: twice the share of them on the
    smaller side of 0, one more counted, so at least 2 / (B + 1) (Davison & Hinkley 1997, section 4.2). It agrees with
    the interval: below 0.05 where that leaves 0 out. None without replicates."""
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return None
    smaller = min(int((finite <= 0).sum()), int((finite >= 0).sum()))
    return min(1.0, 2.0 * (smaller + 1) / (len(finite) + 1))
