"""A process that compiles nothing does not load torch's compiler.

torch.optim, DistributedDataParallel and many operations on the device `meta` import torch._dynamo, to keep the compiler
off functions of theirs. That takes longer than the import of torch itself: one to two seconds of processor time in
every rank, and in every Python worker of Spark that loads a model. `leave_out` puts a module in its place which does
for them what theirs does where nothing is compiled. Who asks for anything else gets the real one, which is then loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "torch._dynamo"


def leave_out() -> None:
    """From now on this process has no compiler until it asks for one; nothing happens where it has one already."""
    if NAME not in sys.modules:
        sys.modules[NAME] = module = _Eager(NAME)
        module.__spec__, module.__path__ = ModuleSpec(NAME, None, is_package=True), []
        # A list of its own: another thread may be going through the one that is there.
        sys.meta_path = [_Parts(), *sys.meta_path]


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Inside, as after `leave_out`. Afterwards the compiler is there for whoever asks; functions of torch that asked
    inside never do again."""
    before = sys.modules.get(NAME)
    leave_out()
    try:
        yield
    finally:
        if before is None:
            _put_back()


class _Eager(ModuleType):
    """The compiler's functions that torch calls where nothing is compiled."""

    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    @staticmethod
    def graph_break(*_: object) -> None:
        """Ends a graph, of which there is none."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """A function that is never compiled."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(), name)


class _Parts:
    """Finds the compiler's own modules while it is left out: by loading it whole."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{NAME}."):
            return None
        _real()
        return ModuleSpec(name, _Loaded(importlib.import_module(name)))


class _Loaded(Loader):
    """Gives a module that was loaded meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """It has been."""


def _real() -> ModuleType:
    _put_back()
    return importlib.import_module(NAME)


def _put_back() -> None:
    if isinstance(sys.modules.get(NAME), _Eager):
        del sys.modules[NAME]
        sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _Parts)]
