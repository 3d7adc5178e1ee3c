"""Whether one index begins with another, so that a model's rows still belong to the same users and items.

Indexes are append-only: an index that extends its base keeps the base's numbers, so whatever a run's `inputs.index`
leads to, step by step, is the beginning of its own index. A forgotten user (input.forget) is missing from later
indexes, but the number is never given again: the others' numbers still agree. Where no step leads to the other index
(manifests were cleaned away, or the model is from elsewhere), the content decides: `prepare` stores a digest of each
index, and a reader computes that of the first n numbers of a longer one, a file at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from ncf_dist.contracts import ITEM_INDEX, USER_INDEX
from ncf_dist.errors import ContractError
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest, read_manifest
from ncf_dist.parquet import read_table
from ncf_dist.sampling import hash64

if TYPE_CHECKING:
    from ncf_dist.bundle import Bundle

INDEXES = {"users": USER_INDEX, "items": ITEM_INDEX}
"""The tables of a prepare run that number users and items, by the facts that hold their sizes."""
DIGESTS = "index_digests"
"""The fact that holds the digest of each, by the same names."""


class Sizes(NamedTuple):
    """How many numbers have been given: more than there are users where some were forgotten."""

    users: int
    items: int

    def within(self, other: Sizes) -> bool:
        return self.users <= other.users and self.items <= other.items


_Count = Annotated[int, Field(ge=0, lt=2**31)]
"""Indexes are int32."""


@dataclass(frozen=True)
class _SaidSizes:
    users: _Count | None = None
    items: _Count | None = None


def index_sizes(prepare: Manifest) -> Sizes:
    """Of the two indexes of a run. Raises ContractError for facts that are no sizes."""
    # Only a hand-made manifest has no such facts, and nobody was forgotten there.
    rows = {name: prepare.tables[table].rows for name, table in INDEXES.items() if table in prepare.tables}
    said = prepare.facts_as(_SaidSizes)
    return Sizes(*(rows.get(name, 0) if of is None else of for name, of in vars(said).items()))


@dataclass(frozen=True)
class Index:
    """The numbers that one prepare run gave. ds: None where a bundle does not say; digests: empty likewise."""

    run_key: str
    ds: str | None
    sizes: Sizes
    digests: dict[str, str]

    @classmethod
    def of_run(cls, prepare: Manifest) -> Index:
        return cls(prepare.run_key, prepare.ds, index_sizes(prepare), dict(prepare.facts.get(DIGESTS, {})))

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Index:
        """The index that the rows of the model are numbered by. Raises ContractError where the bundle does not say."""
        facts = bundle.facts
        if not isinstance(facts.get("prepare_run"), str):
            raise ContractError(
                f"bundle {bundle.path} does not say which prepare run it was trained on; needed one that the job "
                "train has made: train it again"
            )
        sizes = Sizes(bundle.n_users, bundle.n_items)
        return cls(facts["prepare_run"], facts.get("ds"), sizes, dict(facts.get(DIGESTS) or {}))

    def is_of(self, run: Manifest) -> bool:
        """Whether `run` gave these numbers: it is the run, or its index has the same content."""
        other = Index.of_run(run)
        same_run = self.run_key == other.run_key and self.ds in (None, other.ds)
        return self.sizes == other.sizes and (same_run or (bool(self.digests) and self.digests == other.digests))

    def __str__(self) -> str:
        of = f" of {self.ds}" if self.ds else ""
        return f"prepare run {self.run_key}{of} ({self.sizes.users:,} users, {self.sizes.items:,} items)"


class Line:
    """A prepare run and the runs whose indexes it extends, step by step. Manifests are read when they are asked for."""

    def __init__(self, lake: Lake, prepare: Manifest) -> None:
        self.lake, self.prepare = lake, prepare
        self._runs = [prepare]
        self._ended: str | None = None
        """Why the steps end; None while there may be more."""

    def runs(self) -> Iterator[Manifest]:
        """The run itself, then the one that its index extends, and so on."""
        at = 0
        while at < len(self._runs) or self._step():
            yield self._runs[at]
            at += 1

    def _step(self) -> bool:
        """Read one run more."""
        last = self._runs[-1]
        base = last.inputs.get("index")
        if self._ended is not None:
            return False
        if base is None:
            self._ended = f"the first of these indexes is that of {Index.of_run(last)}"
            return False
        found: Manifest | None = None
        with contextlib.suppress(ContractError):
            found = read_manifest(self.lake.stage(base["ds"], "prepare").run_path(base["run_key"]))
        if found is None or found.ds >= last.ds:
            self._ended = f"prepare run {base['run_key']} of {base['ds']}, which comes before them, cannot be read"
            return False
        self._runs.append(found)
        return True

    def objection(self, index: Index) -> str | None:
        """Why this run's index does not begin with `index`, or None where it does."""
        if not index.sizes.within(index_sizes(self.prepare)):
            return f"{index} has more than {Index.of_run(self.prepare)}"
        for run in self.runs():
            if index.is_of(run):
                return None
            if not index.sizes.within(index_sizes(run)):
                break  # What comes before it is smaller still.
        if self._same_content(index):
            return None
        more = f"; {self._ended}" if self._ended else ""
        content = "neither do its numbers agree with them" if index.digests else "it has no digest to compare"
        return f"{Index.of_run(self.prepare)} does not extend {index}, and {content}{more}"

    def _same_content(self, index: Index) -> bool:
        tables = self.prepare.tables
        return index.digests.keys() == INDEXES.keys() and all(
            table in tables and digest_of(self.prepare.files(table), size) == index.digests[name]
            for (name, table), size in zip(INDEXES.items(), index.sizes, strict=True)
        )

    def check(self, index: Index, what: str) -> None:
        """Raise ContractError unless this run's index begins with `index`, that of the model `what` names."""
        if (why := self.objection(index)) is not None:
            raise ContractError(
                f"{what}: its rows may belong to other users and items: {why}; needed a model whose prepare run "
                "tonight's index extends: set train.warm_start=previous, name such a bundle, or start afresh"
            )


# ---- the content of an index ------------------------------------------------------------------------------------


def digest_of(files: Iterable[str], size: int) -> str:
    """Digest of the entries below `size` of the index table in `files`."""
    return joined(partial_digest(read_table(path), size) for path in files)


def partial_digest(entries: pa.Table, size: int | None = None) -> tuple[int, int]:
    """(entries, sum of their hashes modulo 2^64) of some rows (id, number) of an index: the sums of the parts of an
    index add up, in whatever files and order they are. size: only numbers below it."""
    ids, numbers = entries.column(0), entries.column(1).to_numpy().astype(np.int64)
    kept = np.flatnonzero(numbers < (2**31 if size is None else size))
    values = ids.to_numpy()[kept]
    if values.dtype != np.int64:
        from pandas.util import hash_array  # Ranks import this module, and need no pandas.

        values = hash_array(values.astype(object), categorize=False).view(np.int64)
    hashed = np.asarray(hash64(values, numbers[kept]), dtype=np.int64)
    return len(kept), int(hashed.sum()) % 2**64


def joined(parts: Iterable[tuple[int, int]]) -> str:
    """The digest of an index, from those of its parts."""
    entries, total = 0, 0
    for count, part in parts:
        entries, total = entries + count, (total + part) % 2**64
    return f"{entries:x}-{total:016x}"
