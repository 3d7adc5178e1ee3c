"""The objectives: what a step minimises, a mean over its rows. Letters: B rows, N negatives of each, M shared ones.

s(u, i) is the model's score, i a row's item, j a negative.

- bce: -log σ(s(u, i)) - Σ_j log(1 - σ(s(u, j))), a mean over the 1 + N examples (He et al. 2017, eq. 7)
- bpr: -log σ(s(u, i) - s(u, j)), a mean over the pairs (Rendle et al. 2009, BPR-Opt without its regulariser)
- sampled_softmax: -log( e^s(u, i) / (e^s(u, i) + Σ_j e^(s(u, j) - log(M q_j)) ) ) over M items j that all rows of the
  step share, drawn with q_j = 1 / I; a j that is the row's own item is left out. The term log(M q_j) makes the sum an
  unbiased estimate of the whole catalogue's (Bengio & Senécal 2008; the logQ correction of Yi et al. 2019)
- mse: (s(u, i) - rating)²

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

from ncf_dist.models import Recommender
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


def mse(scores: Tensor, rating: Tensor) -> Tensor:
    """Mean squared error of (B,) predictions."""
    return nn.functional.mse_loss(scores, rating)


def _pairs(loss: Callable[[Tensor], Tensor]) -> Callable[[Recommender, Batch], Tensor]:
    return lambda model, batch: loss(model(batch.user[:, None], batch.items).float())


def _shared(model: Recommender, batch: Batch) -> Tensor:
    assert batch.shared is not None
    user, item = model.users(batch.user), batch.items[:, 0]
    positive, shared = model.join(user, model.items(item)), model.score_block(user, model.items(batch.shared))
    return sampled_softmax(positive.float(), shared.float(), item[:, None] == batch.shared[None], model.n_items)


def _rating(model: Recommender, batch: Batch) -> Tensor:
    assert batch.rating is not None
    return mse(model(batch.user, batch.items[:, 0]).float(), batch.rating)


LOSSES: dict[str, Callable[[Recommender, Batch], Tensor]] = {
    "bce": _pairs(bce),
    "bpr": _pairs(bpr),
    "sampled_softmax": _shared,
    "mse": _rating,
}


def squared_norms(model: Recommender, batch: Batch) -> Tensor:
    """½ (‖p_u‖² + ‖q_i‖²), a mean over the batch's pairs."""
    total = torch.zeros((), device=batch.user.device)
    for kind, index in (("user", batch.user), ("item", batch.items)):
        for table in model.tables(kind):
            total = total + table(index).square().sum(-1).mean() / 2
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
