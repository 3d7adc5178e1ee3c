"""What the steps of evaluate share."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from pyspark.sql import SparkSession

from ncf_dist.ancestry import Sizes
from ncf_dist.bundle import Bundle
from ncf_dist.champion import CHAMPION
from ncf_dist.config import Config
from ncf_dist.contracts import RECENT
from ncf_dist.manifests import Manifest
from ncf_dist.products import Products


@dataclass(frozen=True)
class Evaluation:
    """The model and the tables of tonight, and the folder of this run."""

    spark: SparkSession
    config: Config
    prepare: Manifest
    bundle: Bundle
    run: str
    products: Products
    since: Sizes | None = None
    """What has come since the model's night, which it does not know; None for a model of tonight."""
    champion: Bundle | None = None
    """The model of the last published night, where tonight's is compared with it."""

    @property
    def scorers(self) -> list[str]:
        """Beside the model: the baselines, and the champion."""
        return [*self.config.evaluate.baselines, *([CHAMPION] if self.champion else [])]

    @property
    def n_items(self) -> int:
        """Items of tonight."""
        return self.bundle.n_items + (self.since.items if self.since else 0)

    @property
    def kept(self) -> int:
        """How many latest items of a user prepare has kept."""
        return int(self.prepare.config["sequences"]["length"]) if RECENT.name in self.prepare.tables else 0

    @property
    def looks_back(self) -> int:
        """How many of a user's latest items the models and the baselines need."""
        champion = self.champion.looks_back if self.champion else 0
        return max(self.bundle.looks_back, champion, self.kept if self.config.evaluate.in_order else 0)

    @property
    def fits(self) -> str:
        """Folder of the fitted baselines, which is removed once all users are ranked."""
        return posixpath.join(self.run, "baselines")
