"""The section `fetch`: a public dataset, or a synthetic one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import PositiveInt, Section

Dataset = Literal["synthetic", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m"]


class Fetch(Section):
    dataset: Dataset = "synthetic"
    """`synthetic` makes a MovieLens-shaped log with Spark; the others are GroupLens' archives."""
    to: str | None = None
    """Folder that receives the files; default `<paths.lake>/raw/<dataset>`."""
    source: str | None = Field(default=None, alias="from")
    """A zip or an unpacked folder to take a GroupLens dataset from, instead of downloading it."""
    users: PositiveInt = 2_000
    """Synthetic: number of users."""
    items: PositiveInt = 1_000
    """Synthetic: size of the catalogue."""
    clusters: PositiveInt = 12
    """Synthetic: number of planted taste clusters."""
    mean_ratings_per_user: Annotated[int, Field(ge=5)] = 60
    """Synthetic: mean ratings a user; the spread around it is heavy-tailed."""

    @property
    def most_ratings_per_user(self) -> int:
        """Synthetic: nobody rates more than 60 % of the catalogue."""
        return self.items * 3 // 5

    @model_validator(mode="after")
    def _can_be_made(self) -> Fetch:
        if self.dataset != "synthetic":
            return self
        if self.source is not None:
            raise ValueError(
                f"fetch.from is {self.source!r} but fetch.dataset is synthetic, which is made, not taken: "
                "set fetch.dataset to what it holds"
            )
        if self.clusters > self.items:
            raise ValueError(
                f"fetch.clusters is {self.clusters} with {self.items} items; needed at least one item a cluster: "
                "lower it or raise fetch.items"
            )
        if self.mean_ratings_per_user > self.most_ratings_per_user:
            raise ValueError(
                f"fetch.mean_ratings_per_user is {self.mean_ratings_per_user} with {self.items} items; "
                f"needed at most 60 % of fetch.items, {self.most_ratings_per_user}: lower it or raise fetch.items"
            )
        return self
