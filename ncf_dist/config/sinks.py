"""The sections `sinks` and `tracking`: who else is told of a night. All off by default; they need the extra `ops`."""

from __future__ import annotations

from ncf_dist.config.section import Section


class Sinks(Section):
    """Who is told of every attempt at a night. What cannot be reached is a warning, and never stops one."""

    prometheus: str | None = None
    """A file for the textfile collector of Prometheus' node exporter, such as /var/lib/node_exporter/ncf.prom; `{job}`
    in it stands for the job's name. Replaced whole at the end of every attempt."""
    openlineage: str | None = None
    """Where OpenLineage events go: a file, one event a line, or the http address of a server."""
    namespace: str = "ncf-dist"
    """Of OpenLineage's jobs and datasets."""


class Tracking(Section):
    uri: str | None = None
    """Of MLflow 3: a server, or a database such as sqlite:////data/mlflow.db. Each attempt becomes a run with its
    parameters, metrics and report; the model that a night publishes gets the alias champion."""
    experiment: str = "ncf-dist"
    """MLflow's experiment."""
    model: str = "ncf-dist"
    """MLflow's registered model."""
