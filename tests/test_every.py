"""train.every: which nights train, which model ranks the others, and what the jobs after it find. Without Spark."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import files
from ncf_dist.bundle import BUNDLE, CARD, version_of
from ncf_dist.config import Config, Model
from ncf_dist.earlier import GATES
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.stage import StageRun, find_upstream, load_run, model_of_earlier_night
from ncf_dist.train import pipeline
from ncf_dist.train.pipeline import train
from tests.histories import history_config, history_prepared

FIRST = dt.date(2026, 1, 1)


def day(number: int) -> str:
    return (FIRST + dt.timedelta(days=number)).isoformat()


class Nights:
    """Nights whose runs are manifests and, of train, a bundle's card; every index extends that of the night before."""

    def __init__(self, every: str | None, lake: str | None = None, **sections: Any) -> None:
        self.lake = Lake(lake or f"memory://{uuid.uuid4().hex}")
        tree = {"paths": {"lake": self.lake.root}, "input": {"path": "log"}, "train": {"every": every}, **sections}
        self.config = Config.model_validate(tree)
        self.base: Manifest | None = None

    def prepare(self, ds: str, users: int = 5, feedback: str = "implicit", version: int = 0) -> Manifest:
        base = {"ds": self.base.ds, "run_key": self.base.run_key} if self.base else None
        run = StageRun("prepare", self.config, ds, {"index": base, "log": version})
        run.begin()
        self.base = run.finish(facts={"users": users, "items": 3, "feedback": feedback})
        return self.base

    def train(self, prepare: Manifest, name: str | None = None) -> Manifest:
        """name: of an experiment."""
        config = self.config.model_copy(update={"run": name})
        run = StageRun("train", config, prepare.ds, {"prepare": prepare.run_key})
        root = run.begin()
        digest = hashlib.sha256(root.encode()).hexdigest()
        card = {"model": {}, "sha256": digest, "n_users": prepare.facts["users"], "n_items": 3}
        card |= {"model_version": version_of(Model(), digest, None)}
        card |= {"facts": {"prepare_run": prepare.run_key, "ds": prepare.ds}}
        files.make_dirs(f"{root}/{BUNDLE}")
        files.write_bytes(f"{root}/{BUNDLE}/{CARD}", json.dumps(card).encode())
        return run.finish()

    def score(self, prepare: Manifest, train: Manifest, refit: Manifest | None = None) -> Manifest:
        inputs = {"prepare": prepare.run_key, "train": train.run_key} | ({"refit": refit.run_key} if refit else {})
        run = StageRun("score", self.config, prepare.ds, inputs)
        run.begin()
        return run.finish(facts={} if train.ds == prepare.ds else {"earlier_model": {"ds": train.ds}})

    def evaluate(self, prepare: Manifest, train: Manifest) -> Manifest:
        run = StageRun("evaluate", self.config, prepare.ds, {"prepare": prepare.run_key, "train": train.run_key})
        run.begin()
        return run.finish()

    def judge(self, train: Manifest, ds: str, refused: list[str]) -> None:
        folder = self.lake.path("runs", ds, GATES)
        files.make_dirs(folder)
        body = {"train_run": train.run_key, "refused": refused}
        files.write_bytes(f"{folder}/{train.run_key}.json", json.dumps(body).encode())

    def upstream(self, ds: str, stage: str) -> dict[str, Manifest]:
        return find_upstream(self.lake, self.config, ds, stage)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), min_size=1, max_size=9),
)
def test_the_newest_good_model_of_less_than_so_many_days_ranks(every: int, steps: list[tuple[int, bool, bool]]) -> None:
    """Against a model: the days of those trained so far that were not refused. steps: days since the night before,
    whether a model trained there would be refused, and whether the night trains one anyhow (by hand)."""
    nights, at, trained = Nights(f"{every}d"), 0, dict[int, tuple[Manifest, bool]]()
    for step, refused, by_hand in steps:
        at += step
        prepared = nights.prepare(day(at))
        usable = [number for number, (_, bad) in trained.items() if at - number < every and not bad]
        found = model_of_earlier_night(nights.lake, nights.config, prepared)
        assert found == (trained[max(usable)][0] if usable else None)
        if found is None or by_hand:
            run = nights.train(prepared)
            nights.judge(run, day(at), ["beats_popularity"] if refused else [])
            trained[at] = run, refused
        model = trained[at][0] if at in trained else found
        assert model is not None
        for stage in ("evaluate", "score"):
            assert nights.upstream(day(at), stage) == {"prepare": prepared, "train": model}
        scored = nights.score(prepared, model)
        assert nights.upstream(day(at), "publish") == {"score": scored, "train": model, "prepare": prepared}


def test_without_the_setting_every_night_needs_a_model_of_its_own() -> None:
    nights = Nights(None)
    nights.train(nights.prepare(day(0)))
    nights.prepare(day(1))
    with pytest.raises(ContractError, match="needed the output of train"):
        nights.upstream(day(1), "score")


def test_a_log_that_grew_within_the_night_is_ranked_by_the_earlier_model() -> None:
    """Not beside the tables that tonight's first model was trained on: what is newest is prepared last."""
    nights = Nights("7d")
    base = nights.prepare(day(0))
    first = nights.train(base)
    nights.train(nights.prepare(day(1)))
    nights.base = base
    grown = nights.prepare(day(1), users=6, version=2)
    assert nights.upstream(day(1), "score") == {"prepare": grown, "train": first}


@pytest.mark.parametrize("what", ["settings", "index", "explicit", "card"])
def test_a_model_that_does_not_fit_is_passed_over(what: str) -> None:
    nights = Nights("7d")
    run = nights.train(nights.prepare(day(0)))
    if what == "settings":
        nights.config = nights.config.model_copy(update={"seed": 2})
    if what == "index":
        nights.base = None
    if what == "card":
        files.write_bytes(f"{run.root}/{BUNDLE}/{CARD}", b"{")
    rated = what == "explicit"
    later = nights.prepare(day(1), users=6 if rated else 5, feedback="explicit" if rated else "implicit", version=1)
    assert model_of_earlier_night(nights.lake, nights.config, later) is None


def test_a_run_of_this_key_is_found_in_its_own_night() -> None:
    """A score run may name a model of another night; what is in neither is missing from its own."""
    nights = Nights(None)
    earlier = nights.train(nights.prepare(day(0)))
    own = nights.train(nights.prepare(day(1)))
    assert load_run(nights.lake, day(1), "train", own.run_key) == own
    assert load_run(nights.lake, day(1), "train", earlier.run_key) == earlier
    for ds, stage, key in ((day(1), "train", "?"), (day(0), "train", own.run_key), (day(1), "score", "?")):
        with pytest.raises(ContractError, match=f"runs/{ds}/{stage}/.* is no finished run"):
            load_run(nights.lake, ds, stage, key)


def test_looking_for_the_model_loads_no_torch(tmp_path: Path) -> None:
    """publish does it, which has no torch (import-linter is told to pass over the bundle's tensors)."""
    nights = Nights("7d", str(tmp_path))
    nights.train(nights.prepare(day(0)))
    nights.prepare(day(1))
    program = (
        "import sys; from ncf_dist.config import Config; from ncf_dist.lake import Lake;"
        "from ncf_dist.stage import find_upstream;"
        "config = Config.model_validate_json(sys.argv[1]);"
        "found = find_upstream(Lake(config.paths.lake), config, sys.argv[2], 'score');"
        "print(found['train'].ds, 'torch' in sys.modules)"
    )
    text = nights.config.model_dump_json(by_alias=True)
    said = subprocess.run([sys.executable, "-c", program, text, day(1)], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [day(0), "False"]


def test_the_job_train_trains_on_the_first_night_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = history_config(tmp_path, launcher="none", every="2d", epochs=1)
    history_prepared(config, ds=day(0))
    made = train(config, day(0))
    assert made.status == "done"
    history_prepared(config, ds=day(1), base=day(0))
    history_prepared(config, ds=day(2), base=day(1))
    monkeypatch.setattr(pipeline, "run_ranks", lambda *_: pytest.fail("a training"))
    between = train(config, day(1))
    assert (between.status, between.manifest, between.extra["model_of"]) == ("already-done", made.manifest, day(0))
    assert between.outputs["bundle"] == made.outputs["bundle"]
    with pytest.raises(pytest.fail.Exception, match="a training"):
        train(config, day(2))
