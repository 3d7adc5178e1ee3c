"""One thing that goes, and how it goes."""

from __future__ import annotations

import contextlib
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ncf_dist.clean import steps
from ncf_dist.files import remove
from ncf_dist.manifests import MANIFEST

Kind = Literal["run", "attempt", "checkpoints", "record", "night", "file", "entry"]
"""run: finished · attempt: one that died · checkpoints: of a finished training · record: what the jobs of an old night
said · night: a partition that leaves the published table, whose files go later · file: of the published table, in no
version that stays · entry: of its Delta log."""


@dataclass(frozen=True)
class Removal:
    kind: Kind
    path: str
    bytes: int

    def carry_out(self) -> None:
        """Remove it. A run ceases to exist before its files go: killed in between, it is one that died."""
        with contextlib.suppress(FileNotFoundError):  # Another clean was faster.
            if self.kind == "run":
                remove(posixpath.join(self.path, MANIFEST))
                steps.reached("unmade")
            remove(self.path)
        steps.reached("removed")


def totals(removals: Iterable[Removal]) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}}"""
    count, size = Counter[str](), Counter[str]()
    for removal in removals:
        count[removal.kind] += 1
        size[removal.kind] += removal.bytes
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in count}
