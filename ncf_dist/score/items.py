"""Which items may be recommended: the config's lists, as the catalogue's indexes.

The lists go to the workers as they were given, and each worker computes the indexes from the catalogue, which it reads
anyway. So the driver holds the lists and one file of the item index, not the catalogue.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.config import Score
from ncf_dist.errors import InputError
from ncf_dist.files import resolve
from ncf_dist.inputs import ids_digest, listed_ids
from ncf_dist.parquet import read_table

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ItemLists:
    """Ids as text. allow: None for every item. facts: of each list that is given, its file, length and digest."""

    allow: pa.Array | None = None
    deny: pa.Array | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Score) -> ItemLists:
        """Raises InputError where a file cannot be read."""
        facts: dict[str, Any] = {}
        lists: dict[str, pa.Array] = {}
        for name, given in (("allow_items", config.allow_items), ("deny_items", config.deny_items or None)):
            if given is None:
                continue
            ids = listed_ids(given)
            path = resolve(given) if isinstance(given, str) else None
            facts[name] = {"path": path, "ids": len(ids), "sha256": ids_digest(ids)}
            lists[name] = pa.array(ids, pa.string())
        return cls(lists.get("allow_items"), lists.get("deny_items"), facts)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What of the lists decides the table."""
        return {name: fact["sha256"] for name, fact in self.facts.items()}

    def may(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        """Which of these items may be recommended."""
        allowed = np.ones(len(ids), dtype=bool) if self.allow is None else _among(ids, self.allow)
        return allowed if self.deny is None else allowed & ~_among(ids, self.deny)

    def eligible(self, ids: pa.Array, known: int) -> IntArray | None:
        """Ascending indexes of the items that may be recommended, None for all. ids: (I,) by item_idx, of which the
        model knows the first ones, `known` of them."""
        allowed = self.may(ids)
        allowed[known:] = False
        return None if allowed.all() else np.flatnonzero(allowed)

    def count(self, item_files: Iterable[str], known_items: int) -> dict[str, Any]:
        """Facts of the lists against the catalogue: `eligible` items, of those below `known_items`; and of each list
        the `unknown` ids, which are logged. Raises InputError where nothing may be recommended."""
        eligible, known = 0, dict.fromkeys(self.facts, 0)
        for path in item_files:
            table = read_table(path)
            ids = table["item_id"].combine_chunks()
            eligible += int((self.may(ids) & (table["item_idx"].to_numpy() < known_items)).sum())
            for name in known:
                known[name] += int(_among(ids, self.allow if name == "allow_items" else self.deny).sum())
        facts = {name: fact | {"unknown": fact["ids"] - known[name]} for name, fact in self.facts.items()}
        for name, fact in facts.items():
            if fact["unknown"]:
                log.warning(
                    "score.%s: %d of %d ids are of no item in the catalogue", name, fact["unknown"], fact["ids"]
                )
        if not eligible:
            raise InputError(
                "score.allow_items and score.deny_items leave no item ("
                + ", ".join(f"{name}: {fact['ids']} ids, {fact['unknown']} unknown" for name, fact in facts.items())
                + "); needed at least one item of the catalogue: correct the lists"
            )
        return {"eligible": eligible, **facts}


def _among(ids: pa.Array, texts: pa.Array) -> npt.NDArray[np.bool_]:
    return pc.is_in(ids.cast(pa.string()), value_set=texts).to_numpy(zero_copy_only=False)
