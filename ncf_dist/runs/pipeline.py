"""The job runs: a leaderboard of the night's models, for a person (a table) and for programs (`--json`)."""

from __future__ import annotations

import dataclasses
import json
import sys

from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.runs.leaderboard import leaderboard, text_table
from ncf_dist.stage import Outcome


def runs(config: Config, ds: str) -> Outcome:
    """Show every finished model of `ds`, whatever config it was made with."""
    lake = Lake(config.paths.lake)
    entries = leaderboard(lake, ds)
    if config.status.format == "json":
        print(json.dumps({"ds": ds, "runs": [dataclasses.asdict(entry) for entry in entries]}))
    else:
        shown = (
            text_table(entries) if entries else f"{lake.root} has no finished model of {ds}: run the job train first"
        )
        print(shown, file=sys.stderr, flush=True)
    best = next((entry for entry in entries if entry.value is not None), None)
    said = {"best": best.name or "production", "model_version": best.model_version} if best is not None else {}
    figures = {best.metric: best.value} if best is not None and best.metric is not None else {}
    return Outcome("done", None, {}, {"runs": len(entries), **figures}, said)
