"""Hand-made prepare runs: what `train` reads, without Spark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist import contracts
from ncf_dist.config import Config, Model, Negatives
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo, write_parts

DS = "2026-01-31"
N, DRAWS = 2, 2
USERS, ITEMS = 12, 20


def some_rows(count: int) -> npt.NDArray[np.int64]:
    """User u likes items of its own parity; the negatives are of the other one."""
    rng = np.random.default_rng(7)
    user = rng.integers(USERS, size=count)
    item = rng.integers(ITEMS // 2, size=(count, 1 + N)) * 2 + (user % 2)[:, None]
    item[:, 1:] ^= 1
    return np.column_stack([user, item])


def table_of(folder: Path, contract: contracts.Contract, files: list[dict[str, Any]]) -> TableInfo:
    return write_parts((pa.table(columns, schema=contract.schema) for columns in files), str(folder), contract)


def validation_files(lists: list[list[tuple[int, int, list[int]]]]) -> list[dict[str, Any]]:
    """Files of (user, item, candidates) rows as columns."""
    user, item, rating, candidates = contracts.VALIDATION.columns
    return [
        {
            user: [row[0] for row in rows],
            item: [row[1] for row in rows],
            rating: [float(row[1] % 5 + 1) for row in rows],
            candidates: [row[2] for row in rows],
        }
        for rows in lists
    ]


def prepare_run(
    folder: Path, rows: int, files: int, held_out: int, explicit: bool = False, ds: str = DS, base: str | None = None
) -> Manifest:
    """A hand-made prepare run: `rows` train rows cut unevenly into `files`, and one validation row for
    `held_out` users. Explicit feedback: the rating of row r is 1 + r mod 5. base: the night whose index it extends.
    """
    contract, data = contracts.train(N, DRAWS, explicit), some_rows(rows)
    more = [np.arange(rows) % 5 + 1] if explicit else [data[:, 2:]] * DRAWS
    table = np.column_stack([data[:, :2], *more])
    cuts = np.sort(np.random.default_rng(rows).integers(0, rows + 1, size=files - 1))
    columns = [
        {f.name: pa.array(column).cast(f.type) for f, column in zip(contract.schema, part.T, strict=True)}
        for part in np.split(table, cuts)
        if len(part)
    ]
    held = [[(user, user, [(user + 1) % ITEMS, (user + 3) % ITEMS])] for user in range(held_out)]
    tables = {
        "train": table_of(folder, contract, columns),
        "validation": table_of(folder, contracts.VALIDATION, validation_files(held or [[]])),
    }
    config = {
        "input": {"path": "unused", "feedback": "explicit" if explicit else "implicit"},
        "negatives": Negatives(per_positive=N, draws=DRAWS).model_dump(mode="json"),
    }
    return Manifest(
        stage="prepare",
        ds=ds,
        run_key="p1",
        root=str(folder),
        config=config,
        inputs={"index": {"ds": base, "run_key": "p1"} if base else None},
        tables=tables,
        facts={"users": USERS, "items": ITEMS},
    )


def small_config(folder: Path, model: Model, feedback: str = "implicit", **train: Any) -> Config:
    """A config whose lake is in `folder`, for a training of seconds."""
    return Config.model_validate(
        {
            "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
            "input": {"path": "unused", "feedback": feedback},
            "negatives": {"per_positive": N, "draws": DRAWS},
            "model": model,
            "loader": {"backend": "arrow"},
            "train": {"epochs": 1, "batch_size": 4, "device": "cpu", "timeout_s": 30, **train},
        }
    )


def prepared(config: Config, rows: int, ds: str = DS, base: str | None = None) -> Manifest:
    """A finished prepare run in the config's lake, with two validation rows. base: as for `prepare_run`."""
    runs, explicit = Lake(config.paths.lake).stage(ds, "prepare"), config.input.feedback == "explicit"
    return runs.finish(prepare_run(Path(runs.begin("p1")), rows, 2, 2, explicit, ds, base))
