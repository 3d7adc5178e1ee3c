"""The one configuration tree: typed, frozen, read from YAML, each field documented where it is declared.

`load_config` reads a file, applies `--set section.key=value` overrides and validates the result. A mistake raises
`ConfigError` that names the key, the value found, the values allowed and, for an unknown key, the nearest known one.
Relative paths are taken from the working directory of the command, as spark-submit takes its own.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ncf_dist import urls
from ncf_dist.errors import ConfigError

InputFormat = Literal["movielens-dat", "movielens-tsv", "movielens-csv", "csv", "tsv", "jsonl", "parquet"]
IdType = Literal["int", "string"]
Place = str | Annotated[int, Field(ge=0)]
"""Where a field is: a column's name (header, JSON key, Parquet column), or its position in a line, from 0."""
Dataset = Literal["synthetic", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m"]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
MEMORY_PATTERN = r"^[1-9][0-9]*[kmgt]$"


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Paths(Section):
    lake: str
    """Root of everything the line writes: `runs/` and the published table. A folder or an fsspec URL."""
    work: str = "work"
    """Local scratch of this machine: rank logs, downloads in progress. Safe to delete between runs."""
    umask: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] | None = None
    """What group and others may not do with files and folders that the jobs write, in quoted octal digits: "027" lets
    the group read and others nothing; default: what the job was started with. Scratch folders are this user's alone."""


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


class Columns(Section):
    """Where an interaction's fields are. Formats of MovieLens know their own."""

    user: Place = "user_id"
    """The customer's user id."""
    item: Place = "item_id"
    """The customer's item id."""
    rating: Place | None = None
    """None: the log has no ratings; every row counts as 1."""
    timestamp: Place | None = None
    """None: the log has no times; a hash decides what is latest."""


class SideColumn(Section):
    """One typed column of a side table. A value that is not of its type is null, and counted."""

    source: Place = Field(alias="from")
    """Where it is in the file."""
    type: Literal["string", "int", "float", "bool"] = "string"
    """What it becomes."""


class SideTable(Section):
    """Facts about users or items, carried along beside the index."""

    path: str | tuple[str, ...]
    """A file, a folder, a glob, or several."""
    format: InputFormat | None = None
    """Default: the family of `input.format`."""
    separator: str | None = None
    """Text formats: what parts the fields; default: the format's own."""
    header: bool | None = None
    """Text formats: whether the first line names the columns; default: the format's own."""
    encoding: Literal["utf-8", "latin-1"] | None = None
    """Default: the format's own."""
    id: Place | None = None
    """The customer's id; default: the format's own, or `user_id` or `item_id`."""
    title: Place | None = None
    """Items: what people call it, shown in reports; default: the format's own, or none."""
    columns: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], SideColumn] = {}
    """Further columns by the name they get."""


def _by_path(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


SideOrPath = Annotated[SideTable | None, BeforeValidator(_by_path)]
"""A side table, or its path alone."""


class Input(Section):
    path: str | tuple[str, ...]
    """The interaction log: a file, a folder of them, a glob, or several of these."""
    format: InputFormat = "movielens-dat"
    """`movielens-dat`: user::item::rating::seconds · `movielens-tsv`: the same with tabs (u.data) ·
    `movielens-csv`: ratings.csv · `csv`: RFC 4180 lines with a header · `tsv`: tabs, no header, no quotes ·
    `jsonl`: one JSON object a line · `parquet`. Text may be compressed (.gz, .bz2, .zst)."""
    columns: Columns = Columns()
    """For `csv`, `tsv`, `jsonl` and `parquet`."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text formats: what parts the fields; default: the format's own."""
    header: bool | None = None
    """Text formats: whether the first line of each file names the columns; default: the format's own."""
    fields: PositiveInt | None = None
    """Text formats without a header: fields of a whole line; default: up to the last one that `columns` names."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    """Text formats: the charset. Lines that do not fit it go to the quarantine."""
    user_type: IdType | None = None
    """Whether user ids are numbers (int64) or kept as text; default: `int` for MovieLens, the column's type for
    Parquet, else `string`."""
    item_type: IdType | None = None
    """The same for items."""
    time_unit: Literal["s", "ms", "us", "iso"] = "s"
    """What a timestamp counts since 1970, or ISO 8601 text (UTC where it names no zone). Parquet timestamps know."""
    max_line_bytes: PositiveInt = 65_536
    """Longer lines go to the quarantine; bounds what a reader holds in memory."""
    rating_range: tuple[float, float] | None = None
    """Lowest and highest rating there is; others go to the quarantine."""
    items: SideOrPath = None
    """Optional item side table; as a path alone: movies.dat, u.item or movies.csv of the log's family."""
    users: SideOrPath = None
    """Optional user side table; as a path alone likewise: users.dat or u.user."""
    feedback: Literal["implicit", "explicit"] = "implicit"
    """`implicit`: a row is a positive, contrasted with negatives · `explicit`: the rating itself is learned."""
    forget: str | None = None
    """A text file of user ids, one a line: these users' rows are left out and counted as `forgotten`, and the users
    leave the index and what is published. Not the ids themselves: they would stay in every run's manifest."""
    min_rating: float | None = None
    """Implicit only: rows with a lower rating are not positives. None keeps every row."""
    since: dt.date | None = None
    """Rows from before this day (UTC) are left out."""
    until: dt.date | None = None
    """Rows from this day on (UTC) are the future and go to the quarantine; default: ds itself, so that a night sees
    what happened before it."""
    allow_items: tuple[str | int, ...] | None = None
    """Only these items."""
    deny_items: tuple[str | int, ...] = ()
    """Never these items."""
    max_user_interactions: PositiveInt | None = None
    """Keep only so many of a user's latest rows: one crawler must not outweigh a thousand people."""
    k_core: PositiveInt = 1
    """Leave out users and items with fewer rows than this, again and again until none is left (1: keep all)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Above this share of quarantined rows the job exits 3: the file is not what the config says it is. Rows from
    `until` on are not counted: a log that goes on after ds is sound."""

    @property
    def filters(self) -> bool:
        """Whether any rule leaves sound rows out."""
        wanted = (self.since, self.min_rating, self.allow_items, self.max_user_interactions)
        return any(rule is not None for rule in wanted) or bool(self.deny_items) or self.k_core > 1

    @field_validator("forget", mode="before")
    @classmethod
    def _no_ids(cls, given: Any) -> Any:
        if given is None or isinstance(given, str):
            return given
        # What was given is not shown.
        raise ValueError(
            "input.forget holds ids; needed the path of a text file with one id a line: ids in the config would stay "
            "in every run's manifest"
        )

    @model_validator(mode="after")
    def _makes_sense(self) -> Input:
        if self.feedback == "explicit" and self.min_rating is not None:
            raise ValueError(
                f"input.min_rating is {self.min_rating} with feedback explicit, which learns every rating: "
                "leave it out, or set input.feedback=implicit"
            )
        if self.feedback == "explicit" and not self.format.startswith("movielens") and self.columns.rating is None:
            raise ValueError(
                "input.feedback is explicit and input.columns.rating is not set; needed the column of the ratings"
            )
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError(f"input.since is {self.since} and input.until {self.until}; needed an earlier since")
        taken: dict[Place, str] = {}
        for name, place in self.columns.model_dump().items():
            if place is None:
                continue
            if isinstance(place, int) and self.fields is not None and place >= self.fields:
                raise ValueError(
                    f"input.columns.{name} is {place} with input.fields {self.fields}; needed a position from 0 to "
                    f"{self.fields - 1}"
                )
            if (other := taken.setdefault(place, name)) != name:
                raise ValueError(
                    f"input.columns.{other} and input.columns.{name} are both {place!r}; needed two columns"
                )
        if self.rating_range is not None and self.rating_range[0] > self.rating_range[1]:
            raise ValueError(f"input.rating_range is {list(self.rating_range)}; needed [lowest, highest]")
        return self


class Split(Section):
    strategy: Literal["leave-one-out", "leave-k-out", "temporal", "random", "files", "none"] = "leave-one-out"
    """`leave-one-out`: each user's latest item is the test row, the one before it the validation row
    (He et al. 2017, section 4.1) · `leave-k-out`: the latest k, and the k before them · `temporal`: everything from one
    moment on · `random`: each row by its hash · `files`: what `split.test` holds · `none`: train on everything."""
    k: PositiveInt = 1
    """leave-k-out: rows of a user that are held out for the test, and as many for validation."""
    min_interactions: Annotated[int, Field(ge=3)] = 3
    """leave-one-out, leave-k-out: users with fewer items keep all of them in train: too little to judge them by."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """random: share of the rows; temporal: share of the latest rows."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """random, temporal: the same, of what the test leaves."""
    test_from: dt.date | None = None
    """temporal: the day (UTC) the test begins, in place of test_fraction."""
    validation_from: dt.date | None = None
    """temporal: the day (UTC) validation begins, in place of validation_fraction."""
    test: str | tuple[str, ...] | None = None
    """files: the test rows, in the format of the log; `input.path` is then the train rows."""
    candidates: str | tuple[str, ...] | None = None
    """files: given candidates, lines of `(user,item)`, then items, tab-separated (the NCF paper's test.negative);
    None draws them."""
    validation: bool = True
    """Whether train gives up rows for validation, by the rule that makes the test (`files`: each user's latest).
    Without them the last epoch is kept: for the final fit, after the settings are chosen."""

    @model_validator(mode="after")
    def _fits_together(self) -> Split:
        least = 2 * self.k + 1
        if self.strategy == "leave-one-out" and self.k != 1:
            raise ValueError(f"split.k is {self.k} with leave-one-out: set split.strategy=leave-k-out")
        if self.strategy == "leave-k-out" and self.min_interactions < least:
            raise ValueError(
                f"split.min_interactions is {self.min_interactions} with split.k {self.k}; needed at least 2 k + 1 = "
                f"{least}, so that a row is left to train on"
            )
        if (self.strategy == "files") != (self.test is not None):
            raise ValueError(
                f"split.test is {self.test!r} with strategy {self.strategy}; needed the test file for `files`, "
                "and none otherwise"
            )
        if self.candidates is not None and self.strategy != "files":
            raise ValueError(f"split.candidates is set with strategy {self.strategy}; it needs strategy files")
        if self.strategy != "temporal" and (self.test_from or self.validation_from):
            raise ValueError(f"split.test_from is for strategy temporal, not {self.strategy}")
        if self.validation_from and not (self.test_from and self.validation_from < self.test_from):
            raise ValueError(f"split.validation_from is {self.validation_from}; needed a day before split.test_from")
        return self


class Negatives(Section):
    per_positive: NonNegativeInt = 4
    """Negatives drawn for each positive (N)."""
    draws: NonNegativeInt = 4
    """Independent draws kept in the train table; epoch e reads draw `e mod draws`. 0 keeps none: the trainer draws them
    itself (train.negatives=online)."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of an item as a negative: its train popularity to this power; 0 is uniform."""
    candidates: NonNegativeInt = 99
    """Unseen items that a held-out positive is ranked among (the NCF protocol)."""


class Layout(Section):
    """How the train table is cut into files."""

    rows_per_file: PositiveInt = 250_000
    """Upper bound of rows a file (one row group each): what a reader holds in memory at a time."""
    min_files: PositiveInt = 16
    """At least this many files where there are rows for them, so that re-dealing files mixes them."""
    world_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of ranks that shall get whole files: the file count is a multiple of each."""


def embedding_size(rows: int) -> int:
    """fastai's rule of thumb, min(600, round(1.6 · n^0.56)): 944 → 74, 1625 → 101."""
    return min(600, round(1.6 * float(rows**0.56)))


class Model(Section):
    """Which model, and its shape; the formulas are in ncf_dist/models.py."""

    name: Literal["gmf", "mlp", "neumf", "mf", "embedding_nn"] = "neumf"
    """`gmf`, `mlp`, `neumf`: He et al. 2017 · `mf`: dot product · `embedding_nn`: layers over embeddings (fastai)."""
    factors: PositiveInt = 8
    """Embedding size of GMF, of NeuMF's GMF part and of mf (D)."""
    layers: tuple[PositiveInt, ...] = (64, 32, 16, 8)
    """mlp, neumf: the first entry is the width of the concatenated user and item embeddings, so it must be even, the
    rest are hidden layers · embedding_nn: hidden layers, such as [100, 50]."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """mlp, neumf: dropout before each layer · embedding_nn: after each hidden layer."""
    biases: bool = False
    """mf: a bias a user and a bias an item."""
    y_range: tuple[float, float] | None = None
    """Explicit feedback, mf and embedding_nn: a sigmoid maps scores into (low, high). A little more than the scale of
    the ratings, such as [0, 5.5] for 1 to 5, lets the best ones be reached."""
    embedding_sizes: tuple[PositiveInt, PositiveInt] | None = None
    """embedding_nn: of users and of items; default: by the number of each, see `embedding_size`."""
    batch_norm: bool = True
    """embedding_nn: batch normalisation after each hidden layer."""
    init_std: Annotated[float, Field(gt=0)] = 0.01
    """Standard deviation of the initial embeddings, around 0."""

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
        return self


class Loader(Section):
    """How a rank reads the train table. Nothing here but shuffle_files changes a batch."""

    backend: Literal["petastorm", "arrow"] = "petastorm"
    """What reads the Parquet files: Petastorm, or its plain pyarrow twin with the same batches."""
    cache: Literal["none", "host", "device"] = "none"
    """`none`: read every epoch, `shuffle_files` files at a time · `host`: read once, kept in each rank's memory ·
    `device`: the same on its GPU. A table that does not fit in `cache_bytes` is read every epoch after all."""
    cache_bytes: PositiveInt = 2**31
    """Upper bound of a rank's cache."""
    workers: PositiveInt = 2
    """Petastorm threads a rank."""
    shuffle_files: PositiveInt = 8
    """Files whose rows a rank mixes: so many are in memory, and as many are read ahead."""


class Pretrained(Section):
    """NeuMF's start from two trained models (He et al. 2017, section 3.4.1)."""

    gmf: str
    """Bundle folder of a gmf with the same factors."""
    mlp: str
    """Bundle folder of an mlp with the same layers."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of GMF in the output layer; MLP gets 1 - alpha."""


class Train(Section):
    launcher: Literal["torchrun", "spark", "none"] = "torchrun"
    """`torchrun`: `ranks` processes a node under DistributedDataParallel · `spark`: `ranks` barrier tasks of Spark's
    TorchDistributor · `none`: one process, no process group."""
    ranks: PositiveInt = 1
    """Processes on each node; one a GPU, or a share of the cores each without GPUs."""
    nodes: PositiveInt = 1
    """torchrun: machines. The job starts its own ranks and prints the command that the other machines need."""
    rendezvous: str | None = None
    """torchrun, several nodes: HOST:PORT of this machine, as the others reach it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA (NCCL) where there is a GPU for every rank, else CPU (gloo)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16 under autocast; weights, optimiser and loss stay float32."""
    compiled: bool = True
    """gmf, mlp and neumf by bce or bpr, fp32 without dropout, on a CPU: compute a step's loss and gradients in one
    compiled call, where it was built. Faster, and equal within rounding; false: torch's operations."""
    loss: Literal["bce", "bpr", "sampled_softmax", "mse"] | None = None
    """ncf_dist/train/losses.py has the formulas. Default: bce for implicit feedback, mse for explicit."""
    negatives: Literal["table", "online"] = "table"
    """`table`: those that prepare drew, draw `e mod negatives.draws` in epoch e · `online`: drawn by the same hash on
    the training device, draw e in epoch e, so never repeated."""
    shared_negatives: PositiveInt = 1_024
    """sampled_softmax: items drawn for a step and shared by all its rows."""
    epochs: PositiveInt = 20
    """Upper bound of epochs; the validation rows choose which one is kept."""
    batch_size: PositiveInt = 1_024
    """Rows a step on each rank (B); with bce and bpr a step sees B x (1 + negatives.per_positive) examples."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """adam: weight decay is an L2 term of the loss · adamw: it is apart from the gradient · sgd: with `momentum`."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The schedule's highest learning rate."""
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    """ncf_dist/train/schedules.py has the formulas."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates; one_cycle moves the first one."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term in the denominator."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd; one_cycle moves it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the layers' weights; never of biases and batch norm."""
    embedding_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the embedding tables, rows that a step does not touch included."""
    embedding_l2: Annotated[float, Field(ge=0)] = 0.0
    """An L2 term of the loss on the embeddings that a step's pairs use, once for each use; beside any decay."""
    part_decay: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight decay of a part instead of the two above, embeddings and layers alike: by the beginning of its parameters'
    names, such as {gmf: 1.0e-6, tower: 1.0e-5}."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients with a larger norm (all parameters together) are scaled down to it."""
    patience: PositiveInt = 5
    """Stop after this many epochs without a better validation NDCG@10 (explicit feedback: MSE)."""
    pretrained: Pretrained | None = None
    """neumf: start from a trained gmf and a trained mlp."""
    warm_start: str | None = None
    """Start from an earlier bundle of the same model, whose users and items may be fewer: its folder, or `previous` for
    that of the latest night before ds (none there: a fresh start)."""
    checkpoint_steps: PositiveInt | None = None
    """Save after this many steps."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 5.0
    """Save after this many minutes. A training that was cut short goes on from the latest checkpoint."""
    timeout_s: PositiveInt = 300
    """A collective that waits longer than this fails the run instead of hanging it."""
    lr_find: bool = False
    """Draw loss over learning rate, suggest a rate, and exit without training."""
    max_model_bytes: PositiveInt | None = None
    """Refuse a training that needs more than this, all ranks of a machine together;
    default: 80 % of the machine's memory (or of the GPU's)."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Train:
        if (self.nodes > 1) != (self.rendezvous is not None) or (self.nodes > 1 and self.launcher != "torchrun"):
            raise ValueError(
                f"train.nodes is {self.nodes} with train.rendezvous={self.rendezvous} and "
                f"train.launcher={self.launcher}; needed launcher torchrun and HOST:PORT of this machine "
                "for several nodes, and no rendezvous for one"
            )
        if self.pretrained and self.warm_start:
            raise ValueError("train.pretrained and train.warm_start are both set; a model starts from one of them")
        return self


class Evaluate(Section):
    ks: tuple[PositiveInt, ...] = (5, 10, 20)
    """List lengths (K) of the metrics at K."""
    baselines: tuple[Literal["popularity", "ease", "item_knn", "als"], ...] = ("popularity",)
    """What the model is compared with, on the same users and by the same code: `popularity` · `ease` (Steck 2019) ·
    `item_knn` (cosine over items, Sarwar et al. 2001) · `als` (Spark's, Hu et al. 2008). They learn from train and
    validation items."""
    bootstrap: NonNegativeInt = 1_000
    """Replicates of the bootstrap over users that intervals and p-values come from; 0: none."""
    compare: str | None = None
    """Another run of evaluate on the same held-out rows to compare this model with: its folder, its model_version, or
    its ds."""
    ease_lambda: Annotated[float, Field(gt=0)] = 500.0
    """ease: L2 regularisation (λ)."""
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

    @model_validator(mode="after")
    def _each_once(self) -> Evaluate:
        for name, values in (("ks", self.ks), ("baselines", self.baselines)):
            if len(set(values)) != len(values):
                raise ValueError(f"evaluate.{name} is {list(values)}; needed each once")
        if not self.ks:
            raise ValueError("evaluate.ks is empty; needed at least one list length, such as [10]")
        return self


IdList = str | tuple[str | int, ...]


class Score(Section):
    k: PositiveInt = 10
    """Recommendations a user (K)."""
    form: Literal["long", "lists"] = "long"
    """`long`: a row a recommendation · `lists`: a row a user, with a list of them."""
    seen: Literal["all", "train"] = "all"
    """What is masked: `all` the user did before ds, or `train` and validation only (to compare with evaluate)."""
    allow_items: IdList | None = None
    """Recommend only these items: their ids, or a text file with one id a line. Ids that no item has are counted."""
    deny_items: IdList = ()
    """Never recommend these items; likewise."""
    active_since: dt.date | PositiveInt | None = None
    """Only users with an interaction on or after this day (UTC), or in this many days before ds. Users without any
    interaction are not active."""
    fallback_days: PositiveInt | None = 30
    """Known users without train rows tonight get the items that were most interacted with in this many days before ds:
    users of earlier nights, users of `input.users` that never interacted, users with nothing but test rows. None leaves
    them out."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products; scores are stored as float32."""
    users_per_block: PositiveInt = 512
    """Users scored at once by a worker; bounds its memory together with the catalogue."""
    tasks: PositiveInt | None = None
    """Spark tasks of the scoring job; default: one a file of the table."""


Gate = Literal["users", "beats_popularity", "evaluated"]
RESERVED = ("runs", "raw")
"""Folders that the lake itself has at its top."""
_PLAIN_NAME = re.compile(r"[^\W_](?:[\w .-]{0,62}[\w-])?")
"""Begins with a letter or a digit, because readers leave out what begins with a dot or an underscore."""


class Publish(Section):
    table: str = "recommendations"
    """Folder of the published Delta table inside the lake: one plain name."""
    require: tuple[Gate, ...] = ("users", "beats_popularity", "evaluated")
    """What a night must pass to replace the published one; leave one out to switch it off. `users`: the model ranks for
    at least half as many users as in the night that is published · `beats_popularity`: the paired 95 % interval of the
    headline metric does not lie wholly below popularity's · `evaluated`: the very model that score used was evaluated.
    A night without rows is never published."""
    verify: Literal["quick", "deep"] = "quick"
    """How the files of a night that is published already are checked: `quick` looks at existence and size · `deep`
    reads all of them and compares SHA-256. What is damaged is replaced from the score run."""

    @model_validator(mode="after")
    def _one_plain_name(self) -> Publish:
        if not _PLAIN_NAME.fullmatch(self.table) or self.table.casefold() in RESERVED:
            raise ValueError(
                f"publish.table is {self.table!r}; needed one plain name of a folder in the lake: letters, digits, "
                f"spaces, '.', '_' or '-', a letter or digit first, at most 64, and not {' or '.join(RESERVED)}, "
                "which the lake uses itself"
            )
        return self


def _master(text: str) -> str:
    """`text`, if a command line takes it as one word and nothing else. Raises ValueError."""
    if not text.isprintable() or " " in text or text.startswith("-") or not text:
        raise ValueError(
            f"spark.master is {text!r}; needed one word without white space, control characters or a leading -, "
            "such as local[*], yarn, spark://host:7077 or k8s://https://host:443"
        )
    return text


class Spark(Section):
    master: Annotated[str, AfterValidator(_master)] | None = None
    """Given to spark-submit as --master; None leaves the cluster's default."""
    driver_memory: Annotated[str, Field(pattern=MEMORY_PATTERN)] = "1g"
    """Heap of the driver; in local mode it is also the executors'."""
    executor_memory: Annotated[str, Field(pattern=MEMORY_PATTERN)] = "2g"
    """Heap of each executor on a cluster."""
    shuffle_partitions: PositiveInt = 8
    """Partitions of a shuffle. Changes the speed, never a byte of the tables."""
    authenticate: bool | None = None
    """On a cluster: None turns Spark's authentication and encryption on where that needs nothing else (YARN,
    Kubernetes; a standalone cluster with SPARK_AUTHENTICATE_SECRET in the environment), and warns elsewhere. False: it
    is wanted off."""


class Config(Section):
    """The whole tree; only `pipeline.py` of a stage sees it."""

    paths: Paths
    fetch: Fetch = Fetch()
    input: Input
    split: Split = Split()
    negatives: Negatives = Negatives()
    layout: Layout = Layout()
    model: Model = Model()
    loader: Loader = Loader()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    score: Score = Score()
    publish: Publish = Publish()
    spark: Spark = Spark()
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
        timeless = not self.input.format.startswith("movielens") and self.input.columns.timestamp is None
        if self.split.strategy == "temporal" and timeless:
            raise ValueError(
                "split.strategy is temporal and input.columns.timestamp is not set; needed the column of the times"
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
    def loss(self) -> str:
        """The loss in force: `train.loss`, or what the feedback asks for."""
        return self.train.loss or ("mse" if self.input.feedback == "explicit" else "bce")

    @model_validator(mode="after")
    def _loss_fits_the_data(self) -> Config:
        explicit = self.input.feedback == "explicit"
        if explicit != (self.loss == "mse"):
            raise ValueError(
                f"train.loss is {self.loss} with input.feedback={self.input.feedback}; "
                "needed mse for explicit feedback and bce, bpr or sampled_softmax for implicit"
            )
        if not explicit and self.model.y_range is not None:
            raise ValueError(
                f"model.y_range is {list(self.model.y_range)} with input.feedback=implicit, where scores are logits: "
                "leave it out"
            )
        if self.train.pretrained and self.model.name != "neumf":
            raise ValueError(
                f"train.pretrained is set with model.name={self.model.name}; only neumf is made of a gmf and an mlp"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides, validate.

    Raises ConfigError: no such file, not YAML, an override that is not `section.key=value`,
    an unknown key, a bad value.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(_filled(tree, Config))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_mistakes(error)}") from None


def parse_ds(text: str | None, allow_future: bool = False) -> str:
    """`--ds` as an ISO date; default: today in UTC. Raises ConfigError: no date, or one after tomorrow without
    `allow_future`."""
    today = dt.datetime.now(dt.timezone.utc).date()
    if text is None:
        return today.isoformat()
    try:
        if (day := dt.date.fromisoformat(text)).isoformat() == text:
            # What is published of a night in the future is newer than every night until then.
            if allow_future or day <= today + dt.timedelta(days=1):
                return text
            raise ConfigError(
                f"--ds is {text}, and today is {today} (UTC); needed tomorrow at the latest, as the nights until then "
                "could not be published any more: correct it, or add --allow-future for a backtest"
            )
    except ValueError:
        pass
    raise ConfigError(f"--ds is {text!r}; needed a date that exists, written YYYY-MM-DD, for example 2026-01-31")


class _Loader(yaml.SafeLoader):
    """YAML lets a key be written twice and keeps the last; a config that does so is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]} is there twice; needed once", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"config {path} cannot be read ({error.strerror}); give --config a YAML file such as conf/demo.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path} holds {type(tree).__name__}; needed sections such as `paths:` and `input:`, "
            "see conf/demo.yaml"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}; needed section.key=value, for example --set train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for part in parts[:-1]:
        child = tree.setdefault(part, {})
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override!r}: {part} is not a section; known sections: {', '.join(Config.model_fields)}"
            )
        tree = child
    tree[parts[-1]] = value


def _mistakes(error: ValidationError) -> str:
    """Each mistake as: key, what we got, what was needed. A key that may have one of several forms is said once."""
    said: dict[str, list[str]] = {}
    for each in error.errors():
        names, keys = _place(each["loc"])
        name = ".".join(names)
        if each["type"] == "extra_forbidden":
            near = difflib.get_close_matches(names[-1], keys, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*names[:-1], near[0]])}?" if near else f"known here: {', '.join(keys)}"
            said.setdefault(f"unknown key {name} ({hint})", [])
        elif each["type"] == "missing":
            said.setdefault(f"{name} is missing; add it, conf/demo.yaml shows how", [])
        elif each["type"] == "value_error":
            said.setdefault(str(each["ctx"]["error"]), [])
        else:
            needed = f"needed a section with {', '.join(keys)}" if each["type"] == "model_type" else each["msg"]
            found = said.setdefault(f"{name} is {each['input']!r}", [])
            found += [text for text in [needed[0].lower() + needed[1:]] if text not in found]
    return "; ".join(f"{what}: {', or '.join(needed)}" if needed else what for what, needed in said.items())


def _place(loc: Iterable[str | int]) -> tuple[list[str], list[str]]:
    """(the key that an error of pydantic is about, the keys known in its section). Of the names in `loc` those are left
    out that tell which form of a value pydantic tried: they are no keys."""
    names: list[str] = []
    known: list[str] = []
    kind: Any = Config
    keyed = False  # Whether the part before is a key of a table: `[key]` after it says that the key itself is wrong.
    for part in loc:
        section = _section(kind)
        table = next((form for form in _forms(kind) if get_origin(form) is dict), None)
        if section is not None and not (part == "[key]" and keyed):
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            found = fields.get(str(part))
            names, known, kind = [*names, str(part)], list(fields), found.annotation if found else None
        elif table is not None:
            names, kind, keyed = [*names, str(part)], get_args(table)[1], True
            continue
        elif isinstance(part, int):
            names, kind = [*names, str(part)], None
        keyed = False
    section = _section(kind)
    if section is not None:
        known = [field.alias or name for name, field in section.model_fields.items()]
    return names, known


def _forms(kind: Any) -> list[Any]:
    """The forms that a value of this type may have: `Annotated[A | B, …]` → A, B."""
    if get_origin(kind) is Annotated:
        return _forms(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [form for each in get_args(kind) for form in _forms(each)]
    return [kind]


def _section(kind: Any) -> type[BaseModel] | None:
    return next((form for form in _forms(kind) if isinstance(form, type) and issubclass(form, BaseModel)), None)


def _filled(tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A section with nothing in it (all its keys commented out) has its defaults."""
    filled = dict(tree)
    for name, field in model.model_fields.items():
        key = field.alias or name
        section = _section(field.annotation)
        if section is None or key not in tree:
            continue
        if tree[key] is None and type(None) not in _forms(field.annotation):
            filled[key] = {}
        elif isinstance(tree[key], dict):
            filled[key] = _filled(tree[key], section)
    return filled
