"""The section `evaluate`: metrics, baselines and comparisons."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import NonNegativeInt, PositiveInt, Section

Baseline = Literal["popularity", "recent_popularity", "item_to_item", "ease", "item_knn", "als"]


class Evaluate(Section):
    ks: tuple[PositiveInt, ...] = (5, 10, 20)
    """List lengths (K) of the metrics at K."""
    baselines: tuple[Baseline, ...] = ("popularity",)
    """What the model is compared with, on the same users and by the same code: `popularity` · `recent_popularity` (of
    the last days before the test) · `item_to_item` (what follows what, as `parts.counts`) · `ease` (Steck 2019) ·
    `item_knn` (cosine over items, Sarwar et al. 2001) · `als` (Spark's, Hu et al. 2008). They learn from train and
    validation items, item_to_item's counts from train items alone."""
    bootstrap: NonNegativeInt = 1_000
    """Replicates of the bootstrap over users that intervals and p-values come from; 0: none."""
    compare: str | None = None
    """Another run of evaluate on the same held-out rows to compare this model with: its folder, its model_version, or
    its ds."""
    recent_days: PositiveInt = 7
    """recent_popularity: days that count, up to the latest train or validation row."""
    item_to_item_half_life: Annotated[float, Field(gt=0)] = 2.0
    """item_to_item: items after which one of a user's latest items is worth half as much."""
    ease_lambda: Annotated[float, Field(gt=0)] = 500.0
    """ease: L2 regularisation (λ)."""
    ease_half_life: Annotated[float, Field(gt=0)] | None = None
    """ease: items after which one of a user's items is worth half as much, of the latest `sequences.length`; `null`:
    all that a user has, alike."""
    knn_neighbours: PositiveInt = 100
    """item_knn: neighbours kept of each item."""
    knn_shrink: Annotated[float, Field(ge=0)] = 10.0
    """item_knn: added to the product of norms, so that similarities of rare items shrink."""
    gram_bytes: PositiveInt = 4 * 2**30
    """ease, item_knn: most memory that fitting may take; it grows with the square of the catalogue."""
    als_rank: PositiveInt = 64
    """als: factors."""
    als_reg: Annotated[float, Field(ge=0)] = 0.1
    """als: regularisation."""
    als_alpha: Annotated[float, Field(ge=0)] = 10.0
    """als: confidence of an interaction is 1 + alpha."""
    als_iterations: PositiveInt = 15
    """als: sweeps over users and items."""

    @property
    def in_order(self) -> str | None:
        """The baseline that reads what users did last, in the config's words."""
        if "item_to_item" in self.baselines:
            return "evaluate.baselines has item_to_item"
        return "evaluate.ease_half_life is set" if "ease" in self.baselines and self.ease_half_life else None

    @model_validator(mode="after")
    def _each_once(self) -> Evaluate:
        for name, values in (("ks", self.ks), ("baselines", self.baselines)):
            if len(set(values)) != len(values):
                raise ValueError(f"evaluate.{name} is {list(values)}; needed each once")
        if not self.ks:
            raise ValueError("evaluate.ks is empty; needed at least one list length, such as [10]")
        return self
