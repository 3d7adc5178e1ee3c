"""The loop: fit → train_epoch → train_step.

Objectives are in `losses.py`, optimisers in `optimisers.py`, schedules in `schedules.py`. The epoch with the best
validation NDCG@10 (explicit feedback: the lowest MSE) is kept; test rows are never read here.

A training is a function of (config, tables, seed, world). What a rank draws at random in a step is seeded by the step,
so a training that is resumed from a checkpoint gives the same bits as one that was not interrupted.

A loss or a gradient that is not finite ends the training on all ranks before any weight is updated. The rank whose loss
is not finite sends NaN gradients, the mean over ranks gives them to every rank, and the norm shows them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from ncf_dist.config import Train
from ncf_dist.errors import ContractError, Preempted, TrainingFailed
from ncf_dist.models import Recommender
from ncf_dist.sampling import Stream, hash64
from ncf_dist.stored import misfit, typed
from ncf_dist.train import checkpoints
from ncf_dist.train.checkpoints import Checkpoint
from ncf_dist.train.epoch_order import Phase
from ncf_dist.train.exchange import Exchange
from ncf_dist.train.loaders import Batch, TrainLoader
from ncf_dist.train.losses import Objective
from ncf_dist.train.optimisers import build_optimiser, set_rate, state_like
from ncf_dist.train.progress import Meter, show_epoch
from ncf_dist.train.validation import SELECT_BY
from ncf_dist.train.world import World

POINTS_AN_EPOCH = 50
"""At most so many points of the loss curve are kept in the history."""

Validate = Callable[[Recommender], dict[str, float]]


@dataclass
class History:
    """The figures of each epoch, and which epoch was kept (from 0). curve: (epoch, its step, rank 0's loss, rate)."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    best: float | None = None
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)


@dataclass
class Progress:
    """How far a training is: `epoch`, and the phases of it so far, the last of which is running. `updates` counts from
    the start. `loss`, `rows`: this rank's sum of the epoch's losses, each times what it is a mean over, and these."""

    epoch: int = 0
    phases: list[Phase] = field(default_factory=list)
    updates: int = 0
    loss: float = 0.0
    rows: int = 0


@dataclass(frozen=True)
class Saved:
    """progress.json of a checkpoint: how far the training was. sums: each rank's `Progress.loss` and `rows`."""

    epoch: NonNegativeInt
    phases: list[Phase]
    updates: NonNegativeInt
    sums: list[tuple[float, int]]
    history: History


class Trainer:
    """Fits one model on one rank; every rank runs the same steps.

    `folder`: where checkpoints are kept, None for nowhere. `stop`: whether somebody asked to end early.
    """

    def __init__(
        self,
        model: Recommender,
        loader: TrainLoader,
        validate: Validate,
        config: Train,
        world: World,
        *,
        loss: str = "bce",
        seed: int = 1,
        folder: str | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model.to(world.device)
        self.signals = Objective(self.model, loss, config.precision, 2, config.embedding_l2, config.compiled)
        self.signals.to(world.device)
        self.exchange = Exchange(self.signals, loss, config, world)
        self.objective = self.exchange.objective
        self.loader, self.validate, self.config, self.world = loader, validate, config, world
        self.seed, self.folder, self.stop = seed, folder, stop
        self.optimiser = build_optimiser(self.model, config)
        self.parameters = list(self.model.parameters())
        self.draws_random = self.model.draws_random
        self.progress, self.history = Progress(), History()
        self.best = _snapshot(self.model)
        self._saved = time.monotonic()

    # ---- the loop ----

    def fit(self) -> History:
        """Train until `epochs`, `stop_after` or `patience` is used up, then put the best epoch's weights back.
        Raises TrainingFailed for numbers that are not finite, Preempted when asked to stop."""
        history, progress = self.history, self.progress
        last = min(self.config.epochs, self.config.stop_after or self.config.epochs)
        while progress.epoch < last and progress.epoch - history.best_epoch <= self.config.patience:
            trained = self.train_epoch()
            self.world.same_buffers(self.model)
            figures = self.validate(self.model)
            record = {"epoch": progress.epoch, **trained, **figures}
            self._judge(record, figures)
            show_epoch(self.world, record, self.config.epochs, self.history.best_epoch == progress.epoch)
            self.progress = progress = Progress(progress.epoch + 1, updates=progress.updates)
        self.model.load_state_dict(self.best)
        return history

    def _judge(self, record: dict[str, Any], figures: dict[str, float]) -> None:
        """Note the epoch, and its weights where they are the best so far. Raises ValueError for figures of validation
        of which none is chosen by."""
        self.history.epochs.append(record)
        values = [sign * figures[name] for name, sign in SELECT_BY.items() if name in figures]
        if figures and not values:
            raise ValueError(f"validation gives {', '.join(figures)}; needed {' or '.join(SELECT_BY)} to choose by")
        # Without validation rows there is nothing to choose by, and the last epoch is kept.
        value = values[0] if values else float(record["epoch"])
        if self.history.best is None or value > self.history.best:
            self.history.best, self.history.best_epoch = value, int(record["epoch"])
            self.best = _snapshot(self.model)

    def train_epoch(self) -> dict[str, float]:
        """The steps of the epoch that are left: the same number on all ranks.
        Returns loss, samples/s of all ranks, and the share of time waited for data."""
        phase, done = self.enter_phase()
        order = self.loader.order(self.progress.epoch, done)
        steps = order.steps(phase.ranks, phase.batch_size)
        used = self.loader.rows - order.rows
        self.objective.train()
        batches = self.loader.epoch(self.progress.epoch, done, phase.steps)
        meter = Meter(self.world, self.progress.epoch, self.config.epochs, steps, phase.steps)
        for step in range(phase.steps, steps):
            with meter.waiting():
                batch = next(batches)
            share = (used + step * phase.batch_size * phase.ranks) / self.loader.rows
            asked = (self.stop(), self._time_to_save())
            value, rate, flags = self.train_step(batch, (self.progress.epoch + share) / self.config.epochs, asked)
            self._note(step, steps, value, rate, batch)
            meter.step(batch, value)
            self._save_or_stop(*flags)
        meter.close()
        loss, rows = self.world.sum(
            torch.tensor([self.progress.loss, float(self.progress.rows)], dtype=torch.float64)
        ).tolist()
        return {"loss": loss / rows if rows else math.nan, **meter.summary()}

    def train_step(
        self, batch: Batch, done: float, asked: tuple[bool, bool] = (False, False)
    ) -> tuple[float, float, list[bool]]:
        """One update, when the share `done` of the training is done.
        Returns this rank's loss, the learning rate, and which of the flags `asked` any rank has set."""
        rate = set_rate(self.optimiser, self.config, done)
        self._seed_step()
        alone = self.world.size == 1
        self.exchange.announce(batch)
        # As nn.Module.zero_grad, but without going through all modules in every step. Before the loss, which may be
        # computed together with gradients in the memory of these.
        for parameter in (*self.parameters, self.signals.signals):
            parameter.grad = None
        loss = self.objective(batch, () if alone else asked)
        finite = loss.detach().isfinite()
        if batch.rating is not None:
            finite = finite & batch.rating.isfinite().all()
        # Not as an argument of `backward`, which loads sympy to compare two shapes.
        (loss * torch.where(finite, 1.0, math.nan)).backward()
        self.exchange.finish()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(in_few_pieces(gradients))
        value = batch.mean(loss.item())
        if not math.isfinite(norm.item()):
            self._fail(batch, value)
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self.optimiser.step()
        if alone:
            return value, rate, list(asked)
        signals = self.signals.signals.grad
        assert signals is not None
        return value, rate, [flag > 0 for flag in signals.tolist()]

    def _seed_step(self) -> None:
        """Seed what dropout draws by the seed, the update and the rank."""
        if self.draws_random:
            torch.manual_seed(hash64(self.seed, Stream.DROPOUT, self.progress.updates, self.world.rank) & (2**63 - 1))

    def _note(self, step: int, steps: int, value: float, rate: float, batch: Batch) -> None:
        progress = self.progress
        if step % max(1, -(-steps // POINTS_AN_EPOCH)) == 0:
            self.history.curve.append((progress.epoch, step, value, rate))
        progress.updates += 1
        progress.loss += value * len(batch.items)
        progress.rows += len(batch.items)
        progress.phases[-1] = dataclasses.replace(progress.phases[-1], steps=step + 1)

    def _fail(self, batch: Batch, value: float) -> None:
        """Raise TrainingFailed with the same message on all ranks."""
        bad = batch.rating is not None and not bool(batch.rating.isfinite().all())
        mine = {"loss": value, "input": bad, "users": batch.user[:3].tolist(), "items": batch.items[:3, 0].tolist()}
        every = dict(enumerate(self.world.gather(mine)))
        guilty = {r: m for r, m in every.items() if m["input"] or not math.isfinite(m["loss"])} or every
        rank, facts = next(iter(guilty.items()))
        what = (
            "a rating is not finite"
            if facts["input"]
            else "the gradient is not finite"
            if math.isfinite(facts["loss"])
            else f"the loss is {facts['loss']}"
        )
        raise TrainingFailed(
            f"epoch {self.progress.epoch}, step {self.progress.phases[-1].steps}, rank {', '.join(map(str, guilty))}: "
            f"{what} (the batch of rank {rank} begins with users {facts['users']} and items {facts['items']}); "
            "needed finite numbers; no weight was updated: lower train.lr, set train.clip_norm, or look at the input"
        )

    # ---- checkpoints ----

    def enter_phase(self) -> tuple[Phase, list[Phase]]:
        """(the phase that runs now, the phases of this epoch before it)"""
        phases, now = self.progress.phases, self.loader.phase
        if not phases or not phases[-1].same_deal(now):
            phases.append(now)
        return phases[-1], phases[:-1]

    def _time_to_save(self) -> bool:
        minutes = self.config.checkpoint_minutes
        return minutes is not None and self.world.is_main and time.monotonic() - self._saved > 60 * minutes

    def _save_or_stop(self, stop: bool, time_to_save: bool) -> None:
        every = self.config.checkpoint_steps
        if stop or time_to_save or (every is not None and self.progress.updates % every == 0):
            path = self.save()
            if stop:
                raise Preempted(
                    f"stopped as asked after update {self.progress.updates}, "
                    f"{'saved in ' + path if path else 'nothing saved'}: run the job train again to go on"
                )

    def save(self) -> str | None:
        """Write a checkpoint; returns on all ranks once it is on disk. Returns its path."""
        if self.folder is None:
            return None
        sums = self.world.gather([self.progress.loss, self.progress.rows])
        if self.world.is_main:
            progress = self.progress
            saved = Saved(progress.epoch, progress.phases, progress.updates, sums, self.history)
            checkpoints.save(self.folder, self.progress.updates, self._tensors(), dataclasses.asdict(saved))
        self.world.gather(None)
        self._saved = time.monotonic()
        return self.folder

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                if value is not None:
                    tensors[f"optimiser/{name}/{key}"] = value
        return tensors

    def resume(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, in this world or another. Raises ContractError where it is not of this model."""
        try:
            self._load(checkpoint)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ContractError(
                f"checkpoint {checkpoint.path} does not fit this training ({why}); needed one of the same model and "
                "tables: delete the folder to start afresh"
            ) from None

    def _load(self, checkpoint: Checkpoint) -> None:
        """Check everything before anything is changed."""
        saved, parameters = typed(Saved, checkpoint.progress), dict(self.model.named_parameters())
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        weights = self.model.state_dict()
        state = state_like(self.config.optimiser, parameters, parts["optimiser"])
        for part, wanted in (("model", weights), ("best", weights), ("optimiser", state)):
            if problem := misfit(wanted, parts[part]):
                raise ValueError(f"{part}: {problem}")
        if any(phase.ranks > self.loader.rows for phase in saved.phases) or not saved.sums:
            raise ValueError("its phases and sums are not of these rows")
        self.model.load_state_dict(parts["model"])
        self.best = {name: tensor.to(self.world.device) for name, tensor in parts["best"].items()}
        for name, tensor in parts["optimiser"].items():
            parameter, _, key = name.rpartition("/")
            # Adam's step count, too: the fused kernel keeps it on the device of the weights.
            self.optimiser.state[parameters[parameter]][key] = tensor.to(self.world.device)
        self.history, same = saved.history, len(saved.sums) == self.world.size
        if same:
            loss, rows = saved.sums[self.world.rank]
        else:
            loss, rows = (sum(column) if self.world.is_main else 0 for column in zip(*saved.sums, strict=True))
        self.progress = Progress(saved.epoch, saved.phases, saved.updates, loss, int(rows))


def in_few_pieces(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in fewer tensors: tensors that together fill one allocation, as the gradients of `compiled.py`
    do, become one, so that an operation on all of them is one call.

    >>> [len(tensor) for tensor in in_few_pieces([*torch.ones(5).split([2, 3]), torch.ones(4)])]
    [5, 4]
    """
    by_memory: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    pieces = []
    for parts in by_memory.values():
        whole = sum(part.numel() for part in parts)
        filled = parts[0].untyped_storage().nbytes() == whole * parts[0].element_size()
        pieces.extend([parts[0].as_strided((whole,), (1,), 0)] if filled else parts)
    return pieces


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())
