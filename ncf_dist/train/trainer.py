"""The loop: fit → train_epoch → train_step.

Objective (He et al. 2017, eq. 7): binary cross-entropy over each positive and its N negatives, mean over examples.
Adam; the learning rate falls along a half cosine over all planned steps. The epoch with the best validation NDCG@10
is kept (`train/validation.py`).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ncf_dist.config import Train
from ncf_dist.errors import TrainingFailed
from ncf_dist.models import Recommender
from ncf_dist.train.loaders import Batch, TrainLoader
from ncf_dist.train.world import World

log = logging.getLogger(__name__)

SELECT_BY = "ndcg@10"
LOG_EVERY_S = 30.0
Validate = Callable[[Recommender], dict[str, float]]


@dataclass
class History:
    """What happened, epoch by epoch, and which one was kept (from 0)."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    best: float = -math.inf


def bce(logits: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (B, 1 + N), the positive first."""
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1.0
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


class Trainer:
    """Fits one model on one rank; every rank runs the same steps."""

    def __init__(
        self, model: Recommender, loader: TrainLoader, validate: Validate, config: Train, world: World
    ) -> None:
        self.model = model.to(world.device)
        self.parallel: nn.Module = self.model
        if world.size > 1:
            devices = [world.local_rank] if world.device.startswith("cuda") else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        self.loader, self.validate, self.config, self.world = loader, validate, config, world
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        steps = config.epochs * loader.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        )

    def fit(self) -> History:
        """Train until `epochs` or `patience` is used up, then put the best epoch's weights back into the model."""
        history, best = History(), copy.deepcopy(self.model.state_dict())
        for epoch in range(self.config.epochs):
            record = {"epoch": epoch, **self.train_epoch(epoch), **self.validate(self.model)}
            history.epochs.append(record)
            # Without validation rows there is nothing to choose by: the last epoch stands.
            value = record.get(SELECT_BY, float(epoch))
            if value > history.best:
                history.best, history.best_epoch = value, epoch
                best = copy.deepcopy(self.model.state_dict())
            if self.world.is_main:
                log.info(
                    "epoch %s",
                    " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()),
                )
            if epoch - history.best_epoch >= self.config.patience:
                break
        self.model.load_state_dict(best)
        return history

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over this rank's rows: exactly `loader.steps` steps.
        Returns loss, samples/s of all ranks, and the share of time waited for data."""
        self.parallel.train()
        batches = self.loader.epoch(epoch)
        total, waited, start = torch.zeros((), device=self.world.device), 0.0, time.monotonic()
        logged = start
        bar = tqdm(
            range(self.loader.steps),
            desc=f"epoch {epoch}",
            unit="step",
            leave=False,
            disable=None if self.world.is_main else True,
        )
        for step in bar:
            asked = time.monotonic()
            batch = next(batches)
            now = time.monotonic()
            waited += now - asked
            total += self.train_step(batch)
            if self.world.is_main and bar.disable and now - logged > LOG_EVERY_S:
                logged = now
                log.info(
                    "epoch %d: step %d of %d, loss %.4f",
                    epoch,
                    step + 1,
                    self.loader.steps,
                    total.item() / (step + 1),
                )
        loss = total.item() / self.loader.steps
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss of epoch {epoch} is {loss}; needed a finite number: lower train.lr, and look at the input"
            )
        seconds = time.monotonic() - start
        examples = self.loader.rows * self.world.size * (1 + self.loader.per_positive)
        return {
            "loss": loss,
            "samples_per_s": examples / seconds,
            "data_wait": waited / seconds,
            "seconds": seconds,
        }

    def train_step(self, batch: Batch) -> Tensor:
        """One update. Returns the (detached) loss of this rank's batch."""
        device = self.world.device
        user = batch.user.to(device, non_blocking=True)[:, None]
        items = torch.cat([batch.item[:, None], batch.negatives], dim=1).to(device, non_blocking=True)
        loss = bce(self.parallel(user, items))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.detach()
