"""The versions that work together. Looked up without importing the packages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

from ncf_dist.doctor.check import Check

WINDOW = {
    "python": ("3.10", "3.12"),
    "deltalake": ("1.6.6", "2"),
    "filelock": ("3.12", None),
    "fsspec": ("2024.2", None),
    "jinja2": ("3.1", None),
    "numpy": ("1.26", "2"),
    "pandas": ("2.1", "3"),
    "petastorm": ("0.13.1", "0.13.2"),
    "psutil": ("5.9", None),
    "pyarrow": ("14.0.1", "15"),
    "pydantic": ("2.12", "3"),
    "pyspark": ("3.5", "4.1"),
    "pyyaml": ("6", None),
    "safetensors": ("0.4", None),
    "torch": ("2.13", "3"),
    "tqdm": ("4.66", None),
}
"""Package to (at least, below): pyproject.toml's ranges, which a test compares."""


def versions() -> Iterator[Check]:
    for name, (least, below) in WINDOW.items():
        needed = f">={least}" + (f",<{below}" if below else "")
        try:
            found = ".".join(str(part) for part in sys.version_info[:3]) if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", f"is not installed: needed {needed}: run make install")
            continue
        good = _numbers(found) >= _numbers(least) and (below is None or _numbers(found) < _numbers(below))
        yield (Check(name, "ok", found) if good else Check(name, "fail", f"{found}: needed {needed}: run make install"))


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release.group().split(".")] if release else [0]
    return tuple(numbers + [0] * (4 - len(numbers)))
