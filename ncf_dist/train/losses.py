"""The objectives: what a step minimises, a mean over its rows. Letters: B rows, N negatives of each, M shared ones.

s(u, i) is the model's score, i a row's item, j a negative.

- bce: -log σ(s(u, i)) - Σ_j log(1 - σ(s(u, j))), a mean over the 1 + N examples (He et al. 2017, eq. 7)
- bpr: -log σ(s(u, i) - s(u, j)), a mean over the pairs (Rendle et al. 2009, BPR-Opt without its regulariser)
- sampled_softmax: -log( e^s(u, i) / (e^s(u, i) + Σ_j e^(s(u, j) - log(M q_j)) ) ) over M items j that all rows of the
  step share, drawn with q_j = 1 / I; a j that is the row's own item is left out. The term log(M q_j) makes the sum an
  unbiased estimate of the whole catalogue's (Bengio & Senécal 2008; the logQ correction of Yi et al. 2019)
- softmax: -log( e^s(u, i) / Σ_j e^s(u, j) ) over all items j
- gbce: -(β log σ(s(u, i)) + Σ_j log(1 - σ(s(u, j)))) / (1 + M) over shared items j, the row's own left out; β < 1
  undoes what sampling does to the size of scores (gBCE, Petrov & Macdonald 2023; their t is .75)
- mse: (s(u, i) - rating)²

A model of histories predicts an item at every known position of a window, and is trained by these last three: its loss
is the sum over all of a step, divided by the number of windows times the table's mean (`windows.py`).

`l2` adds l2 / 2 · (‖p_u‖² + ‖q_i‖²) of all embedding tables to any of them, a mean over the pairs of the step's rows
(with sampled_softmax the positives). So an embedding shrinks as often as it is used, as in Rendle et al. 2020 ("Neural
Collaborative Filtering vs. Matrix Factorization Revisited", section 3); an optimiser's decay shrinks rare and frequent
ones alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ncf_dist.models import History, Recommender, Side
from ncf_dist.models.base import rows_of
from ncf_dist.train import all_items
from ncf_dist.train.compiled import compiled_loss
from ncf_dist.train.loaders import Batch


def bce(scores: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (B, 1 + N), the positive first."""
    labels = torch.zeros_like(scores)
    labels[:, 0] = 1.0
    return nn.functional.binary_cross_entropy_with_logits(scores, labels)


def bpr(scores: Tensor) -> Tensor:
    """Mean of -log σ(positive - negative) of logits (B, 1 + N), the positive first."""
    return -nn.functional.logsigmoid(scores[:, :1] - scores[:, 1:]).mean()


def sampled_softmax(positive: Tensor, shared: Tensor, own: Tensor, n_items: int) -> Tensor:
    """positive: (B,); shared: (B, M) scores of the shared items; own: (B, M) bool, whether a shared item is the row's
    own."""
    corrected = (shared + math.log(n_items / shared.shape[1])).masked_fill(own, -math.inf)
    return (torch.cat([positive[:, None], corrected], dim=1).logsumexp(dim=1) - positive).mean()


def softmax(positive: Tensor, every: Tensor) -> Tensor:
    """positive: (B,); every: (B, I) scores of all items."""
    return (every.logsumexp(dim=1) - positive).mean()


def gbce(positive: Tensor, shared: Tensor, own: Tensor, beta: float) -> Tensor:
    """positive: (B,); shared: (B, M) scores of the shared items; own: as for `sampled_softmax`."""
    negatives = nn.functional.softplus(shared.masked_fill(own, -math.inf)).sum(dim=1)
    return (negatives - beta * nn.functional.logsigmoid(positive)).mean() / (1 + shared.shape[1])


def mse(scores: Tensor, rating: Tensor) -> Tensor:
    """Mean squared error of (B,) predictions."""
    return nn.functional.mse_loss(scores, rating)


def _pairs(loss: Callable[[Tensor], Tensor]) -> Callable[[Recommender, Batch], Tensor]:
    return lambda model, batch: loss(model(batch.user[:, None], batch.items).float())


def _own_and_shared(model: Recommender, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) scores of the rows' items, (B, M) of the shared ones, and (B, M) whether a shared item is the row's own."""
    assert batch.shared is not None
    user, item = model.users(batch.user), batch.items[:, 0]
    positive, shared = model.join(user, model.items(item)), model.score_block(user, model.items(batch.shared))
    return positive.float(), shared.float(), item[:, None] == batch.shared[None]


def _sampled_softmax(model: Recommender, batch: Batch) -> Tensor:
    if batch.windows is not None:
        return _of_windows(all_items.sampled_softmax, model, batch, math.log(model.n_items / _drawn(batch)))
    return sampled_softmax(*_own_and_shared(model, batch), model.n_items)


def _gbce(model: Recommender, batch: Batch) -> Tensor:
    beta = all_items.beta_of(_drawn(batch), model.n_items)
    if batch.windows is not None:
        return _of_windows(all_items.gbce(beta), model, batch)
    return gbce(*_own_and_shared(model, batch), beta)


def _softmax(model: Recommender, batch: Batch) -> Tensor:
    if batch.windows is not None:
        return _of_windows(all_items.softmax, model, batch)
    user, items = model.users(batch.user), model.items(torch.arange(model.n_items, device=batch.user.device))
    every = model.score_block(user, items).float()
    return softmax(every.gather(1, batch.items[:, :1])[:, 0], every)


def _drawn(batch: Batch) -> int:
    assert batch.shared is not None
    return len(batch.shared)


def _of_windows(rule: all_items.Rule, model: Recommender, batch: Batch, added: float = 0.0) -> Tensor:
    """The sum over all that a model of histories predicts, divided by what the batch says. added: to the scores of the
    shared items."""
    assert isinstance(model, History)
    assert batch.windows is not None
    assert batch.divisor is not None
    user, target, shared = model.positions(batch.windows), batch.items[:, 0], batch.shared
    mine, others = _sides(model, target, shared)
    own = model.join(user, mine)
    assert user.dot is not None
    assert others.dot is not None
    assert others.bias is not None
    total = all_items.total_loss(rule, user.dot, others.dot, others.bias[:, 0] + added, own, target, shared)
    return total / batch.divisor


def _sides(model: Recommender, target: Tensor, shared: Tensor | None) -> tuple[Side, Side]:
    """Of what is to be predicted (T,), and of what all is compared with: the shared items (M,), or all."""
    if shared is None:
        every = model.item_side(None)
        return every.each(lambda part: rows_of(part, target)), every
    both = model.items(torch.cat([target, shared]))
    return both.each(lambda part: part[: len(target)]), both.each(lambda part: part[len(target) :])


def _rating(model: Recommender, batch: Batch) -> Tensor:
    assert batch.rating is not None
    return mse(model(batch.user, batch.items[:, 0]).float(), batch.rating)


LOSSES: dict[str, Callable[[Recommender, Batch], Tensor]] = {
    "bce": _pairs(bce),
    "bpr": _pairs(bpr),
    "sampled_softmax": _sampled_softmax,
    "softmax": _softmax,
    "gbce": _gbce,
    "mse": _rating,
}


def squared_norms(model: Recommender, batch: Batch) -> Tensor:
    """½ (‖p_u‖² + ‖q_i‖²), a mean over the batch's pairs; of what windows predict the sum, divided as their loss is."""
    total = torch.zeros((), device=batch.user.device)
    for kind, index in (("user", batch.user), ("item", batch.items)):
        for table in model.tables(kind):
            squares = table(index).square().sum(-1)
            total = total + (squares.mean() if batch.divisor is None else squares.sum() / batch.divisor) / 2
    return total


class Objective(nn.Module):
    """A model and its loss as one module, so that DDP wraps all that a step computes.

    `signals` is a parameter that stays zero and carries flags from rank to rank. DDP averages its gradient as it
    averages all others, and the gradient is the ranks' flags: so every rank sees a flag that any rank has set, without
    another collective.

    compiled: whether `compiled.py` may compute the loss. The model must already be on its device.
    """

    def __init__(
        self,
        model: Recommender,
        loss: str,
        precision: str = "fp32",
        signals: int = 1,
        l2: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.bf16, self.l2 = model, precision == "bf16", l2
        one_call = compiled_loss(model, loss) if compiled and not self.bf16 else None
        self.compiled, self.loss = one_call is not None, one_call or LOSSES[loss]
        self.signals = nn.Parameter(torch.zeros(signals))

    def forward(self, batch: Batch, flags: Sequence[bool] = ()) -> Tensor:
        """The mean loss of a batch, a scalar in float32."""
        with torch.autocast(batch.user.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, batch)
        if self.l2:
            loss = loss + self.l2 * squared_norms(self.model, batch)
        if flags:
            loss = loss + self.signals @ torch.tensor(flags, dtype=torch.float32, device=loss.device)
        return loss
