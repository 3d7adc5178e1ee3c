"""Attempts as runs of MLflow: parameters, metrics, the report, and what was published as a registered model.

MLflow refuses `@` in names, so hr@10 becomes hr_at_10, and takes no folder of files any more: name a server or a
database, such as sqlite:////data/mlflow.db.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from typing import Any

from ncf_dist.attempts import Listener, Record
from ncf_dist.bundle import BUNDLE
from ncf_dist.config import Config
from ncf_dist.files import exists, list_names, read_bytes
from ncf_dist.lake import Lake
from ncf_dist.refits import REFIT
from ncf_dist.stage import load_run
from ncf_dist.urls import real_url

CHAMPION = "champion"
SHORT_WAIT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""A server that is gone must not hold a night up."""
REPORTS = ("report.html", "metrics.json")


class Tracking(Listener):
    """What it tells goes out at the end, when all is known."""

    def __init__(self, config: Config) -> None:
        for name, value in SHORT_WAIT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        assert config.tracking.uri is not None
        self.config, self.lake = config, Lake(config.paths.lake)
        self.client = MlflowClient(real_url(config.tracking.uri))

    def ended(self, record: Record) -> None:
        name = self.config.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=f"{record.ds} {record.job}", tags=_tags(record))
        run_id, ok = run.info.run_id, not record.exit_code
        try:
            for key, value in parameters(self.config).items():
                self.client.log_param(run_id, key, str(value)[:500])
            for key, value in record.metrics.items():
                if isinstance(value, int | float):
                    self.client.log_metric(run_id, metric_name(key), float(value))
            if "evaluate" in record.stages and (judged := record.stages["evaluate"].run):
                self._copy(run_id, posixpath.join(self.lake.root, judged), "report", REPORTS)
            if "publish" in record.stages and ok and "score" in record.stages:
                self._copy(run_id, self._ranked(record), "bundle")
                self._register(run_id, f"{run.info.artifact_uri}/bundle", record)
        finally:
            self.client.set_terminated(run_id, "FINISHED" if ok else "FAILED")

    def _ranked(self, record: Record) -> str:
        """The bundle that the readers' lists are of: tonight's, its refit, the champion's or another earlier night's.
        Raises ContractError where its run is gone."""
        made_from = record.stages["score"].inputs
        key = made_from.get(REFIT) or made_from["train"]
        return posixpath.join(load_run(self.lake, record.ds, "train", key).root, BUNDLE)

    def _copy(self, run_id: str, root: str, to: str, names: tuple[str, ...] | None = None) -> None:
        """Those files of a folder that are there."""
        present = [name for name in names or list_names(root) if exists(posixpath.join(root, name))]
        with tempfile.TemporaryDirectory(prefix="ncf-mlflow-") as scratch:
            for name in present:
                local = os.path.join(scratch, name)
                with open(local, "wb") as out:
                    out.write(read_bytes(posixpath.join(root, name)))
                self.client.log_artifact(run_id, local, to)

    def _register(self, run_id: str, source: str, record: Record) -> None:
        """The model that readers get tonight has the alias champion."""
        from mlflow.exceptions import MlflowException

        name = self.config.tracking.model
        try:
            self.client.get_registered_model(name)
        except MlflowException:
            self.client.create_registered_model(name)
        tags = {"ds": record.ds, "model_version": str(record.model_version)}
        made = self.client.create_model_version(name, source, run_id, tags=tags)
        self.client.set_registered_model_alias(name, CHAMPION, made.version)


def metric_name(name: str) -> str:
    """
    >>> metric_name("popularity.full.hr@10")
    'popularity.full.hr_at_10'
    """
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def parameters(config: Config) -> dict[str, Any]:
    """The settings of the model and its training, each by its key."""
    sections = ("model", "train", "negatives", "split", "sequences", "parts")
    tree = config.model_dump(mode="json", include=set(sections))
    return {f"{section}.{key}": value for section in sections for key, value in (tree[section] or {}).items()}


def _tags(record: Record) -> dict[str, str]:
    said = {"ds": record.ds, "attempt": record.attempt, "outcome": record.outcome, "run_key": record.run_key}
    said |= {"code": record.code.sha256, "lock": record.code.lock, "error": (record.error or "")[:500] or None}
    return {f"ncf.{name}": value for name, value in said.items() if value is not None}


def sink(config: Config) -> Listener:
    return Tracking(config)
