"""What was tried beside conf/ncf-ml-1m-history.yaml: each variant on its hold-out, each user's latest train row.

    .venv/bin/python -m benchmarks.history_variants [--variants gated time] [--epochs 24] [--at-once 1]
        [--device cuda] [--lake FOLDER] [--results FILE]

The NCF paper's files, from NCF_DATA_DIR/ncf-ml-1m, are prepared in --lake without those rows, once for each length of
histories; where the lake has that already, neither Spark nor the files are needed. Then a process each trains a variant
as the config says, on one rank with all 40 windows of a step, and ranks the whole catalogue: by itself, and with the
item-to-item parts at the weights that are the best there. No test row is read.

- gated: the second half of a block is W_2 (SiLU(W_1 h) ⊙ W_3 h), half as many weights more
- time: a block's kernels also weigh how long before position t the item at s was, from the coarse gaps between items of
  the history: w = softmax over s ≤ t of k_h(t - s) + Σ a_hf f(time from s to t), f: log2(1 + seconds) / 8, and whether
  it was less than a minute, an hour, a day, a week. Nothing reads the time of the item to be predicted
- softmax, …: a softmax over all items with 34 epochs, and what else the name says: conf/ncf-ml-1m-history-long.yaml is
  the best of these with parts (history_variants_softmax.json: --variants "softmax, 34 epochs" … --at-once 7)

Prints one table and writes benchmarks/results/history_variants.json (--results).
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ncf import papers_files, places, run
from ncf_dist.config import Config
from ncf_dist.config.load import load_config
from ncf_dist.lake import Lake
from ncf_dist.machine import cores, processor
from ncf_dist.models import Recommender, Sequences
from ncf_dist.models.history import Block, History, Mix, Shapes, in_groups, one_after_another
from ncf_dist.train.item_parts import parts_of
from ncf_dist.train.spec import Spec
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.worker import loader_of, starting_model, task_of
from ncf_dist.train.world import World

ROOT = Path(__file__).parent.parent
CONFIG, DS = "ncf-ml-1m-history", "2026-01-31"
BASE: dict[str, object] = {
    "split.validation": True,
    "loader.backend": "arrow",
    "train.ranks": 1,
    "train.batch_size": 40,
    "train.checkpoint_minutes": None,
}
VARIANTS: dict[str, dict[str, object]] = {
    "as committed": {},
    "another seed": {"seed": 2},
    "four blocks": {"model.blocks": 4},
    "gated": {},
    "time": {},
    "200 items": {"model.history": 200},
    "softmax over all items": {"train.loss": "softmax"},
    "3,000 negatives": {"train.shared_negatives": 3000},
}
SOFTMAX: dict[str, dict[str, object]] = {
    "34 epochs": {},
    "50 epochs": {"train.epochs": 50},
    "50 epochs, dropout .3": {"train.epochs": 50, "model.dropout": 0.3},
    "50 epochs, 192 wide, dropout .3": {"train.epochs": 50, "model.factors": 192, "model.dropout": 0.3},
    "four blocks": {"model.blocks": 4},
    "four blocks, dropout .3": {"model.blocks": 4, "model.dropout": 0.3},
    "four blocks, 192 wide, dropout .3": {"model.blocks": 4, "model.factors": 192, "model.dropout": 0.3},
}
VARIANTS |= {f"softmax, {name}": {"train.loss": "softmax", "train.epochs": 34, **it} for name, it in SOFTMAX.items()}


# ---- what no setting says --------------------------------------------------------------------------------------------


class GatedBlock(Block):
    def __init__(self, old: Block) -> None:
        nn.Module.__init__(self)
        self.before_mixing, self.before_layers, self.mixing = old.before_mixing, old.before_layers, old.mixing
        self.narrow, self.dropout = old.narrow, old.dropout
        self.wide = nn.Linear(old.wide.in_features, 2 * old.wide.out_features)

    def forward(self, h: Tensor, shapes: Shapes) -> Tensor:
        h = h + self.dropout(self.mixing(self.before_mixing(h), shapes))
        gate, wide = self.wide(self.before_layers(h)).chunk(2, -1)
        after: Tensor = h + self.dropout(self.narrow(functional.silu(gate) * wide))
        return after


class TimedMix(Mix):
    gaps: Sequence[Tensor]
    """(R, T) of each group of the step."""

    def __init__(self, old: Mix) -> None:
        nn.Module.__init__(self)
        self.heads, self.gate, self.out, self.kernel = old.heads, old.gate, old.out, old.kernel
        self.time = nn.Parameter(torch.zeros(self.heads, 5))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        u, v = functional.silu(self.gate(x)).chunk(2, -1)
        pairs = zip(in_groups(v, shapes), self.gaps, strict=True)
        mixed: Tensor = self.out(u * one_after_another([self._over_times(*pair) for pair in pairs]))
        return mixed

    def _over_times(self, v: Tensor, gaps: Tensor) -> Tensor:
        """v: (R, T, D) → (R, T, D)"""
        rows, positions, width = v.shape
        at = torch.where(gaps > 0, torch.exp2((gaps.double() - 1) / 2), 0.0).cumsum(1)
        seconds = (at[:, :, None] - at[:, None, :]).clamp(min=0).float()
        less = [(seconds < most).float() for most in (60, 3600, 86_400, 604_800)]
        facts = torch.stack([torch.log2(seconds + 1) / 8, *less], -1)
        place = torch.arange(positions, device=v.device)
        lag = place[:, None] - place
        logits = self.kernel[:, lag.clamp(min=0)] + torch.einsum("rtsf,hf->rhts", facts, self.time)
        weights = logits.masked_fill(lag < 0, -torch.inf).softmax(-1)
        y = torch.einsum("rhts,rshe->rthe", weights, v.view(rows, positions, self.heads, -1))
        return y.reshape(rows, positions, width)


class TimedHistory(History):
    def tower(self, groups: Sequence[Sequences]) -> Tensor:
        for block in self.blocks:
            cast(TimedMix, block.mixing).gaps = [group.gaps for group in groups]
        return super().tower(groups)


def changed(model: Recommender, variant: str) -> Recommender:
    assert isinstance(model, History)
    if variant == "gated":
        model.blocks = nn.ModuleList(GatedBlock(cast(Block, block)) for block in model.blocks)
    if variant == "time":
        for block in model.blocks:
            block.mixing = TimedMix(cast(Mix, block.mixing))
        model.__class__ = TimedHistory
    return model


# ---- a variant -------------------------------------------------------------------------------------------------------


def length_of(variant: str) -> dict[str, object]:
    """Settings of its histories' length."""
    length = VARIANTS[variant].get("model.history", 150)
    return {"sequences.length": length, "model.history": length}


def tables_of(variant: str, lake: Path) -> Path:
    return lake / str(length_of(variant)["sequences.length"])


def config_of(variant: str, lake: Path, epochs: int) -> Config:
    here = {"paths.lake": tables_of(variant, lake), "paths.work": lake / "work"}
    settings = {**BASE, **here, **length_of(variant), "train.epochs": epochs, **VARIANTS[variant]}
    given = [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items()]
    return load_config(str(ROOT / f"conf/{CONFIG}.yaml"), given)


def prepare(variant: str, lake: Path) -> None:
    here = tables_of(variant, lake)
    if not here.is_dir():
        settings = {**places(papers_files(), str(here), 1), **length_of(variant), "split.validation": "true"}
        run("prepare", CONFIG, settings)


def train(variant: str, lake: Path, epochs: int, device: str) -> dict[str, Any]:
    """Figures by model, seconds of training."""
    config, world = config_of(variant, lake, epochs), World(device=device)
    found = Lake(config.paths.lake).stage(DS, "prepare").newest()
    assert found is not None
    model = changed(starting_model(config, Spec("", found.root, ""), found), variant)
    loader = loader_of(config, found, task_of(config, found), world)
    trainer = Trainer(model, loader, lambda model: {}, config.train, world, loss=config.loss, seed=config.seed)
    history = trainer.fit()
    record = lake / f"parts of {variant}.json"
    parts_of(config, found, trainer.model, str(record))
    figures = json.loads(record.read_text())["figures"]
    alone = next(row for row in figures if not row["counts"] and not row["ease"])
    return {
        "epochs": config.train.epochs,
        "alone": alone,
        "with parts": max(figures, key=lambda row: row["ndcg@10"]),
        "seconds": sum(epoch["seconds"] for epoch in history.epochs),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--at-once", type=int, default=1, help="variants that share the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lake", type=Path, default=ROOT / "work/history-variants", help="where tables are or will be")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/history_variants.json")
    parser.add_argument("--one", action="store_true", help="train the variant in this process, and say what came out")
    args = parser.parse_args()
    if args.one:
        logging.basicConfig(level=logging.INFO, format=f"{args.variants[0]}: %(message)s")
        print(json.dumps(train(args.variants[0], args.lake, args.epochs, args.device)))
        return
    for variant in args.variants:
        prepare(variant, args.lake)

    def one(variant: str) -> dict[str, Any]:
        options = {"--variants": variant, "--lake": args.lake, "--epochs": args.epochs, "--device": args.device}
        command = [sys.executable, "-m", "benchmarks.history_variants", "--one"]
        command += [str(part) for option in options.items() for part in option]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{variant} exited {done.returncode}; its log is above")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    with ThreadPoolExecutor(args.at_once) as pool:
        found = dict(zip(args.variants, pool.map(one, args.variants), strict=True))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{cores()} cores, {processor()}"
    print(f"Each user's latest train row, {args.at_once} at once, {machine}: epochs, HR@10 / NDCG@10, seconds")
    for variant, row in found.items():
        cells = [f"{row[who]['hr@10']:.4f} / {row[who]['ndcg@10']:.4f}" for who in ("alone", "with parts")]
        print(
            f"{variant:42}{row['epochs']:>4}" + "".join(f"{cell:>20}" for cell in cells) + f"{row['seconds']:>8.0f} s"
        )
    body = {"machine": machine, "at_once": args.at_once, "variants": found}
    args.results.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
