"""A model's rows are tonight's users and items, or they are not used, whatever happened to the nights between."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ncf_dist import contracts, earlier
from ncf_dist.ancestry import DIGESTS, INDEXES, Index, Line, digest_of, index_sizes, joined, partial_digest
from ncf_dist.bundle import BUNDLE, CARD, read_bundle, version_of
from ncf_dist.config import Model, Train
from ncf_dist.errors import ContractError
from ncf_dist.files import make_dirs, remove, write_bytes
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_table, write_parts
from ncf_dist.prepare.index import base_run
from ncf_dist.published import Shown
from ncf_dist.train.start import start_bundle

GMF, MF = Model(name="gmf"), Model(name="mf")
DAYS = [f"2024-06-0{day}" for day in range(1, 7)]
CONTRACTS = {"users": contracts.user_index(pa.string()), "items": contracts.item_index(pa.int64())}


@dataclass
class Nights:
    """Prepare and train without either job: indexes are real tables, a model is whose row each number's is."""

    folder: str
    owners: dict[str, list[Any]] = field(default_factory=dict)
    """Bundle → for each number of a user, whose vector it is; None for a fresh one."""

    @property
    def lake(self) -> Lake:
        return Lake(f"{self.folder}/lake")

    def prepare(self, ds: str, users: Iterable[int], forget: Iterable[int] = (), variant: int = 0) -> Manifest:
        """Extend the night's base as prepare does. variant: a setting that changes the run and not the index."""
        base = base_run(self.lake, ds)
        sizes = dict(zip(INDEXES, index_sizes(base) if base else (0, 0), strict=True))
        inputs = {"index": {"ds": base.ds, "run_key": base.run_key} if base else None}
        what = json.dumps([ds, sorted(users), sorted(forget), variant, inputs])
        runs, key = self.lake.stage(ds, "prepare"), hashlib.sha256(what.encode()).hexdigest()[:16]
        if found := runs.find(key):
            return found
        tables, digests = {}, {}
        run = runs.begin(key)
        for name, contract in CONTRACTS.items():
            gone = {self.id(name, user) for user in forget} if name == "users" else set()
            old = {of: n for of, n in (read_index(base, name) if base else {}).items() if of not in gone}
            new = {self.id(name, user) for user in users} - old.keys() - gone
            # As the real ones: the order of one night's new ids is a hash's, so forks differ.
            order = sorted(new, key=lambda of: hashlib.sha256(str(of).encode()).digest())
            index = old | {of: sizes[name] + place for place, of in enumerate(order)}
            sizes[name] += len(new)
            table = pa.table([list(index), list(index.values())], schema=contract.schema)
            cut = len(index) // 2
            parts = [table.slice(0, cut), table.slice(cut)]
            tables[contract.name] = write_parts(parts, run, contract)
            digests[name] = joined(partial_digest(part) for part in parts)
        return runs.finish(
            Manifest(
                stage="prepare",
                ds=ds,
                run_key=key,
                root=run,
                config={},
                inputs=inputs,
                tables=tables,
                facts={**sizes, DIGESTS: digests},
            )
        )

    def id(self, name: str, user: int) -> Any:
        return f"user {user}" if name == "users" else user % 5

    def train(self, ds: str, start: str = "previous", model: Model = GMF) -> str | None:
        """Train on the night's current run; every row is its user's own afterwards. Returns the bundle started from."""
        prepare = self.lake.stage(ds, "prepare").newest()
        line = Line(self.lake, prepare)
        first = start_bundle(Train(warm_start=start), model, line, "recommendations")
        if first is not None:
            line.check(Index.of_bundle(read_bundle(first)), "train.warm_start")
        index = {number: user for user, number in read_index(prepare, "users").items()}
        owners = [None] * index_sizes(prepare).users
        for number, owner in enumerate(self.owners[first] if first else ()):
            if number in index:
                assert owner in (None, index[number]), f"{index[number]} starts with the vector of {owner}"
                owners[number] = owner
        runs = self.lake.stage(ds, "train")
        key = hashlib.sha256(f"{prepare.run_key} {first} {model}".encode()).hexdigest()[:16]
        if runs.find(key) is None:
            run = runs.begin(key)
            self.write_bundle(f"{run}/{BUNDLE}", prepare, model)
            runs.finish(
                Manifest(stage="train", ds=ds, run_key=key, root=run, config={}, inputs={"prepare": prepare.run_key})
            )
            self.owners[f"{run}/{BUNDLE}"] = [index.get(number, owners[number]) for number in range(len(owners))]
        return first

    def write_bundle(self, path: str, prepare: Manifest, model: Model = GMF, **facts: Any) -> None:
        sizes = index_sizes(prepare)
        made_from = {"prepare_run": prepare.run_key, "ds": prepare.ds, DIGESTS: prepare.facts.get(DIGESTS), **facts}
        weights = hashlib.sha256(path.encode()).hexdigest()
        card: dict[str, Any] = {
            "model": model.model_dump(mode="json"),
            "model_version": version_of(model, weights),
            "sha256": weights,
        }
        card |= {"n_users": sizes.users, "n_items": sizes.items, "facts": made_from}
        make_dirs(path)
        write_bytes(f"{path}/{CARD}", json.dumps(card).encode())

    def bundle(self, ds: str) -> str:
        return f"{self.lake.stage(ds, 'train').newest().root}/{BUNDLE}"

    def clean(self, ds: str) -> None:
        remove(self.lake.path("runs", ds, "prepare"))


def read_index(prepare: Manifest, name: str) -> dict[Any, int]:
    tables = [read_table(path) for path in prepare.files(INDEXES[name])]
    return dict(zip(*(pa.concat_tables(tables).column(n).to_pylist() for n in (0, 1)), strict=True))


def in_memory() -> Nights:
    """A lake of its own that waits for no disk."""
    return Nights(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def nights() -> Iterator[Nights]:
    nights = in_memory()
    yield nights
    remove(nights.folder)


A, B, C = range(8), range(12), range(16)


def test_forked_indexes_do_not_start_from_each_other(nights: Nights, caplog: pytest.LogCaptureFixture) -> None:
    """06-01, then 06-03 and, made up for later, 06-02: both extend 06-01, and 06-03 counts more users than 06-02."""
    nights.prepare(DAYS[0], A)
    late = nights.prepare(DAYS[2], C)
    backfilled = nights.prepare(DAYS[1], B)
    assert late.inputs == backfilled.inputs
    assert read_index(backfilled, "users").items() - read_index(late, "users").items()
    nights.train(DAYS[1])
    with caplog.at_level(logging.INFO):
        assert nights.train(DAYS[2]) is None, "06-01 has no model: a fresh start"
    assert f"not from the model of {DAYS[1]}: prepare run {late.run_key} of {DAYS[2]} (16 users" in caplog.text
    assert "a fresh start" in caplog.text
    nights.train(DAYS[0])
    assert nights.train(DAYS[2]) == nights.bundle(DAYS[0])
    with pytest.raises(ContractError) as refused:
        nights.train(DAYS[2], nights.bundle(DAYS[1]))
    for part in (late.run_key, "(16 users, 5 items)", backfilled.run_key, "(12 users, 5 items)", "start afresh"):
        assert part in str(refused.value)


def test_a_model_of_another_kind_is_passed_over(nights: Nights, caplog: pytest.LogCaptureFixture) -> None:
    """Nights of gmf, on one of which an mf was trained later, and a night of mf alone, which is the newest."""
    for day in DAYS[:5]:
        nights.prepare(day, A)
    nights.train(DAYS[0])
    first = nights.bundle(DAYS[0])
    assert nights.train(DAYS[1], model=MF) is None, "no mf so far"
    mf = nights.bundle(DAYS[1])
    assert nights.train(DAYS[1]) == first
    gmf = nights.bundle(DAYS[1])
    assert nights.train(DAYS[2], model=MF) == mf, "of that night the newest is a gmf"
    with caplog.at_level(logging.INFO):
        assert nights.train(DAYS[3]) == gmf, "the newest night has an mf"
    assert f"of {DAYS[2]}, whose model has {{'name': 'mf'}}" in caplog.text
    wider = GMF.model_copy(update={"factors": 2 * GMF.factors})
    assert nights.train(DAYS[4], model=wider) is None
    careful = GMF.model_copy(update={"dropout": 0.5})
    assert nights.train(DAYS[4], model=careful) == nights.bundle(DAYS[3]), "the weights are of one kind"


def test_a_model_whose_night_was_rolled_back_is_passed_over(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for day in DAYS[:3]:
        nights.prepare(day, A)
    for day in DAYS[:2]:
        nights.train(day)
    monkeypatch.setattr(earlier, "shown", lambda *_: Shown(undone=frozenset({(DAYS[1], "s")})))
    assert nights.train(DAYS[2]) == nights.bundle(DAYS[0])
    assert f"warm start: not from the model of {DAYS[1]}: a rollback took the run s of {DAYS[1]} back" in caplog.text


def test_the_newest_model_of_the_line_is_started_from(nights: Nights) -> None:
    for day, users in zip(DAYS[:4], (A, B, C, C), strict=True):
        nights.prepare(day, users)
    for day in DAYS[:2]:
        nights.train(day)
    assert nights.train(DAYS[3]) == nights.bundle(DAYS[1]), "06-03 was not trained"
    # The same index by a run of another config: proved by its digest.
    again = nights.prepare(DAYS[1], B, variant=1)
    assert nights.lake.stage(DAYS[1], "train").newest().inputs["prepare"] != again.run_key
    nights.prepare(DAYS[4], C)
    assert nights.train(DAYS[4]) == nights.bundle(DAYS[3])


def test_content_proves_what_cleaned_manifests_cannot(nights: Nights) -> None:
    for day, users in zip(DAYS[:3], (A, B, C), strict=True):
        nights.prepare(day, users)
    nights.train(DAYS[0])
    nights.clean(DAYS[1])
    nights.clean(DAYS[0])
    assert nights.train(DAYS[2]) == nights.bundle(DAYS[0])
    elsewhere = in_memory()
    elsewhere.prepare(DAYS[0], A)
    elsewhere.train(DAYS[0])
    nights.owners |= elsewhere.owners
    assert nights.train(DAYS[2], elsewhere.bundle(DAYS[0])) == elsewhere.bundle(DAYS[0])
    other = in_memory()
    other.prepare(DAYS[0], [*A[1:], 99])
    other.train(DAYS[0])
    with pytest.raises(ContractError, match=rf"neither do its numbers agree.*{DAYS[1]}, which .* cannot be read"):
        nights.train(DAYS[2], other.bundle(DAYS[0]))


def test_a_forgotten_user_does_not_break_the_line_but_is_no_prefix_by_content(nights: Nights) -> None:
    first = nights.prepare(DAYS[0], A)
    second = nights.prepare(DAYS[1], B, forget=[3])
    assert "user 3" not in read_index(second, "users")
    nights.train(DAYS[0])
    assert nights.train(DAYS[1]) == nights.bundle(DAYS[0])
    # Taken off the list, and seen again: a new number.
    third = read_index(nights.prepare(DAYS[2], B), "users")
    assert third["user 3"] == index_sizes(second).users
    assert first.facts[DIGESTS]["users"] != digest_of(second.files("user_index"), 8)
    nights.clean(DAYS[0])
    with pytest.raises(ContractError, match="cannot be read"):
        nights.train(DAYS[1], nights.bundle(DAYS[0]))


def test_bundles_that_do_not_say_enough(nights: Nights) -> None:
    """Of an earlier version: the run's key is enough where the steps lead to it, and nothing is where they do not."""
    prepare = nights.prepare(DAYS[0], A)
    later = Line(nights.lake, nights.prepare(DAYS[1], B))
    for name, facts in (("old", {"ds": None, DIGESTS: None}), ("stray", {"prepare_run": "x", "ds": None, DIGESTS: {}})):
        nights.write_bundle(f"{nights.folder}/{name}", prepare, **facts)
    assert later.objection(Index.of_bundle(read_bundle(f"{nights.folder}/old"))) is None
    stray = later.objection(Index.of_bundle(read_bundle(f"{nights.folder}/stray")))
    assert stray is not None
    assert "it has no digest to compare" in stray
    nights.write_bundle(f"{nights.folder}/mute", prepare, prepare_run=None)
    with pytest.raises(ContractError, match="does not say which prepare run"):
        Index.of_bundle(read_bundle(f"{nights.folder}/mute"))


@given(st.permutations(range(30)), st.lists(st.integers(0, 30), max_size=3), st.booleans(), st.integers(0, 30))
def test_a_digest_is_of_the_entries_whatever_their_order_and_files(
    order: list[int], cuts: list[int], text: bool, size: int
) -> None:
    def table(numbers: Iterable[int]) -> pa.Table:
        numbers = list(numbers)
        ids = pa.array([f"é{n}" for n in numbers] if text else [n * 7 - 50 for n in numbers])
        return pa.table({"id": ids if numbers else pa.array([], ids.type if text else pa.int64()), "n": numbers})

    edges = [0, *sorted(cuts), 30]
    whole = joined([partial_digest(table(range(size)))]) if size else joined([])
    assert joined(partial_digest(table(order[a:b]), size) for a, b in pairwise(edges) if a < b) == whole
    swapped = table(range(30)).set_column(1, "n", pa.array([1, 0, *range(2, 30)]))
    if size:
        assert joined([partial_digest(swapped, size)]) != whole or size > 30


DAY, PEOPLE = st.sampled_from(DAYS[:4]), st.sets(st.integers(0, 9), min_size=2)
NIGHT = st.tuples(
    DAY, PEOPLE, st.sets(st.integers(0, 9), max_size=2), st.integers(0, 1), st.none() | DAY, st.booleans()
)
"""A night's run: ds, its users, who is forgotten, a variant of the config, the night to start from (None: previous),
and whether its prepare runs are cleaned away afterwards, one time of four."""


def refusal(work: Callable[..., object], *what: Any) -> str:
    """Which of the messages that are allowed to `work` says, "" for none."""
    try:
        work(*what)
    except ContractError as error:
        return next(
            (part for part in ("may belong to other users", "is no finished run") if part in str(error)), str(error)
        )
    return ""


def history_holds(history: list[tuple[Any, ...]]) -> None:
    """Live through the nights; `Nights.train` asserts that everybody starts with their own vector or a fresh one."""
    nights = in_memory()
    for number, (ds, users, forget, variant, other, clean) in enumerate(history):
        # A night whose base was cleaned away is refused.
        found = refusal(nights.prepare, ds, users, forget, variant)
        assert found in ("", "is no finished run")
        if not found:
            named = other is not None and nights.lake.stage(other, "train").finished()
            found = refusal(nights.train, ds, nights.bundle(other) if named else "previous")
            assert found in ("", "may belong to other users" if named else "")
        if clean and number % 4 == 3:
            nights.clean(ds)
    remove(nights.folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NIGHT, min_size=3, max_size=8))
def test_everybody_starts_with_their_own_vector_or_a_fresh_one(history: list[tuple[Any, ...]]) -> None:
    """Nights in any order, again with other users, settings or lists of forgotten people, or cleaned away."""
    history_holds(history)


@pytest.mark.soak
@settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NIGHT, min_size=3, max_size=20))
def test_everybody_starts_with_their_own_vector_in_long_histories(history: list[tuple[Any, ...]]) -> None:
    history_holds(history)
