"""Everything the page shows: the metrics of this evaluation, and beside them the data, the training, the resources and
the lineage, from manifests, small files and Spark aggregates."""

from __future__ import annotations

import contextlib
import math
import platform
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pyspark.sql import SparkSession

from ncf_dist import __version__
from ncf_dist.errors import ContractError
from ncf_dist.evaluate.report.profile import Counted, profile
from ncf_dist.files import exists, read_json
from ncf_dist.manifests import Manifest

CURVE_POINTS = 300
"""Points of the loss curve that are kept: more than a figure can show."""
PACKAGES = ("pyspark", "torch", "petastorm", "pyarrow", "numpy", "pandas")


@dataclass(frozen=True)
class History:
    """What the page uses of history.json. epoch: the one that was kept; curve: (epoch, its step, loss, rate)."""

    epoch: int
    epochs: list[dict[str, int | float]]
    curve: list[tuple[int, int, float, float]]

    def check(self) -> None:
        """Raise ValueError for what cannot be drawn."""
        numbers = [value for epoch in self.epochs for value in epoch.values()]
        if not all(math.isfinite(value) for value in (*numbers, *(v for point in self.curve for v in point))):
            raise ValueError("not all of its numbers are finite")
        if any(step < 0 for _, step, _, _ in self.curve):
            raise ValueError("a step of its curve is below 0")
        if not 0 <= self.epoch < len(self.epochs) or any(
            epoch.keys() != self.epochs[0].keys() or not {"epoch", "loss"} <= epoch.keys() for epoch in self.epochs
        ):
            raise ValueError(f"epoch {self.epoch} of {len(self.epochs)} is kept, or they hold different figures")


def report_data(
    spark: SparkSession,
    prepare: Manifest,
    train: Manifest,
    metrics: Mapping[str, Any],
    counted: Counted,
    *,
    run_key: str,
    config: Mapping[str, Any],
    seconds: float,
    examples: Sequence[Mapping[str, Any]] = (),
    peak_memory_bytes: int | None = None,
) -> dict[str, Any]:
    """`metrics` with the sections that they do not hold; a section without anything to say is left out.

    counted: of the interactions. run_key, config, seconds: of the evaluation at hand, which has no manifest yet.
    examples: from `examples.examples`. peak_memory_bytes: what the driver's Python process took at most.
    """
    sections: dict[str, Any] = {
        "examples": list(examples),
        "profile": profile(spark, prepare, counted),
        "training": training(train),
        "resources": resources(prepare, train, metrics, seconds),
        "peak_memory_bytes": peak_memory_bytes,
        "lineage": lineage(prepare, train, run_key, config),
    }
    return {**metrics, **{name: section for name, section in sections.items() if section}}


def training(train: Manifest) -> dict[str, Any]:
    """{"epochs", "curve", "best_epoch"}: the records of history.json, the curve thinned; empty where a model came
    without one. Raises ContractError for a history.json that is damaged."""
    path = posixpath.join(train.root, "history.json")
    if not exists(path):
        return {}
    try:
        history = read_json(History, path, more_keys=True)
        history.check()
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} cannot be read ({error}); needed what train wrote: rerun the job train") from None
    return {
        "epochs": history.epochs,
        "curve": [list(point) for point in thinned(history.curve)],
        "best_epoch": history.epoch,
    }


def thinned(curve: Sequence[Any], most: int = CURVE_POINTS) -> list[Any]:
    """At most `most` points, evenly spaced, the first and the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]


def resources(prepare: Manifest, train: Manifest, metrics: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """What each stage took, as its manifest says, and what came of it."""
    read, users = prepare.facts["rows"]["input"], metrics["n_users"]
    stored = sum(file.bytes for table in prepare.tables.values() for file in table.files)
    facts = {
        "prepare": {"rows/s": _rate(read, prepare.seconds), "bytes stored": stored},
        "train": {
            "epochs": train.metrics.get("train.epochs"),
            "samples/s": train.metrics.get("train.samples_per_s"),
            "waiting for data": train.metrics.get("train.data_wait"),
        },
        "evaluate": {"users/s": _rate(users, seconds)},
    }
    took = {"prepare": prepare.seconds, "train": train.seconds, "evaluate": seconds}
    return [
        {"stage": stage, "seconds": took[stage], "facts": {k: v for k, v in found.items() if v is not None}}
        for stage, found in facts.items()
    ]


INPUTS = {
    "interactions": ("input", "path"),
    "items": ("input", "items"),
    "users": ("input", "users"),
    "test": ("split", "test"),
    "candidates": ("split", "candidates"),
    "forget": ("input", "forget"),
}
"""The files that a night is made from, by the section and the key that name them."""


def lineage(prepare: Manifest, train: Manifest, run_key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What this night was made from and with: enough to make it again, or to see that something else was used."""
    given = {name: prepare.inputs[name] for name in INPUTS if prepare.inputs.get(name)}
    return {
        "inputs": [{"name": name, "path": _path(prepare, name), "fingerprint": mark} for name, mark in given.items()],
        "index": prepare.inputs.get("index"),
        "runs": {"prepare": prepare.run_key, "train": train.run_key, "evaluate": run_key},
        "weights_sha256": train.facts.get("sha256"),
        "config": {**prepare.config, **train.config, **config},
        "versions": {"ncf_dist": __version__, "python": platform.python_version(), **_installed()},
        "seed": prepare.config.get("seed"),
    }


def _installed() -> dict[str, str]:
    """Versions of the packages that decide results, looked up without importing them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _path(prepare: Manifest, name: str) -> str:
    """Where the config says input `name` is."""
    section, key = INPUTS[name]
    found = prepare.config.get(section, {}).get(key)
    found = found["path"] if isinstance(found, dict) else found
    return found if isinstance(found, str) else ", ".join(found or ())


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None
