"""The section `model`: which model, and its shape."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import PositiveInt, Section


def embedding_size(rows: int) -> int:
    """fastai's rule of thumb, min(600, round(1.6 · n^0.56)): 944 → 74, 1625 → 101."""
    return min(600, round(1.6 * float(rows**0.56)))


class Model(Section):
    """Which model, and its shape; the formulas are in ncf_dist/models/."""

    name: Literal["gmf", "mlp", "neumf", "mf", "embedding_nn", "history", "item_to_item"] = "neumf"
    """`gmf`, `mlp`, `neumf`: He et al. 2017 · `mf`: dot product · `embedding_nn`: layers over embeddings (fastai) ·
    `history`: what a person did last; needs the tables of `sequences.length` · `item_to_item`: nothing but its `parts`
    (default: counts), so nothing is trained."""
    factors: PositiveInt = 8
    """Embedding size of GMF, of NeuMF's GMF part, of mf and of history (D)."""
    layers: tuple[PositiveInt, ...] = (64, 32, 16, 8)
    """mlp, neumf: the first entry is the width of the concatenated user and item embeddings, so it must be even, the
    rest are hidden layers · embedding_nn: hidden layers, such as [100, 50]."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """mlp, neumf: dropout before each layer · embedding_nn: after each hidden layer · history: of the input and after
    each half of a block."""
    biases: bool = False
    """mf: a bias a user and a bias an item."""
    y_range: tuple[float, float] | None = None
    """Explicit feedback, mf and embedding_nn: a sigmoid maps scores into (low, high). A little more than the scale of
    the ratings, such as [0, 5.5] for 1 to 5, lets the best ones be reached."""
    embedding_sizes: tuple[PositiveInt, PositiveInt] | None = None
    """embedding_nn: embedding sizes of users and of items; default: min(600, round(1.6 · n^0.56)) for n of them."""
    batch_norm: bool = True
    """embedding_nn: batch normalisation after each hidden layer."""
    init_std: Annotated[float, Field(gt=0)] = 0.01
    """Standard deviation of the initial embeddings, around 0."""
    history: PositiveInt = 100
    """history: the latest items that it looks at, at most; `sequences.length` is the same number."""
    block: Literal["mix", "attention", "gru", "mean"] = "mix"
    """history: what mixes positions: learned kernels over lags with gates, causal attention, a recurrent unit, or the
    mean of all before."""
    blocks: PositiveInt = 2
    """history: blocks, one after another."""
    heads: PositiveInt = 8
    """history, mix and attention: heads, a divisor of `factors`; mix has a kernel a head."""
    gaps: bool = True
    """history: whether the coarse time since the item before is read beside each item."""

    @property
    def trained(self) -> bool:
        """Whether it has weights of its own."""
        return self.name != "item_to_item"

    @model_validator(mode="after")
    def _shape_fits_model(self) -> Model:
        if self.name in ("mlp", "neumf") and (not self.layers or self.layers[0] % 2):
            raise ValueError(
                f"model.layers starts with {self.layers[:1]}: its first entry is split evenly between user and item, "
                "give an even width"
            )
        if self.y_range is not None:
            if self.name not in ("mf", "embedding_nn"):
                raise ValueError(
                    f"model.y_range is {list(self.y_range)} with model.name={self.name}; "
                    "only mf and embedding_nn have one: leave it out"
                )
            if not self.y_range[0] < self.y_range[1]:
                raise ValueError(f"model.y_range is {list(self.y_range)}; needed the lower bound first, as [0, 5.5]")
        if self.name == "history" and self.block in ("mix", "attention") and self.factors % self.heads:
            raise ValueError(
                f"model.factors is {self.factors} with {self.heads} heads; needed a multiple of model.heads, such as "
                f"{self.heads * -(-self.factors // self.heads)}"
            )
        return self
