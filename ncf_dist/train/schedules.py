"""Learning rate (and one-cycle's momentum) as functions of how much of the training is done, from 0 to 1.

- constant: 1
- linear: 1 - t
- cosine: (1 + cos πt) / 2                               Loshchilov & Hutter 2017, without restarts
- one_cycle: from 1/25 up to 1 in the first quarter, then down to 1e-5, momentum from 0.95 down to 0.85 and back, each
  along a half cosine                                    Smith 2018; shape and numbers of fastai's fit_one_cycle
"""

from __future__ import annotations

import math
from collections.abc import Callable

WARM, START, END = 0.25, 1 / 25, 1e-5
HIGH, LOW = 0.95, 0.85


def between(start: float, end: float, t: float) -> float:
    """From `start` (t = 0) to `end` (t = 1) along a half cosine."""
    return start + (end - start) * (1 - math.cos(math.pi * t)) / 2


def one_cycle(t: float) -> float:
    return between(START, 1, t / WARM) if t < WARM else between(1, END, (t - WARM) / (1 - WARM))


def one_cycle_momentum(t: float) -> float:
    return between(HIGH, LOW, t / WARM) if t < WARM else between(LOW, HIGH, (t - WARM) / (1 - WARM))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: between(1, 0, t),
    "one_cycle": one_cycle,
}
"""Multiplier of `train.lr` when the share t of the training is done."""
