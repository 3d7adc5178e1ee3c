"""The doctor's judgement: what must fail fails, names what is needed and what to do, and decides the exit
code.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ncf_dist import contracts, last_line, machine
from ncf_dist.config import Config, Train
from ncf_dist.doctor import checks, places, programs
from ncf_dist.doctor.check import Check
from ncf_dist.doctor.pipeline import doctor
from ncf_dist.doctor.versions import WINDOW, versions
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo

tomllib: Any = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
specifiers: Any = importlib.import_module("packaging.specifiers")
REPO = Path(__file__).parents[1]
GIB = 1024**3


def config(root: Path, **sections: dict[str, Any]) -> Config:
    tree = {
        "paths": {"lake": str(root / "lake"), "work": str(root / "work")},
        "input": {"path": str(root / "log.dat")},
    }
    return Config.model_validate(tree | sections)


def named(found: Any, name: str) -> Check:
    return next(check for check in found if check.name == name)


def fake_java(folder: Path, version: str) -> Path:
    path = folder / "bin" / "java"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
    path.chmod(0o755)
    return folder


# ---- versions ----------------------------------------------------------------------------------------------


def test_the_window_is_that_of_pyproject() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = {"python": specifiers.SpecifierSet(project["requires-python"])}
    for requirement in project["dependencies"]:
        name = requirement.split(">=")[0].split("==")[0]
        wanted[name] = specifiers.SpecifierSet(requirement[len(name) :])
    assert wanted.keys() == WINDOW.keys()
    for name, (least, below) in WINDOW.items():
        assert least in wanted[name]
        assert (below is None) == ("9999" in wanted[name])
        assert below is None or below not in wanted[name]


@pytest.mark.parametrize(
    ("name", "found", "status"),
    [
        ("pyarrow", "14.0.2", "ok"),
        ("pyarrow", "14.0.0", "fail"),
        ("pyarrow", "15.0.0", "fail"),
        ("numpy", "1.26.4", "ok"),
        ("numpy", "2.0.0", "fail"),
        ("pyspark", "3.5.1", "ok"),
        ("pyspark", "4.1.0", "fail"),
        ("petastorm", "0.13.1", "ok"),
        ("petastorm", "0.12.1", "fail"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "1.13.1", "fail"),
        ("deltalake", "0.25.5", "fail"),
    ],
)
def test_versions_are_compared_as_numbers(name: str, found: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: found)
    check = named(versions(), name)
    assert check.status == status
    if status == "fail":
        least, below = WINDOW[name]
        assert str(check) == f"FAIL {name} {found}: needed >={least},<{below}: run make install"


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert {check.name for check in versions() if check.status == "fail"} == WINDOW.keys() - {"python"}


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9, 18), "fail"), ((3, 10, 2), "ok"), ((3, 11, 9), "ok"), ((3, 12, 0), "fail")],
)
def test_python_itself_has_a_window(version: tuple[int, ...], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    check = next(versions())
    assert (check.name, check.status) == ("python", status)


# ---- Java --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("1.8.0_392", "fail"),
        ("11.0.22", "fail"),
        ("17.0.15", "ok"),
        ("21", "ok"),
        ("21.0.5", "ok"),
        ("22.0.1", "fail"),
    ],
)
def test_java_is_17_to_21(version: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", version)))
    check = checks.java()
    assert check.status == status
    assert version in check.detail


def test_java_home_goes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = fake_java(tmp_path / "old", "11.0.1"), fake_java(tmp_path / "new", "17.0.1")
    monkeypatch.setenv("PATH", f"{new / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert str(checks.java()) == "ok   java 17.0.1"
    monkeypatch.setenv("JAVA_HOME", str(old))
    assert "11.0.1" in str(checks.java())
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    assert str(checks.java()).startswith(f"FAIL java not found at JAVA_HOME={tmp_path / 'none'}: needed Java 17 to 21")


# ---- memory, cores, devices --------------------------------------------------------------------------------


def prepared(root: Path, users: int, items: int) -> None:
    """A prepare run of which only the row counts are looked at."""
    runs = Lake(str(root / "lake")).stage("2026-01-31", "prepare")
    tables = {
        name: TableInfo(name, "", (FileInfo("part-00000-000.parquet", rows, 1, 1, ""),))
        for name, rows in (("user_index", users), ("item_index", items))
    }
    runs.finish(
        Manifest(
            stage="prepare",
            ds="2026-01-31",
            run_key="p1",
            root=runs.begin("p1"),
            config={},
            inputs={},
            tables=tables,
            facts={},
        )
    )


def test_memory_counts_the_driver_and_the_model_of_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, dict[str, Any]] = {
        "spark": {"driver_memory": "1g"},
        "train": {"ranks": 2},
        "model": {"name": "gmf", "factors": 16},
    }
    prepared(tmp_path, users=3 * 1024**2, items=1024**2)
    # (3 Mi + 1 Mi) rows x 16 floats x 4 bytes = 256 MiB; with gradients and two moments 1 GiB a rank
    needed = 1 * GIB + 2 * GIB
    monkeypatch.setattr(machine, "memory_available", lambda: needed)
    assert checks.memory(config(tmp_path, **sections)).status == "ok"
    monkeypatch.setattr(machine, "memory_available", lambda: needed - 1)
    check = checks.memory(config(tmp_path, **sections))
    assert check.status == "fail"
    assert "needed about 3.0 GiB (driver 1.0 GiB + model 2.0 GiB): lower spark.driver_memory" in check.detail


def test_memory_without_a_prepared_night_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: GIB)
    assert checks.memory(config(tmp_path)).status == "ok"
    assert checks.memory(config(tmp_path, spark={"driver_memory": "1025m"})).status == "fail"
    monkeypatch.setattr(machine, "memory_available", lambda: None)
    assert checks.memory(config(tmp_path)).status == "warn"


@pytest.mark.parametrize(
    ("master", "ranks", "slots", "rank"),
    [
        ("local[2]", 2, "ok", "ok"),
        ("local[*]", 3, "ok", "warn"),
        ("local", 1, "ok", "ok"),
        ("local[4]", 1, "warn", "ok"),
        (None, 1, "ok", "ok"),
        ("yarn", 1, "ok", "ok"),
    ],
)
def test_slots_are_compared_with_cores(
    master: str, ranks: int, slots: str, rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(programs, "gpus", lambda: 0)
    chosen = config(tmp_path, spark={"master": master}, train={"ranks": ranks})
    assert [check.status for check in checks.slots(chosen.spark, chosen.train)] == [slots, rank]


@pytest.mark.parametrize(
    ("device", "ranks", "seen", "status", "used"),
    [
        ("auto", 2, 0, "ok", "the CPU"),
        ("auto", 2, 1, "ok", "the CPU"),
        ("auto", 2, 2, "ok", "CUDA"),
        ("cpu", 1, 1, "ok", "the CPU"),
        ("cuda", 2, 1, "fail", "train.ranks=1"),
    ],
)
def test_cuda_needs_a_gpu_for_every_rank(
    device: str,
    ranks: int,
    seen: int,
    status: str,
    used: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "gpus", lambda: seen)
    check = checks.gpu(config(tmp_path, train={"device": device, "ranks": ranks}).train)
    assert check.status == status
    assert used in check.detail


def test_a_step_that_was_not_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "COMPILED", tmp_path)
    missing = checks.compiled(Train())
    assert (missing.status, "install g++" in missing.detail) == ("warn", True)
    assert checks.compiled(Train(compiled=False)).status == "ok"
    for build in ("avx512", "avx2"):
        (tmp_path / f"_neumf_step_{build}.cpython-311-x86_64-linux-gnu.so").touch()
    assert str(checks.compiled(Train())) == "ok   compiled steps of gmf, mlp and neumf on a CPU: avx2, avx512"


def test_gpus_are_counted_from_the_driver_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA X (UUID: a)'\necho 'GPU 1: NVIDIA X (UUID: b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert programs.gpus() == 2


# ---- places ------------------------------------------------------------------------------------------------


def test_disk_must_hold_the_tables_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.dat").write_bytes(b"x" * 20_000)
    # at most 1,000 rows of 20 bytes; 2 + 4 x 4 columns of train and 6 others, 4 bytes each
    needed = GIB + 1_000 * 24 * 4
    monkeypatch.setattr(machine, "disk_free", lambda path: needed)
    assert {check.status for check in places.disk(config(tmp_path))} == {"ok"}
    monkeypatch.setattr(machine, "disk_free", lambda path: needed - 1)
    assert [check.status for check in places.disk(config(tmp_path))] == ["fail", "ok"]
    monkeypatch.setattr(machine, "disk_free", lambda path: GIB - 1)
    assert [check.status for check in places.disk(config(tmp_path))] == ["fail", "fail"]


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert machine.disk_free(str(tmp_path / "not" / "yet")) > 0


def test_places_that_cannot_be_written_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    chosen = config(tmp_path, paths={"lake": str(tmp_path / "file" / "lake"), "work": str(tmp_path / "file" / "work")})
    for check in (places.lake(chosen.paths), places.work(chosen.paths)):
        assert (check.status, check.place) == ("fail", "data")
        assert str(tmp_path / "file") in check.detail
    good = config(tmp_path)
    assert (places.lake(good.paths).status, places.work(good.paths).status) == ("ok", "ok")


def test_a_lake_on_an_unknown_file_system_fails(tmp_path: Path) -> None:
    assert places.lake(config(tmp_path, paths={"lake": "nosuch://bucket/lake"}).paths).status == "fail"


def test_an_input_that_is_not_there_yet_is_a_warning(tmp_path: Path) -> None:
    section = {"path": str(tmp_path / "log.dat"), "items": str(tmp_path / "movies.dat")}
    for check in places.inputs(config(tmp_path, input=section)):
        assert check.status == "warn"
        assert "run fetch" in check.detail
    (tmp_path / "log.dat").write_text("1::2::3::4\n")
    assert [str(check) for check in places.inputs(config(tmp_path))] == [
        "ok   input 1 file, 11 B",
        "ok   items none in the config: items have no titles",
    ]


def test_an_input_that_cannot_be_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.dat").write_text("1::2::3::4\n")

    def refuse(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(places, "filesystem", refuse)
    check = next(places.inputs(config(tmp_path)))
    assert (check.status, check.place) == ("fail", "data")


def test_a_standalone_master_must_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert [
            c.status for c in checks.master(config(tmp_path, spark={"master": f"spark://127.0.0.1:{port}"}).spark)
        ] == ["ok"]
    assert [c.status for c in checks.master(config(tmp_path, spark={"master": f"spark://127.0.0.1:{port}"}).spark)] == [
        "fail"
    ]
    assert list(checks.master(config(tmp_path, spark={"master": "local[2,4]"}).spark)) == []


# ---- the job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        (["environment"], ConfigError, "1 of 2 checks failed: a1 is wrong"),
        (["data"], InputError, "1 of 2 checks failed: a1 is wrong"),
        (["data", "environment"], ConfigError, "2 of 3 checks failed: a1 is wrong; a2 is wrong"),
    ],
)
def test_failures_are_counted_and_decide_the_exit_code(
    kinds: list[Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [
        Check("a0", "warn", "is odd"),
        *(Check(f"a{i}", "fail", "is wrong", place) for i, place in enumerate(kinds, 1)),
    ]
    monkeypatch.setattr("ncf_dist.doctor.pipeline.examine", lambda config: iter(found))
    with pytest.raises(error) as caught:
        doctor(config(tmp_path), "2026-01-31")
    assert str(caught.value) == message
    assert capsys.readouterr().err.splitlines()[:2] == ["warn a0 is odd", "FAIL a1 is wrong"]


def test_the_job_reports_every_check_without_importing_what_it_checks(tmp_path: Path) -> None:
    (tmp_path / "log.dat").write_text("1::2::3::4\n")
    (tmp_path / "conf.yaml").write_text(json.dumps(config(tmp_path).model_dump(mode="json", by_alias=True)))
    packages = ("torch", "petastorm", "pyspark", "deltalake")
    heavy = f"print([m for m in {packages} if m in sys.modules], file=sys.stderr)"
    code = f"import sys; from ncf_dist.cli import main; done = main(['doctor', *sys.argv[1:]]); {heavy}; sys.exit(done)"
    env = {k: v for k, v in os.environ.items() if k != "JAVA_HOME"} | {
        "PYTHONPATH": str(REPO),
        "JAVA_HOME": str(fake_java(tmp_path / "jdk", "17.0.15")),
    }
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "conf.yaml")]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    report = last_line.read(ran.stdout.splitlines()[-1])
    assert (ran.returncode, report["status"]) == (0, "done"), ran.stderr
    assert {"name": "java", "status": "ok", "detail": "17.0.15"} in report["checks"]
    assert "ok   java 17.0.15" in ran.stderr.splitlines()
    assert ran.stderr.splitlines()[-1] == "[]"
    assert contracts.HISTORY.name not in report["outputs"]
