"""The whole tree: every section, and the checks that concern several of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ncf_dist import urls
from ncf_dist.config.evaluate import Evaluate
from ncf_dist.config.fetch import Fetch
from ncf_dist.config.gates import Gates
from ncf_dist.config.input import Input
from ncf_dist.config.layout import Layout
from ncf_dist.config.loader import Loader
from ncf_dist.config.log import Log
from ncf_dist.config.model import Model
from ncf_dist.config.negatives import Negatives
from ncf_dist.config.parts import Counts, Parts
from ncf_dist.config.paths import Paths
from ncf_dist.config.publish import Publish
from ncf_dist.config.retention import Retention
from ncf_dist.config.score import Score
from ncf_dist.config.section import Section
from ncf_dist.config.sequences import Sequences
from ncf_dist.config.sinks import Sinks, Tracking
from ncf_dist.config.spark import Spark
from ncf_dist.config.split import Split
from ncf_dist.config.status import Status
from ncf_dist.config.sweep import Sweep
from ncf_dist.config.train import LOSSES, OF_ALL_ITEMS, Loss, Train


class Config(Section):
    """The whole tree; only `pipeline.py` of a stage sees it."""

    paths: Paths
    fetch: Fetch = Fetch()
    input: Input
    split: Split = Split()
    negatives: Negatives = Negatives()
    sequences: Sequences = Sequences()
    layout: Layout = Layout()
    model: Model = Model()
    loader: Loader = Loader()
    train: Train = Train()
    parts: Parts = Parts()
    evaluate: Evaluate = Evaluate()
    score: Score = Score()
    publish: Publish = Publish()
    gates: Gates = Gates()
    retention: Retention = Retention()
    status: Status = Status()
    sweep: Sweep = Sweep()
    spark: Spark = Spark()
    log: Log = Log()
    sinks: Sinks = Sinks()
    tracking: Tracking = Tracking()
    seed: Annotated[int, Field(ge=1)] = 1
    """The one seed; every stream is derived from it by name, epoch and rank."""
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """Names an experiment (`--run NAME`): its runs are kept apart, and production never builds on them."""

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, tree: Any) -> Any:
        """What is stored, hashed and printed of a config holds no password and no token of a URL."""
        if not isinstance(tree, dict):
            return tree
        return {name: value if name == "spark" else urls.hide_all(value) for name, value in tree.items()}

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.split.strategy == "files" and (self.input.k_core > 1 or self.input.max_user_interactions):
            raise ValueError(
                "input.k_core and input.max_user_interactions do not go with split.strategy files, whose rows are "
                "given: leave them out"
            )
        timeless = self._timeless
        if self.split.strategy == "temporal" and timeless:
            raise ValueError(
                "split.strategy is temporal and input.columns.timestamp is not set; needed the column of the times"
            )
        if self.sequences.length and timeless and self.split.ties == "hash":
            raise ValueError(
                f"sequences.length is {self.sequences.length} and input.columns.timestamp is not set; needed the "
                "column of the times, or split.ties=file where the log's rows are in order of time"
            )
        if self.score.active_since is not None and timeless:
            raise ValueError(
                f"score.active_since is {self.score.active_since} and input.columns.timestamp is not set; needed the "
                "column of the times"
            )
        if self.train.negatives == "online" and self.negatives.alpha > 0:
            raise ValueError(
                f"negatives.alpha is {self.negatives.alpha} with train.negatives online, which draws uniformly: "
                "set train.negatives=table, or negatives.alpha=0"
            )
        return self

    @property
    def _timeless(self) -> bool:
        return not self.input.format.startswith("movielens") and self.input.columns.timestamp is None

    @property
    def loss(self) -> Loss:
        """The loss in force: `train.loss`, or what the feedback and the model ask for."""
        if self.train.loss is not None:
            return self.train.loss
        return "mse" if self.input.feedback == "explicit" else "sampled_softmax" if self.sequential else "bce"

    @property
    def sequential(self) -> bool:
        """Whether the model is one of histories."""
        return self.model.name == "history"

    @property
    def item_parts(self) -> Parts:
        """The parts in force: `parts`; item_to_item is made of counts where it names none."""
        return self.parts if self.parts.named or self.model.trained else Parts(counts=Counts())

    @property
    def shares_negatives(self) -> bool:
        """Whether the loss in force draws negatives for a whole step, `train.shared_negatives` of them."""
        return LOSSES[self.loss][1] == "step"

    @property
    def negatives_from(self) -> Literal["table", "online"] | None:
        """Where the loss in force gets the negatives of each row: `train.negatives`, or None for a loss that reads none
        (mse compares ratings, softmax reads all items, sampled_softmax and gbce draw items for a whole step)."""
        return self.train.negatives if LOSSES[self.loss][1] == "row" else None

    @model_validator(mode="after")
    def _loss_fits_the_data(self) -> Config:
        if LOSSES[self.loss][0] != self.input.feedback:
            explicit, implicit = (
                " or ".join(name for name, (needed, _) in LOSSES.items() if needed == feedback)
                for feedback in ("explicit", "implicit")
            )
            raise ValueError(
                f"train.loss is {self.loss} with input.feedback={self.input.feedback}; "
                f"needed {explicit} for explicit feedback and {implicit} for implicit"
            )
        if self.input.feedback == "implicit" and self.model.y_range is not None:
            raise ValueError(
                f"model.y_range is {list(self.model.y_range)} with input.feedback=implicit, where scores are logits: "
                "leave it out"
            )
        if self.sequential:
            self._histories_fit()
        if self.train.pretrained and self.model.name != "neumf":
            raise ValueError(
                f"train.pretrained is set with model.name={self.model.name}; only neumf is made of a gmf and an mlp"
            )
        return self

    @model_validator(mode="after")
    def _refit_fits(self) -> Config:
        if self.train.refit and self.split.strategy in ("none", "files"):
            raise ValueError(
                f"train.refit is true with split.strategy={self.split.strategy}; needed one that holds rows of the log "
                "out, which the refit then learns from: leave-one-out, leave-k-out, temporal or random"
            )
        return self

    def _histories_fit(self) -> None:
        if self.model.history != self.sequences.length:
            raise ValueError(
                f"model.history is {self.model.history} with sequences.length={self.sequences.length}; needed the same "
                f"number, as prepare makes windows of so many items: set sequences.length={self.model.history} and "
                "prepare again, or another model.name"
            )
        if self.input.feedback == "explicit":
            raise ValueError(
                "model.name is history with input.feedback=explicit; needed implicit feedback, as it predicts which "
                "item comes next: set input.feedback=implicit, or take mf or embedding_nn"
            )
        if self.loss not in OF_ALL_ITEMS:
            raise ValueError(
                f"train.loss is {self.loss} with model.name=history; needed {' or '.join(OF_ALL_ITEMS)}: "
                "leave train.loss out, or take another model"
            )

    @model_validator(mode="after")
    def _baselines_fit(self) -> Config:
        asked = self.evaluate.in_order
        if asked and not self.sequences.length:
            raise ValueError(
                f"{asked} and sequences.length is 0, so that prepare does not keep what users did last: set it, such "
                "as sequences.length=100, and prepare again"
            )
        if "item_to_item" in self.evaluate.baselines and not self.sequences.next_items:
            raise ValueError(
                f"{asked} and sequences.next_items is 0, so that prepare does not count what follows what: set it, "
                "such as sequences.next_items=400, and prepare again"
            )
        if "recent_popularity" in self.evaluate.baselines and self._timeless:
            raise ValueError(
                "evaluate.baselines has recent_popularity and input.columns.timestamp is not set; needed the column of "
                "the times"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        parts, length = self.item_parts, self.sequences.length
        whose = "parts has counts or ease" if self.model.trained else "model.name is item_to_item"
        if not parts.named:
            return self
        if self.input.feedback == "explicit":
            raise ValueError(
                f"{whose} with input.feedback=explicit; needed implicit feedback, as their scores are no ratings: set "
                "input.feedback=implicit, or leave them out"
            )
        if not length:
            raise ValueError(
                f"{whose} and sequences.length is 0, so that prepare does not keep what users did last: set it, such "
                "as sequences.length=100, and prepare again"
            )
        if parts.counts and not self.sequences.next_items:
            raise ValueError(
                f"{whose} and sequences.next_items is 0, so that prepare does not count what follows what: set it, "
                "such as sequences.next_items=400, and prepare again"
            )
        if not self.model.trained and (self.train.warm_start or self.train.lr_find):
            raise ValueError(
                "model.name is item_to_item, of which nothing is trained: leave train.warm_start and train.lr_find out"
            )
        return self
