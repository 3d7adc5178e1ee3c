"""Who else is told of an attempt at a night: metrics for Prometheus, lineage events for OpenLineage, runs for MLflow.

Each is off until the config names where it goes, and needs a package of the extra `ops`. None stops a night: the first
thing that fails is a warning, and the sink hears no more of that attempt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ncf_dist.attempts import Listener
from ncf_dist.config import Config


def sinks(config: Config) -> dict[str, Callable[[], Listener]]:
    """How those that the config turns on are made, by name. What is off imports nothing."""
    places = {
        "prometheus": config.sinks.prometheus,
        "openlineage": config.sinks.openlineage,
        "mlflow": config.tracking.uri,
    }

    def maker(name: str) -> Callable[[], Listener]:
        def make() -> Listener:
            listener: Listener = importlib.import_module(f"ncf_dist.sinks.{name}_sink").sink(config)
            return listener

        return make

    return {name: maker(name) for name, place in places.items() if place is not None}
