"""A finished night of prepare, read back file by file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.stage import Outcome


@dataclass(frozen=True)
class Night:
    """A finished run, read back file by file."""

    config: Config
    outcome: Outcome
    manifest: Manifest

    def stored(self, name: str) -> list[pa.Table]:
        return [pq.ParquetFile(path).read() for path in self.manifest.files(name)]

    def rows(self, name: str) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for table in self.stored(name) for row in table.to_pylist()]

    def index(self, side: str) -> dict[Any, int]:
        return dict(self.rows(f"{side}_index"))

    @property
    def train_rows(self) -> list[dict[str, int]]:
        return [row for table in self.stored("train") for row in table.to_pylist()]

    def items_by_user(self, *splits: int) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {user: set() for user, *_ in self.rows("interactions")}
        for user, item, _, _, split in self.rows("interactions"):
            if split in splits:
                found[user].add(item)
        return found


def run(config: Config, ds: str = "2026-01-01") -> Night:
    outcome = prepare(config, ds)
    return Night(config, outcome, Lake(config.paths.lake).stage(ds, "prepare").newest())
