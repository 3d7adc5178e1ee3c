"""Whether the line can run here with this config: one line a check, and an exit code.

Makes nothing but empty folders for paths.lake and paths.work. Looks at versions without importing the
packages.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from ncf_dist.config import Config
from ncf_dist.doctor import checks, places
from ncf_dist.doctor.check import Check
from ncf_dist.doctor.executors import executors
from ncf_dist.doctor.sample import looked_at
from ncf_dist.doctor.versions import versions
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.stage import Outcome


def doctor(config: Config, ds: str) -> Outcome:
    """Print every check to stderr. Raises ConfigError if the environment or the config fails one, else
    InputError if the data does.
    """
    return _judged(chain(examine(config), looked_at(config, ds)))


def cluster(config: Config, ds: str) -> Outcome:
    """The same, and every executor of the cluster beside the driver (`doctor --cluster`)."""
    return _judged(chain(examine(config), looked_at(config, ds), executors(config)))


def _judged(checks: Iterable[Check]) -> Outcome:
    found = []
    for check in checks:
        print(check, file=sys.stderr, flush=True)
        found.append(check)
    report = [{"name": check.name, "status": check.status, "detail": check.detail} for check in found]
    counts = {"checks": dict(Counter(check.status for check in found))}
    failed = [check for check in found if check.status == "fail"]
    if failed:
        error = ConfigError if any(check.place == "environment" for check in failed) else InputError
        raise error(
            f"{len(failed)} of {len(found)} checks failed: "
            + "; ".join(f"{check.name} {check.detail}" for check in failed),
            metrics=counts,
            checks=report,
        )
    return Outcome("done", None, {}, counts, {"checks": report})


def examine(config: Config) -> Iterator[Check]:
    """All checks, cheap ones first."""
    yield from versions()
    yield checks.java()
    yield checks.gpu(config.train)
    yield checks.compiled(config.train)
    yield from checks.slots(config.spark, config.train)
    yield from checks.master(config.spark)
    yield checks.memory(config)
    yield from places.disk(config)
    yield places.lake(config.paths)
    yield places.work(config.paths)
    yield from places.inputs(config)
