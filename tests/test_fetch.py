"""Job `fetch`: the synthetic log is the same bytes everywhere and has its answer planted; a download resumes and
is believed only by its checksum; hostile archives are refused and leave nothing behind."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import re
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from ncf_dist import files, last_line
from ncf_dist.config import Config, Fetch
from ncf_dist.errors import BusyRun, ConfigError, InputError
from ncf_dist.fetch import delivery, download, grouplens, pipeline, synthetic
from ncf_dist.fetch.lines import write_lines
from ncf_dist.fetch.titles import ADJECTIVES, GENRES, NOUNS

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = Fetch(users=300, items=200, clusters=5, mean_ratings_per_user=20)
RATINGS_SHA256 = "3fe3c3ef1ec603407f4d32708a3678f50be1edd5b800aba5f5fb9ae602e64cb1"
MOVIES_SHA256 = "d2f8061520b04d77f35633ae33cdc49a34a75c1581f43d323aab801f87632db8"
USERS_SHA256 = "fa9149063cb8d173bf6e3cf78c36eef1b39f8c082f85da07be0edbc4e56dfdf0"
"""Of the log SMALL with seed 1: a change here is a change of everybody's synthetic data."""
QUICK = download.Patience(attempts=2, pause=0.001, timeout=5.0)
FILES = {
    "ratings.dat": b"1::10::5::978300760\n1::20::3::978302109\n",
    "movies.dat": "10::Amélie (2001)::Comedy\n20::Heat (1995)::Crime\n".encode("latin-1"),
    "users.dat": b"1::F::1::10::48067\n",
    "README": b"licence\n",
}


# ---- synthetic ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log SMALL, as one file a table."""
    folder = tmp_path_factory.mktemp("small")
    pipeline.write_synthetic(spark, str(folder), SMALL, seed=1)
    return folder


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("::") for line in path.read_text(encoding="utf-8").splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_synthetic_log_has_the_same_bytes_on_every_machine(small: Path) -> None:
    found = [sha256(small / name) for name in ("ratings.dat", "movies.dat", "users.dat")]
    assert found == [RATINGS_SHA256, MOVIES_SHA256, USERS_SHA256]


@pytest.mark.parametrize("partitions", [1, 7])
def test_partitions_never_change_a_byte(spark: SparkSession, small: Path, tmp_path: Path, partitions: int) -> None:
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    try:
        ids = spark.range(SMALL.users).orderBy(-F.col("id")).repartition(partitions)
        rows = synthetic.ratings(ids, SMALL, 1)
        parts = write_lines(rows, str(tmp_path), "ratings.dat", 300, 90, ("user", "timestamp", "item"))
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", str(before))
    names = [f"ratings.dat/ratings-{file:05d}.dat" for file in range(4)]  # users 1-90, 91-180, 181-270, 271-300
    assert [part.path for part in parts] == names
    assert b"".join((tmp_path / name).read_bytes() for name in names) == (small / "ratings.dat").read_bytes()
    assert {row[0] for row in rows_of(tmp_path / names[1])} == {str(user) for user in range(91, 181)}
    assert [part.sha256 for part in parts] == [sha256(tmp_path / name) for name in names]
    assert sorted(p.name for p in (tmp_path / "ratings.dat").iterdir()) == [name.split("/")[1] for name in names]


def test_the_seed_changes_the_log(spark: SparkSession, small: Path) -> None:
    one = synthetic.ratings(spark.range(10), SMALL, 1).collect()
    two = synthetic.ratings(spark.range(10), SMALL, 2).collect()
    assert one != two


def test_layout_is_movielens_dat(small: Path) -> None:
    ratings, movies, users = (
        (small / name).read_text().splitlines() for name in ("ratings.dat", "movies.dat", "users.dat")
    )
    genre = "|".join(re.escape(name) for name in GENRES)
    assert all(re.fullmatch(r"\d+::\d+::[1-5]::\d{10}", line) for line in ratings)
    assert all(re.fullmatch(rf"\d+::The [^:]+ \((19|20)\d\d\)::({genre})", line) for line in movies)
    assert all(re.fullmatch(r"\d+::[MF]::(1|18|25|35|45|50|56)::(1?\d|20)::\d{5}", line) for line in users)
    assert [int(line.split("::")[0]) for line in movies] == list(range(1, 201))
    assert [int(line.split("::")[0]) for line in users] == list(range(1, 301))


def test_titles_tell_their_genre_and_differ(small: Path) -> None:
    movies = rows_of(small / "movies.dat")
    assert len({title.rsplit(" (", 1)[0] for _, title, _ in movies}) == 200
    assert all(any(noun in title for noun in NOUNS[genre]) for _, title, genre in movies)
    assert len({genre for _, _, genre in movies}) == SMALL.clusters


def test_more_clusters_than_genres_get_pairs_and_sequels_get_numbers(spark: SparkSession) -> None:
    many = Fetch(users=1, items=40 * 400, clusters=40, mean_ratings_per_user=5)
    rows = synthetic.movies(spark.range(many.items), many, 1).collect()
    assert len({row.genres for row in rows}) == 40
    titles = {row.title.rsplit(" (", 1)[0] for row in rows if row.genres == "Action"}
    assert len(titles) == 400
    assert sum(title.endswith(" 2") for title in titles) == 400 - len(ADJECTIVES) * 8


def test_item_ids_are_a_permutation(spark: SparkSession) -> None:
    for n in (1, 2, 12, 997, 1000):
        slots = spark.range(n).select(synthetic.item_id(n, F.col("id")).alias("item"))
        assert sorted(row.item for row in slots.collect()) == list(range(1, n + 1))


def test_pairs_are_unique_and_times_increase_and_end_before_2024(small: Path) -> None:
    rows = np.array(rows_of(small / "ratings.dat"), dtype=np.int64)
    user, item, _, time = rows.T
    assert len({(u, i) for u, i in zip(user, item, strict=True)}) == len(rows)
    assert (np.diff(user) >= 0).all()
    assert (np.diff(time)[np.diff(user) == 0] > 0).all()
    assert time.min() >= synthetic.BEGIN
    assert time.max() < synthetic.END
    assert item.min() >= 1
    assert item.max() <= SMALL.items


def test_activity_is_heavy_tailed_around_the_mean(small: Path) -> None:
    user = np.array([row[0] for row in rows_of(small / "ratings.dat")], dtype=np.int64)
    counts = np.bincount(user)[1:]
    assert len(counts) == SMALL.users
    assert counts.min() >= 5
    assert counts.max() <= SMALL.most_ratings_per_user
    assert abs(counts.mean() / SMALL.mean_ratings_per_user - 1) < 0.15
    assert np.median(counts) < 0.8 * counts.mean()
    assert counts.max() > 3 * counts.mean()


@pytest.mark.parametrize(
    ("items", "mean"),
    [(9, 5), (30, 18)],  # the smallest catalogues that 60 % rule allows for these means
)
def test_small_catalogues_stay_within_bounds(spark: SparkSession, items: int, mean: int) -> None:
    tiny = Fetch(users=50, items=items, clusters=3, mean_ratings_per_user=mean)
    rows = synthetic.ratings(spark.range(50), tiny, 1).collect()
    counts = np.bincount([row.user for row in rows])[1:]
    assert counts.max() <= items * 0.6
    assert counts.min() >= 3
    assert {row.item for row in rows} <= set(range(1, items + 1))


def test_the_planted_answer_beats_popularity(spark: SparkSession) -> None:
    """Leave-one-out by time, full catalogue: each user's favourite genre, by popularity, against plain popularity."""
    planted = Fetch(users=800, items=400, clusters=8, mean_ratings_per_user=40)
    frame = synthetic.ratings(spark.range(planted.users), planted, 1)
    rows = np.array([tuple(row) for row in frame.collect()], dtype=np.int64)
    user, item, rating, _ = rows[np.lexsort((rows[:, 3], rows[:, 0]))].T
    user, item = user - 1, item - 1
    genres = {r.item - 1: r.genres for r in synthetic.movies(spark.range(400), planted, 1).collect()}
    names = sorted(set(genres.values()))
    genre = np.array([names.index(genres[i]) for i in range(planted.items)])

    last = np.append(np.diff(user) > 0, True)
    seen = np.zeros((planted.users, planted.items), dtype=bool)
    seen[user[~last], item[~last]] = True
    popularity = np.bincount(item[~last], minlength=planted.items).astype(float)
    share = np.zeros((planted.users, planted.clusters))
    np.add.at(share, (user[~last], genre[item[~last]]), 1.0)
    favourite = share.argmax(axis=1)

    def ndcg(score: Any) -> float:
        masked = np.where(seen, -np.inf, score)
        rank = (masked > masked[np.arange(planted.users), item[last]][:, None]).sum(axis=1)
        return float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean())

    by_taste = ndcg((genre[None] == favourite[:, None]) * popularity.max() * 2 + popularity)
    assert by_taste > 2.5 * ndcg(popularity[None])

    liked = genre[item] == favourite[user]
    assert rating[liked].mean() > rating[~liked].mean() + 0.5
    assert set(rating) == {1, 2, 3, 4, 5}
    assert np.sort(popularity)[::-1][:40].sum() > 0.25 * popularity.sum()  # the top tenth: more than twice its share
    assert 0.4 < liked.mean() < 0.75


# ---- the job, synthetic ------------------------------------------------------------------------------------------


def config(tmp_path: Path, **fetch: Any) -> Config:
    tree = {
        "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
        "input": {"path": "unused"},
        "spark": {"shuffle_partitions": 2},
    }
    return Config.model_validate({**tree, "fetch": fetch})


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a finished fetch must start no Spark session and no download")


def test_synthetic_is_made_once(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config(tmp_path, **SMALL.model_dump(by_alias=True))
    outcome = pipeline.fetch(chosen, "2024-01-01")
    raw = tmp_path / "lake" / "raw" / "synthetic"
    assert outcome.status == "done"
    assert outcome.outputs == {table: str(raw / f"{table}.dat") for table in ("ratings", "movies", "users")}
    assert sha256(raw / "ratings.dat") == RATINGS_SHA256
    assert outcome.metrics["lines"] == {
        "ratings": len(rows_of(raw / "ratings.dat")),
        "movies": 200,
        "users": 300,
    }
    assert outcome.extra == {"format": "movielens-dat"}
    assert not (raw / ".staging").exists()

    monkeypatch.setattr(pipeline, "spark_session", _refuse)
    again = pipeline.fetch(chosen, "2024-01-02")
    assert (again.status, again.run_key, again.outputs) == ("already-done", outcome.run_key, outcome.outputs)
    for change in ({"fetch": chosen.fetch.model_copy(update={"users": 301})}, {"seed": 2}):
        with pytest.raises(AssertionError, match="must start no Spark"):
            pipeline.fetch(chosen.model_copy(update=change), "2024-01-01")
    (raw / "movies.dat").write_bytes(b"cut")
    with pytest.raises(AssertionError, match="must start no Spark"):
        pipeline.fetch(chosen, "2024-01-01")


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        ({"from": "some.zip"}, "fetch.from is 'some.zip' but fetch.dataset is synthetic"),
        ({"items": 5, "clusters": 6, "mean_ratings_per_user": 5}, "fetch.clusters is 6 with 5 items"),
        ({"items": 50, "mean_ratings_per_user": 31}, "needed at most 60 % of fetch.items, 30"),
    ],
)
def test_a_log_that_cannot_be_made_is_a_config_error(fetch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Fetch.model_validate(fetch)


# ---- archives ----------------------------------------------------------------------------------------------------


def zip_of(path: Path, files: dict[str, bytes], extra: Callable[[zipfile.ZipFile], None] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
        if extra:
            extra(zipped)
    return path


def in_folder(files: dict[str, bytes], folder: str = "ml-1m") -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def taken(tmp_path: Path, source: Path | str, dataset: str = "ml-1m", **more: Any) -> Any:
    return pipeline.fetch(config(tmp_path, dataset=dataset, **{"from": str(source)}, **more), "2024-01-01")


def left_behind(tmp_path: Path) -> list[str]:
    lake = tmp_path / "lake"
    return [str(p.relative_to(lake)) for p in lake.rglob("*") if p.name != ".lock" and p.is_file()]


@pytest.mark.parametrize("folder", ["", "ml-1m/"])
def test_a_zip_of_any_name_is_taken(tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    source = zip_of(tmp_path / "copy of it.zip", {folder + name: data for name, data in FILES.items()} | {"x/y/z": b""})
    with caplog.at_level(logging.WARNING):
        outcome = taken(tmp_path, source)
    raw = tmp_path / "lake" / "raw" / "ml-1m"
    assert outcome.status == "done"
    assert {name: (raw / name).read_bytes() for name in FILES} == FILES
    assert outcome.outputs["ratings"] == str(raw / "ratings.dat")
    assert outcome.metrics["lines"] == {"ratings": 2, "movies": 2, "users": 1}
    assert sorted(p.name for p in raw.iterdir()) == sorted([*FILES, ".lock", "manifest.json"])
    assert f"GroupLens publishes {grouplens.ARCHIVES['ml-1m'].md5}" in caplog.text
    assert taken(tmp_path, source).status == "already-done"


def test_a_zip_with_the_published_checksum_is_taken_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = zip_of(tmp_path / "a.zip", FILES)
    publish(monkeypatch, download.md5_of(str(source)))
    with caplog.at_level(logging.WARNING):
        taken(tmp_path, source)
    assert "MD5" not in caplog.text


def _member(name: str, mode: int = 0, data: bytes = b"x") -> Callable[[zipfile.ZipFile], None]:
    def add(zipped: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("placeholder")
        info.filename, info.external_attr, info.compress_type = name, mode << 16, zipfile.ZIP_DEFLATED
        zipped.writestr(info, data)

    return add


HOSTILE = {
    "traversal": (_member("ml-1m/../../evil"), "may lead out of the archive"),
    "traversal at the front": (_member("../evil"), "may lead out of the archive"),
    "backslash traversal": (_member("ml-1m\\evil"), "may lead out of the archive"),
    "NUL in the name": (_member("ml-1m/evil\0.dat"), "may lead out of the archive"),
    "absolute": (_member("/tmp/evil"), "has an absolute path"),
    "absolute backslash": (_member("\\evil"), "has an absolute path"),
    "drive letter": (_member("C:evil"), "has an absolute path"),
    "symlink": (_member("ml-1m/evil", stat.S_IFLNK | 0o777, b"/etc"), "is a link or a special file"),
    "device": (_member("ml-1m/evil", stat.S_IFCHR | 0o600), "is a link or a special file"),
    "ratio": (_member("ml-1m/evil", data=bytes(1_000_000)), "more than the 200 to 1 allowed"),
    "twice in another case": (_member("ML-1M/Ratings.dat"), "comes twice"),
    "in two folders": (_member("other/ratings.dat"), "holds ratings.dat in two folders"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path: Path, case: str) -> None:
    extra, message = HOSTILE[case]
    source = zip_of(tmp_path / "bad.zip", in_folder(FILES), extra)
    with pytest.raises(InputError, match=message) as caught:
        taken(tmp_path, source)
    assert "needed a zip as GroupLens publishes it" in str(caught.value)
    assert left_behind(tmp_path) == []
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "bad.zip", in_folder(FILES), lambda z: z.writestr("ml-1m/ratings.dat", b"other"))
    with pytest.raises(InputError, match="comes twice"):
        taken(tmp_path, source)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "a.zip", in_folder(FILES)).read_bytes())
    for found in re.finditer(b"PK\x01\x02", bytes(data)):
        data[found.start() + 8] |= 1  # bit 0 of the flags in the central directory
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(InputError, match="is encrypted"):
        taken(tmp_path, tmp_path / "bad.zip")
    assert left_behind(tmp_path) == []


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = zip_of(tmp_path / "a.zip", FILES)
    total = sum(map(len, FILES.values()))
    monkeypatch.setattr(grouplens, "MAX_BYTES", total - 1)
    with pytest.raises(InputError, match=f"unpacks to {total} bytes, more than the {total - 1} allowed"):
        taken(tmp_path, source)
    monkeypatch.setattr(grouplens, "MAX_BYTES", total)
    assert taken(tmp_path, source).status == "done"


def test_a_damaged_member_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as zipped:
        for name, data in FILES.items():
            zipped.writestr(name, data)
    data = (tmp_path / "a.zip").read_bytes().replace(b"1::20::3", b"1::20::4")
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged or not a zip.*CRC"):
        taken(tmp_path, tmp_path / "bad.zip")
    assert left_behind(tmp_path) == []
    assert not (tmp_path / "lake" / "raw" / "ml-1m" / ".staging").exists()


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", None])
def test_what_is_not_a_zip_is_refused(tmp_path: Path, data: bytes | None) -> None:
    whole = zip_of(tmp_path / "a.zip", FILES).read_bytes()
    (tmp_path / "bad.zip").write_bytes(whole[:-30] if data is None else data)
    with pytest.raises(InputError, match="damaged or not a zip"):
        taken(tmp_path, tmp_path / "bad.zip")


def test_a_zip_without_the_files_says_what_it_holds(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "a.zip", {"ml-1m/ratings.dat": b"", "deep/er/movies.dat": b""})
    with pytest.raises(InputError, match=r"holds ml-1m/ratings.dat, deep/er/movies.dat; needed ratings.dat and movies"):
        taken(tmp_path, source)


# ---- folders -----------------------------------------------------------------------------------------------------


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("below", [False, True])
def test_an_unpacked_folder_is_taken(tmp_path: Path, below: bool) -> None:
    folder = folder_of(tmp_path / "source" / "ml-1m", FILES | {"notes.txt": b"mine"})
    folder_of(tmp_path / "source" / "other", {"ratings.dat": b""})
    outcome = taken(tmp_path, folder.parent if below else folder)
    raw = tmp_path / "lake" / "raw" / "ml-1m"
    assert {name: (raw / name).read_bytes() for name in FILES} == FILES
    assert not (raw / "notes.txt").exists()
    assert outcome.metrics["lines"]["ratings"] == 2
    assert taken(tmp_path, folder).status == "already-done"
    (folder / "ratings.dat").write_bytes(b"1::10::5::978300761\n")
    assert taken(tmp_path, folder).status == "done"
    assert (raw / "ratings.dat").read_bytes() == b"1::10::5::978300761\n"


@pytest.mark.parametrize(
    ("dataset", "names", "form"),
    [
        ("ml-100k", ["u.data", "u.item"], "movielens-tsv"),
        ("ml-10m", ["ratings.dat", "movies.dat"], "movielens-dat"),
        ("ml-20m", ["ratings.csv", "movies.csv"], "movielens-csv"),
        ("ml-25m", ["ratings.csv", "movies.csv"], "movielens-csv"),
        ("ml-32m", ["ratings.csv", "movies.csv"], "movielens-csv"),
    ],
)
def test_the_other_datasets(tmp_path: Path, dataset: str, names: list[str], form: str) -> None:
    """As GroupLens packs them: tags, links and the genome are left where they are."""
    beside = ["tags.dat"] if form == "movielens-dat" else ["tags.csv", "links.csv", "genome-scores.csv"]
    folder = folder_of(tmp_path / "source", dict.fromkeys([*names, *beside], b"x\n"))
    outcome = taken(tmp_path, folder, dataset)
    assert not {path.name for path in Path(outcome.outputs["ratings"]).parent.iterdir()} & set(beside)
    assert [Path(outcome.outputs[table]).name for table in ("ratings", "movies")] == names
    assert outcome.extra == {"format": form}
    assert "users" not in outcome.outputs


def test_a_folder_without_the_files_says_what_it_holds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "source", {"u.data": b"", "u.item": b""})
    with pytest.raises(InputError, match=r"holds u.data, u.item; needed ratings.dat and movies.dat of ml-1m in it"):
        taken(tmp_path, folder)
    assert left_behind(tmp_path) == []


def test_two_folders_with_the_files_are_ambiguous(tmp_path: Path) -> None:
    folder_of(tmp_path / "source" / "a", FILES)
    folder_of(tmp_path / "source" / "b", FILES)
    with pytest.raises(InputError, match=r"set fetch\.from to the one you mean"):
        taken(tmp_path, tmp_path / "source")


def test_a_source_must_exist_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; needed a zip of GroupLens"):
        taken(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="needed a zip or a folder on this machine"):
        taken(tmp_path, "s3://bucket/ml-1m.zip")


# ---- delivery ----------------------------------------------------------------------------------------------------


def test_other_files_in_the_target_stay(tmp_path: Path) -> None:
    target = folder_of(tmp_path / "mine", {"thesis.tex": b"mine"})
    outcome = taken(tmp_path, folder_of(tmp_path / "source", FILES), to=str(target))
    assert outcome.outputs["ratings"] == str(target / "ratings.dat")
    assert (target / "thesis.tex").read_bytes() == b"mine"


def test_a_folder_of_parts_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "lake" / "raw" / "ml-1m"
    folder_of(target / "ratings.dat", {"ratings-00001.dat": b"of an earlier, larger log"})
    taken(tmp_path, folder_of(tmp_path / "source", FILES))
    assert (target / "ratings.dat").read_bytes() == FILES["ratings.dat"]


def test_a_target_outside_this_machine(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "source", FILES)
    outcome = taken(tmp_path, folder, to="memory://fetched/ml-1m")
    assert outcome.outputs["ratings"] == "memory://fetched/ml-1m/ratings.dat"
    assert files.read_bytes(outcome.outputs["ratings"]) == FILES["ratings.dat"]
    assert not files.exists("memory://fetched/ml-1m/.staging")
    assert taken(tmp_path, folder, to="memory://fetched/ml-1m").status == "already-done"


def test_killed_before_the_manifest_it_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "source", FILES)
    assert taken(tmp_path, folder).status == "done"
    (folder / "ratings.dat").write_bytes(b"1::10::5::978300761\n")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            taken(tmp_path, folder)
    assert not (tmp_path / "lake" / "raw" / "ml-1m" / "manifest.json").exists()
    assert taken(tmp_path, folder).status == "done"


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b'{"parts": [{}]}'])
def test_a_damaged_manifest_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    folder = folder_of(tmp_path / "source", FILES)
    taken(tmp_path, folder)
    (tmp_path / "lake" / "raw" / "ml-1m" / "manifest.json").write_bytes(damage)
    assert taken(tmp_path, folder).status == "done"


def test_what_a_killed_attempt_staged_is_not_delivered(tmp_path: Path) -> None:
    target = tmp_path / "lake" / "raw" / "ml-1m"
    folder_of(target / ".staging" / "ratings.dat", {"ratings-00000.dat": b"half"})
    taken(tmp_path, folder_of(tmp_path / "source", FILES))
    assert (target / "ratings.dat").read_bytes() == FILES["ratings.dat"]
    assert not (target / ".staging").exists()


def test_one_fetch_at_a_time(tmp_path: Path) -> None:
    folder, target = folder_of(tmp_path / "source", FILES), tmp_path / "lake" / "raw" / "ml-1m"
    target.mkdir(parents=True)
    with FileLock(target / ".lock"), pytest.raises(BusyRun, match="another fetch is writing"):
        taken(tmp_path, folder)
    assert taken(tmp_path, folder).status == "done"


def test_a_lake_or_target_that_cannot_be_written(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "source", FILES)
    (tmp_path / "lake").write_bytes(b"a file in its place")
    with pytest.raises(InputError, match=r"the lake .* cannot be written"):
        taken(tmp_path, folder)
    with pytest.raises(InputError, match=r"fetch to .* stopped: .*; needed .* a place it can write"):
        taken(tmp_path, folder, to=str(tmp_path / "source" / "users.dat" / "x"))


# ---- download ----------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `plan` holds what to do to the next requests: a status, or a number of bytes to cut after."""

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.plan, self.asked = (
            body,
            True,
            list[tuple[str, int]](),
            list[str | None](),
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        what, value = self.server.plan.pop(0) if self.server.plan else ("", 0)
        if what == "status":
            self.send_error(value)
            return
        body, start = self.server.body, 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            start = value if what == "shift" else start
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if what != "endless":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:value] if what == "cut" else body[start:])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, data in in_folder(FILES).items():
            zipped.writestr(name, data)
        zipped.writestr("ml-1m/links", np.random.default_rng(0).bytes(1_000_000))
    with Server(buffer.getvalue()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def got(server: Server, folder: Path, checksum: str | None = None) -> str:
    return download.download(f"{server.url}/ml-1m.zip", checksum or md5(server.body), str(folder), QUICK)


def publish(monkeypatch: pytest.MonkeyPatch, checksum: str, dataset: str = "ml-1m") -> None:
    known = grouplens.ARCHIVES[dataset]
    changed = grouplens.Archive(known.name, checksum, known.format, known.tables, known.extras)
    monkeypatch.setitem(grouplens.ARCHIVES, dataset, changed)


def test_download_then_unpack_then_leave_alone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, md5(server.body))
    monkeypatch.setattr(pipeline, "BASE_URL", server.url)
    chosen = config(tmp_path, dataset="ml-1m")
    outcome = pipeline.fetch(chosen, "2024-01-01")
    assert outcome.status == "done"
    assert Path(outcome.outputs["movies"]).read_bytes() == FILES["movies.dat"]
    assert not (tmp_path / "lake" / "raw" / "ml-1m" / "links").exists()
    monkeypatch.setattr(pipeline, "download", _refuse)
    assert pipeline.fetch(chosen, "2024-01-02").status == "already-done"
    assert len(server.asked) == 1


def test_a_download_that_is_there_is_not_repeated_and_a_bad_one_is(server: Server, tmp_path: Path) -> None:
    path = Path(got(server, tmp_path))
    assert path.read_bytes() == server.body
    got(server, tmp_path)
    assert len(server.asked) == 1
    path.write_bytes(b"damaged since")
    got(server, tmp_path)
    assert path.read_bytes() == server.body
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ml-1m.zip", "ml-1m.zip.lock"]


def test_a_cut_connection_is_continued(server: Server, tmp_path: Path) -> None:
    half = len(server.body) // 2
    server.plan = [("cut", half)]
    assert Path(got(server, tmp_path)).read_bytes() == server.body
    assert server.asked == [None, f"bytes={half}-"]


def test_attempts_are_counted_only_while_nothing_arrives(server: Server, tmp_path: Path) -> None:
    server.plan = [("cut", 100_000)] * 6  # more cuts than QUICK.attempts
    assert Path(got(server, tmp_path)).read_bytes() == server.body


def test_a_later_run_continues_an_earlier_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(server.body[:1000])
    assert Path(got(server, tmp_path)).read_bytes() == server.body
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "ml-1m.zip.part").write_bytes(server.body[:1000])
    assert Path(got(server, tmp_path)).read_bytes() == server.body
    assert server.asked == ["bytes=1000-"]


def test_a_server_that_sends_another_range_is_not_believed(server: Server, tmp_path: Path) -> None:
    server.plan = [("cut", 1000), ("shift", 2000)]
    assert Path(got(server, tmp_path)).read_bytes() == server.body
    assert server.asked == [None, "bytes=1000-", None]


def test_a_part_that_is_already_whole_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(server.body)
    assert Path(got(server, tmp_path)).read_bytes() == server.body


@pytest.mark.parametrize("stale", [b"of another file", b"longer" * 400_000])
def test_a_part_of_another_file_is_thrown_away(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(stale)
    assert Path(got(server, tmp_path)).read_bytes() == server.body
    assert server.asked == [f"bytes={len(stale)}-", None]


def test_a_wrong_checksum_is_refused_before_anything_is_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "0" * 32)
    monkeypatch.setattr(pipeline, "BASE_URL", server.url)
    with pytest.raises(InputError, match=f"came with MD5 {md5(server.body)} .*needed {'0' * 32}.*run the job again"):
        pipeline.fetch(config(tmp_path, dataset="ml-1m"), "2024-01-01")
    assert left_behind(tmp_path) == []
    assert [p.name for p in (tmp_path / "work" / "downloads").iterdir()] == ["ml-1m.zip.lock"]
    assert len(server.asked) == 1


@pytest.mark.parametrize("dataset", ["ml-25m", "ml-32m"])
def test_the_large_archives_are_downloaded_and_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    """As GroupLens packs them: a folder with tags, links and (25M) the genome. A zip that unpacks well and is another
    one is refused."""
    ratings, movies = b"userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n", b"movieId,title,genres\n296,x,y\n"
    beside = dict.fromkeys(["tags.csv", "links.csv", "genome-scores.csv", "genome-tags.csv"], b"x\n")
    files = in_folder({"ratings.csv": ratings, "movies.csv": movies} | beside, dataset)
    published = zip_of(tmp_path / "published.zip", files).read_bytes()
    other = zip_of(tmp_path / "other.zip", files | {f"{dataset}/ratings.csv": ratings.replace(b"5.0", b"0.5")})
    publish(monkeypatch, md5(published), dataset)
    monkeypatch.setattr(pipeline, "BASE_URL", server.url)
    server.body = other.read_bytes()
    with pytest.raises(InputError, match=rf"{dataset}\.zip came with MD5 {md5(server.body)} .*needed {md5(published)}"):
        pipeline.fetch(config(tmp_path, dataset=dataset), "2024-01-01")
    assert left_behind(tmp_path) == []
    server.body = published
    outcome = pipeline.fetch(config(tmp_path, dataset=dataset), "2024-01-01")
    assert Path(outcome.outputs["ratings"]).read_bytes() == ratings
    assert not {path.name for path in Path(outcome.outputs["ratings"]).parent.iterdir()} & set(beside)
    assert outcome.extra == {"format": "movielens-csv"}


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.plan = [("status", 503), ("cut", 1000), ("status", 429)]
    assert Path(got(server, tmp_path / "a")).read_bytes() == server.body
    server.plan, server.asked = [("status", 404)], []
    with pytest.raises(InputError, match=r"refused by the server \(404"):
        got(server, tmp_path / "b")
    assert len(server.asked) == 1


def test_it_gives_up_and_keeps_what_arrived(server: Server, tmp_path: Path) -> None:
    server.plan = [("cut", 500_000), ("status", 500), ("status", 500), ("status", 500)]
    with pytest.raises(InputError, match=r"2 attempts in a row brought nothing; 500,000 bytes are kept in .*\.part"):
        got(server, tmp_path)
    assert (tmp_path / "ml-1m.zip.part").read_bytes() == server.body[:500_000]


def test_nobody_answers(tmp_path: Path) -> None:
    with Server(b"") as closed:
        url = closed.url
    with pytest.raises(InputError, match=r"could not be downloaded.*set fetch.from to a copy of the zip"):
        download.download(f"{url}/ml-1m.zip", "0" * 32, str(tmp_path), QUICK)


def test_a_server_that_sends_for_ever_is_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 300_000)
    server.plan = [("endless", 0)]
    with pytest.raises(InputError, match="sends more than 300,000 bytes"):
        got(server, tmp_path)


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    with FileLock(tmp_path / "ml-1m.zip.lock"), pytest.raises(BusyRun, match="another fetch is writing"):
        got(server, tmp_path)


def test_progress_is_logged_where_there_is_no_terminal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        got(server, tmp_path)
    assert re.search(r"ml-1m\.zip\.part: 0\.3 of 1\.0 MB", caplog.text)
    assert "1.0 MB received" in caplog.text


def test_the_published_checksums() -> None:
    assert {name: archive.md5 for name, archive in grouplens.ARCHIVES.items()} == {
        "ml-100k": "0e33842e24a9c977be4e0107933c0723",
        "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
        "ml-10m": "ce571fd55effeba0271552578f2648bd",
        "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
        "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
        "ml-32m": "d472be332d4daa821edc399621853b57",
    }


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_job_prints_one_json_line(tmp_path: Path) -> None:
    folder_of(tmp_path / "source", FILES)
    (tmp_path / "c.yaml").write_text(
        "paths: {lake: lake}\ninput: {path: unused}\nfetch: {dataset: ml-1m, from: source}\n"
    )
    command = [sys.executable, str(REPOSITORY / "jobs" / "fetch.py"), "--config", "c.yaml"]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["outputs"]["ratings"] == str(tmp_path / "lake" / "raw" / "ml-1m" / "ratings.dat")
    (tmp_path / "source" / "movies.dat").unlink()
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 3
    assert "needed ratings.dat and movies.dat" in last_line.read(failed.stdout.splitlines()[-1])["error"]
