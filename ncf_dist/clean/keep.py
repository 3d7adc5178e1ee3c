"""Which runs stay: those that `retention` names, and whatever they, readers and the next night need.

A run that stays keeps the runs that it was made from, and a model keeps its refit. Of indexes the one that a kept index
extends stays, because a night that is prepared again extends it again; those before it are needed only by models that
hold no digest of their index (`ncf_dist/ancestry.py`), and stay as far as such a model.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ncf_dist.ancestry import DIGESTS, Line
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle
from ncf_dist.config import Config
from ncf_dist.earlier import rejected
from ncf_dist.errors import ContractError
from ncf_dist.files import resolve
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.refits import name_of
from ncf_dist.stage import LINE

PREVIOUS = "previous"
"""What train.warm_start says in place of a bundle."""


@dataclass(frozen=True)
class Kept:
    """nights: every one of them stays whole; runs: folders of those that stay."""

    nights: frozenset[str]
    runs: frozenset[str]


class _Runs(list[Manifest]):
    """Every finished run."""

    def __init__(self, runs: Iterable[Manifest]) -> None:
        super().__init__(runs)
        self._by_key = {(run.stage, run.run_key): run for run in self}
        self._models = {run.name: run for run in self if run.stage == "train" and run.name is not None}
        self._by_night = {(run.ds, run.stage, run.run_key): run for run in self}

    def get(self, ds: str, stage: str, key: object) -> Manifest | None:
        """The run of this key, of this night where it has one; a night may rank by an earlier one's model."""
        return self._by_night.get((ds, stage, str(key))) or self._by_key.get((stage, str(key)))

    def refit_of(self, run: Manifest) -> Manifest | None:
        """Of a run of train: what ranks in its place, tonight or in a later night."""
        return self._models.get(name_of(run)) if run.stage == "train" else None


def what_stays(lake: Lake, config: Config, shown: Iterable[tuple[str, str]]) -> Kept:
    """shown: (ds, key) of the score runs that readers see as the newest night."""
    found = _Runs(run for ds in lake.nights() for stage in LINE for run in lake.stage(ds, stage).finished())
    prepared = sorted({run.ds for run in found if run.stage == "prepare" and run.name is None})
    first = prepared[-config.retention.nights :][:1]
    nights = frozenset(ds for ds in lake.nights() if first and ds >= first[0])

    roots = [run for run in found if run.ds in nights]
    roots += [run for ds, key in shown if (run := found.get(ds, "score", key))]
    roots += _newest(lake, config.publish.table, found)
    roots += [run for run in found if _is_named(run, config)]
    kept = _with_upstream(roots, found)
    kept |= {run.root: run for run in found if run.stage == "evaluate" and _judged_one_of(run, kept, found)}
    kept |= _with_upstream(list(_bases(kept.values(), found)), found)
    kept |= {run.root: run for run in _chains(lake, prepared, kept.values(), found)}
    return Kept(nights, frozenset(kept))


def _newest(lake: Lake, table: str, found: _Runs) -> Iterator[Manifest]:
    """The runs that the next night begins with: the newest index, and of each kind of model the newest good one."""
    seen = set()
    for run in sorted(found, key=lambda run: (run.ds, run.finished), reverse=True):
        what = json.dumps(run.config.get("model"), sort_keys=True) if run.stage == "train" else run.stage
        if run.stage in ("prepare", "train") and run.name is None and what not in seen:
            if run.stage == "train" and rejected(lake, table, run) is not None:
                continue
            seen.add(what)
            yield run


def _is_named(run: Manifest, config: Config) -> bool:
    """Whether the config names this run, or its bundle."""
    start, pretrained, compare = config.train.warm_start, config.train.pretrained, config.evaluate.compare
    names = [start if start != PREVIOUS else None, *((pretrained.gmf, pretrained.mlp) if pretrained else ()), compare]
    for name in filter(None, names):
        path = resolve(name)
        if path == run.root or path.startswith(f"{run.root}/"):
            return True
    if compare is None or run.stage != "evaluate":
        return False
    return compare == (run.ds if re.fullmatch(r"\d{4}-\d\d-\d\d", compare) else run.facts.get("model_version"))


def _with_upstream(roots: list[Manifest], found: _Runs) -> dict[str, Manifest]:
    """These runs and those that they were made from, by their folders."""
    kept: dict[str, Manifest] = {}
    waiting = list(roots)
    while waiting:
        run = waiting.pop()
        if run.root not in kept:
            kept[run.root] = run
            above = [found.get(run.ds, stage, run.inputs.get(stage)) for stage in LINE[run.stage].builds_on]
            waiting += [other for other in (*above, found.refit_of(run)) if other is not None]
    return kept


def _judged_one_of(run: Manifest, kept: Mapping[str, Manifest], found: _Runs) -> bool:
    """Whether an evaluation judged a model that stays: tonight's is compared with it."""
    model = found.get(run.ds, "train", run.inputs.get("train"))
    return model is not None and model.root in kept


def _bases(kept: Iterable[Manifest], found: _Runs) -> Iterator[Manifest]:
    """The runs whose indexes these extend."""
    for run in kept:
        base = run.inputs.get("index") if run.stage == "prepare" else None
        if base and (other := found.get(base["ds"], "prepare", base["run_key"])):
            yield other


def _chains(lake: Lake, prepared: list[str], kept: Iterable[Manifest], found: _Runs) -> Iterator[Manifest]:
    """Runs of prepare from the newest back to the one of each model that can only be recognised step by step."""
    newest = next((run for run in reversed(found) if run.stage == "prepare" and run.ds == prepared[-1]), None)
    for run in kept:
        bundle = _bundle(run) if run.stage == "train" and newest is not None else None
        if bundle is None or bundle.facts.get(DIGESTS):
            continue
        assert newest is not None
        steps: list[Manifest] = []
        for step in Line(lake, newest).runs():
            steps.append(step)
            if step.run_key == bundle.facts.get("prepare_run"):
                yield from steps
                break


def _bundle(train: Manifest) -> Bundle | None:
    try:
        return read_bundle(posixpath.join(train.root, BUNDLE))
    except ContractError:
        return None  # No model that anything could start from.
