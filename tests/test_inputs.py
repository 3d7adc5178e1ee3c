"""Finding input files: each once, links followed, nothing left out without a word."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path

import pytest

from ncf_dist import files
from ncf_dist.errors import InputError
from ncf_dist.files import read_bytes
from ncf_dist.inputs import input_files, listing


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for name in ("b.dat", "a.dat", "deep/c.dat", ".hidden.dat", "_SUCCESS", "_temporary/0/d.dat", ".trash/e.dat"):
        path = tmp_path / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "logs"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.dat", "b.dat", "deep/c.dat"]),
        ("a.dat", ["a.dat"]),
        ("*.dat", ["a.dat", "b.dat"]),
        ("*", ["a.dat", "b.dat", "deep/c.dat"]),
        ("[bc].dat", ["b.dat"]),
        ("d*p", ["deep/c.dat"]),
        ("**", ["a.dat", "b.dat", "deep/c.dat"]),
        ("**/*.dat", ["a.dat", "b.dat", "deep/c.dat"]),
    ],
)
def test_input_files_are_sorted_without_what_is_hidden(logs: Path, pattern: str, expected: list[str]) -> None:
    assert input_files(str(logs / pattern)) == [str(logs / name) for name in expected]


def test_a_hidden_folder_above_the_input_hides_nothing(logs: Path) -> None:
    (logs / "_temporary" / "d.dat").write_text("d")
    assert input_files(str(logs / "_temporary")) == [str(logs / "_temporary" / n) for n in ("0/d.dat", "d.dat")]
    assert input_files(str(logs / "_temporary" / "*.dat")) == [str(logs / "_temporary" / "d.dat")]


def test_input_files_may_be_relative_or_a_url(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(logs.parent)
    assert input_files("logs/a.dat") == input_files(f"file://{logs}/a.dat") == [str(logs / "a.dat")]
    folder = f"memory://{uuid.uuid4().hex}"
    files.write_bytes(f"{folder}/x.dat", b"x")
    assert [read_bytes(path) for path in input_files(folder)] == [b"x"]


@pytest.mark.parametrize(
    ("pattern", "what"),
    [("nothing.dat", "matches no file"), ("*.csv", "matches no file"), ("empty", "is an empty folder")],
)
def test_no_input_is_an_error_that_names_the_key(logs: Path, pattern: str, what: str) -> None:
    (logs / "empty").mkdir()
    (logs / "empty" / "_SUCCESS").write_text("")
    with pytest.raises(InputError, match=f"{what}; needed a file, a folder or a glob .*: set input.path"):
        input_files(str(logs / pattern))


# ---- links, names, what is hidden --------------------------------------------------------------------------


def test_links_to_files_and_folders_are_followed(logs: Path, tmp_path: Path) -> None:
    """A linked folder in a linked folder, a linked file, and by a glob, too."""
    store = tmp_path / "nas" / "feb"
    (store / "week").mkdir(parents=True)
    (store / "part.dat").write_text("part")
    (store / "week" / "w.dat").write_text("w")
    (tmp_path / "single.dat").write_text("single")
    (logs / "feb").symlink_to("../nas/feb")
    (logs / "one.dat").symlink_to(tmp_path / "single.dat")
    linked = ["feb/part.dat", "feb/week/w.dat", "one.dat"]
    assert input_files(str(logs)) == sorted(str(logs / n) for n in ["a.dat", "b.dat", "deep/c.dat", *linked])
    for pattern in ("f*b", "f*/*", "feb/**", "**/part.dat", "[f]eb/**/*"):
        assert set(input_files(str(logs / pattern))) <= {str(logs / n) for n in linked}
    assert input_files(str(logs / "**" / "*.dat")) == input_files(str(logs))


def test_a_link_into_itself_ends_and_a_file_is_read_once(logs: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = input_files(str(logs))
    (logs / "deep" / "up").symlink_to("..")
    (logs / "aaa").symlink_to("deep")
    (logs / "again.dat").symlink_to("a.dat")
    with caplog.at_level(logging.INFO):
        for path in (logs, logs / "**", logs / "*"):
            assert input_files(str(path)) == whole, "a file is named by its own path"
    assert "is a second way to" in caplog.text
    assert "are one file" in caplog.text


@pytest.mark.parametrize("name", ["gone", "gone.dat"])
def test_a_link_to_nothing_is_named(logs: Path, name: str) -> None:
    (logs / name).symlink_to("../nas/not-mounted")
    for path in (logs, logs / "*", logs / name):
        with pytest.raises(InputError, match=f"{name} is a link to ../nas/not-mounted, which is not there; needed"):
            input_files(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_named(logs: Path) -> None:
    (logs / "deep").chmod(0)
    try:
        with pytest.raises(InputError, match="deep cannot be listed"):
            input_files(str(logs))
    finally:
        (logs / "deep").chmod(0o755)


@pytest.mark.parametrize("name", ["log[2024].csv", "a?.csv", "st*r.csv", "_hidden.csv", ".hidden.csv"])
def test_a_name_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in (name, "log2.csv", "ab.csv", "stir.csv"):
        (tmp_path / other).write_text(other)
    assert input_files(str(tmp_path / name)) == [str(tmp_path / name)]
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.csv").write_text("x")
    assert input_files(str(tmp_path / name)) == [str(tmp_path / name / "x.csv")]


def test_what_a_folder_hides_is_known(logs: Path) -> None:
    hidden = {Path(path).relative_to(logs).as_posix() for path in listing(str(logs)).hidden}
    assert hidden == {".hidden.dat", ".trash", "_SUCCESS", "_temporary"}
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("x.dat", "_delta_log/0.json", "deep/.y"):
        files.write_bytes(f"{folder}/{name}", b"x")
    found = listing(folder)
    name = folder.removeprefix("memory://")
    assert [path.partition(name)[2] for path in found.hidden] == ["/_delta_log/0.json", "/deep/.y"]
    assert [path.partition(name)[2] for path in found.files] == ["/x.dat"]
