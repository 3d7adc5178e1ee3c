"""What others read while nights are published, taken back and cleaned, and publishers at once: real processes.

Readers open the table by its Delta log, and by latest.json, over and over. Each snapshot must be whole nights. The same
readers over files that are overwritten in place do see torn nights, so they would notice.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable

from ncf_dist.clean.pipeline import clean
from ncf_dist.config import Config
from ncf_dist.publish.log import DeltaLog
from ncf_dist.stage import LINE
from tests.killing import KILLED, Killer, Run, killer
from tests.published import Night, good

READER = """
import json, os, sys, time
from urllib.parse import unquote

import pyarrow.parquet as pq
from deltalake import DeltaTable

root, how, stop, rows = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def models(paths):
    tables = [pq.read_table(path, columns=["model_version"], partitioning=None) for path in paths]
    return [model for table in tables for model in table["model_version"].to_pylist()]

def whole(paths, model=None):
    found = models(paths)
    return len(found) == rows and len(set(found)) == 1 and model in (None, found[0])

def by_delta():
    nights = {}
    for uri in DeltaTable(root).file_uris():
        path = unquote(uri)
        nights.setdefault(path.split("/ds=")[1][:10], []).append(path)
    return all(whole(paths) for paths in nights.values())

def by_latest():
    named = json.loads(open(os.path.join(root, "latest.json")).read())
    return whole([os.path.join(root, path) for path in named["files"]], named["model_version"])

while not os.path.exists(stop):
    try:
        print("whole" if {"delta": by_delta, "latest": by_latest}[how]() else "torn", flush=True)
    except Exception as error:
        print("error", type(error).__name__, " ".join(str(error).split())[:200], flush=True)
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[Killer]:
    with killer(*(f"tests.quick_nights:{job}" for job in ("nightly", "clean", "rollback", "publish"))) as made:
        yield made


class Readers:
    """Processes that read until they are told to stop."""

    def __init__(self, root: Path, stop: Path, *hows: str) -> None:
        self.stop = stop
        self._said: list[str] = []
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(root), how, str(stop), str(len(good()))],
                stdout=subprocess.PIPE,
                text=True,
            )
            for how in hows
        ]

    def wait_for(self, reads: int) -> None:
        """Until each has read so often again."""
        for process in self._processes:
            assert process.stdout is not None
            self._said += [process.stdout.readline().strip() for _ in range(reads)]

    def end(self) -> Counter[str]:
        """How often what was seen."""
        self.stop.touch()
        while self._processes:
            self._said += self._processes.pop().communicate()[0].splitlines()
        return Counter(self._said)


@contextlib.contextmanager
def reading(night: Night, *hows: str) -> Iterator[Readers]:
    readers = Readers(night.table, night.root / "stop", *hows)
    try:
        yield readers
    finally:
        readers.end()


def cleaning(night: Night) -> Config:
    """As little is kept as a reader may rely on."""
    retention = {"versions": 7, "nights": 7, "days": 0, "published": None}
    return Config.model_validate({**night.config.model_dump(), "retention": retention})


def changes(root: Path, rounds: int, reads: int) -> tuple[Counter[str], Counter[str]]:
    """(what readers saw, what was done) while two nights were published, backfilled, taken back and cleaned. reads: at
    least so many between two changes, by each reader."""
    night, older = Night(root), Night(root, "2026-01-30")
    for each in (night, older):
        each.prepare()
        each.offer("m0")
        each.publish()
    done = Counter[str]()
    with reading(night, "delta", "latest") as readers:
        for number in range(1, rounds + 1):
            each = older if number % 4 == 3 else night
            each.offer(f"m{number}")
            assert each.publish()[0] == "done"
            done["published"] += 1
            if number % 3 == 0:
                assert each.rollback().status == "done"
                done["rolled back"] += 1
            if number % 5 == 0:
                clean(cleaning(night), night.ds)
                done["cleaned"] += 1
            readers.wait_for(reads)
        return readers.end(), done


def test_readers_see_whole_nights_whatever_happens(tmp_path: Path) -> None:
    seen, done = changes(tmp_path, 6, 2)
    assert set(seen) == {"whole"}, seen
    assert seen["whole"] >= 6 * 2 * 2
    assert done == {"published": 6, "rolled back": 2, "cleaned": 1}, "all that may happen to a night"


@pytest.mark.soak
def test_readers_see_whole_nights_for_long(tmp_path: Path) -> None:
    seen, done = changes(tmp_path, 120, 5)
    print(dict(seen), dict(done))
    assert set(seen) == {"whole"}, seen
    assert seen["whole"] >= 1_000
    assert done["published"] + done["rolled back"] + done["cleaned"] >= 100


@pytest.mark.parametrize("how", ["delta", "latest"])
def test_the_same_readers_see_nights_torn_that_are_overwritten_in_place(tmp_path: Path, how: str) -> None:
    night = Night(tmp_path)
    night.prepare()
    night.offer("m1")
    night.publish()
    mine = [night.table / path for path in night.latest()["files"]]
    night.offer("m2")
    run = night.lake.stage(night.ds, "score").find("s2")
    assert run is not None
    with reading(night, how) as readers:
        readers.wait_for(2)
        for path, other in zip(mine, run.files("recommendations"), strict=True):
            path.write_bytes(Path(other).read_bytes())
            readers.wait_for(2)
        seen = readers.end()
    assert seen["torn"] + sum(count for what, count in seen.items() if what.startswith("error")) > 0
    assert seen["whole"] > 0


# ---- publishers at once ----------------------------------------------------------------------------------------------


PUBLISHERS = 4


def races(root: Path, processes: Killer, rounds: int, same: bool) -> int:
    """Each round, four publishers meet right before their commits, so that all have looked at the same version; the
    number of winners. same: all of one ds, each from a lake of its own with the table of the first."""
    shared = Night(root / "lake-0", "2026-01-01")
    shared.prepare()
    shared.offer("m0")
    shared.publish()
    wanted, winners = {shared.ds: "m0"}, 0
    for number in range(1, rounds + 1):
        nights = []
        for who in range(PUBLISHERS):
            ds = f"2026-02-{number:02d}" if same else f"2026-{who + 2:02d}-{number:02d}"
            night = Night(root / (f"lake-{who}" if same else "lake-0"), ds)
            night.prepare()
            night.offer(f"m{number}{who}")
            if not night.table.exists():
                night.table.symlink_to(shared.table)
            nights.append(night)
        folder = root / f"meeting-{number}"
        folder.mkdir()
        meeting = (str(folder), PUBLISHERS)
        codes, _ = processes.at_once([Run("publish", n.config, n.ds, "committing", meeting=meeting) for n in nights])
        assert sorted(codes) == [0, 5, 5, 5], codes
        winner = codes.index(0)
        wanted[nights[winner].ds] = f"m{number}{winner}"
        winners += 1
        assert DeltaTable(str(shared.table)).version() == number
        assert nights[winner].latest()["ds"] == max(wanted)
    assert {p["ds"] for p in DeltaTable(str(shared.table)).partitions()} == wanted.keys()
    for ds, model in wanted.items():
        assert Night(root / "lake-0", ds).read() == sorted(good(model)), "no update is lost"
    assert len(DeltaLog(str(shared.table)).live()) == 2 * len(wanted)
    return winners


@pytest.mark.parametrize("same", [False, True])
def test_of_publishers_at_once_one_wins(tmp_path: Path, processes: Killer, same: bool) -> None:
    assert races(tmp_path, processes, 2, same) == 2


@pytest.mark.soak
@pytest.mark.parametrize("same", [False, True])
def test_of_publishers_at_once_one_wins_each_time(tmp_path: Path, processes: Killer, same: bool) -> None:
    assert races(tmp_path, processes, 25, same) == 25


# ---- nightly, clean and rollback at once -----------------------------------------------------------------------------

DAYS = ("2026-01-29", "2026-01-30", "2026-01-31")
LAWFUL = {"nightly": {0, 5}, "clean": {0}, "rollback": {0, 3, 5}}
"""How each may end beside the others: done · 3, nothing to undo, or cleaned away · 5, another holds the night, or was
faster."""


def configured(night: Night, model: int) -> Config:
    retention = {"versions": 7, "nights": 3, "days": 0, "published": None}
    return Config.model_validate({**night.config.model_dump(), "seed": model, "retention": retention})


def at_once(root: Path, processes: Killer, rounds: int, seed: int) -> Counter[str]:
    """Each round a whole night, a clean and a rollback are three live processes, one of which may be killed; how each
    ended. Readers see whole nights, and what a night or a rollback said it did is there."""
    rng, ended, longest = random.Random(seed), Counter[str](), 0.0
    nights = {ds: Night(root, ds) for ds in DAYS}
    offered = {ds: [1] for ds in DAYS}
    for ds, night in nights.items():
        longest = max(longest, processes.run("nightly", configured(night, 1), ds)[1])
        assert night.read() == sorted(good("m1"))
    for number in range(2, rounds + 2):
        mine, other = rng.choice(DAYS), rng.choice(DAYS)
        before = {ds: night.read() for ds, night in nights.items()}
        offered[mine].append(number)
        config = configured(nights[mine], number)
        jobs = {"nightly": mine, "clean": mine, "rollback": other}
        dying = rng.choice([*jobs, None])
        delays = {job: rng.uniform(0, 2 * longest) if job == dying else None for job in jobs}
        codes, _ = processes.at_once([Run(job, config, ds, delay=delays[job]) for job, ds in jobs.items()])
        found = dict(zip(jobs, codes, strict=True))
        for job, code in found.items():
            assert code in LAWFUL[job] or (code == KILLED and job == dying), found
            ended[f"{job} {code}"] += 1
        assert_whole(nights, offered)
        now = {ds: night.read() for ds, night in nights.items()}
        if found["nightly"] == 0 and (other != mine or found["rollback"] not in (0, KILLED)):
            assert now[mine] == sorted(good(f"m{number}")), "a night that is done is what readers see"
        for ds in DAYS:
            if ds not in (mine, other):
                assert now[ds] == before[ds], "nobody asked for a change of this night"
    for ds, night in nights.items():
        assert processes.run("nightly", configured(night, rounds + 2), ds)[0] == 0
        assert night.read() == sorted(good(f"m{rounds + 2}"))
    assert nights[DAYS[-1]].latest()["model_version"] == f"m{rounds + 2}"
    assert processes.run("clean", configured(night, 1), DAYS[0])[0] == 0
    assert [path.name for path in night.table.rglob("*.tmp")] == []
    return ended


def assert_whole(nights: dict[str, Night], offered: dict[str, list[int]]) -> None:
    """Every night is one model's, every version that stays has its files, and every run those that it was made from."""
    for ds, night in nights.items():
        assert night.read() in ([], *(sorted(good(f"m{model}")) for model in offered[ds]))
    delta, lake = DeltaLog(str(night.table)), night.lake
    newest = delta.opened().version()
    for version in range(max(0, newest - 6), newest + 1):
        assert all((night.table / path).exists() for path in delta.live(version)), version
    for ds in nights:
        for stage in LINE:
            for run in lake.stage(ds, stage).finished():
                assert all(lake.stage(ds, above).find(str(run.inputs[above])) for above in LINE[stage].builds_on)


def test_a_night_a_clean_and_a_rollback_at_once_leave_a_whole_lake(tmp_path: Path, processes: Killer) -> None:
    assert sum(at_once(tmp_path, processes, 4, 1).values()) == 4 * 3


@pytest.mark.soak
def test_nights_cleans_and_rollbacks_at_once_leave_a_whole_lake_for_long(tmp_path: Path, processes: Killer) -> None:
    ended = at_once(tmp_path, processes, 200, 2)
    print(dict(ended))
    assert min(ended["nightly 0"], ended["clean 0"], ended["rollback 0"]) > 50
