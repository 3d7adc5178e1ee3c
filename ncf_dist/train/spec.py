"""What the job and its ranks agree on: the spec, the files in the run's folder, the table that is read. No torch, so
that the job starts without it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ncf_dist import contracts
from ncf_dist.config import Config
from ncf_dist.contracts import Contract
from ncf_dist.files import write_atomic
from ncf_dist.manifests import Manifest

CHECKPOINTS, HISTORY, RATES, PARTS = "checkpoints", "history.json", "lr_find.json", "parts.json"
SPEC, STOP = "spec.json", "stop"


@dataclass(frozen=True)
class Spec:
    """What the job tells its ranks. prepare, run: folders; config: the resolved tree as JSON; start: the bundle that a
    warm start begins with."""

    config: str
    prepare: str
    run: str
    start: str | None = None

    def save(self, path: str) -> None:
        write_atomic(path, json.dumps(asdict(self)).encode())


def train_contract(prepare: Manifest, config: Config) -> Contract:
    """The table that the model is trained on, as prepare wrote it."""
    if config.sequential:
        return contracts.sequences(window_length(prepare))
    negatives = prepare.config["negatives"]
    return contracts.train(negatives["per_positive"], negatives["draws"], config.input.feedback == "explicit")


def window_length(prepare: Manifest) -> int:
    """L of the table as prepare wrote it."""
    return int(prepare.config["sequences"]["length"])
