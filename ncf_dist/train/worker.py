"""One training rank. torchrun (or plain Python, for one rank) runs `python -m ncf_dist.train.worker --spec FILE`.

Everything it needs is in the spec; everything it makes is under the run's folder. A failure that a person can mend is
written to `error-<rank>.json` beside the spec, so that the job reports it as its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import posixpath
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ncf_dist import contracts
from ncf_dist.artifacts import read_manifest, write_atomic
from ncf_dist.bundle import save_bundle
from ncf_dist.config import Config
from ncf_dist.errors import NcfError
from ncf_dist.models import build_model
from ncf_dist.train.loaders import TrainLoader, verify_files
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.validation import Validator
from ncf_dist.train.world import World

VALIDATE_K = 10
DROPOUT_STREAM = 3
"""Streams 1 and 2 are the loader's."""


@dataclass(frozen=True)
class Spec:
    """What the job tells its ranks. prepare, run: folders; config: the resolved tree as JSON."""

    config: str
    prepare: str
    run: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def train_rank(spec: Spec, world: World) -> None:
    """Train this rank's share; rank 0 writes the bundle and history.json."""
    config = Config.model_validate_json(spec.config)
    prepare = read_manifest(spec.prepare)
    negatives = config.negatives
    contract = contracts.train(negatives.per_positive, negatives.draws)
    for table in (contract, contracts.VALIDATION):
        verify_files(prepare, table, world)
    loader = TrainLoader(prepare, contract, negatives.per_positive, negatives.draws, config.train, config.seed, world)
    torch.manual_seed(config.seed)
    n_users, n_items = int(prepare.facts["users"]), int(prepare.facts["items"])
    model = build_model(config.model, n_users, n_items)
    # The same weights on all ranks; from here on each rank drops units of its own.
    torch.manual_seed(int(np.random.default_rng([config.seed, DROPOUT_STREAM, world.rank]).integers(2**62)))
    trainer = Trainer(model, loader, Validator(prepare, VALIDATE_K, world), config.train, world)
    history = trainer.fit()
    if world.is_main:
        made_from = {"prepare_run": prepare.run_key, "seed": config.seed}
        save_bundle(posixpath.join(spec.run, "bundle"), model, config.model, n_users, n_items, made_from)
        record = {**made_from, "epoch": history.best_epoch, "epochs": history.epochs}
        write_atomic(posixpath.join(spec.run, "history.json"), json.dumps(record, indent=1).encode())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    path: Path = parser.parse_args().spec
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("petastorm").setLevel(logging.WARNING)
    spec = Spec(**json.loads(path.read_text()))
    config = Config.model_validate_json(spec.config)
    world = World.from_environment(config.train.device)
    world.join(config.train.timeout_s)
    try:
        train_rank(spec, world)
    except NcfError as error:
        (path.parent / f"error-{rank}.json").write_text(
            json.dumps({"kind": type(error).__name__, "message": str(error)})
        )
        # No clean-up of the process group: it would wait for ranks that are waiting for us.
        os._exit(int(error.exit_code))
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
