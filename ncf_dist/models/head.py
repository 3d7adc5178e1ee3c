"""What turns hidden_u + hidden_i into a number: linear layers, with what comes between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

Layers = list[tuple[Tensor, Tensor]]
"""Weight (out, in) and bias (out,) of linear layers, first to last."""


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over (…, H), for steps of one row, too: one row has no variance, so it is shifted and scaled as in
    ranking, by the running mean and variance, and leaves them as they are."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > 1:
            return super().forward(rows).view(x.shape)
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(rows, mean, variance, self.weight, self.bias, eps=self.eps).view(x.shape)


class Head:
    """head(x) = W_n g_n(… W_1 g_1(x) + b_1 …) + b_n with g_l(x) = dropout(BN_l(ReLU(x))); the last layer has one
    output.

    `affine`: the head of a model without hidden layers. It is at most one layer, with nothing before it: W x + b, or x
    itself. A head refers to modules of its model and owns none, so it changes no name of a weight.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        affine: bool,
        dropout: nn.Dropout,
        dropped: int,
        norms: Sequence[nn.Module] = (),
    ) -> None:
        """dropped: dropout comes before so many of the layers. norms: one a layer, or none."""
        self.layers, self.norms = cast("list[nn.Linear]", list(layers)), cast("list[BatchNorm]", list(norms))
        self.affine, self.dropout, self.dropped = affine, dropout, dropped

    def __call__(self, x: Tensor) -> Tensor:
        """(…, H) → (…,)"""
        for number, layer in enumerate(self.layers):
            x = layer(x if self.affine else self._activated(number, x))
        return x[..., 0]

    def _activated(self, number: int, x: Tensor) -> Tensor:
        """What layer `number` sees."""
        x = torch.relu(x)
        if self.norms:
            x = self.norms[number](x)
        return cast(Tensor, self.dropout(x)) if number < self.dropped else x

    def share(self, hidden: Tensor, with_bias: bool) -> Tensor | None:
        """(R, H) of one side → (R, 1): its share of an affine head, W x or W x + b, which is added to that of the other
        side. None for any other head."""
        if not self.affine or not self.layers:
            return hidden if self.affine else None
        [layer] = self.layers
        return nn.functional.linear(hidden, layer.weight, layer.bias if with_bias else None)

    def ranking_layers(self) -> Layers:
        """The layers with nothing but ReLU before each: a trained batch norm only shifts and scales, so it is made part
        of the layer after it. Nothing for an affine head."""
        return [] if self.affine else [self._after_norm(number, layer) for number, layer in enumerate(self.layers)]

    def _after_norm(self, number: int, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of `layer` on the input of batch norm `number`: W (s x + t) + b = (W s) x + (W t + b)."""
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        if not self.norms:
            return layer.weight, bias
        norm = self.norms[number]
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        return layer.weight * scale, layer.weight @ (norm.bias - mean * scale) + bias
