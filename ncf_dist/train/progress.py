"""What people see while a rank trains: a bar on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ncf_dist.train.loaders import Batch
from ncf_dist.train.world import World

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Meter:
    """Counts one epoch's samples, loss and waiting, and shows them on rank 0. A sample is one scored pair: a row has as
    many as it has items."""

    def __init__(self, world: World, epoch: int, epochs: int, steps: int, first: int) -> None:
        self.world, self.epoch, self.epochs, self.steps = world, epoch, epochs, steps
        self.first = self.done = first
        self.samples, self.loss, self.waited = 0, 0.0, 0.0
        self.start = self.shown = time.monotonic()
        terminal = world.is_main and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first, desc=f"epoch {epoch}", unit="step", leave=False, disable=not terminal
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        asked = time.monotonic()
        yield
        self.waited += time.monotonic() - asked

    def step(self, batch: Batch, loss: float) -> None:
        self.done += 1
        self.samples += batch.items.numel()
        self.loss += loss
        self.bar.update()
        now = time.monotonic()
        if not self.world.is_main or now - self.shown < (0.5 if not self.bar.disable else LOG_EVERY_S):
            return
        self.shown = now
        if self.bar.disable:
            log.info("%s", json.dumps({"epoch": self.epoch, "step": self.done, "of": self.steps, **self.now()}))
        else:
            shown = self.now()
            self.bar.set_postfix_str(
                f"{shown['samples_per_s']:,.0f} samples/s, loss {shown['loss']:.4f}, "
                f"{shown['data_wait']:.0%} waiting for data, at most {shown['eta_s']:,.0f} s left"
            )

    def now(self) -> dict[str, float]:
        """The epoch so far, and the seconds to the last epoch that may come."""
        here, seconds = self.done - self.first, max(time.monotonic() - self.start, 1e-9)
        to_come = (self.steps - self.done) + self.steps * (self.epochs - self.epoch - 1)
        return {
            "loss": round(self.loss / max(1, here), 6),
            "samples_per_s": round(self.samples * self.world.size / seconds),
            "data_wait": round(self.waited / seconds, 4),
            "eta_s": round(to_come * seconds / max(1, here), 1),
        }

    def close(self) -> None:
        self.bar.close()

    def summary(self) -> dict[str, float]:
        """Of the whole epoch, or of what of it was run here: samples/s of all ranks, share waited for data, seconds."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {
            "samples_per_s": self.samples * self.world.size / seconds,
            "data_wait": self.waited / seconds,
            "seconds": seconds,
        }


def show_epoch(world: World, record: dict[str, Any]) -> None:
    """One line for an epoch that is over."""
    if world.is_main:
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}
        log.info("%s", json.dumps(rounded))
