"""The job status: the last nights, for a person (a table and `status.html` in the lake) and for programs (`--json`)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import sys

from ncf_dist.config import Config
from ncf_dist.files import write_atomic
from ncf_dist.lake import Lake
from ncf_dist.stage import Outcome
from ncf_dist.status.nights import last_nights
from ncf_dist.status.page import page
from ncf_dist.status.table import text_table

PAGE = "status.html"
log = logging.getLogger(__name__)


def status(config: Config, ds: str) -> Outcome:
    """Show the last nights, whatever `ds` is. Raises ContractError where the published table's log is damaged."""
    lake = Lake(config.paths.lake)
    nights = last_nights(lake, config.publish.table, config.status.nights)
    if config.status.format == "json":
        print(json.dumps({"nights": [dataclasses.asdict(night) for night in nights]}))
    else:
        print(text_table(nights) if nights else f"{lake.root} has no nights yet", file=sys.stderr, flush=True)
    path, now = lake.path(PAGE), dt.datetime.now(dt.timezone.utc)
    outputs, warnings = {"page": path}, list[str]()
    try:
        write_atomic(path, page(nights, config.publish.table, f"{now:%Y-%m-%d %H:%M} UTC").encode())
    except OSError as error:  # Whoever may only read the lake sees the nights all the same.
        warnings = [f"{path} cannot be written ({error.strerror or error}): the page stays as it was"]
        log.warning("%s", warnings[0])
        outputs = {}
    counts = {"status.nights": len(nights), "status.published": sum(night.published is not None for night in nights)}
    return Outcome("done", None, outputs, counts, {"warnings": warnings})
