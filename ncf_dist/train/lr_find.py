"""The learning-rate range test (Smith 2017, section 3.3): one step at each of a hundred rates from 1e-7 to 10, each a
fixed factor above the last, until the loss diverges. It suggests the rate at which the smoothed loss falls steepest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ncf_dist.errors import TrainingFailed
from ncf_dist.train.trainer import Trainer

LOW, HIGH, POINTS = 1e-7, 10.0, 100
SMOOTHING = 0.9
AWAY = 4.0
"""The test ends when the smoothed loss is this many times its lowest."""


def rate_curve(trainer: Trainer) -> list[tuple[float, float]]:
    """(rate, mean loss of all ranks) of each step. The trainer's model is of no use afterwards."""
    trainer.config = trainer.config.model_copy(update={"schedule": "constant"})
    curve: list[tuple[float, float]] = []
    lowest = math.inf
    epoch, batches = 0, trainer.loader.epoch(0)
    trainer.objective.train()
    trainer.enter_phase()
    for point in range(POINTS):
        rate = LOW * (HIGH / LOW) ** (point / (POINTS - 1))
        trainer.config = trainer.config.model_copy(update={"lr": rate})
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            batches = trainer.loader.epoch(epoch)
            batch = next(batches)
        try:
            value, _, _ = trainer.train_step(batch, 0.0)
        except TrainingFailed:
            break
        trainer.progress.updates += 1
        mean = trainer.world.sum(torch.tensor([value], dtype=torch.float64)).item() / trainer.world.size
        curve.append((rate, mean))
        smooth = smoothed([loss for _, loss in curve])[-1]
        lowest = min(lowest, smooth)
        if smooth > AWAY * lowest:
            break
    return curve


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start at 0."""
    values, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        values.append(mean / (1 - SMOOTHING**count))
    return values


def suggest(curve: Sequence[tuple[float, float]]) -> float:
    """The rate at which the smoothed loss falls steepest over log(rate), before its lowest point.
    Raises TrainingFailed where it never falls."""
    losses = smoothed([loss for _, loss in curve])
    end = losses.index(min(losses)) if losses else 0
    falls = [losses[i + 1] - losses[i - 1] for i in range(1, end)]
    if not falls or min(falls) >= 0:
        raise TrainingFailed(
            f"the loss never falls over {len(curve)} learning rates from {LOW} up; needed a rate that lowers it: "
            "raise train.batch_size, or look at the input"
        )
    return curve[1 + falls.index(min(falls))][0]
