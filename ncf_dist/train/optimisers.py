"""The optimisers and what they decay. The mathematics is torch's, in its fused form: one pass over each tensor.

- adam: Kingma & Ba 2015, L2 terms added to the gradient
- adamw: Loshchilov & Hutter 2019, decay apart from the gradient
- sgd: with momentum, L2 terms added to the gradient

Every row of a table is updated in every step, also where its gradient is zero: Adam's moments then decay as published,
and a batch uses most rows of a catalogue anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ncf_dist.config import Train
from ncf_dist.errors import ConfigError
from ncf_dist.train.schedules import SCHEDULES, one_cycle_momentum

OPTIMISERS: dict[str, Callable[[Any, Train], torch.optim.Optimizer]] = {
    "adam": lambda groups, c: torch.optim.Adam(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True),
    "adamw": lambda groups, c: torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True),
    "sgd": lambda groups, c: torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True),
}
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1}
"""Tensors of a weight's size that the optimiser keeps beside it."""

STATE = {
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""What torch keeps of a parameter, by its names: `step` is a number, the others are moments."""


def state_like(name: str, parameters: Mapping[str, Tensor], keys: Collection[str]) -> dict[str, Tensor]:
    """{"parameter/key": a tensor of the shape and type that this state has}, of every parameter that has any key in
    `keys`. A parameter that no step has updated has no state."""
    begun = {key.rpartition("/")[0] for key in keys}
    return {
        f"{parameter}/{key}": torch.empty(()) if key == "step" else weight
        for parameter, weight in parameters.items()
        if parameter in begun
        for key in STATE[name]
    }


def decay_of(name: str, table: bool, dimensions: int, config: Train) -> float:
    """The weight decay of one parameter. `table`: it is an embedding table."""
    parts = [part for part in config.part_decay if name == part or name.startswith(f"{part}.")]
    if parts:
        return config.part_decay[max(parts, key=len)]
    if table:
        return config.embedding_decay
    return config.weight_decay if dimensions > 1 else 0.0


def build_optimiser(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """The optimiser over the model's parameters, grouped by their decay. Raises ConfigError for an unknown part."""
    names = [name for name, _ in model.named_parameters()]
    for part in config.part_decay:
        if not any(name == part or name.startswith(f"{part}.") for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"train.part_decay names {part}, which this model has not; needed the beginning of a parameter's name: "
                f"{', '.join(known)}"
            )
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(decay_of(name, name in tables, parameter.ndim, config), []).append(parameter)
    return OPTIMISERS[config.optimiser](
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()], config
    )


def set_rate(optimiser: torch.optim.Optimizer, config: Train, done: float) -> float:
    """Set the learning rate, and one-cycle's momentum, for when the share `done` of the training is done.
    Returns the rate."""
    rate = config.lr * SCHEDULES[config.schedule](done)
    for group in optimiser.param_groups:
        group["lr"] = rate
        if config.schedule == "one_cycle" and "betas" in group:
            group["betas"] = (one_cycle_momentum(done), config.betas[1])
        elif config.schedule == "one_cycle":
            group["momentum"] = one_cycle_momentum(done)
    return rate
