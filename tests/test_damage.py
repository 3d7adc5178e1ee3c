"""Whatever happens to a file that we stored, its reader ends in ContractError or loads something sound.

A campaign damages the same small bundle, checkpoint, manifests, latest.json, history.json and reports again and again,
by bytes, by JSON values and by safetensors headers, and where a digest guards a file also with the digest made to fit.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ncf_dist.bundle import CARD, WEIGHTS, load_model, read_bundle, save_bundle, verify_weights
from ncf_dist.config import Model
from ncf_dist.demo import Latest, read_latest
from ncf_dist.errors import ContractError, NcfError, TrainingFailed
from ncf_dist.evaluate.baselines import item_weights
from ncf_dist.evaluate.report import figures
from ncf_dist.evaluate.report.data import training
from ncf_dist.fetch import delivery
from ncf_dist.inputs import ids_digest
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest, read_manifest
from ncf_dist.models import build_model
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.publish.pipeline import publish
from ncf_dist.train import checkpoints
from ncf_dist.train.reports import raise_reported
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.world import World
from tests.published import Night
from tests.tables import prepare_run
from tests.test_checkpoints import trainer_of

MODEL = Model(name="neumf", factors=2, layers=(4, 2))
USERS, ITEMS = 5, 7
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(10**40), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 10_000, "../../evil", "\0", "1", [], [1], {}, {"a": []}, [[[]]]),
]
DEEP = "@deep@"


# ---- damage ------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, swaps, splices, zeroes and noise."""
    one, two = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    piece, noise = data[one:two], rng.randbytes(rng.randrange(1, 64))
    kind = rng.randrange(7)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 8))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    return [
        data[:one],
        data[two:] + data[:one],
        data[:one] + noise + data[one:],
        data[:two] + piece + data[two:],
        data[:one] + bytes(two - one) + data[two:],
        noise,
    ][kind - 1]


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """One value of a JSON tree replaced, removed, renamed or moved."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("x", str(key).upper(), ""))] = node.pop(key)
    elif kind == 2:
        node[key] = DEEP
    elif kind == 3:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place]) if node is not other else None
    else:
        node[key] = rng.choice(VALUES)
    return tree


def as_bytes(tree: Any, rng: random.Random) -> bytes:
    depth = rng.choice((100, 300, 100_000))
    deep = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "1" * depth))
    return json.dumps(tree).replace(json.dumps(DEEP), deep).encode()


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    if rng.random() < 0.1:
        return as_bytes(rng.choice([DEEP, *VALUES]), rng)
    return as_bytes(damaged_tree(json.loads(data), rng), rng)


def damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes, the header's length, or a value of the header: names, shapes, types, offsets."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.3:
        return damaged_bytes(data, rng)
    if kind < 0.5:
        length = rng.choice((0, 1, size - 1, size + 1, len(data) - 8, len(data), 2**31, 2**40, 2**63 - 1, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + size])
    if kind < 0.7:
        entry = header[rng.choice([*header])]
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I32", "U64", "BOOL", "F8_E4M3", "F4", "E8M0", "X"))
        entry["shape"] = rng.choice((entry["shape"], entry["shape"][::-1], [0, 2**62], [2**32, 2**32], [], [1]))
    text = as_bytes(damaged_tree(header, rng) if kind > 0.6 else header, rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# ---- what is damaged ---------------------------------------------------------------------------------------


class Site:
    """A file of `home`, kept whole in `whole`; `check` reads it as its readers do."""

    def __init__(self, home: Path, file: str, damage: Callable[[bytes, random.Random], bytes]) -> None:
        self.home, self.file, self.damage = home, file, damage
        self.whole = (home / file).read_bytes()

    def strike(self, rng: random.Random) -> None:
        (self.home / self.file).write_bytes(self.damage(self.whole, rng))
        if rng.random() < 0.7:
            self.reseal()

    def heal(self) -> None:
        (self.home / self.file).write_bytes(self.whole)

    def reseal(self) -> None:
        """Make the digest that guards the file fit."""

    def check(self) -> None:
        raise NotImplementedError


class BundleSite(Site):
    def __init__(self, home: Path, file: str, damage: Callable[[bytes, random.Random], bytes]) -> None:
        super().__init__(home, file, damage)
        self.card = (home / CARD).read_bytes()

    def reseal(self) -> None:
        if self.file == WEIGHTS:
            digest = hashlib.sha256((self.home / WEIGHTS).read_bytes()).hexdigest()
            card = {**json.loads(self.card), "sha256": digest, "model_version": f"neumf-{digest[:12]}"}
            (self.home / CARD).write_text(json.dumps(card))

    def heal(self) -> None:
        super().heal()
        (self.home / CARD).write_bytes(self.card)

    def check(self) -> None:
        bundle = read_bundle(str(self.home))
        verify_weights(bundle)
        model = load_model(bundle)
        with torch.no_grad():
            scores = model(torch.arange(bundle.n_users)[:, None], torch.arange(bundle.n_items)[None])
        assert scores.shape == (bundle.n_users, bundle.n_items)


class UnverifiedSite(BundleSite):
    """A worker's way, which trusts the digest that its driver has looked at."""

    def check(self) -> None:
        load_model(read_bundle(str(self.home)))


class CheckpointSite(Site):
    """`trainer` takes over what is found, and a step is made with it."""

    trainer: Trainer

    def reseal(self) -> None:
        names = (checkpoints.TENSORS, checkpoints.PROGRESS)
        sums = "".join(f"{hashlib.sha256((self.home / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
        (self.home / checkpoints.SUMS).write_text(sums)

    def heal(self) -> None:
        super().heal()
        self.reseal()

    def check(self) -> None:
        found = checkpoints.latest(str(self.home.parent))
        assert found is not None, "the one before is whole"
        self.trainer.resume(found)
        progress = self.trainer.progress
        assert self.trainer.loader.order(progress.epoch, progress.phases[:-1]).rows >= 0
        assert progress.updates + progress.rows + progress.loss is not None
        with contextlib.suppress(TrainingFailed):  # Weights of any size are weights.
            self.trainer.train_step(next(self.trainer.loader.epoch(0)), 0.5)


class ManifestSite(Site):
    def check(self) -> None:
        found = read_manifest(str(self.home))
        assert all(isinstance(file.rows + file.bytes, int) for t in found.tables.values() for file in t.files)
        assert found.outputs().keys() == found.tables.keys()
        assert all(len(found.files(name)) == len(table.files) for name, table in found.tables.items())


class DeliverySite(Site):
    def check(self) -> None:
        found = delivery.find(str(self.home), "k")
        assert found is None or isinstance(found.outcome(str(self.home), "done").metrics["lines"], dict)


class ListedSite(Site):
    def check(self) -> None:
        """A look-up over all runs passes a damaged one over."""
        lake = Lake(str(self.home.parents[4]))
        assert len(lake.stage("2026-01-31", "prepare").finished()) <= 1


class LatestSite(Site):
    def check(self) -> None:
        found = read_latest(str(self.home))
        assert f"{found.rows:,} {found.version}"
        assert all(isinstance(file, str) for file in found.files)


class HistorySite(Site):
    def check(self) -> None:
        found = training(
            Manifest(stage="train", ds="2026-01-31", run_key="k", root=str(self.home), config={}, inputs={})
        )
        assert figures._training(found, 10)


def sites(folder: Path) -> list[Site]:
    torch.manual_seed(1)
    bundles = [folder / "bundle", folder / "unverified"]
    for home in bundles:
        save_bundle(str(home), build_model(MODEL, USERS, ITEMS), MODEL, USERS, ITEMS, {"seed": 1})
    found: list[Site] = [
        kind(home, file, damage)
        for kind, home in zip((BundleSite, UnverifiedSite), bundles, strict=True)
        for file, damage in ((CARD, damaged_json), (WEIGHTS, damaged_tensors))
    ]
    return [*found, *checkpoint_sites(folder / "checkpoints"), *json_sites(folder)]


def checkpoint_sites(folder: Path) -> list[Site]:
    """The later of two checkpoints; the first is never touched."""
    run = prepare_run(folder.parent / "run", 23, 3, 4)
    trainer = trainer_of(run, World(), Model(name="gmf", factors=2), folder=str(folder))
    batches = trainer.loader.epoch(0)
    trainer.enter_phase()
    for step in range(2):
        batch = next(batches)
        value, rate, _ = trainer.train_step(batch, 0.0)
        trainer._note(step, 6, value, rate, batch)
        trainer.save()
    home = folder / sorted(path.name for path in folder.iterdir())[-1]
    CheckpointSite.trainer = trainer
    return [
        CheckpointSite(home, checkpoints.TENSORS, damaged_tensors),
        CheckpointSite(home, checkpoints.PROGRESS, damaged_json),
        CheckpointSite(home, checkpoints.SUMS, damaged_bytes),
    ]


def json_sites(folder: Path) -> list[Site]:
    files = tuple(FileInfo(f"part-{n}.parquet", 10, 1, 100, "0" * 64) for n in range(3))
    runs = Lake(str(folder / "lake")).stage("2026-01-31", "prepare")
    manifest = Manifest(
        stage="prepare",
        ds="2026-01-31",
        run_key="k",
        root=runs.begin("k"),
        config={"seed": 1},
        inputs={"log": "x"},
        tables={"train": TableInfo("train", "f", files)},
        facts={"users": 5},
        metrics={"a": 0.5},
        seconds=1.5,
    )
    runs.finish(manifest)
    parts = (delivery.DeliveredFile("ratings.dat", 1, 4, "0" * 64),)
    (folder / "raw").mkdir()
    (folder / "raw" / "ratings.dat").write_text("1::2")
    body = asdict(delivery.Delivery("k", "ml", "movielens", {"ratings": "ratings.dat"}, parts))
    (folder / "raw" / "manifest.json").write_text(json.dumps(body))
    (folder / "table").mkdir()
    latest = asdict(Latest("2026-01-31", 3, "neumf-0", "k", 30, ["ds=2026-01-31/a.parquet"]))
    (folder / "table" / "latest.json").write_text(json.dumps({**latest, "k": 10}))
    (folder / "train").mkdir()
    history = {"epoch": 0, "epochs": [{"epoch": 0, "loss": 0.5}], "curve": [[0, 0, 0.5, 0.1], [0, 1, 0.4, 0.1]]}
    (folder / "train" / "history.json").write_text(json.dumps({**history, "seed": 1}))
    (folder / "ranks").mkdir()
    (folder / "ranks" / "error-0.json").write_text(json.dumps({"kind": "ContractError", "message": "the file is gone"}))
    (folder / "gram").mkdir()
    (folder / "gram" / "ease.safetensors").write_bytes(safetensors.torch.save({"weights": torch.eye(3)}))
    return [
        ReportSite(folder / "ranks", "error-0.json", damaged_json),
        WeightsSite(folder / "gram", "ease.safetensors", damaged_tensors),
        ManifestSite(Path(manifest.root), "manifest.json", damaged_json),
        ListedSite(Path(manifest.root), "manifest.json", damaged_json),
        DeliverySite(folder / "raw", "manifest.json", damaged_json),
        LatestSite(folder / "table", "latest.json", damaged_json),
        HistorySite(folder / "train", "history.json", damaged_json),
    ]


class ReportSite(Site):
    """A rank's report is of a failure whatever it holds."""

    def check(self) -> None:
        with pytest.raises(NcfError, match=r"^rank 0: "):
            raise_reported(str(self.home))


class WeightsSite(Site):
    """A baseline's item-item matrix."""

    def check(self) -> None:
        assert item_weights(str(self.home / self.file)).weights.shape


# ---- the campaign ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.soak)])
def test_damage_ends_in_a_contract_error_or_a_sound_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    caplog.set_level(logging.CRITICAL)
    rng, places = random.Random(13), sites(tmp_path)
    for site in places:
        site.check()
    refused = loaded = 0
    for number in range(count):
        site = places[number % len(places)]
        seed, named = rng.getrandbits(64), True
        site.strike(random.Random(seed))
        try:
            site.check()
            loaded += 1
        except ContractError as error:
            refused += 1
            named = str(site.home) in str(error)
        except BaseException as error:
            raise AssertionError(f"{type(site).__name__} {site.file}, seed {seed}: {error!r}") from error
        assert named, "a message names its file"
        site.heal()
    for site in places:
        site.check()
    assert refused > count // 4
    assert loaded > count // 10


def test_a_step_below_zero_is_damage(tmp_path: Path) -> None:
    """Step -1 of a single one would be drawn at epoch + step / 0."""
    history = {"epoch": 0, "epochs": [{"epoch": 0, "loss": 0.5}], "curve": [[0, -1, 0.5, 0.1]]}
    (tmp_path / "history.json").write_text(json.dumps(history))
    run = Manifest(stage="train", ds="2026-01-31", run_key="k", root=str(tmp_path), config={}, inputs={})
    with pytest.raises(ContractError, match=r"history\.json.*a step of its curve is below 0"):
        training(run)


# ---- whole jobs on damaged manifests -------------------------------------------------------------------------------


def places_of(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each value of a JSON document is."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in inner for place in ((*above, key), *places_of(value, (*above, key)))]


@pytest.mark.parametrize("count", [120, pytest.param(2_000, marks=pytest.mark.soak)])
def test_publish_refuses_a_manifest_that_says_something_odd(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """One value of one manifest is another, or gone: publish raises an error of ours, or publishes what is sound."""
    caplog.set_level(logging.CRITICAL)
    night, rng = Night(tmp_path), random.Random(3)
    night.prepare(unseen=("zed",))
    night.score(items={"eligible": 4, "deny_items": {"path": None, "ids": 0, "sha256": ids_digest([])}}, users=5)
    night.config = night.configured(require=("users", "interactions"))
    manifests = sorted(tmp_path.glob("lake/runs/*/*/*/manifest.json"))
    assert [path.parent.parent.name for path in manifests] == ["prepare", "score", "train"]
    for number in range(count):
        path = manifests[number % len(manifests)]
        whole = path.read_text()
        tree = json.loads(whole)
        *above, last = rng.choice([place for place in places_of(tree) if place[0] != "config"])
        node = tree
        for key in above:
            node = node[key]
        if odd := rng.randrange(8):
            node[last] = rng.choice(VALUES)
        else:
            del node[last]
        path.write_text(json.dumps(tree))
        try:
            publish(night.config, night.ds)
        except NcfError:
            pass
        except Exception as error:
            raise AssertionError(f"{path.parent.parent.name} {[*above, last]}, {odd}: {repr(error)[:300]}") from error
        path.write_text(whole)
        shutil.rmtree(night.table, ignore_errors=True)
