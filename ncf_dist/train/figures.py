"""The figures of a training that its manifest says: functions of the files that it left."""

from __future__ import annotations

from typing import Any


def of_training(history: dict[str, Any]) -> dict[str, Any]:
    """history: as history.json has it. Validation figures are those of the epoch that was kept."""
    kept = history["epochs"][history["epoch"]]
    metrics = {f"validation.{k}": v for k, v in kept.items() if "@" in k or k in ("mrr", "mse", "mae")}
    metrics |= {
        "train.loss": kept["loss"],
        "train.epochs": len(history["epochs"]),
        "train.best_epoch": history["epoch"],
        "train.data_wait": min(epoch["data_wait"] for epoch in history["epochs"]),
    }
    return metrics | {"train.samples_per_s": max(epoch["samples_per_s"] for epoch in history["epochs"])}


def of_parts(chosen: dict[str, Any]) -> dict[str, Any]:
    """What the parts do for the ranking of validation rows among the whole catalogue: with them, and without any."""
    metrics: dict[str, Any] = {f"parts.weight.{name}": weight for name, weight in chosen["weights"].items()}
    for label, weights in (("with_parts", chosen["weights"]), ("without_parts", dict.fromkeys(chosen["weights"], 0))):
        for row in chosen["figures"]:
            if all(row[name] == weight for name, weight in weights.items()):
                metrics |= {f"validation.full.{name}.{label}": row[name] for name in row if "@" in name}
    return metrics
