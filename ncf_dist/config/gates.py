"""The section `gates`: what is measured of a night before it is published, and within which bounds it must be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ncf_dist.config.evaluate import Baseline
from ncf_dist.config.section import PositiveInt, Section

Reader = Literal["pandas", "duckdb", "spark"]
Learned = Literal["learned"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Most = NotNegative | Learned | None
Least = NotNegative | Learned | None
Between = tuple[NotNegative, NotNegative] | Learned | None

DATA_GATES = ("volume", "new_users", "quarantine", "age", "rating_drift", "item_drift", "vanished")
OUTPUT_GATES = ("coverage", "filled", "fallback", "churn")
MODEL_GATES = ("beats", "champion", "slices", "scores")
OVERRIDABLE = ("users", "interactions", "beats_popularity", "evaluated", *DATA_GATES, *MODEL_GATES, *OUTPUT_GATES)
"""The gates that `--override` may name."""
UNDONE = "undone"
"""What `--override` names to publish a run that was rolled back."""


class Gates(Section):
    """Each gate has a bound: a number, `learned`, or `null`, which switches it off. `learned` is the median of the last
    good nights ± `spread` × their MAD (median absolute deviation), and never narrower than what the gate allows for by
    itself; below three good nights it lets every night pass. A good night is one that is published."""

    nights: PositiveInt = 7
    """Good nights before this one that `learned` looks at, at most."""
    spread: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6.0
    """MADs from the median that `learned` allows."""
    volume: Between = "learned"
    """Interactions that prepare kept. Numbers: the least and the most, as multiples of the median of the good nights:
    `[0.8, 1.5]`."""
    new_users: Between = "learned"
    """Users who are new, a day since the night before. Numbers: as for `volume`."""
    quarantine: Most = "learned"
    """Share of the log's rows in the quarantine, at most."""
    age: Most = "learned"
    """Days from the newest interaction to the beginning of ds, at most. A log without times passes."""
    rating_drift: Most = 0.25
    """How much the distribution of ratings has moved since the last good night, at most: the population stability
    index, of which 0.1 is usually called some drift and 0.25 much. What so many rows give by chance is taken off."""
    item_drift: Most = 0.25
    """The same of how interactions are spread over items."""
    vanished: Most = "learned"
    """Share of the interactions of the last published night whose user or item is gone tonight, at most."""
    beats: tuple[Baseline, ...] = ()
    """Further baselines, of `evaluate.baselines`, that the model may not be worse than on the headline metric: the
    paired 95 % interval may not lie wholly below 0, as publish.require's `beats_popularity` has it of popularity."""
    champion: NotNegative | None = 0.02
    """How much worse than the champion, the model of the last published night, the model may be on the headline metric
    and the same held-out rows, as a share of the champion's. It is refused where it is worse by more than that and not
    by chance (one-sided p of the paired bootstrap below 0.05). `null`: evaluate does not rank by the champion."""
    slices: dict[str, NotNegative] = Field(default={})
    """The like of each segment of a kind (`activity`, `item_popularity`), by kind: the 95 % interval of the model's
    NDCG may not lie wholly below the champion's less this share. Segments of 200 users and more count."""
    scores: bool = True
    """Whether a model that scores everything alike is refused."""
    on_refusal: Literal["stop", "champion"] = "stop"
    """What nightly does where a gate of the model refuses: `stop` (exit 4; readers keep what they have), or rank
    tonight's users by the `champion`, publish that, and say so."""
    coverage: Least = "learned"
    """Share of the items that may be offered that anybody is offered, at least."""
    filled: Least = "learned"
    """Share of the places of all users' lists that are filled, at least."""
    fallback: Most = "learned"
    """Share of the users who are ranked by popularity, at most."""
    churn: Between = "learned"
    """Share of the items in the last published night's lists that are not in tonight's, on a sample of users: the least
    and the most."""
    canary: tuple[Reader, ...] | None = ("pandas", "duckdb", "spark")
    """Who reads the files before they are published, as consumers will: `pandas` · `duckdb`, where it is installed and
    the lake is a folder · `spark`, where the job has a session open. They must find every row; no override helps."""
    overrides: dict[str, str] = Field(default={})
    """Gates that may not stop this night, and why: what `--override GATE --why TEXT` sets. It is written into the
    commit."""

    @field_validator(*DATA_GATES, *OUTPUT_GATES, "champion", "canary", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML reads `off` as false."""
        return None if value is False else value

    @field_validator("overrides")
    @classmethod
    def _known_gates(cls, overrides: dict[str, str]) -> dict[str, str]:
        for gate, why in overrides.items():
            if gate not in (*OVERRIDABLE, UNDONE):
                raise ValueError(f"--override is {gate}; needed one of {', '.join((*OVERRIDABLE, UNDONE))}")
            if not why.strip():
                raise ValueError(
                    f"--why of --override {gate} is empty; needed the reason, which is kept with the night"
                )
        return overrides

    @model_validator(mode="after")
    def _ordered(self) -> Gates:
        for name in ("volume", "new_users", "churn"):
            bounds = getattr(self, name)
            if isinstance(bounds, tuple) and bounds[0] > bounds[1]:
                raise ValueError(f"gates.{name} is {list(bounds)}; needed the least first")
        return self
