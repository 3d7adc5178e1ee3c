"""Item-to-item parts: made of train rows alone, weighed on the validation rows, kept in the bundle; and a model that is
nothing else."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ncf_dist import contracts, metrics
from ncf_dist.ancestry import index_sizes
from ncf_dist.bundle import load_model, load_parts, read_bundle
from ncf_dist.config import Config
from ncf_dist.contracts import STEP_UNIT, Contract
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.item_item.part import Part, dense_scores
from ncf_dist.item_item.rows import largest
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import MF, ItemToItem, Users, latest
from ncf_dist.parquet import TableInfo, read_table, write_parts
from ncf_dist.scoring import ModelScorer
from ncf_dist.train import part_weights, worker
from ncf_dist.train.part_weights import Candidate, choose
from ncf_dist.train.pipeline import train
from ncf_dist.train.spec import Spec
from ncf_dist.train.world import World
from tests.histories import TINY, history_run

DS, USERS, ITEMS, LENGTH, STEPS = "2026-01-31", 40, 15, 6, 3
Logs = list[list[int]]
"""Of each user the train items, oldest first, and the validation item last."""


def walks(seed: int = 1) -> Logs:
    """Item a + 1 follows item a two times in three; every user has a validation item."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(USERS):
        items = [int(rng.integers(ITEMS))]
        while len(items) < rng.integers(5, 10):
            left = [item for item in range(ITEMS) if item not in items]
            after = (items[-1] + 1) % ITEMS
            items.append(after if after in left and rng.random() < 2 / 3 else int(rng.choice(left)))
        found.append(items)
    return found


def pairs_of(logs: Logs) -> np.ndarray:
    """(I, I) weights of what follows what in train rows, in steps of 1 / 2520."""
    found = np.zeros((ITEMS, ITEMS), np.int64)
    for *items, _ in logs:
        for place, item in enumerate(items):
            for step, after in enumerate(items[place + 1 : place + 1 + STEPS], 1):
                found[item, after] += STEP_UNIT // step
    return found


def stored(folder: str, contract: Contract, rows: list[tuple[Any, ...]]) -> TableInfo:
    """Two files, all rows of a user (or of an item) in one, as prepare writes them."""

    def table(some: list[tuple[Any, ...]]) -> pa.Table:
        columns = list(zip(*some, strict=True)) if some else [()] * len(contract.schema)
        arrays = [pa.array(list(c), f.type) for c, f in zip(columns, contract.schema, strict=True)]
        return pa.table(arrays, schema=contract.schema)

    parts = [row for row in rows if row[0] < 8], [row for row in rows if row[0] >= 8]
    return write_parts(map(table, parts), folder, contract)


def prepare_run(config: Config, logs: Logs, validation: bool = True) -> Manifest:
    """A finished prepare run of these logs in the config's lake, made by hand. validation: whether the last item of a
    user is a validation row, or one of train."""
    runs = Lake(config.paths.lake).stage(DS, "prepare")
    folder = runs.begin("p1")
    split = [[0] * (len(items) - 1) + [int(validation)] for items in logs]
    known = [[*items, *([] if validation else [-1])] for items in logs]
    times = [[10**6 * (place + 1) for place in range(len(items))] for items in logs]
    weights, users = pairs_of(known), range(len(logs))
    train_rows = np.bincount([item for *items, _ in known for item in items], minlength=ITEMS)
    rows: dict[Contract, list[tuple[Any, ...]]] = {
        contracts.INTERACTIONS: [
            (user, item, 1.0, time, part)
            for user in users
            for item, time, part in sorted(zip(logs[user], times[user], split[user], strict=True))
        ],
        contracts.HISTORY: [(user, sorted(logs[user]), []) for user in users],
        contracts.RECENT: [
            (user, logs[user][-LENGTH - 1 :], times[user][-LENGTH - 1 :], split[user][-LENGTH - 1 :]) for user in users
        ],
        contracts.VALIDATION: [(user, logs[user][-1], 1.0, []) for user in users] if validation else [],
        contracts.TEST: [],
        contracts.NEXT_ITEMS: [(a, b, int(weights[a, b])) for a, b in zip(*np.nonzero(weights), strict=True)],
        contracts.NEXT_TOTALS: [(item, int(train_rows[item]), int(weights[item].sum())) for item in range(ITEMS)],
        contracts.train(1, 1): [
            (user, item, (item + 7) % ITEMS) for user in users for item in known[user][:-1]
        ],
    }  # fmt: skip
    of_windows = history_run(Path(folder), 2, LENGTH, [items[:-1] for items in known], ITEMS)
    tables = {contract.name: stored(folder, contract, found) for contract, found in rows.items()}
    tables["sequences"] = of_windows.tables["sequences"]
    manifest = Manifest(
        stage="prepare", ds=DS, run_key="p1", root=folder, inputs={"index": None}, tables=tables,
        config=config.model_dump(mode="json", include={"input", "split", "negatives", "sequences", "layout", "seed"}),
        facts={"users": USERS, "items": ITEMS, "sequences": of_windows.facts["sequences"]},
    )  # fmt: skip
    return runs.finish(manifest)


def config_of(folder: Path, name: str = "item_to_item", **sections: Any) -> Config:
    return Config.model_validate(
        {
            "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
            "input": {"path": "unused", "format": "movielens-dat"},
            "negatives": {"per_positive": 1, "draws": 1},
            "sequences": {"length": LENGTH, "steps": STEPS},
            "model": {"name": name, "factors": 4},
            "loader": {"backend": "arrow"},
            "train": {"launcher": "none", "epochs": 1, "batch_size": 64, "device": "cpu"},
            **sections,
        }
    )


BOTH = {"counts": {"weights": [0.6, 0.0, 2.0]}, "ease": {"weights": [5.0, 0.0], "ridge": 3.0, "half_life": 4.0}}


# ---- a model of nothing else -------------------------------------------------------------------------------


def test_a_model_of_counts_is_made_without_training(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepare_run(config, walks())
    outcome, again = train(config, DS), train(config, DS)
    assert (outcome.status, again.status) == ("done", "already-done")
    assert (again.outputs, again.extra) == (outcome.outputs, outcome.extra)
    run = Lake(config.paths.lake).stage(DS, "train").newest()
    assert run.facts["trained"] is False
    assert not any(name.startswith("train.") for name in run.metrics)
    bundle = read_bundle(outcome.outputs["bundle"])
    assert (bundle.model.name, bundle.n_users, bundle.n_items, bundle.looks_back) == ("item_to_item", USERS, ITEMS, 6)
    [part] = load_parts(bundle)
    assert (part.name, part.weight, part.half_life, part.last) == ("counts", 0.6, 2.0, LENGTH)
    times = pairs_of(walks()) / STEP_UNIT
    train_rows = np.bincount([item for *items, _ in walks() for item in items], minlength=ITEMS)
    wanted = np.log1p(times / (20 * train_rows / train_rows.sum()))
    found = np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS):
        entries = slice(int(part.rows.offsets[item]), int(part.rows.offsets[item + 1]))
        found[item, part.rows.items[entries].numpy()] = part.rows.values[entries].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    model = load_model(bundle)
    assert isinstance(model, ItemToItem)
    assert not model(torch.arange(USERS)[:, None], torch.arange(ITEMS)[None]).any()


def test_the_same_tables_give_the_same_version(tmp_path: Path) -> None:
    versions = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        config = config_of(folder, parts=BOTH)
        prepare_run(config, walks())
        versions.append(train(config, DS).extra["model_version"])
    assert versions[0] == versions[1]


# ---- beside a model that is trained ------------------------------------------------------------------------


def test_parts_beside_a_trained_model(tmp_path: Path) -> None:
    config = config_of(tmp_path, "mf", parts=BOTH)
    prepare = prepare_run(config, walks())
    spec = Spec(config.model_dump_json(by_alias=True), prepare.root, str(tmp_path / "run"))
    Path(spec.run).mkdir()
    worker.train_rank(spec, World())
    bundle = read_bundle(str(tmp_path / "run/bundle"))
    record = json.loads((tmp_path / "run/parts.json").read_text())
    assert len(record["figures"]) == 6
    assert record["chosen_by"] == f"the best of 6 by ndcg@10 of {USERS} validation rows"
    found = {part.name: part.weight for part in load_parts(bundle)}
    assert found == {name: weight for name, weight in record["weights"].items() if weight}
    assert isinstance(load_model(bundle), MF)


def test_two_ranks_and_a_model_of_histories(tmp_path: Path) -> None:
    """One rank makes the parts, and no other waits for it."""
    ranks = {"launcher": "torchrun", "ranks": 2, "batch_size": 4, "epochs": 1, "device": "cpu"}
    config = config_of(tmp_path, parts=BOTH, model=TINY, train=ranks)
    prepare_run(config, walks())
    outcome = train(config, DS)
    run = Lake(config.paths.lake).stage(DS, "train").newest()
    assert run.metrics["train.epochs"] == 1
    figures = {name: value for name, value in run.metrics.items() if name.startswith("validation.full.ndcg@10")}
    assert figures["validation.full.ndcg@10.with_parts"] >= figures["validation.full.ndcg@10.without_parts"] > 0
    bundle = read_bundle(outcome.outputs["bundle"])
    assert {part.name for part in load_parts(bundle)} == {n for n, w in run.facts["parts"]["weights"].items() if w}
    assert bundle.looks_back == LENGTH


@pytest.mark.parametrize("table", ["history", "recent"])
def test_a_user_who_is_missing_is_told(tmp_path: Path, table: str) -> None:
    prepare = prepare_run(config_of(tmp_path), walks())
    [contract] = [c for c in (contracts.HISTORY, contracts.RECENT) if c.name == table]
    rows = [tuple(row.values()) for path in prepare.files(table) for row in read_table(path).to_pylist()]
    tables = {**prepare.tables, table: stored(prepare.root, contract, rows[:-1])}
    with pytest.raises(ContractError, match=f"table {table} has 39 rows of the 40 users .*rerun the job prepare"):
        choose(a_model(), candidates((1.0,), (1.0,)), replace(prepare, tables=tables), 1)


def test_ease_is_of_train_rows_alone(tmp_path: Path) -> None:
    """The validation row of a user would tell what it is to be judged by."""
    config = config_of(tmp_path, parts={"ease": {"weights": [1.0], "ridge": 3.0, "kept": ITEMS}})
    prepare_run(config, walks())
    [part] = load_parts(read_bundle(train(config, DS).outputs["bundle"]))
    x = np.zeros((USERS, ITEMS))
    for user, (*items, _) in enumerate(walks()):
        x[user, items] = 1
    p = np.linalg.inv(x.T @ x + 3.0 * np.eye(ITEMS))
    wanted = p / -np.diag(p)
    np.fill_diagonal(wanted, 0)
    matrix = torch.zeros(ITEMS, ITEMS)
    row = torch.arange(ITEMS).repeat_interleave(part.rows.offsets.diff())
    matrix[row, part.rows.items] = part.rows.values
    np.testing.assert_allclose(matrix.numpy(), wanted, atol=1e-6)


# ---- their weights -----------------------------------------------------------------------------------------


def candidates(weights: tuple[float, ...], others: tuple[float, ...], sign: float = 1.0) -> list[Candidate]:
    """A part in which an item's successor is likely (or the least likely, where sign is -1), and one of noise."""
    follows = torch.eye(ITEMS).roll(1, 1) * sign
    noise = torch.from_numpy(np.random.default_rng(5).normal(size=(ITEMS, ITEMS))).float()
    return [
        Candidate(Part("counts", 1.0, 1.0, 2, largest(follows, ITEMS)), weights),
        Candidate(Part("ease", 1.0, 3.0, 4, largest(noise, ITEMS)), others),
    ]


def a_model() -> MF:
    torch.manual_seed(3)
    return MF(USERS, ITEMS, 4, True, std=0.5)


def ndcg(model: MF, chosen: list[Part], logs: Logs) -> float:
    """By hand: each validation item among all items but the user's train items."""
    ranks = []
    for user, (*items, held) in enumerate(logs):
        scores = model(torch.tensor([user]), torch.arange(ITEMS)[None]).detach().double().numpy()[0]
        for part in chosen:
            matrix = torch.zeros(ITEMS, ITEMS)
            row = torch.arange(ITEMS).repeat_interleave(part.rows.offsets.diff())
            matrix[row, part.rows.items] = part.rows.values
            for age, item in enumerate(items[::-1][: min(part.last, LENGTH)]):
                scores += part.weight * 0.5 ** (age / part.half_life) * matrix[item].double().numpy()
        others = [item for item in range(ITEMS) if item not in items and item != held]
        ranks.append(1 + sum(scores[item] > scores[held] for item in others))
    return float(metrics.ndcg(np.array(ranks, float), 10).mean())


@pytest.mark.parametrize("users_a_block", [1, 7, 256])
def test_the_combination_that_ranks_validation_rows_best(
    tmp_path: Path, users_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_weights, "BLOCK_USERS", users_a_block)
    model, found = a_model(), candidates((0.0, 0.3, 2.0, 9.0), (0.5, 0.0))
    choice = choose(model, found, prepare_run(config_of(tmp_path), walks()), 1)
    assert choice.rows == USERS
    by_hand = {
        (a, b): ndcg(model, [found[0].weighing(a), found[1].weighing(b)], walks())
        for a, b in itertools.product(found[0].weights, found[1].weights)
    }
    assert [row["ndcg@10"] for row in choice.figures] == pytest.approx(list(by_hand.values()))
    assert tuple(choice.weights.values()) == max(by_hand, key=by_hand.__getitem__)
    assert choice.weights["counts"] > 0
    assert choice.weights["ease"] == 0


def test_a_part_that_harms_is_left_out(tmp_path: Path) -> None:
    """0 wins where it is the best, whatever comes first."""
    prepare = prepare_run(config_of(tmp_path), walks())
    [harms, _] = candidates((3.0, 1.0, 0.0), (), sign=-1.0)
    assert choose(a_model(), [harms], prepare, 1).weights == {"counts": 0.0}


def test_where_two_are_as_good_the_first_counts(tmp_path: Path) -> None:
    """With nothing beside it a part ranks alike at every weight; and something must be left of such a model."""
    prepare, nothing = prepare_run(config_of(tmp_path), walks()), ItemToItem(USERS, ITEMS)
    [follows, _] = candidates((0.0, 4.0, 2.0), (1.0,))
    assert choose(nothing, [follows], prepare, 1, may_be_nothing=False).weights == {"counts": 4.0}
    [harms, _] = candidates((0.0, 4.0, 2.0), (1.0,), sign=-1.0)
    assert choose(nothing, [harms], prepare, 1, may_be_nothing=False).weights == {"counts": 4.0}


def test_without_validation_rows_the_first_of_each(tmp_path: Path) -> None:
    prepare = prepare_run(config_of(tmp_path), walks(), validation=False)
    choice = choose(a_model(), candidates((3.0, 1.0, 0.0), (0.0, 4.0), sign=-1.0), prepare, 1)
    assert (choice.weights, choice.figures) == ({"counts": 3.0, "ease": 0.0}, [])
    assert choice.chosen_by == "the first of each, as there are no validation rows"


def test_of_many_users_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one each time."""
    prepare = prepare_run(config_of(tmp_path), walks())
    monkeypatch.setattr(part_weights, "PAIRS", USERS * ITEMS // 3)
    found = [choose(a_model(), candidates((1.0, 0.0), (0.0,)), prepare, 1) for _ in range(2)]
    assert 0 < found[0].rows < USERS
    assert found[0] == found[1]


def test_scores_are_those_of_the_scorer(tmp_path: Path) -> None:
    """What is weighed is the model's scores as it ranks with, and what the user did last in train."""
    prepare = prepare_run(config_of(tmp_path), walks())
    model = a_model()
    for block in part_weights.held_out_blocks(prepare, ITEMS, 1):
        recent = pa.concat_tables([read_table(path) for path in prepare.files("recent")])
        known = latest(recent, contracts.TRAIN_SPLIT, LENGTH)
        assert block.users.latest is not None
        assert torch.equal(block.users.latest.items, known.items)
        assert block.users.index.tolist() == list(range(USERS))
        own = ModelScorer(model, ITEMS).scores(Users(torch.arange(USERS)))
        for user, (*items, held) in enumerate(walks()):
            assert block.seen.part(user, user + 1).values.tolist() == sorted(items)
            assert block.item[block.row == user].tolist() == [held]
        assert torch.equal(ModelScorer(model, ITEMS).scores(block.users), own)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("item_to_item", {"sequences": {}}, r"model\.name is item_to_item and sequences\.length is 0.*prepare again"),
        ("mf", {"sequences": {}, "parts": {"ease": {}}}, r"parts has counts or ease and sequences\.length is 0"),
        ("mf", {"sequences": {"length": 5, "next_items": 0}, "parts": {"counts": {}}}, r"sequences\.next_items is 0"),
        ("mf", {"input": {"path": "x", "feedback": "explicit"}, "parts": {"counts": {}}}, r"needed implicit feedback"),
        ("item_to_item", {"input": {"path": "x", "feedback": "explicit"}}, r"item_to_item with input\.feedback=expl"),
        ("item_to_item", {"train": {"warm_start": "previous"}}, r"nothing is trained: leave train\.warm_start"),
        ("item_to_item", {"train": {"lr_find": True}}, r"leave train\.warm_start and train\.lr_find out"),
        ("mf", {"parts": {"counts": {"weights": []}}}, r"weights of a part are \[\]; needed at least one"),
        ("mf", {"parts": {"ease": {"weights": [1, 1]}}}, r"a part are \[1\.0, 1\.0\]; .* each once"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, name: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, name, **sections)


def test_without_counts_ease_needs_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, sequences={"length": LENGTH, "next_items": 0}, parts={"ease": {}})
    assert config.item_parts.counts is None


def test_a_catalogue_too_large_for_ease_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = config_of(tmp_path, parts={"ease": {"gram_bytes": 1_000}})
    prepare_run(config, walks())
    with pytest.raises(ConfigError, match=r"15 items x 15 items x 8 bytes x 3 matrices = 5,400 bytes; .* allows 1,000"):
        train(config, DS)
    assert not list(Path(config.paths.lake).rglob("bundle.json"))


@pytest.mark.parametrize("table", [contracts.NEXT_ITEMS.name, contracts.NEXT_TOTALS.name])
def test_a_damaged_table_is_refused(tmp_path: Path, table: str) -> None:
    config = config_of(tmp_path)
    prepare = prepare_run(config, walks())
    path = Path(prepare.root) / table / "part-00000-000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ContractError, match=rf"{table}/part-00000-000\.parquet.*rerun the job prepare"):
        train(config, DS)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepare = prepare_run(config, walks())
    tables = {name: table for name, table in prepare.tables.items() if name != contracts.NEXT_ITEMS.name}
    Lake(config.paths.lake).stage(DS, "prepare").finish(replace(prepare, tables=tables))
    with pytest.raises(ContractError, match="next_items"):
        train(config, DS)


def test_the_scores_of_a_bundle_are_its_parts(tmp_path: Path) -> None:
    """`dense_scores` of what is stored, added up: what the scorer gives (tests/test_sparse.py)."""
    config = config_of(tmp_path, parts=BOTH)
    prepare = prepare_run(config, walks())
    bundle = read_bundle(train(config, DS).outputs["bundle"])
    recent = pa.concat_tables([read_table(path) for path in prepare.files("recent")])
    known = latest(recent, contracts.TRAIN_SPLIT, bundle.looks_back)
    total = sum(dense_scores(part, known.items, known.length) for part in load_parts(bundle))
    assert isinstance(total, torch.Tensor)
    assert index_sizes(prepare).items == total.shape[1]
    places = [int((total[user] > total[user, held]).sum()) for user, (*_, held) in enumerate(walks())]
    assert np.mean([place < ITEMS / 2 for place in places]) > 0.6
