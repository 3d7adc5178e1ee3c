"""What people see while a rank trains: a bar on a terminal, now and then a line elsewhere, and a line an epoch. Epochs
and steps are counted from 1 here."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ncf_dist.train.loaders import Batch
from ncf_dist.train.validation import SELECT_BY
from ncf_dist.train.world import World

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
WORTH_SAYING = 0.05
"""The share of time waited for data from which on an epoch's line says it."""


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
            total=steps,
            initial=first,
            desc=f"epoch {epoch + 1} of {epochs}",
            unit="step",
            leave=False,
            disable=not terminal,
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
            where = f"epoch {self.epoch + 1} of {self.epochs}, step {self.done:,} of {self.steps:,}"
            log.info("%s: %s", where, self.in_words())
        else:
            self.bar.set_postfix_str(self.in_words())

    def in_words(self) -> str:
        shown = self.now()
        return (
            f"loss {figure(shown['loss'], 4)}, {count(shown['samples_per_s'])} samples/s, "
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


def show_epoch(world: World, record: dict[str, Any], epochs: int, best: bool) -> None:
    """One line for an epoch that is over. best: whether it is the best so far."""
    if world.is_main:
        log.info("epoch %d of %d: %s", record["epoch"] + 1, epochs, in_words(record, best))


def in_words(record: dict[str, Any], best: bool) -> str:
    """An epoch's record as a person reads it: `loss .3917, ndcg@10 .312 (best), 2.9 M samples/s, 14 s`."""
    said = [f"loss {figure(record['loss'], 4)}"]
    for name in [name for name in SELECT_BY if name in record][:1]:
        said.append(f"{name} {figure(record[name], 3)}{' (best)' if best else ''}")
    said.append(f"{count(record['samples_per_s'])} samples/s")
    if record["data_wait"] >= WORTH_SAYING:
        said.append(f"{record['data_wait']:.0%} waiting for data")
    return ", ".join([*said, f"{record['seconds']:,.{0 if record['seconds'] >= 10 else 1}f} s"])


def figure(value: float, digits: int) -> str:
    """.312 for 0.3124: no zero before the point."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def count(value: float) -> str:
    """2.9 M for 2,912,345."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.1f}{name}"
    return f"{value:.0f}"
