"""GMF, MLP and NeuMF on a CPU: loss and gradients of a step in one compiled call, `neumf_step.cpp`.

It computes what `models/` and `losses.py` define, from the parts that a model declares. Their many small operations
become one pass over blocks of pairs that stay in the cache (equal within float rounding, by test). setuptools compiles
it for AVX2 and AVX-512 at installation, where there is a compiler. Elsewhere, and for every other model, torch's
operations are used.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ncf_dist import native
from ncf_dist.models import GMF, MLP, FirstLayer, NeuMF, Product, Recommender
from ncf_dist.train.loaders import Batch

BUILDS = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
"""What the CPU can do, as torch names it → the builds that it can run, best first."""
PAIRWISE = {"bce": False, "bpr": True}
"""The losses that the library computes → whether they compare pairs."""
NO_MEMORY, OUTSIDE = 1, 2

_Index = ctypes.c_int64


# The structs of neumf_step.cpp.
class _Parameter(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("gradient", _Index))


class _Side(ctypes.Structure):
    _fields_ = (("count", _Index), ("dim", _Index), ("table", _Parameter))


class _Layer(ctypes.Structure):
    _fields_ = (("out", _Index), ("weight", _Parameter), ("bias", _Parameter))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _Index) for name in ("rows", "items", "factors", "layers", "threads", "pairwise")),
        *((name, ctypes.c_void_p) for name in ("user", "item")),
        *((name, _Side) for name in ("gmf_user", "gmf_item", "deep_user", "deep_item")),
        *((name, _Parameter) for name in ("gmf_weight", "output_weight", "bias")),
        *(("layer", ctypes.POINTER(_Layer)), ("gradients", ctypes.c_void_p)),
    )


def library(build: str) -> ctypes.CDLL | None:
    """One build of the library; None where it was not compiled."""
    return native.library(f"{__package__}._neumf_step_{build}")


def best_library() -> ctypes.CDLL | None:
    """The best build for this CPU."""
    builds = BUILDS.get(torch.backends.cpu.get_cpu_capability(), ())
    return next((built for build in builds if (built := library(build))), None)


class _Model:
    """A model as the library wants it. Its gradients lie one after another in memory, in the order of `parameters`."""

    def __init__(self, model: Recommender, run: Any, pairwise: bool) -> None:
        self.model, self.run, self.pairwise = model, run, pairwise
        self.parameters = list(model.parameters())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.step = self._step()
        self.places = self._places()
        self.memory = np.empty(0, np.float32)

    def _places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]

    def _step(self) -> _Step:
        """What does not change from step to step."""
        model, first, place = self.model, 0, {}
        for parameter in self.parameters:
            place[id(parameter)] = _Parameter(parameter.data_ptr(), first)
            first += parameter.numel()

        def side(table: nn.Embedding) -> _Side:
            return _Side(*table.weight.shape, place[id(table.weight)])

        step, bias = _Step(pairwise=self.pairwise), model.bias
        if isinstance(product := model.dot_sides, Product):
            assert product.output is not None
            step.factors, step.gmf_weight = product.output.in_features, place[id(product.output.weight)]
            step.gmf_user, step.gmf_item = side(product.user), side(product.item)
        if isinstance(halves := model.hidden_sides, FirstLayer):
            assert model.head is not None
            *hidden, output = (halves.layer, *model.head.layers)
            step.deep_user, step.deep_item = side(halves.user), side(halves.item)
            step.output_weight, step.layers = place[id(output.weight)], len(hidden)
            step.layer = (_Layer * len(hidden))(
                *(_Layer(layer.out_features, place[id(layer.weight)], place[id(layer.bias)]) for layer in hidden)
            )
            bias = output.bias if bias is None else bias
        step.bias = place[id(bias)]
        return step

    def _memory(self) -> Tensor:
        """(size,) that of the step before, unless somebody still has its gradients. Where tables are long the system
        takes longer to hand out fresh pages than a step takes to compute."""
        # This attribute and getrefcount's own argument; tensors of torch.from_numpy count, as long as there are any.
        if len(self.memory) != self.size or sys.getrefcount(self.memory) > 2:
            self.memory = np.empty(self.size, np.float32)
        return torch.from_numpy(self.memory)

    def loss_and_gradients(self, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
        """The mean loss, and the gradient of each parameter, all in one allocation."""
        if self.places != self._places():
            self.step, self.places = self._step(), self._places()
        step, user, items = self.step, batch.user.contiguous(), batch.items.contiguous()
        memory, loss = self._memory(), ctypes.c_double()
        step.rows, step.items = items.shape
        step.threads, step.gradients = torch.get_num_threads(), memory.data_ptr()
        step.user, step.item = user.data_ptr(), items.data_ptr()
        code = self.run(ctypes.byref(step), ctypes.byref(loss))
        if code == NO_MEMORY:
            raise MemoryError(f"a step of {items.numel():,} pairs does not fit; needed less: lower train.batch_size")
        if code == OUTSIDE:
            raise IndexError(
                f"the batch has users {int(user.min())} to {int(user.max())} and items {int(items.min())} to "
                f"{int(items.max())}; needed indexes of the model's tables"
            )
        return loss.value, torch._utils._unflatten_dense_tensors(memory, self.parameters)


class _Loss(torch.autograd.Function):
    """Forward computes the gradients together with the loss; backward returns them."""

    @staticmethod
    def forward(ctx: Any, model: _Model, batch: Batch, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = model.loss_and_gradients(batch)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        # No other reference may be left: autograd then makes them the parameters' .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if slopes[0].item() != 1:
            gradients = [gradient * slopes[0] for gradient in gradients]
        return (None, None, *gradients)


def compiled_loss(
    model: Recommender, loss: str, library: ctypes.CDLL | None = None
) -> Callable[[Recommender, Batch], Tensor] | None:
    """`losses.LOSSES[loss]` for this model in one call; None where torch's operations are needed: another model or
    loss, no hidden layer, dropout, a GPU, other than float32, or no build that this CPU runs.

    library: a build other than the best one. Backward may be called once on the loss, which has a gradient for each of
    the model's parameters. A batch with an index outside the model's tables raises IndexError. Only one thread of a
    process may call it at a time."""
    # Not for a subclass: it may compute its score in another way.
    if type(model) not in (GMF, MLP, NeuMF) or loss not in PAIRWISE or model.draws_random:
        return None
    library = library or best_library()
    usual = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    if library is None or not usual or (model.head is not None and model.head.affine):
        return None
    compiled = _Model(model, library.neumf_step, PAIRWISE[loss])
    return lambda _, batch: cast(Tensor, _Loss.apply(compiled, batch, *compiled.parameters))
