"""The published table as a state machine: whatever is published, run again, killed, filled in, resumed too late,
damaged and taken back, in any order, readers see what a dict says. Each guard, taken away, is missed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ncf_dist.clean.pipeline import clean
from ncf_dist.config import Config
from ncf_dist.errors import BusyRun, ContractError, InputError, NcfError, StaleRun
from ncf_dist.files import read_bytes
from ncf_dist.publish import commits, latest, pipeline, repair, steps, table, undo
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.pipeline import publish
from ncf_dist.publish.table import PublishedTable
from tests.published import COLUMNS, Night, good

NIGHTS = ("2026-01-29", "2026-01-30", "2026-01-31")
MODELS = ("m1", "m2", "m3")
ORDER = ("begun", "checked", "audited", "judged", "folder", "staged", "durable", "verified", "committing")
AFTER = ("committed", "logged", "described", "settled")
"""Steps before and after what readers of the log see of a change."""
nights = st.sampled_from((*NIGHTS[1:], *NIGHTS[1:], NIGHTS[0]))
models = st.sampled_from((*MODELS[:2], *MODELS[:2], MODELS[2]))
"""Some more often than others, so that things meet."""


class Killed(BaseException):
    """What a process that is killed does: nothing more."""


@functools.cache
def prepared() -> Night:
    """The last of the nights, all of which are prepared. No canary reads what is published: it changes nothing, and
    takes a fifth of the time."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    for ds in NIGHTS:
        night = Night(root, ds)
        night._made_with(gates={"canary": None})
        night.prepare()
    return night


class Table(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        shutil.copytree(prepared().root, self.root, dirs_exist_ok=True)
        self.nights = {ds: Night(self.root, ds) for ds in NIGHTS}
        for night in self.nights.values():
            night._made_with(**prepared().sections)
        self.live: dict[str, str] = {}
        self.past: dict[str, list[tuple[int, str | None, bool]]] = {ds: [] for ds in NIGHTS}
        """Of each night: the version, the model that readers saw since, and whether it was a rollback."""
        self.undone: set[tuple[str, str]] = set()
        self.version = -1
        self.first = 0
        """The oldest version that can be gone back to."""
        self.latest: tuple[str, str] | None = None
        self.kept = 0
        """The oldest version that the last clean has left."""

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    # ---- the model of it ----

    def commits(self, ds: str, model: str | None, undoes: frozenset[str] | None = None) -> None:
        self.version += 1
        self.past[ds].append((self.version, model, undoes is not None))
        self.undone |= {(ds, each) for each in undoes or ()}
        self.live.pop(ds, None)
        if model is not None:
            self.live[ds] = model
            self.undone.discard((ds, model))

    def settles(self) -> None:
        newest = max(self.live, default=None)
        self.latest = (newest, self.live[newest]) if newest is not None else None

    def target(self, ds: str) -> tuple[int, str | None]:
        """What a rollback goes back to."""
        for version, model, _ in reversed(self.past[ds]):
            if model is not None and model != self.live[ds] and (ds, model) not in self.undone:
                return version, model
        return -1, None

    def undoes(self, ds: str, since: int, model: str | None) -> frozenset[str]:
        return frozenset(m for version, m, _ in self.past[ds] if version > since and m is not None and m != model)

    def is_gone(self, version: int) -> bool:
        """Whether a clean may have removed what a version needs. -1: from before the first one."""
        return self.kept > 0 and version < self.kept

    def is_rolled_back(self, ds: str) -> bool:
        return bool(self.past[ds]) and self.past[ds][-1][2]

    # ---- the rules ----

    @rule(ds=nights, model=models)
    def publishes(self, ds: str, model: str) -> None:
        """The first run of a night, an older night, another run of one, or the same again."""
        self.nights[ds].offer(model)
        if self.live.get(ds) == model:
            assert self.nights[ds].publish()[0] == "already-done"
        elif (ds, model) in self.undone:
            with pytest.raises(StaleRun):
                self.nights[ds].publish()
            return
        else:
            self.commits(ds, model)
            assert self.nights[ds].publish() == ("done", self.version)
        self.settles()

    @rule(ds=nights, model=models)
    def publishes_in_spite_of_a_rollback(self, ds: str, model: str) -> None:
        if (ds, model) not in self.undone:
            return
        self.nights[ds].offer(model)
        self.commits(ds, model)
        night = self.nights[ds]
        config = night.config.model_dump() | {"gates": {"overrides": {"undone": "why"}}}
        outcome = publish(Config.model_validate(config), ds)
        assert (outcome.status, outcome.extra["version"]) == ("done", self.version)
        self.settles()

    @rule(ds=nights, model=models, step=st.sampled_from([*ORDER[:-2], *AFTER]))
    def is_killed_while_publishing(self, ds: str, model: str, step: str) -> None:
        if self.live.get(ds) == model or (ds, model) in self.undone:
            return
        self.nights[ds].offer(model)
        with pytest.raises(Killed), at(step, dies):
            self.nights[ds].publish()
        self.was_killed(step, ds, model)

    @rule(ds=nights, step=st.sampled_from(["begun", "checked", "verified", "committing", *AFTER]))
    def is_killed_while_rolling_back(self, ds: str, step: str) -> None:
        if ds not in self.live or self.is_rolled_back(ds) or self.is_gone(self.target(ds)[0]):
            return
        since, model = self.target(ds)
        with pytest.raises(Killed), at(step, dies):
            self.nights[ds].rollback()
        self.was_killed(step, ds, model, self.undoes(ds, since, model))

    def was_killed(self, step: str, ds: str, model: str | None, undoes: frozenset[str] | None = None) -> None:
        if step in AFTER:
            self.commits(ds, model, undoes)
        if step in AFTER[2:]:
            self.settles()

    @rule(ds=nights, model=models, other=nights, others=models, step=st.sampled_from(["judged", "committing"]))
    def resumes_too_late(self, ds: str, model: str, other: str, others: str, step: str) -> None:
        """Another publication comes between the fence and the commit. Up to the look at the log that the commit is
        checked against it is simply the one before; after that it is in the way."""
        if self.live.get(ds) == model or self.live.get(other) == others or {(ds, model), (other, others)} & self.undone:
            return
        self.nights[ds].offer(model)

        def overtakes() -> None:
            if ds == other and model == others:
                assert self.nights[ds].publish()[0] == "done"
                return
            night = Night(self.root, other)
            night._made_with(**self.nights[other].sections)
            night.offer(others)
            assert night.publish()[0] == "done"

        with at(step, overtakes):
            if step == "committing":
                with pytest.raises(StaleRun if ds == other else BusyRun):
                    self.nights[ds].publish()
            else:
                assert self.nights[ds].publish()[0] == "done"
        self.commits(other, others)
        if step != "committing" and (ds, model) != (other, others):
            self.commits(ds, model)
        self.settles()

    @rule(ds=nights, model=models, other=nights, others=models)
    def another_publishes_before_latest_is_written(self, ds: str, model: str, other: str, others: str) -> None:
        if ds == other or self.live.get(ds) == model or self.live.get(other) == others:
            return
        if {(ds, model), (other, others)} & self.undone:
            return
        for each, its in ((ds, model), (other, others)):
            self.nights[each].offer(its)
            self.commits(each, its)
        with between_reading_and_writing(lambda: self.nights[other].publish()):
            assert self.nights[ds].publish()[0] == "done"
        self.settles()

    @rule(ds=nights)
    def rolls_back(self, ds: str) -> None:
        if self.is_rolled_back(ds) and ds in self.live:
            assert self.nights[ds].rollback().status == "already-done"
        elif self.is_rolled_back(ds):
            if self.kept:
                return
            assert self.nights[ds].rollback().status == "already-done"
        elif ds not in self.live:
            with pytest.raises(InputError):
                self.nights[ds].rollback()
            return
        elif self.is_gone(self.target(ds)[0]):
            self.goes_back_or_refuses(ds, "PREVIOUS", *self.target(ds))
            return
        else:
            since, model = self.target(ds)
            undoes = self.undoes(ds, since, model)
            self.commits(ds, model, undoes)
            outcome = self.nights[ds].rollback()
            assert (outcome.status, outcome.extra["undone"]) == ("done", sorted(m.replace("m", "s") for m in undoes))
        self.settles()

    @precondition(lambda self: self.version > 0)
    @rule(ds=nights, data=st.data())
    def rolls_back_to(self, ds: str, data: st.DataObject) -> None:
        version = data.draw(st.integers(self.first, self.version - 1))
        before = [(number, model) for number, model, _ in self.past[ds] if number <= version]
        since, model = before[-1] if before else (-1, None)
        if model is not None and (ds, model) in self.undone:
            # Of what a clean has removed nobody may know that it was undone, or what it was.
            with pytest.raises((StaleRun, ContractError) if self.is_gone(version) else StaleRun):
                self.nights[ds].rollback(version)
            return
        if self.is_gone(version):
            self.goes_back_or_refuses(ds, version, since, model)
            return
        if model == self.live.get(ds):
            assert self.nights[ds].rollback(version).status == "already-done"
        else:
            self.commits(ds, model, self.undoes(ds, since, model))
            assert self.nights[ds].rollback(version).status == "done"
        self.settles()

    def goes_back_or_refuses(self, ds: str, to: int | str, since: int, model: str | None) -> None:
        if model == self.live.get(ds):
            return
        try:
            self.nights[ds].rollback(to)
        except ContractError:
            return
        self.commits(ds, model, self.undoes(ds, since, model))
        keys = DeltaLog(str(self.nights[ds].table)).undone()
        undone = {(night, key.replace("s", "m")) for night, key in keys}
        assert undone <= self.undone, "of what was cleaned away nobody knows that it was undone"
        self.undone = undone
        self.settles()

    @rule(ds=nights, which=st.integers(0, 1), at_byte=st.integers(4, 200))
    def is_damaged_and_repaired(self, ds: str, which: int, at_byte: int) -> None:
        if ds not in self.live:
            return
        night = self.nights[ds]
        night.offer(self.live[ds])
        path = self.files(ds)[which]
        flip(path, at_byte)
        night.config = night.configured(verify="deep")
        outcome = publish(night.config, ds)
        assert (outcome.status, outcome.extra.get("repaired")) == ("done", [str(path.relative_to(night.table))])
        self.settles()

    @rule(ds=nights, at_byte=st.integers(4, 200))
    def does_not_go_back_to_a_damaged_file(self, ds: str, at_byte: int) -> None:
        if ds not in self.live or self.is_rolled_back(ds) or self.target(ds)[1] is None:
            return
        if self.is_gone(self.target(ds)[0]):
            return
        delta = DeltaLog(str(self.nights[ds].table))
        entry = delta.entry(self.target(ds)[0])
        assert entry is not None
        path = self.nights[ds].table / min(entry.files)
        whole = path.read_bytes()
        flip(path, at_byte)
        with pytest.raises(ContractError):
            self.nights[ds].rollback()
        path.write_bytes(whole)

    @rule(ds=nights, model=models)
    def does_not_publish_what_changed_since_its_audit(self, ds: str, model: str) -> None:
        if self.live.get(ds) == model or (ds, model) in self.undone:
            return
        self.nights[ds].offer(model)
        run = self.nights[ds].lake.stage(ds, "score").find(model.replace("m", "s"))
        assert run is not None
        path = Path(run.files("recommendations")[0])
        with at("audited", lambda: flip(path, 50)), pytest.raises(ContractError):
            self.nights[ds].publish()

    def loses_its_beginning(self, ds: str) -> None:
        """Nobody knows any more what the night was before the first commit that the log still has."""
        night = self.nights[ds]
        DeltaTable(str(night.table)).create_checkpoint()
        for version in range(self.version):
            (night.table / "_delta_log" / f"{version:020d}.json").unlink()
        with pytest.raises(ContractError, match="is not known any more"):
            night.rollback()

    @precondition(lambda self: bool(self.live) and not self.kept)
    @rule(ds=nights)
    def loses_the_end_of_its_log(self, ds: str) -> None:
        """What latest.json names is not in the log: said, and nothing is done."""
        night = self.nights[ds]
        self.repaired()
        version = night.latest()["version"]
        delta = night.table / "_delta_log"
        lost = [delta / f"{number:020d}.json" for number in range(version, self.version + 1)]
        for path in lost:
            path.rename(path.with_suffix(".lost"))
        night.offer("m9")
        with pytest.raises(ContractError, match=r"is gone|no log"):
            night.publish()
        for path in lost:
            path.with_suffix(".lost").rename(path)

    @precondition(lambda self: self.version >= 0)
    @rule()
    def is_cleaned(self) -> None:
        """Of older versions not everything is there any more: a rollback may refuse to go there, and then does
        nothing. Readers see what they saw."""
        retention = {"versions": 3, "days": 0, "nights": 7, "published": None}
        config = self.nights[NIGHTS[0]].config.model_dump() | {"retention": retention}
        clean(Config.model_validate(config), NIGHTS[0])
        self.kept = max(self.kept, self.version - 2)

    @precondition(lambda self: self.version >= 0)
    @rule()
    def repaired(self) -> None:
        assert pipeline.repair(self.nights[NIGHTS[0]].config, NIGHTS[0]).extra["version"] == self.version
        self.settles()

    # ---- what readers see ----

    def files(self, ds: str) -> list[Path]:
        delta = DeltaLog(str(self.nights[ds].table))
        return sorted(self.nights[ds].table / path for path in delta.live() if path.startswith(f"ds={ds}/"))

    @invariant()
    def readers_see_what_was_published(self) -> None:
        root = self.nights[NIGHTS[0]].table
        if self.version < 0:
            assert not DeltaTable.is_deltatable(str(root))
            return
        delta = DeltaTable(str(root))
        assert delta.version() == self.version
        assert {partition["ds"] for partition in delta.partitions()} == self.live.keys()
        rows = duckdb.from_arrow(delta.scan()).select("ds", *COLUMNS).to_arrow_table().to_pylist()
        seen = sorted(tuple(row.values()) for row in rows)
        assert seen == sorted((ds, *row) for ds, model in self.live.items() for row in good(model))
        assert DeltaLog(str(root)).undone() == {(ds, model.replace("m", "s")) for ds, model in self.undone}
        if self.latest is None:
            assert not (root / "latest.json").exists()
            return
        named = self.nights[NIGHTS[0]].latest()
        assert (named["ds"], named["model_version"]) == self.latest
        assert all((root / path).is_file() for path in named["files"])


def dies() -> None:
    raise Killed


def flip(path: Path, at_byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[at_byte] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def at(step: str, what: Callable[[], Any]) -> Iterator[None]:
    """Do something once, when a step is reached."""

    before: Any = steps.listener

    def listener(name: str) -> None:
        if name == step:
            steps.__dict__["listener"] = before
            what()

    with replaced(steps, "listener", listener):
        yield


@contextlib.contextmanager
def between_reading_and_writing(what: Callable[[], Any]) -> Iterator[None]:
    """Do something once, when the log was read and latest.json is about to be written."""
    real = latest._body

    def body(*args: Any) -> Any:
        made = real(*args)
        latest._body = real
        what()
        return made

    with replaced(latest, "_body", body):
        yield


COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate,),
    "print_blob": False,
}


def test_readers_see_what_a_dict_says() -> None:
    run_state_machine_as_test(
        Table, settings=settings(max_examples=12, stateful_step_count=15, derandomize=True, **COMMON)
    )


@pytest.mark.soak
def test_readers_see_what_a_dict_says_for_long() -> None:
    run_state_machine_as_test(Table, settings=settings(max_examples=300, stateful_step_count=30, **COMMON))


# ---- each guard is missed ------------------------------------------------------------------------------------------

Story = Callable[[Table], Any]
Guard = tuple[Any, str, Callable[[Any], Any], tuple[Story, ...]]
"""Its owner, its name, what takes its place, and what happens then."""
OLD, NEW = NIGHTS[1:]


def no_carry(real: Any) -> Any:
    def facts(delta: Any, table: Any, ds: Any, facts: Any, kept: Any) -> Any:
        return real(delta, table if "ncf.undoes" in facts else None, ds, facts, kept)

    return facts


def one_look(real: Any) -> Any:
    """latest.json is written once, whatever is committed meanwhile."""

    def settle(delta: DeltaLog) -> DeltaTable:
        made = delta.opened()
        body = latest._body(delta, made)
        path = Path(delta.root, "latest.json")
        path.unlink(missing_ok=True) if body is None else path.write_bytes(body)
        return made

    return settle


def the_last_commit(real: Any) -> Any:
    """latest.json names the night that was published last."""

    def body(delta: DeltaLog, made: DeltaTable) -> bytes | None:
        last = delta._last_of_ours(made.version())
        nights = delta.nights(made)
        kept = {last.ds: nights[last.ds]} if last is not None and last.ds in nights else nights
        with replaced(delta, "nights", lambda table: kept):
            return real(delta, made)

    return body


def retries(real: Any) -> Any:
    return lambda custom_metadata, max_commit_retries: real(custom_metadata=custom_metadata, max_commit_retries=5)


def always_busy(real: Any) -> Any:
    def say(delta: Any, before: Any, ds: str, error: Exception) -> None:
        raise BusyRun(str(error))

    return say


def not_found_done(real: Any) -> Any:
    return lambda self, found, night, files: real(self, found, night, files) and False


def always(value: Any) -> Callable[[Any], Any]:
    return lambda real: lambda *args, **kwargs: value


def runs(ds: str, *models: str) -> tuple[Story, ...]:
    return tuple(lambda table, model=model: table.publishes(ds, model) for model in models)


def back(ds: str) -> Story:
    return lambda table: table.rolls_back(ds)


def back_to_version_1(table: Table) -> None:
    """Which was undone."""
    with pytest.raises(StaleRun):
        table.nights[NEW].rollback(1)


def clean_it(table: Table) -> None:
    """Twice: what a checkpoint stands for goes with the clean after it."""
    table.is_cleaned()
    table.is_cleaned()


def back_to_what_is_gone(table: Table) -> None:
    """Version 1 is not there any more, though its commit is: it explains another night."""
    assert DeltaLog(str(table.nights[NEW].table)).entry(1) is not None
    with pytest.raises(ContractError, match="does not reach back to version 1 any more"):
        table.nights[NEW].rollback(1)


GUARDS: dict[str, Guard] = {
    "delta-rs does not rebase a commit": (
        *(commits, "CommitProperties", retries),
        (*runs(OLD, "m1"), lambda table: table.resumes_too_late(OLD, "m2", NEW, "m1", "committing")),
    ),
    "who lost its own ds is told so": (
        *(commits, "_say_who_won", always_busy),
        (*runs(NEW, "m1"), lambda table: table.resumes_too_late(NEW, "m2", NEW, "m3", "committing")),
    ),
    "a run that is published is found": (PublishedTable, "_fence", not_found_done, runs(NEW, "m1", "m1")),
    "what was undone is refused": (
        *(PublishedTable, "_refuse_undone", always(None)),
        (*runs(NEW, "m1", "m2"), back(NEW), *runs(NEW, "m2")),
    ),
    "what was undone is carried on": (
        *(commits, "_facts", no_carry),
        (*runs(NEW, "m1", "m2"), back(NEW), *runs(OLD, "m1")),
    ),
    "a second rollback goes no further": (
        *(undo, "_is_rolled_back", always(False)),
        (*runs(NEW, "m1", "m2", "m3"), back(NEW), back(NEW)),
    ),
    "a rollback reads the files first": (
        *(undo, "_whole", always(b"")),
        (*runs(NEW, "m1", "m2"), lambda table: table.does_not_go_back_to_a_damaged_file(NEW, 50)),
    ),
    "a rollback does not redo": (
        *(undo, "_refuse_redo", always(None)),
        (*runs(NEW, "m1", "m2"), back(NEW), *runs(OLD, "m1"), back_to_version_1),
    ),
    "a night without a commit that is left stays": (
        *(undo, "_had_none", always(True)),
        (
            *(*runs(NEW, "m1"), *runs(OLD, "m1"), *runs(NEW, "m2", "m3", "m1"), *runs(NIGHTS[0], "m1", "m2")),
            *(clean_it, back_to_what_is_gone),
        ),
    ),
    "a night whose beginning is unknown stays": (
        *(undo, "_check_beginning", always(None)),
        (*runs(OLD, "m1"), *runs(NEW, "m1"), lambda table: table.loses_its_beginning(NEW)),
    ),
    "what is copied is what was audited": (
        *(table, "checked_bytes", lambda real: lambda path, info: read_bytes(path)),
        (lambda table: table.does_not_publish_what_changed_since_its_audit(NEW, "m1"),),
    ),
    "published files are looked at": (
        *(repair, "damage", always(None)),
        (*runs(NEW, "m1"), lambda table: table.is_damaged_and_repaired(NEW, 0, 50)),
    ),
    "latest.json is looked at again": (
        *(latest, "settle", one_look),
        (lambda table: table.another_publishes_before_latest_is_written(OLD, "m1", NEW, "m2"),),
    ),
    "latest.json names the newest night": (latest, "_body", the_last_commit, (*runs(NEW, "m1"), *runs(OLD, "m1"))),
    "latest.json goes with the last night": (latest, "remove", always(None), (*runs(NEW, "m1"), back(NEW))),
    "the log reaches what latest.json names": (
        *(DeltaLog, "_check_end", always(None)),
        (*runs(NEW, "m1", "m2"), lambda table: table.loses_the_end_of_its_log(NEW)),
    ),
}


def told(story: tuple[Story, ...]) -> None:
    """What happens, and what readers see after each part of it."""
    table = Table()
    try:
        for part in story:
            part(table)
            table.readers_see_what_was_published()
    finally:
        table.teardown()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_taken_away_is_missed(guard: str) -> None:
    owner, name, without, story = GUARDS[guard]
    told(story)
    noticed = pytest.raises((AssertionError, NcfError, pytest.fail.Exception))
    with replaced(owner, name, without(getattr(owner, name))), noticed:
        told(story)
