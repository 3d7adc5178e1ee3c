"""The compiled libraries, each the speed of something that torch's operations compute, too.

setuptools compiles them at installation, where there is a compiler (pyproject.toml).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

log = logging.getLogger(__name__)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of a module's full name; None where it was not compiled."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError as error:
        log.warning("%s cannot be loaded (%s): torch's operations are used; run make -B install", spec.origin, error)
        return None
