"""The learning-rate range test (Smith 2017, section 3.3): one step at each of a hundred rates from 1e-7 to 10, each a
fixed factor above the last, until the loss diverges. It suggests the rate at which the smoothed loss falls steepest."""

from __future__ import annotations

import math

import torch

from ncf_dist.errors import TrainingFailed
from ncf_dist.train.lr_curve import HIGH, LOW, smoothed
from ncf_dist.train.trainer import Trainer

POINTS = 100
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
