"""The section `train`: the processes, the objective, the optimiser, and when to stop and to save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import PositiveInt, Section

Loss = Literal["bce", "bpr", "sampled_softmax", "softmax", "gbce", "mse"]
LOSSES: dict[Loss, tuple[Literal["implicit", "explicit"], Literal["row", "step"] | None]] = {
    "bce": ("implicit", "row"),
    "bpr": ("implicit", "row"),
    "sampled_softmax": ("implicit", "step"),
    "softmax": ("implicit", None),
    "gbce": ("implicit", "step"),
    "mse": ("explicit", None),
}
"""What each loss of ncf_dist/train/losses.py needs: the feedback, and for whom negatives are drawn: each row, or all
rows of a step together."""
OF_ALL_ITEMS: tuple[Loss, ...] = ("sampled_softmax", "softmax", "gbce")
"""Those that compare a row's item with items that all rows of a step share: what a model of histories trains by."""


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
    """torchrun: machines. The job starts its own ranks; `other_nodes` says who starts those of the others."""
    rendezvous: str | None = None
    """torchrun, several nodes: HOST:PORT of this machine, as the others reach it."""
    other_nodes: Literal["command", "spark"] = "command"
    """torchrun, several nodes: `command`: a person or a program runs the command that the job prints on each of the
    other machines · `spark`: the job starts them itself, in one barrier task of Spark a machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA (NCCL) where there is a GPU for every rank, else CPU (gloo)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16 under autocast; weights, optimiser and loss stay float32."""
    exchange: Literal["auto", "dense", "rows"] = "auto"
    """Several ranks: how they add up the gradients of embedding tables. `rows`: each sends the rows that its batch
    looked up · `dense`: all of a table · `auto`: whichever is fewer bytes; on one machine `rows` where this saves 4 MB
    a step, on GPUs `dense`. Equal within rounding."""
    exchange_dtype: Literal["fp32", "bf16"] = "fp32"
    """Several ranks: what gradients travel in. `bf16` is half the bytes, and rounds them to 8 bits."""
    compiled: bool = True
    """gmf, mlp and neumf by bce or bpr, fp32 without dropout, on a CPU: compute a step's loss and gradients in one
    compiled call, where it was built. Faster, and equal within rounding. `false`: torch's operations do it."""
    loss: Loss | None = None
    """ncf_dist/train/losses.py has the formulas. Default: bce for implicit feedback, mse for explicit, sampled_softmax
    for the model history."""
    negatives: Literal["table", "online"] = "table"
    """`table`: those that prepare drew, draw `e mod negatives.draws` in epoch e · `online`: drawn by the same hash on
    the training device, draw e in epoch e, so never repeated."""
    shared_negatives: PositiveInt = 1_024
    """sampled_softmax, gbce: items drawn for a step and shared by all its rows."""
    epochs: PositiveInt = 20
    """Upper bound of epochs; the validation rows choose which one is kept."""
    batch_size: PositiveInt = 1_024
    """Rows a step on each rank (B); with bce and bpr a step sees B x (1 + negatives.per_positive) examples. The model
    history: windows of up to `sequences.length` items to be predicted."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam`: weight decay is an L2 term of the loss · `adamw`: weight decay is decoupled from the gradient · `sgd`:
    with `momentum`."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The schedule's highest learning rate."""
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    """ncf_dist/train/schedules.py has the formulas."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates. The schedule one_cycle changes the first one during training."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term in the denominator."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd. The schedule one_cycle changes it during training."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the layers' weights. Biases and batch norm have none."""
    embedding_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the embedding tables, including the rows that a step does not use."""
    embedding_l2: Annotated[float, Field(ge=0)] = 0.0
    """An L2 term of the loss on the embeddings that a step's pairs use, once for each use; beside any decay."""
    part_decay: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Weight decay of a part instead of the two above, embeddings and layers alike: by the beginning of its parameters'
    names, such as {gmf: 1.0e-6, tower: 1.0e-5}."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients with a larger norm (all parameters together) are scaled down to it."""
    stop_after: PositiveInt | None = None
    """Stop after so many epochs, each with the learning rate that `epochs` and the schedule give it: a final fit is as
    long as the one that was judged. Default: after `epochs`."""
    patience: PositiveInt = 5
    """Stop after this many epochs without a better validation NDCG@10 (explicit feedback: MSE)."""
    pretrained: Pretrained | None = None
    """neumf: start from a trained gmf and a trained mlp."""
    every: Annotated[str, Field(pattern=r"^[1-9]\d{0,3}d$")] | None = None
    """How often a model is trained, such as 7d: the nights between are ranked by the newest model of less than so many
    days before, where it was made with these settings, no gate refused it, no rollback took it back and tonight's
    index extends its own. Users and items that have come since are treated as the model's kind allows, and said.
    Default: every night."""
    refit: bool = False
    """Once the gates of the model have passed, train it once more on every row, those held out for validation and test
    too, for as many epochs as were kept, and rank by that: the job refit, which nightly runs after evaluate. What was
    judged is the model without these rows: the refit has seen them, and nobody can judge it by them."""
    warm_start: str | None = None
    """Start from an earlier bundle of the same model, whose users and items may be fewer: its folder, or `previous` for
    that of the latest night before ds whose model no gate refused and no rollback took back (none there: a fresh
    start)."""
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

    @property
    def every_days(self) -> int:
        """`every` as a number; 1 for every night."""
        return int(self.every.removesuffix("d")) if self.every else 1

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
