"""Losses that compare what a row is to predict with items that all rows share: loss and gradients in one pass over
blocks of scores that stay in the cache.

Plain operations would hold (T, J) scores and their gradient, and read and write these ten times from memory. Here a
block of rows is scored, its loss and the gradient of its scores are computed in place, and the products that carry the
gradient to users and items follow at once. By test equal to the plain formulas of `losses.py`.

Letters: T rows, J items that all rows are compared with (the shared ones, or all), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK = {"cpu": 2**19, "cuda": 2**26}
"""Scores at a time: 2 MiB in a CPU's cache; few calls on a GPU."""
CALIBRATION = 0.75
"""t of gBCE: 0 is plain cross-entropy, 1 corrects for all that was not drawn; the paper's choice."""

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(scores (n, J), the row's own score (n,)) → (losses (n,), the gradient of the own score (n,)); the gradient of the
scores takes their place."""


def sampled_softmax(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """log(e^own + Σ_j e^score_j) - own"""
    top = torch.maximum(scores.amax(1), own)
    scores.sub_(top[:, None]).exp_()
    mine = (own - top).exp()
    total = scores.sum(1) + mine
    scores.div_(total[:, None])
    return total.log() + top - own, mine / total - 1


def softmax(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_j e^score_j - own, the row's own item being among all items."""
    top = scores.amax(1)
    scores.sub_(top[:, None]).exp_()
    total = scores.sum(1)
    scores.div_(total[:, None])
    return total.log() + top - own, torch.full_like(own, -1.0)


def gbce(beta: float) -> Rule:
    """(-β log σ(own) - Σ_j log(1 - σ(score_j))) / (1 + J)"""

    def rule(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        examples = 1 + scores.shape[1]
        losses = functional.softplus(scores).sum(1) + beta * functional.softplus(-own)
        scores.sigmoid_().div_(examples)
        return losses / examples, -beta * torch.sigmoid(-own) / examples

    return rule


def beta_of(shared: int, n_items: int) -> float:
    """β = α (t (1 - 1 / α) + 1 / α), α being the share of the other items that is drawn (Petrov & Macdonald 2023)."""
    alpha = min(1.0, shared / max(1, n_items - 1))
    return alpha * (CALIBRATION * (1 - 1 / alpha) + 1 / alpha)


class _Total(torch.autograd.Function):
    """Σ over rows. Computes all gradients on the way forward: the total is one number, and they are only scaled on the
    way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        user: Tensor,
        item: Tensor,
        bias: Tensor,
        own: Tensor,
        target: Tensor | None,
        shared: Tensor | None,
    ) -> Tensor:
        kind = user.device.type
        exact = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else user.dtype
        with torch.autocast(kind, enabled=False):
            item_in = item.to(exact)
            to_user, to_own = torch.empty_like(user), torch.empty_like(own)
            to_item, to_bias = torch.zeros_like(item), torch.zeros_like(bias)
            total = own.new_zeros(())
            for rows in _blocks(len(user), max(1, BLOCK.get(kind, BLOCK["cuda"]) // len(item))):
                user_in = user[rows].to(exact)
                scores = (user_in @ item_in.T).to(user.dtype).add_(bias)
                if target is not None and shared is not None:
                    _leave_out(scores, target[rows], shared)
                losses, to_own[rows] = rule(scores, own[rows])
                total += losses.sum()
                to_bias += scores.sum(0)
                back = scores.to(exact)
                to_user[rows] = back @ item_in
                to_item += back.T @ user_in
        ctx.save_for_backward(to_user, to_item, to_bias, to_own)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * scale for gradient in ctx.saved_tensors), None, None


def _leave_out(scores: Tensor, target: Tensor, shared: Tensor) -> None:
    """Makes the scores of shared items that are a row's own -inf. scores (n, M); target (n,); shared (M,)."""
    if scores.device.type != "cpu":
        scores.masked_fill_(target[:, None] == shared, -math.inf)
        return
    # Few are: on a CPU, looking them up takes a tenth of the time that comparing all does. On a GPU it would wait.
    order = np.argsort(shared.numpy(), kind="stable")
    there, wanted = shared.numpy()[order], target.numpy()
    first = np.searchsorted(there, wanted)
    count = np.searchsorted(there, wanted, side="right") - first
    row = np.repeat(np.arange(len(wanted)), count)
    within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    scores.numpy()[row, order[first[row] + within]] = -np.inf


def _blocks(rows: int, step: int) -> Iterator[slice]:
    return (slice(first, first + step) for first in range(0, rows, step))


def total_loss(
    rule: Rule,
    user: Tensor,
    item: Tensor,
    bias: Tensor,
    own: Tensor,
    target: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """Σ over rows of `rule`, a scalar. user (T, D); item (J, D) and bias (J,) of the items that all are compared with;
    own (T,) each row's score of what it is to predict. target (T,), shared (J,): which items these are, where a row's
    own item is to be left out of the shared ones."""
    total: Tensor = _Total.apply(  # type: ignore[no-untyped-call]
        rule, user, item, bias, own, target, shared
    )
    return total
