"""A small shop: a log of twenty users and twelve items until 19 May, and a config whose whole line takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ncf_dist.config import Config


def shop(root: Path, **sections: Any) -> Config:
    """sections: on top of the shop's own."""
    log = root / "log.csv"
    rows = [(f"u{user}", f"i{(3 * user + item) % 12}", 19 - item % 5) for user in range(20) for item in range(6)]
    log.write_text("u,i,t\n" + "".join(f"{user},{item},2024-05-{day}T12:00:00\n" for user, item, day in rows))
    columns = {"user": "u", "item": "i", "timestamp": "t"}
    tree: dict[str, Any] = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": str(log), "format": "csv", "columns": columns, "time_unit": "iso"},
        "negatives": {"per_positive": 1, "draws": 1, "candidates": 3},
        "layout": {"min_files": 1},
        "model": {"name": "mf", "factors": 2},
        "train": {"launcher": "none", "epochs": 1, "device": "cpu"},
        "evaluate": {"bootstrap": 50},
        "score": {"k": 2, "tasks": 1},
        "publish": {"require": []},
        "spark": {"master": "local[2]", "shuffle_partitions": 2},
    }
    return Config.model_validate({**tree, **{name: {**tree.get(name, {}), **each} for name, each in sections.items()}})


def new_users(config: Config) -> None:
    """Three come on 20 May."""
    assert isinstance(config.input.path, str)
    with Path(config.input.path).open("a") as log:
        log.writelines(f"new{user},i{item},2024-05-20T12:00:00\n" for user in range(3) for item in range(5))
