"""Hand-made prepare runs with tables of order: what a model of histories trains on, without Spark."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ncf_dist import contracts
from ncf_dist.config import Config, Model, Negatives
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.prepare.sequences import InOrder, window_rows
from tests.tables import DS, ITEMS, USERS, table_of, validation_files

LENGTH = 6
TINY = Model(name="history", factors=8, heads=2, history=LENGTH, init_std=0.3)
SECOND = 10**6


def lives(users: int = USERS, items: int = ITEMS) -> list[list[int]]:
    """User u's train items, oldest first: from u on, one after another. User 3 has one, user 5 none."""
    sizes = [1 + (7 * user) % items for user in range(users)]
    sizes[3], sizes[5] = 1, 0
    return [[(user + place) % items for place in range(size)] for user, size in enumerate(sizes)]


def history_run(
    folder: Path,
    files: int = 3,
    length: int = LENGTH,
    sequences: list[list[int]] | None = None,
    n_items: int = ITEMS,
    base: str | None = None,
    ds: str = DS,
) -> Manifest:
    """What `sequences` (of each user, else `lives()`) are made into, the windows cut unevenly into `files`. The
    validation row of user u is what would come next, with two candidates. base: the night whose index it extends."""
    rows = sequences or lives()
    times = [np.cumsum([SECOND * 2 ** (place % 9) for place in range(len(row))]).tolist() for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    flat, when = (np.array([x for row in values for x in row], np.int64) for values in (rows, times))
    order = InOrder(np.arange(len(rows)), flat, when, np.zeros(len(flat), np.int8), offsets)
    contract = contracts.sequences(length)
    [(_, columns)] = window_rows(order, length, 1)
    shuffled = np.argsort(columns.pop("order_hash"))
    # Arrow does not cast to fixed-width binary.
    taken = [pa.array(column).take(shuffled).to_pylist() for column in columns.values()]
    windows = [pa.array(column, field.type) for column, field in zip(taken, contract.schema, strict=True)]
    cuts = [0, *np.sort(np.random.default_rng(3).integers(0, len(shuffled) + 1, size=files - 1)), len(shuffled)]
    parts = [[c.slice(a, b - a) for c in windows] for a, b in itertools.pairwise(cuts) if b > a]
    held = [
        (user, (row[-1] + 1) % n_items, [(row[-1] + 2) % n_items, (row[-1] + 5) % n_items])
        for user, row in enumerate(rows)
        if row
    ]
    recent = {
        "user_idx": list(range(len(rows))),
        "item_idx": [row[-length:] for row in rows],
        "timestamp": [row[-length:] for row in times],
        "split": [[contracts.TRAIN_SPLIT] * len(row[-length:]) for row in rows],
    }
    names = contract.columns
    tables = {
        "sequences": table_of(folder, contract, [dict(zip(names, part, strict=True)) for part in parts]),
        "recent": table_of(folder, contracts.RECENT, [recent]),
        "validation": table_of(folder, contracts.VALIDATION, validation_files([held[::2], held[1::2]])),
    }
    facts = {"rows": len(shuffled), "targets": sum(max(0, len(row) - 1) for row in rows), "length": length}
    return Manifest(
        stage="prepare",
        ds=ds,
        run_key="p1",
        root=str(folder),
        config={
            "input": {"path": "unused"},
            "negatives": Negatives(draws=0).model_dump(mode="json"),
            "sequences": {"length": length},
        },
        inputs={"index": {"ds": base, "run_key": "p1"} if base else None},
        tables=tables,
        facts={"users": len(rows), "items": n_items, "sequences": facts},
    )


def history_config(folder: Path, model: Model = TINY, **train: Any) -> Config:
    """A config whose lake is in `folder`, for a training of seconds."""
    return Config.model_validate(
        {
            "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
            "input": {"path": "unused"},
            "negatives": {"draws": 0},
            "sequences": {"length": model.history},
            "model": model,
            "loader": {"backend": "arrow"},
            "train": {
                **{"epochs": 2, "batch_size": 2, "device": "cpu", "timeout_s": 30, "shared_negatives": 5},
                **train,
            },
        }
    )


def history_prepared(config: Config, **how: Any) -> Manifest:
    """A finished prepare run in the config's lake."""
    runs = Lake(config.paths.lake).stage(how.get("ds", DS), "prepare")
    return runs.finish(history_run(Path(runs.begin("p1")), **how))
