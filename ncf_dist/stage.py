"""A stage's life, once for all stages: key → find → begin → make → finish; and which finished runs a stage builds on.

A stage finds its upstream runs by ds and by what this config says, never by recency alone: a run fits when the
settings that decide its bytes are those of this config (`LINE`; a setting at its default counts as left out, so that a
version of ours with more settings still finds it) and when the runs that it was made from fit too. Of several that fit
the newest counts. The files of the input are not looked at: a log that has grown since prepare does not break the line.

A run with a name (`--run NAME`) is an experiment. Production never builds on it; it may build on production's runs.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ncf_dist import earlier, logs, refits
from ncf_dist.config import Config, Input
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest, run_key
from ncf_dist.parquet import TableInfo

log = logging.getLogger(__name__)

Tree = Mapping[str, Any]
Passive = Mapping[str, frozenset[str]]
"""Settings by section."""
NOTHING: Passive = {}
Upstream = Mapping[str, Manifest]
"""Finished runs by the name of their stage."""


@dataclass(frozen=True)
class Rule:
    """What a stage is made from.

    builds_on: the stages before it, nearest first; a run's `inputs` name the run of each.
    sections: of the config, stored with a run. passive: settings of those that do not decide its bytes.
    """

    builds_on: tuple[str, ...]
    sections: tuple[str, ...]
    passive: Passive


LINE: Mapping[str, Rule] = {
    "prepare": Rule((), ("input", "split", "negatives", "sequences", "layout", "seed"), {}),
    "train": Rule(
        ("prepare",),
        ("model", "negatives", "train", "loader", "parts", "seed"),
        # The number of ranks decides the bytes, but may change while a training goes on.
        {
            "train": frozenset(
                {"launcher", "ranks", "nodes", "rendezvous", "device", "checkpoint_steps", "checkpoint_minutes"}
                | {"timeout_s", "lr_find", "max_model_bytes", "every", "refit", "exchange", "other_nodes"}
            ),
            "loader": frozenset({"backend", "cache", "cache_bytes", "local_bytes", "workers"}),
        },
    ),
    "evaluate": Rule(("train", "prepare"), ("evaluate", "seed"), {}),
    "score": Rule(("train", "prepare"), ("score",), {"score": frozenset({"users_per_block", "tasks"})}),
    "publish": Rule(("score", "train", "prepare"), (), {}),
}


class StageRun:
    """One run of a stage, from its key to its manifest."""

    def __init__(self, stage: str, config: Config, ds: str, inputs: Tree) -> None:
        """inputs: what the run is made from beside the config: upstream run keys, fingerprints, versions."""
        self.stage, self.ds, self.inputs, self.name = stage, ds, inputs, config.run
        self.config = stored(stage, config)
        named = {"run": config.run} if config.run else {}
        self.key = run_key(stage, ds, decisive(stage, self.config) | named, inputs)
        self.runs = Lake(config.paths.lake).stage(ds, stage)
        self._began = time.monotonic()
        logs.say(ds=ds, stage=stage, run_key=self.key)

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def find(self) -> Manifest | None:
        """The finished run of this key."""
        return self.runs.find(self.key)

    def begin(self, *keep: str) -> str:
        """The run's folder; what an attempt that died left there is removed, but for the names in `keep`."""
        return self.runs.begin(self.key, keep)

    def finish(
        self,
        *,
        tables: Mapping[str, TableInfo] | None = None,
        facts: Tree | None = None,
        metrics: Tree | None = None,
        noted: Tree | None = None,
    ) -> Manifest:
        """Make the run exist: its manifest is written last. noted: of the inputs, what does not decide the key."""
        return self.runs.finish(
            Manifest(
                stage=self.stage,
                ds=self.ds,
                run_key=self.key,
                root=self.runs.run_path(self.key),
                config=self.config,
                inputs={**self.inputs, **(noted or {})},
                tables=tables or {},
                facts=facts or {},
                metrics=metrics or {},
                seconds=self.seconds,
                name=self.name,
            )
        )


@dataclass(frozen=True)
class Outcome:
    """What a job tells the scheduler. others: the folders of runs of other stages, by stage, that nightly made."""

    status: str
    run_key: str | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> dict[str, str]:
        """Folders of the runs that were made or found, by stage."""
        return {**self.others, **({self.manifest.stage: self.manifest.root} if self.manifest else {})}

    @classmethod
    def of(
        cls, manifest: Manifest, status: str = "done", outputs: Mapping[str, str] | None = None, **extra: Any
    ) -> Outcome:
        """outputs: beside the run's tables."""
        return cls(
            status, manifest.run_key, {**(outputs or {}), **manifest.outputs()}, manifest.metrics, extra, manifest
        )


def stored(stage: str, config: Config) -> dict[str, Any]:
    """What of `config` is kept with a run of `stage`: its sections, resolved."""
    return config.model_dump(mode="json", include=set(LINE[stage].sections))


def decisive(stage: str, config: Tree, unread: Passive = NOTHING) -> dict[str, Any]:
    """What of a stored config decides the bytes of `stage`, without what is at its default.

    unread: settings to leave out beside those that never do.
    """
    picked = {}
    for section in LINE[stage].sections:
        passive = LINE[stage].passive.get(section, frozenset()) | unread.get(section, frozenset())
        if passive and section in config:
            picked[section] = {key: value for key, value in config[section].items() if key not in passive}
        elif section in config:
            picked[section] = config[section]
    return _without_defaults(picked, DEFAULTS)


def not_read(config: Config) -> Passive:
    """Settings that decide a part of prepare's tables which this config does not read: stored negatives, where they are
    drawn while training, or where the loss has none."""
    return NOTHING if config.negatives_from == "table" else {"negatives": frozenset({"per_positive", "draws"})}


def find_upstream(
    lake: Lake, config: Config, ds: str, stage: str, given: Upstream | None = None
) -> dict[str, Manifest]:
    """The finished runs that `stage` builds on tonight, by stage: those that nightly hands on where it does (`given`),
    else the newest that fit this config.

    Raises ContractError where there is none; it names the first setting in which the newest run differs.
    """
    wanted = LINE[stage].builds_on
    if given is not None and all(name in given for name in wanted):
        return {name: given[name] for name in wanted}
    fitting = find_fitting(lake, config, ds, wanted[0])
    if not fitting:
        raise ContractError(_what_is_missing(lake, config, ds, wanted[0]))
    nearest = fitting[0]
    if nearest.ds != ds:  # A model of an earlier night, beside tonight's tables.
        return {nearest.stage: nearest, "prepare": find_fitting(lake, config, ds, "prepare")[0]}
    others = {name: load_run(lake, ds, name, nearest.made_from(name)) for name in LINE[nearest.stage].builds_on}
    return {nearest.stage: nearest, **others}


def load_run(lake: Lake, ds: str, stage: str, key: str) -> Manifest:
    """The finished run of this key that a run of `ds` was made from: of the same night, or, of train, of an earlier
    one. Raises ContractError where there is none."""
    if stage == "train" and lake.stage(ds, stage).find(key) is None:
        for night in reversed(lake.nights()):
            if night < ds and (found := lake.stage(night, stage).find(key)):
                return found
    return lake.stage(ds, stage).load(key)


def find_fitting(lake: Lake, config: Config, ds: str, stage: str) -> list[Manifest]:
    """Every finished run of `stage` that fits this config, the newest first; an experiment's own before others. Of
    train, where nothing was trained on tonight's newest tables, before them the one that train.every lets stand in."""
    found = _fitting_of_night(lake, config, ds, stage)
    if stage == "train" and config.train.every_days > 1:
        prepared = find_fitting(lake, config, ds, "prepare")
        if prepared and all(run.inputs.get("prepare") != prepared[0].run_key for run in found):
            found = [*filter(None, [model_of_earlier_night(lake, config, prepared[0])]), *found]
    return found


def model_of_earlier_night(lake: Lake, config: Config, prepare: Manifest) -> Manifest | None:
    """The train run that ranks the night of `prepare`, where train.every lets one of a night before do so: the newest
    that fits this config and that nothing speaks against."""
    tonight = dt.date.fromisoformat(prepare.ds)
    first = (tonight - dt.timedelta(days=config.train.every_days - 1)).isoformat()
    for night in reversed([night for night in lake.nights() if first <= night < prepare.ds]):
        for run in _fitting_of_night(lake, config, night, "train"):
            if (why := earlier.objection(lake, config.publish.table, prepare, run)) is None:
                return run
            log.info("train.every is %s; not the model of %s: %s", config.train.every, night, why)
    return None


def _fitting_of_night(lake: Lake, config: Config, ds: str, stage: str) -> list[Manifest]:
    unread = not_read(config) if stage == "prepare" else NOTHING
    wanted = decisive(stage, stored(stage, config), unread)
    found = [
        run
        for run in lake.stage(ds, stage).finished()
        if run.name in (None, config.run) and decisive(stage, run.config, unread) == wanted
    ]
    if stage == "score":
        found = [run for run in found if refits.fits(config, run)]
    for nearest in LINE[stage].builds_on[:1]:
        keys = [run.run_key for run in find_fitting(lake, config, ds, nearest)] if found else []
        found = [run for run in found if run.inputs.get(nearest) in keys]
    return sorted(found, key=lambda run: run.name != config.run)


def _what_is_missing(lake: Lake, config: Config, ds: str, stage: str) -> str:
    """Why no run of `stage` fits this config, and what to do."""
    for nearest in LINE[stage].builds_on[:1]:
        if not find_fitting(lake, config, ds, nearest):
            return _what_is_missing(lake, config, ds, nearest)
    runs = lake.stage(ds, stage)
    newest = next((run for run in runs.finished() if run.name in (None, config.run)), None)
    if newest is None:
        return runs.what_is_missing() + (f" (with --run {config.run}, or without it)" if config.run else "")
    found, wanted = (flat_settings(decisive(stage, tree)) for tree in (newest.config, stored(stage, config)))
    differing = [key for key in [*wanted, *found] if wanted.get(key) != found.get(key)]
    if not differing:
        return (
            f"{newest.root}, the newest run of {stage}, was made from runs {dict(newest.inputs)}, which this config "
            f"does not lead to; needed a run of this config's own line: rerun the job {stage}"
        )
    key = differing[0]
    return (
        f"{newest.root}, the newest run of {stage}, was made with {key}={_shown(found, key)}, this config says "
        f"{_shown(wanted, key)}; needed a run of {stage} with the settings of this config: rerun the job {stage} with "
        "them, or give this job the settings that it had"
    )


def _shown(flat: Tree, key: str) -> str:
    return repr(flat[key]) if key in flat else "its default"


def flat_settings(tree: Tree, above: str = "") -> dict[str, Any]:
    """Settings by their whole names: {"a": {"b": 1}} → {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flat_settings(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
        )
    return flat


def _without_defaults(tree: Tree, defaults: Tree) -> dict[str, Any]:
    kept = {}
    for key, value in tree.items():
        default = defaults.get(key, _NONE_SUCH)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := _without_defaults(value, default):
                kept[key] = inner
        elif value != default:
            kept[key] = value
    return kept


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    """Every setting that has a default, as a stored config spells it."""
    return section.model_construct().model_dump(mode="json", warnings=False)


_NONE_SUCH = object()
DEFAULTS: Tree = {**_defaults(Config), "input": _defaults(Input)}


def production_runs(lake: Lake, stage: str, before: str | None = None) -> Iterator[Manifest]:
    """The production runs of `stage` of every night, the latest night first, of a night the newest first."""
    for ds in reversed(lake.nights()):
        if before is None or ds < before:
            yield from lake.stage(ds, stage).production()
