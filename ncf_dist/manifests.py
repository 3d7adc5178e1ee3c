"""What a finished run says of itself, `manifest.json` in its folder, and the key that names it."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ncf_dist import __version__
from ncf_dist.contracts import Contract
from ncf_dist.errors import ContractError
from ncf_dist.files import read_json
from ncf_dist.parquet import TableInfo, read_schema
from ncf_dist.stored import typed

MANIFEST = "manifest.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished run is: its key, what it was made from, and what it holds.

    name: of an experiment; production has none. finished: when, UTC, ISO 8601.
    """

    stage: str
    ds: str
    run_key: str
    root: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    tables: Mapping[str, TableInfo] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    version: str = __version__
    name: str | None = None
    finished: str = ""

    def table_path(self, name: str) -> str:
        return posixpath.join(self.root, self._table(name).path)

    def files(self, name: str) -> list[str]:
        """Full paths of the files of table `name`, in the manifest's order."""
        return self._table(name).paths(self.root)

    def table(self, contract: Contract) -> TableInfo:
        """The stored table, after checking that it was written to this contract. Raises ContractError."""
        info = self._table(contract.name)
        if info.schema != contract.fingerprint:
            files = self.files(contract.name)
            if files:
                contract.check(read_schema(files[0]))
        return info

    def facts_as(self, kind: type[T]) -> T:
        """Those facts that the dataclass `kind` names, types checked. Raises ContractError."""
        try:
            return typed(kind, self.facts, more_keys=True)
        except ValueError as error:
            raise ContractError(
                f"the facts of {self.stage} run {self.run_key} cannot be used ({error}); rerun the job {self.stage}"
            ) from None

    def made_from(self, stage: str) -> str:
        """The key of the run of `stage` that this one was made from. Raises ContractError where it does not say."""
        key = self.inputs.get(stage)
        if not isinstance(key, str):
            raise ContractError(
                f"{self.stage} run {self.run_key} does not say which run of {stage} it was made from; rerun the job "
                f"{self.stage}"
            )
        return key

    def outputs(self) -> dict[str, str]:
        return {name: self.table_path(name) for name in self.tables}

    def _table(self, name: str) -> TableInfo:
        if name not in self.tables:
            raise ContractError(
                f"{self.stage} run {self.run_key} has no table {name} (it has {', '.join(self.tables)}); "
                f"rerun {self.stage}"
            )
        if not self.tables[name].files:
            raise ContractError(
                f"{self.stage} run {self.run_key} names no file of its table {name}; needed one at least: rerun "
                f"{self.stage}"
            )
        return self.tables[name]


def read_manifest(run: str) -> Manifest:
    """The manifest of the finished run at `run`. Raises ContractError where it cannot be read."""
    try:
        return read_json(Manifest, posixpath.join(run, MANIFEST), root=run)
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{run}/{MANIFEST} cannot be read ({error}); needed a finished run: delete the folder and rerun the job"
        ) from None


def run_key(stage: str, ds: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Names a run by what decides its bytes: the stage, the night, the config it uses, its inputs and our version."""
    text = json.dumps([stage, ds, config, inputs, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
