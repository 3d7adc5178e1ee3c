"""What travels to a cluster: Python with all packages, and this code; and the options of spark-submit that send them.

Executors find both in their working folder, under names that do not depend on where the driver has them. The packages
change with requirements.lock and are large: `make package` packs them (`pack.py`). The code is packed whenever a job is
submitted, so executors always run the driver's.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ncf_dist import __version__
from ncf_dist import config as settings
from ncf_dist.errors import ConfigError

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
ENVIRONMENT, CODE = "environment", "ncf-dist"
"""Folders in an executor's working folder."""
PYTHON = f"./{ENVIRONMENT}/bin/python"
IMAGE_PYTHON = "/opt/ncf-dist/.venv/bin/python"
"""Where conf/schedulers/Dockerfile has it."""
MOMENT = (1980, 1, 1, 0, 0, 0)
"""Of every file in a zip archive, so that the same code gives the same bytes."""
TRAVELS = ("spark-submit.sh", "requirements.lock", "LICENSE", "conf/**/*", "jobs/*.py", "ncf_dist/**/*")
"""What the archive of the code holds, of the folder that has ncf_dist in it: enough to submit from another machine."""
LEFT = ("__pycache__", ".pyc", ".cpp", "~")
"""Ends of names that stay. So do hidden files: a `.env`, what an editor keeps."""


def environment_archive() -> Path:
    return DIST / f"ncf-dist-env-{__version__}.tar.gz"


def code_archive() -> Path:
    return DIST / f"ncf-dist-jobs-{__version__}.zip"


def pack_code(path: Path, root: Path = ROOT) -> Path:
    """Write the archive of the code under `root` to `path`: the same files give the same bytes. Returns `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in _files(root):
            entry = zipfile.ZipInfo(str(file.relative_to(root)), MOMENT)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if file.suffix == ".sh" else 0o100644) << 16
            archive.writestr(entry, file.read_bytes())
    return path


def _files(root: Path) -> Iterator[Path]:
    for pattern in TRAVELS:
        for file in sorted(root.glob(pattern)):
            parts = file.relative_to(root).parts
            if file.is_file() and not any(part.endswith(LEFT) or part.startswith(".") for part in parts):
                yield file


def options(config: settings.Spark, master: str, deploy_mode: str | None, archives: str | None) -> list[str]:
    """What spark-submit gets so that executors find the environment as `config.environment` says.

    master, deploy_mode, archives: of the options so far; spark-submit takes the last --archives alone, so theirs are
    said again. Raises ConfigError where there is nothing to send, or nobody to send it to.
    """
    if config.environment == "image":
        return ["--conf", f"spark.pyspark.python={IMAGE_PYTHON}"]
    if config.environment in (None, "none"):
        return []
    if master.startswith("local"):
        raise ConfigError(
            f"spark.environment is archive (--cluster) and Spark's master is {master}, which runs in this environment; "
            "needed a cluster: leave spark.master out and give --master after --, or leave --cluster out"
        )
    sent = [f"{_environment(config)}#{ENVIRONMENT}", f"{_code()}#{CODE}", *([archives] if archives else [])]
    made = ["--archives", ",".join(sent), *_conf("spark.pyspark.python", PYTHON)]
    made += _conf("spark.executorEnv.PYTHONPATH", CODE)
    if deploy_mode == "cluster":
        for name, value in (("PYTHONPATH", CODE), ("PYSPARK_PYTHON", PYTHON), ("PYSPARK_DRIVER_PYTHON", PYTHON)):
            made += _conf(f"spark.yarn.appMasterEnv.{name}", value)
        made += _conf("spark.pyspark.driver.python", PYTHON)
    return made


def _conf(key: str, value: str) -> list[str]:
    return ["--conf", f"{key}={value}"]


def _environment(config: settings.Spark) -> str:
    """The archive's path or URL. Raises ConfigError where a local one is not there."""
    archive = config.environment_archive or str(environment_archive())
    if "://" not in archive and not Path(archive).is_file():
        raise ConfigError(
            f"the environment's archive {archive} is not there; needed it for spark.environment=archive (--cluster): "
            "run make package, or set spark.environment_archive to its path or URL"
        )
    return archive


@functools.cache
def _code() -> Path:
    """This code's archive, which lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="ncf-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pack_code(Path(folder) / code_archive().name)
