"""A person on the list of input.forget is in nothing that a night makes, and nobody else's number changes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist import contracts
from ncf_dist.bundle import Bundle, load_model, read_bundle
from ncf_dist.config import Config, Input, Model, load_config
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import build_model
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.given_candidates import _line
from ncf_dist.prepare.index import extend_index
from ncf_dist.prepare.ingest import read_one
from ncf_dist.prepare.input_files import find_files
from ncf_dist.prepare.interactions import RowSpec
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.publish.pipeline import publish
from ncf_dist.score import plan as planning
from ncf_dist.score.items import ItemLists
from ncf_dist.score.pipeline import score
from ncf_dist.score.plan import Plan
from ncf_dist.train.pipeline import train
from tests.tables import small_config, table_of

UNTIL = 2_000_000_000 * 10**6
GONE, KEPT = 7_000_111_222, 3


def a_list(folder: Path, *ids: Any, name: str = "forget.txt") -> str:
    path = folder / name
    path.write_text("".join(f"{of}\n" for of in ids), encoding="utf-8")
    return str(path)


# ---- the list ----------------------------------------------------------------------------------------------------


def test_the_list_is_read_as_the_log_types_its_users(tmp_path: Path) -> None:
    path = a_list(tmp_path, "7", " +8 ", "", "7", "-2")
    numbers, texts = Forget.read(path, pa.int64()), Forget.read(path, pa.string())
    assert numbers.among(pa.array([7, 8, 80, None, -2])).tolist() == [True, True, False, False, True]
    assert texts.among(pa.array(["7", "8", " 7\t", None, "+8"])).tolist() == [True, False, True, False, True]
    assert numbers.digest == texts.digest
    assert numbers.digest != Forget.read(a_list(tmp_path, "7"), pa.int64()).digest
    assert not Forget.read(None, pa.int64()).among(pa.array([7])).any()
    assert "7" not in repr(Forget(texts.ids, None))


@pytest.mark.parametrize("bad", ["anna", "7.0", "0x10", "9" * 25, "9223372036854775808", "1_000", "٣"])
def test_an_id_that_no_user_can_have_is_refused_and_not_shown(tmp_path: Path, bad: str) -> None:
    with pytest.raises(InputError, match=r"1 of the 2 ids in .*forget.txt are not integers") as refused:
        Forget.read(a_list(tmp_path, "7", bad), pa.int64())
    assert bad not in str(refused.value).replace(str(tmp_path), "").replace("64", "")
    assert bad in Forget.read(a_list(tmp_path, "7", bad), pa.string()).ids.to_pylist()  # type: ignore[union-attr]


@pytest.mark.parametrize("given", ["[4711]", "4711", "{a: 4711}", "['4711', 'x']"])
def test_ids_in_the_config_are_refused_and_not_shown(tmp_path: Path, given: str) -> None:
    (tmp_path / "c.yaml").write_text(f"paths: {{lake: l}}\ninput: {{path: x, forget: {given}}}\n")
    with pytest.raises(ConfigError, match="input.forget holds ids; needed the path of a text file") as refused:
        load_config(tmp_path / "c.yaml")
    assert "4711" not in str(refused.value)
    with pytest.raises(InputError, match="list of ids .* cannot be read"):
        Forget.read(str(tmp_path / "none.txt"), pa.string())


# ---- rows ----------------------------------------------------------------------------------------------------------

NAMED = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}
WRONG = ["{u},5", "{u}", "{u},5,4,100,9", "{u},,4,100", "{u},5,x,100", "{u},5,nan,100", "{u},5,4,soon", "{u},5,4,-1"]
"""Lines with something wrong in them after the user, which is read."""
HIDDEN = ["{u}\xff,5,4,100", '"{u},5,4,100']
"""Lines whose user cannot be read: in another charset, and with a quote that does not end."""


def read(folder: Path, text: str, forget: Forget, kind: pa.DataType) -> tuple[dict[str, Any], list[str], str]:
    """(statistics, texts in the quarantine, everything that was written) of a CSV log."""
    path = folder / "log.csv"
    path.write_bytes(("u,i,r,t\n" + text).encode("latin-1"))
    config = Input.model_validate({"path": str(path), "format": "csv", "columns": NAMED})
    staging = folder / f"staging-{forget.digest}-{kind}"
    source = interactions_source(config, find_files(config.path, FORMATS["csv"], "csv"))
    spec = RowSpec(source, kind, pa.int64(), "s", UNTIL, None, str(staging), forget=forget)
    [stats] = [read_one(spec, unit) for unit in range(len(spec.source.units))]
    tables = {name: [pq.ParquetFile(file).read() for file in files] for name, files in stats["files"].items()}
    assert sum(table.num_rows for table in tables["rejects"]) == sum(stats["reasons"].values())
    kept = sum(table.num_rows for table in tables["rows"])
    assert stats["rows"] == kept + sum(stats["reasons"].values()) + stats["forgotten"]
    written = json.dumps([table.to_pylist() for files in tables.values() for table in files])
    return stats, [raw for table in tables["rejects"] for raw in table["raw"].to_pylist()], written


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_rows_of_forgotten_users_are_neither_kept_nor_rejected(tmp_path: Path, kind: pa.DataType) -> None:
    """Whatever else is wrong with them. A line whose user nobody can read is rejected without its text."""
    lines = [line.format(u=user) for user in (KEPT, GONE) for line in ("{u},5,4,100", *WRONG, "{u},5,4,3000000000")]
    lines += [line.format(u=GONE) for line in HIDDEN]
    text = "\n".join(lines) + "\n"
    forget = Forget.read(a_list(tmp_path, GONE), kind)
    stats, raws, written = read(tmp_path, text, forget, kind)
    assert stats["forgotten"] == len(WRONG) + 2
    assert str(GONE) not in written
    assert raws.count("") == len(HIDDEN)
    assert sum(raw.startswith(f"{KEPT},") or raw == f"{KEPT}" for raw in raws) == len(WRONG) + 1
    before, raws, written = read(tmp_path, text, Forget(), kind)
    assert before["forgotten"] == 0
    assert str(GONE) in written
    assert "" not in raws


USER = st.sampled_from(["1", "2", "12", " 2 ", "+2", "", "x", "NULL"])
CELL = st.sampled_from(["7", "", "x", '"', '"7"', "4.5"])
LINE = st.builds(lambda user, cells: ",".join([user, *cells]), USER, st.lists(CELL, max_size=4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(lines=["1,7,7,7", "2"], listed={"1"}, text=True)
@given(lines=st.lists(LINE, min_size=1, max_size=12), listed=st.sets(st.sampled_from("12")), text=st.booleans())
def test_forgetting_moves_rows_and_changes_no_other(
    tmp_path: Path, lines: list[str], listed: set[str], text: bool
) -> None:
    """Against the same log without a list: what is left is the same, and the rest is forgotten."""
    kind = pa.string() if text else pa.int64()
    body = "\n".join(lines) + "\n"
    before, _, _ = read(tmp_path, body, Forget(), kind)
    after, _, _ = read(tmp_path, body, Forget.read(a_list(tmp_path, *listed), kind), kind)
    assert after["rows"] == before["rows"]
    assert after["forgotten"] + sum(after["reasons"].values()) <= before["rows"]
    assert all(after["reasons"].get(reason, 0) <= count for reason, count in before["reasons"].items())
    if '"' not in body:
        users = [line.split(",")[0] for line in lines]
        ids = users if text else [str(int(user)) if user.strip().lstrip("+").isdigit() else "" for user in users]
        assert after["forgotten"] == sum(user.strip() in listed for user in ids)


def test_candidates_of_forgotten_users_are_left_out() -> None:
    schema = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "candidate")] + [("bad", pa.string())])
    assert [row["user_id"] for row in _line("(7,1)\t3\t4", None, "0 of x", schema)] == [7, 7]
    for bad in ("(7,1)", "(7,x)\t3", "(7,1)\tx"):
        assert [row["user_id"] for row in _line(bad, None, "0 of x", schema)] == [7], (
            "so that a forgotten user's can be dropped"
        )
    assert _line("7,1", None, "0 of x", schema)[0]["user_id"] is None


# ---- numbers -------------------------------------------------------------------------------------------------------


def live(spark: SparkSession, nights: list[tuple[set[int], set[int]]], folder: Path) -> None:
    """Extend an index night by night: (keys, who is on the list)."""
    index: dict[int, int] = {}
    given: dict[int, int] = {}  # Number → the only user it was ever given to.
    size = 0
    for night, (keys, listed) in enumerate(nights):
        forget = Forget.read(a_list(folder, *listed, name=f"{night}.txt"), pa.int64())
        old = spark.createDataFrame(list(index.items()), "user_id long, user_idx int") if night else None
        frame = spark.createDataFrame([(key,) for key in keys - listed], "user_id long")
        kept = forget.leave_out(old, "user_id") if old is not None else None
        longer, after = extend_index(spark, frame, kept, size, "user_id", "user_idx")
        found = {row["user_id"]: row["user_idx"] for row in longer.collect()}
        survivors = index.keys() - listed
        assert found.keys() == survivors | (keys - listed)
        assert {user: found[user] for user in survivors} == {user: index[user] for user in survivors}
        new = {number: user for user, number in found.items() if user not in survivors}
        assert sorted(new) == list(range(size, after)), "numbering goes on after the last number ever given"
        assert not new.keys() & given.keys()
        index, given, size = found, given | new, after


def random_nights(seed: int, count: int) -> list[tuple[set[int], set[int]]]:
    chance = random.Random(seed)
    return [
        (set(chance.sample(range(20), chance.randint(2, 12))), set(chance.sample(range(20), chance.randint(0, 6))))
        for _ in range(count)
    ]


def test_numbers_are_never_given_again_and_survivors_keep_theirs(spark: SparkSession, tmp_path: Path) -> None:
    """The last user is forgotten, and comes back when taken off the list."""
    nights: list[tuple[set[int], set[int]]] = [({1, 2, 3, 4, 5}, set()), ({1, 6}, {1, 2, 3, 4, 5}), ({1, 2, 7}, {7})]
    live(spark, nights, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 22))
def test_numbers_are_never_given_again_in_long_histories(spark: SparkSession, tmp_path: Path, seed: int) -> None:
    live(spark, random_nights(seed, 8), tmp_path)


def test_files_of_users_follow_the_numbers_given(tmp_path: Path) -> None:
    """A hundred numbers, four users: as many numbers a file as if all had one, or there would be too many files."""
    contract = contracts.user_index(pa.int64())
    tables = {contract.name: table_of(tmp_path, contract, [{"user_id": [1, 2, 3, 4], "user_idx": [0, 33, 66, 99]}])}
    facts = {"users": 100, "items": 1}
    prepared = Manifest(
        stage="prepare",
        ds=NIGHTS[0],
        run_key="p1",
        root=str(tmp_path),
        config={},
        inputs={},
        tables=tables,
        facts=facts,
    )
    config = small_config(tmp_path, Model())
    bundle = Bundle("", Model(), "m", 100, 1, "", {})
    plan = Plan(config, prepared, prepared, bundle, contract, ItemLists())
    assert (plan.indexed, plan.n_files) == (100, planning.MIN_FILES)


# ---- the line ------------------------------------------------------------------------------------------------------

NIGHTS = ("2024-06-01", "2024-06-02", "2024-06-03")
USERS, ITEMS, FIRST_DAY = 24, 12, 1_714_521_600
OFF_LOG = 7_000_333_444
"""On the list, and in the side table of users alone."""


def log_of(users: range) -> str:
    """Five rows a user, and one that has no time."""
    rows = [f"{u},{100 + (u * 5 + n * 7) % ITEMS},4,{FIRST_DAY + u * 60 + n}" for u in users for n in range(5)]
    return "u,i,r,t\n" + "".join(f"{row}\n" for row in [*rows, f"{users[-1]},100,4,soon"])


class Line:
    """06-01, then 06-03 and, made up for later, 06-02, which fork; GONE is forgotten from 06-02 on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake = folder, Lake(str(folder / "lake"))
        people = (*range(1000, 1000 + USERS), GONE, OFF_LOG, 5000)
        (folder / "people.csv").write_text("user_id,age\n" + "".join(f"{user},30\n" for user in people))
        self.listed = a_list(folder, GONE, OFF_LOG)
        self.configs: dict[str, Config] = {}

    def config(self, log: str, **more: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "paths": {"lake": str(self.folder / "lake"), "work": str(self.folder / "work")},
            "input": {
                "path": str(self.folder / log), "format": "csv", "columns": NAMED, "user_type": "int",
                "users": {"path": str(self.folder / "people.csv"), "columns": {"age": {"from": "age", "type": "int"}}},
                "max_bad_fraction": 0.5,
            },
            "negatives": {"per_positive": 2, "draws": 1, "candidates": 3},
            "layout": {"min_files": 1},
            "model": {"name": "mf", "factors": 4},
            "loader": {"backend": "arrow"},
            "train": {"launcher": "none", "epochs": 1, "batch_size": 32, "device": "cpu", "warm_start": "previous"},
            "score": {"k": 3, "tasks": 2},
            "publish": {"require": []},
            "spark": {"master": "local[2]", "driver_memory": "1g", "shuffle_partitions": 2},
        }  # fmt: skip
        for section, values in more.items():
            tree[section] |= values
        return Config.model_validate(tree)

    def night(self, ds: str, users: range, *, extra: str = "", forget: bool = False) -> None:
        (self.folder / f"{ds}.csv").write_text(log_of(users) + extra)
        self.configs[ds] = self.config(f"{ds}.csv", input={"forget": self.listed} if forget else {})
        prepare(self.configs[ds], ds)


def at(manifest: Manifest, table: str) -> list[dict[str, Any]]:
    return [row for path in manifest.files(table) for row in pq.ParquetFile(path).read().to_pylist()]


AHEAD = range(1000, 1000 + USERS)


@pytest.fixture(scope="module")
def line(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """On 06-02 the log still holds GONE's rows, and two more with something wrong."""
    line = Line(tmp_path_factory.mktemp("line"))
    gone = "".join(f"{GONE},{100 + n},4,{FIRST_DAY + n}\n" for n in range(4))
    line.night(NIGHTS[0], AHEAD[:16], extra=gone)
    line.night(NIGHTS[2], AHEAD)
    line.night(NIGHTS[1], AHEAD[:20], extra=f"{gone}{GONE},100,x,1\n{GONE}\n", forget=True)
    return line


def test_a_night_forgets_a_person_and_counts_their_rows(line: Line) -> None:
    runs = [line.lake.stage(ds, "prepare").newest() for ds in NIGHTS]
    first, second = ({row["user_id"]: row["user_idx"] for row in at(run, "user_index")} for run in runs[:2])
    assert second.items() >= {(user, number) for user, number in first.items() if user != GONE}
    assert second.keys() == {*AHEAD[:20]}
    assert sorted(second.values()) == [number for number in range(21) if number != first[GONE]]
    facts = runs[1].facts
    assert facts["users"] == 21
    assert facts["rows"] == {
        "input": 20 * 5 + 1 + 4 + 2,
        "accepted": 20 * 5,
        "duplicates": 0,
        "quarantined": {"timestamp is not an integer": 1},
        "forgotten": 4 + 2,
    }
    assert facts["forgotten_users"] == 1
    assert facts["side_users"]["forgotten"] == 2
    assert {row["user_id"] for row in at(runs[1], "unseen_users")} == {5000, *AHEAD[20:]}
    assert no_trace(Path(runs[1].root))


def test_nights_that_fork_start_from_what_they_share(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """The right outcome of the case `fork`, of which 06-01 is trained too; and GONE's row on 06-02 starts afresh."""
    caplog.set_level("DEBUG", logger="ncf_dist")
    one, two, three = (train(line.configs[ds], ds) for ds in NIGHTS)
    for ds in NIGHTS[1:]:
        found = line.lake.stage(ds, "train").newest().inputs
        assert found["warm_start"] == one.extra["model_version"]
    assert f"not from the model of {NIGHTS[1]}: prepare run" in caplog.text
    assert three.extra["model_version"] != two.extra["model_version"]

    config = line.configs[NIGHTS[1]]
    first = {
        row["user_id"]: row["user_idx"] for row in at(line.lake.stage(NIGHTS[0], "prepare").newest(), "user_index")
    }
    torch.manual_seed(config.seed)
    fresh = build_model(config.model, 21, ITEMS).state_dict()["user.weight"]
    rows = load_model(read_bundle(two.outputs["bundle"])).state_dict()["user.weight"]
    assert torch.equal(rows[first[GONE]], fresh[first[GONE]]), "nothing of the person is left"
    assert not torch.equal(rows[first[1000]], fresh[first[1000]])

    score(config, NIGHTS[1])
    publish(config, NIGHTS[1])
    published = line.folder / "lake/recommendations"
    tables = [pq.ParquetFile(path).read() for path in published.rglob("*.parquet")]
    assert {user for table in tables for user in table["user_id"].to_pylist()} == {*AHEAD, 5000}
    for root in (published, *(Path(line.lake.stage(NIGHTS[1], stage).newest().root) for stage in ("train", "score"))):
        assert no_trace(root)
    assert not any(str(user) in caplog.text for user in (GONE, OFF_LOG))


def no_trace(root: Path) -> bool:
    """Whether no file below names a forgotten user: in plain text, or as a value of a Parquet file."""
    for path in root.rglob("*"):
        if path.suffix == ".parquet":
            text = json.dumps(pq.ParquetFile(path).read().to_pylist(), default=str)
        else:
            text = path.read_bytes().decode("latin-1") if path.is_file() else ""
        assert not any(str(user) in text for user in (GONE, OFF_LOG)), path
    return True
