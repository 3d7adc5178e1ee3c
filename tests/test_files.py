"""Which files a log is: chosen by format, none left out in silence, none read that a table has given up."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from ncf_dist.config import SideTable
from ncf_dist.errors import InputError
from ncf_dist.prepare.columns import side_files, side_source
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import InputFiles, find_files
from tests.test_spellings import an_input, read

CSV = "u,i,r,t\n"


def found(path: Path | str, form: str = "csv") -> InputFiles:
    return find_files(str(path), FORMATS[form], form)


def names(files: InputFiles, root: Path) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in files.paths]


# ---- chosen and left out -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for name in ("log/jan.csv", "log/FEB.CSV", "log/mar.csv.gz", "log/apr.tsv", "log/README.md", "log/_may.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CSV)
    return tmp_path / "log"


@pytest.mark.parametrize("pattern", ["", "*", "**", "[!_]*"])
def test_what_is_left_out_is_named_and_counted(mixed: Path, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    files = found(mixed / pattern)
    assert names(files, mixed) == ["FEB.CSV", "jan.csv", "mar.csv.gz"]
    assert [record.levelname for record in caplog.records][:1] == ["WARNING"]
    assert "2 files left out, not of format csv (*.csv): apr.tsv" in caplog.text
    hidden = not pattern
    assert ("1 file left out, hidden by . or _: _may.csv" in caplog.text) == hidden
    assert len(files.left_out) == 2 + hidden


def test_papers_and_companions_are_left_out_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ratings.dat", "movies.dat", "tags.dat", "README", "users.dat"):
        (tmp_path / name).write_text("")
    with caplog.at_level(logging.INFO):
        files = found(tmp_path, "movielens-dat")
    assert names(files, tmp_path) == ["ratings.dat"]
    assert len(files.left_out) == 4
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_many_left_out_are_named_in_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(30):
        (tmp_path / f"{n:02}.log").write_text("")
    (tmp_path / "a.csv").write_text(CSV)
    assert len(found(tmp_path).left_out) == 30
    assert "30 files left out" in caplog.text
    assert "09.log and 20 more" in caplog.text
    assert "10.log" not in caplog.text


def test_a_glob_whose_files_have_no_ending_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("part-0", "part-1", "other"):
        (tmp_path / name).write_text(CSV)
    assert names(found(tmp_path / "part-*"), tmp_path) == ["part-0", "part-1"]
    with pytest.raises(InputError, match=r"holds other, part-0, part-1: no file of format csv in .*; needed \*.csv"):
        found(tmp_path)


def test_a_glob_of_nothing_but_companions_is_none(tmp_path: Path) -> None:
    (tmp_path / "tags.dat").write_text("1::2::x::3\n")
    for path in (tmp_path, tmp_path / "*.dat"):
        with pytest.raises(InputError, match="holds tags.dat: no file of format movielens-dat"):
            found(path, "movielens-dat")


def test_a_linked_file_that_two_paths_reach_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").symlink_to("a.csv")
    files = find_files([str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), str(tmp_path)], FORMATS["csv"], "csv")
    assert names(files, tmp_path) == ["a.csv"]


# ---- GroupLens' folders ------------------------------------------------------------------------------------

RATING = {"dat": "1::11::3.5::978300760\n", "csv": "userId,movieId,rating,timestamp\n1,11,3.5,978300760\n"}
FOLDERS = {
    "ml-10M100K": ("movielens-dat", "dat", ["movies", "tags"]),
    "ml-20m": ("movielens-csv", "csv", ["movies", "tags", "links", "genome-scores", "genome-tags"]),
    "ml-25m": ("movielens-csv", "csv", ["movies", "tags", "links", "genome-scores", "genome-tags"]),
    "ml-32m": ("movielens-csv", "csv", ["movies", "tags", "links"]),
}


@pytest.mark.parametrize("dataset", FOLDERS)
def test_of_a_whole_folder_of_grouplens_the_ratings_are_read(tmp_path: Path, dataset: str) -> None:
    form, ending, others = FOLDERS[dataset]
    folder = tmp_path / dataset
    folder.mkdir()
    (folder / f"ratings.{ending}").write_text(RATING[ending])
    for name in others:
        (folder / f"{name}.{ending}").write_text(
            "1::9001::5::1\n" if ending == "dat" else "userId,movieId,tag\n1,9001,x\n"
        )
    title = {"dat": "11::Amélie (2001)::Comedy\n", "csv": "movieId,title,genres\n11,Amélie (2001),Comedy\n"}[ending]
    (folder / f"movies.{ending}").write_text(title, encoding="utf-8")
    (folder / "README.html").write_text("")
    rows, rejects = read(tmp_path, an_input(folder, format=form))
    assert (rows, rejects) == ([(1, 11, 3.5, 978300760 * 10**6)], [])
    side = SideTable(path=str(folder))
    movies = side_source("items", side, form, side_files("items", side, form))
    assert [Path(path).name for path in movies.files] == [f"movies.{ending}"]
    assert not movies.latin1, "MovieLens 10M is UTF-8, although its format is that of 1M"


def test_titles_of_movielens_1m_are_latin_1(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_bytes("11::Amélie (2001)::Comedy\n".encode("latin-1"))
    side = SideTable(path=str(tmp_path / "movies.dat"))
    assert side_source("items", side, "movielens-dat", side_files("items", side, "movielens-dat")).latin1


# ---- tables ------------------------------------------------------------------------------------------------


def log_of(users: range) -> pa.Table:
    count = len(users)
    return pa.table({"u": list(users), "i": [1] * count, "r": [3] * count, "t": [1_711_213_454] * count})


def users_of(tmp_path: Path, path: Path | str) -> list[int]:
    rows, rejects = read(tmp_path, an_input(path, format="parquet"))
    assert rejects == []
    return sorted(row[0] for row in rows)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """Users 0 to 5; 1 was erased: its rows are still in a file."""
    root = tmp_path / "my lög"
    write_deltalake(str(root), log_of(range(6)))
    DeltaTable(str(root)).delete("u = 1")
    return root


def test_what_a_delta_table_deleted_stays_deleted(tmp_path: Path, delta: Path) -> None:
    assert len(list(delta.glob("*.parquet"))) == 2
    files = found(delta, "parquet")
    assert len(files.paths) == 1
    assert files.versions == {str(delta): 1}
    assert users_of(tmp_path, delta) == [0, 2, 3, 4, 5]
    assert users_of(tmp_path, f"{delta}/") == users_of(tmp_path, delta / "*.parquet") == [0, 2, 3, 4, 5]


def test_its_version_is_part_of_what_names_a_run(delta: Path) -> None:
    before = found(delta, "parquet").fingerprint()
    assert before["delta"] == {str(delta): 1}
    table = DeltaTable(str(delta))
    table.alter.set_table_properties({"delta.appendOnly": "false"})
    assert found(delta, "parquet").fingerprint() == before | {"delta": {str(delta): 2}}


def test_a_file_that_a_table_gave_up_is_refused_by_name(tmp_path: Path, delta: Path) -> None:
    [live] = found(delta, "parquet").paths
    [dead] = {str(path) for path in delta.glob("*.parquet")} - {live}
    assert users_of(tmp_path, live) == [0, 2, 3, 4, 5]
    with pytest.raises(
        InputError, match=r"is not a live file of the Delta table .*my lög \(version 1\).* input.path=.*lög"
    ):
        found(dead, "parquet")


def test_tables_beside_plain_files_and_in_folders_below(tmp_path: Path, delta: Path) -> None:
    """A folder may hold plain files, tables, and partitions of tables that are reached by their own path."""
    top = tmp_path / "top"
    (top / "plain").mkdir(parents=True)
    pq.write_table(log_of(range(100, 102)), top / "plain" / "a.parquet")
    shutil.move(delta, top / "deep" / "table")
    assert users_of(tmp_path, top) == [0, 2, 3, 4, 5, 100, 101]
    (tmp_path / "link").symlink_to(top / "deep")
    assert users_of(tmp_path, tmp_path / "link") == [0, 2, 3, 4, 5]


def test_partition_columns_are_those_of_the_log(tmp_path: Path) -> None:
    root = tmp_path / "table"
    for day, value in (("2024-03-23", "a b"), ("2024-03-24", "z/é%"), ("2024-03-25", None)):
        part = pa.table({"u": [1], "day": pa.array([day]).cast(pa.date32()), "shop": pa.array([value], pa.string())})
        write_deltalake(str(root), part, mode="append", partition_by=["day", "shop"])
    DeltaTable(str(root)).delete("day = '2024-03-23'")
    columns = {"user": "u", "item": "shop", "timestamp": "day"}
    rows, rejects = read(tmp_path, an_input(root, format="parquet", columns=columns))
    assert rows == [(1, "z/é%", 1.0, 1_711_238_400 * 10**6)]
    assert rejects == [(0, "item id is null")]
    below = root / "day=2024-03-23"
    assert below.is_dir()
    with pytest.raises(InputError, match=r"no file of the Delta table .*table at version 3 is live here; needed"):
        found(below, "parquet")
    assert len(found(root / "day=2024-03-24", "parquet").paths) == 1


@pytest.mark.parametrize("name", ["_ds", ".ds"])
def test_a_partition_column_may_have_a_hidden_name(tmp_path: Path, name: str) -> None:
    root = tmp_path / "table"
    write_deltalake(str(root), log_of(range(3)).append_column(name, pa.array(["x"] * 3)), partition_by=[name])
    assert users_of(tmp_path, root) == [0, 1, 2]


def commit(root: Path, version: int, *actions: dict[str, Any]) -> None:
    (root / "_delta_log" / f"{version:020}.json").write_text("".join(json.dumps(a) + "\n" for a in actions))


def protocol(*features: str) -> dict[str, Any]:
    writer = {"minWriterVersion": 7, "writerFeatures": list(features)}
    return {"protocol": {"minReaderVersion": 3, "readerFeatures": list(features)} | writer}


def meta(root: Path, **configuration: str) -> dict[str, Any]:
    lines = (root / "_delta_log" / f"{0:020}.json").read_text().splitlines()
    [action] = [json.loads(line) for line in lines if "metaData" in line]
    action["metaData"]["configuration"] = configuration
    return dict(action)


def test_deletion_vectors_and_column_mapping_are_refused_by_name(tmp_path: Path, delta: Path) -> None:
    commit(delta, 2, protocol("deletionVectors"))
    assert users_of(tmp_path, delta) == [0, 2, 3, 4, 5], "permitted, but not used"
    mapped = tmp_path / "mapped"
    shutil.copytree(delta, mapped)
    commit(mapped, 3, protocol("columnMapping"), meta(delta, **{"delta.columnMapping.mode": "name"}))
    with pytest.raises(
        InputError, match=r"input.path: the Delta table .*mapped .* uses column mapping|cannot be read by"
    ):
        found(mapped, "parquet")
    [live] = found(delta, "parquet").paths
    inline = "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"
    vector = {"storageType": "i", "pathOrInlineDv": inline, "sizeInBytes": 40, "cardinality": 6}
    size = Path(live).stat().st_size
    add = {
        "path": quote(Path(live).name),
        "partitionValues": {},
        "size": size,
        "modificationTime": 0,
        "dataChange": True,
    }
    commit(delta, 3, {"add": add | {"deletionVector": vector, "stats": '{"numRecords": 5}'}})
    with pytest.raises(InputError, match="uses deletion vectors|cannot be read by its log"):
        found(delta, "parquet")


def test_a_table_whose_log_is_damaged_is_not_read_as_plain_files(delta: Path) -> None:
    (delta / "_delta_log" / f"{0:020}.json").write_text("{")
    with pytest.raises(InputError, match="my lög cannot be read by its log .*; needed a table that delta-rs opens"):
        found(delta, "parquet")


def test_a_live_file_that_is_lost_is_an_error(tmp_path: Path, delta: Path) -> None:
    [live] = found(delta, "parquet").paths
    Path(live).unlink()
    with pytest.raises(InputError, match="No such file"):
        users_of(tmp_path, delta)


@pytest.mark.parametrize(
    ("kind", "mark"), [("Iceberg", "metadata/00001-abc.metadata.json"), ("Hudi", ".hoodie/hoodie.properties")]
)
def test_tables_of_other_formats_are_refused_by_name(tmp_path: Path, kind: str, mark: str) -> None:
    """The folder itself, one below it, one above it, a glob, a file."""
    root = tmp_path / "log" / "table"
    (root / mark).parent.mkdir(parents=True)
    (root / mark).write_text("{}")
    (root / "data").mkdir()
    pq.write_table(log_of(range(3)), root / "data" / "a.parquet")
    for path in (root, root.parent, root / "data", root / "data" / "*.parquet", root / "data" / "a.parquet"):
        with pytest.raises(InputError, match=f"input.path: {root} is a table of Apache {kind}.*; needed plain Parquet"):
            found(path, "parquet")


def test_a_folder_that_only_has_such_a_name_is_plain(tmp_path: Path) -> None:
    (tmp_path / "log" / "metadata").mkdir(parents=True)
    (tmp_path / "log" / "metadata" / "a.json").write_text("{}")
    pq.write_table(log_of(range(3)), tmp_path / "log" / "a.parquet")
    assert users_of(tmp_path, tmp_path / "log") == [0, 1, 2]
