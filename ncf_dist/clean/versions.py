"""What stays of the published table: the newest versions, those that readers were still shown lately, and all that they
and latest.json need. The nights that it holds: the latest ones.

A file goes when no such version has it. An entry of the log goes when a checkpoint that is old enough (`checkpoint`)
stands for it and it explains no night of a version that stays.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote

from deltalake import DeltaTable

from ncf_dist.clean.removal import Removal
from ncf_dist.config import Retention
from ncf_dist.contracts import PARTITION
from ncf_dist.files import list_names, sizes, takes_conditions
from ncf_dist.publish.log import DeltaLog, Entry

LOG = "_delta_log"
ENTRY = re.compile(r"(\d{20})\.json")
CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
_NIGHT = re.compile(rf"{PARTITION}=(\d{{4}}-\d\d-\d\d)")
DROPPED = "ncf.dropped"
"""The fact of a commit that takes a night out of the table, which says why."""
UNLOCKED_SECONDS = 86_400
"""Age at which a file goes in a store without locks, where a publication may be under way: it takes minutes."""


class Published:
    """The published table as it is now."""

    def __init__(self, delta: DeltaLog, table: DeltaTable, retention: Retention, before: float) -> None:
        """before: seconds since 1970; a version that was replaced after that stays."""
        self.delta, self.table, self.retention, self.before = delta, table, retention, before
        self.newest = int(table.version())
        self.logged = sizes(posixpath.join(delta.root, LOG))
        """Files of the log by name."""

    @classmethod
    def open(cls, delta: DeltaLog, retention: Retention, before: float) -> Published | None:
        """None where nothing is published. Raises ContractError where the log is damaged."""
        table = delta.open()
        return None if table is None else cls(delta, table, retention, before)

    def versions_of(self, names: re.Pattern[str]) -> list[int]:
        return sorted(int(found[1]) for name in self.logged if (found := names.fullmatch(name)))

    @property
    def first(self) -> int:
        """The oldest version that can still be read."""
        return 0 if 0 in self.versions_of(ENTRY) else min(self.versions_of(CHECKPOINT), default=0)

    @functools.cached_property
    def oldest(self) -> int:
        """The oldest version that stays. One that took an old night out counts with the one before it."""
        version, left = self.newest, self.retention.versions
        while version > self.first and (left > 1 or self._came(version) >= self.before):
            entry = self.delta.entry(version)
            left -= entry is None or DROPPED not in entry.facts
            version -= 1
        return version

    @property
    def shown(self) -> list[str]:
        """The nights that readers may take for the newest: that of the log, and the one that latest.json names."""
        latest = self.delta.latest()
        named = {found[1] for path in (latest.files if latest else ()) if (found := _NIGHT.match(path))}
        return sorted({*named, *sorted(self.delta.nights(self.table))[-1:]})

    def explained(self, ds: str) -> tuple[int, Entry] | None:
        return self.delta.explain(self.table, ds)

    def leaving(self) -> list[str]:
        """Nights that are to leave the table, the oldest first: those before the latest ones that it is to hold, which
        were published long enough ago by us."""
        nights = sorted(self.delta.nights(self.table))
        surplus = nights[: -self.retention.published] if self.retention.published else []
        explained = {ds: found[0] for ds in surplus if ds not in self.shown and (found := self.explained(ds))}
        return [ds for ds, version in explained.items() if self._came(version) < self.before]

    @functools.cached_property
    def needed(self) -> set[str]:
        """Every file that a version which stays has, or latest.json names."""
        oldest, latest = self.oldest, self.delta.latest()
        entries = (self.delta.entry(version) for version in range(oldest + 1, self.newest + 1))
        paths = {*self.delta.live(oldest), *(path for entry in entries if entry is not None for path in entry.added)}
        # Others may have written names with escapes; the log has them as URLs.
        return paths | {unquote(path) for path in paths} | set(latest.files if latest else ())

    def entries_needed(self) -> set[int]:
        """Entries that a reader of ours looks at whatever checkpoints there are: those of the versions that stay, and
        those that explain what these hold of each night."""
        oldest, last = self.oldest, dict[str, int]()
        for version in self.versions_of(ENTRY):
            entry = self.delta.entry(version) if version <= oldest else None
            if entry is not None and entry.ds is not None and entry.files:
                last[entry.ds] = version
        held = {found[1] for path in self.delta.live(oldest) if (found := _NIGHT.match(path))}
        return {*(version for ds, version in last.items() if ds in held), *range(oldest, self.newest + 1)}

    def nights(self) -> list[str]:
        """Every night that has a folder."""
        return [found[1] for name in list_names(self.delta.root) if (found := _NIGHT.fullmatch(name))]

    def unneeded(self, ds: str, now: float) -> Iterator[Removal]:
        """Files of a night that no version which stays has: those of old versions, and those that were staged by a run
        that died. Only while nobody else can publish `ds`."""
        night, locked = f"{PARTITION}={ds}", takes_conditions(self.delta.root)
        for name, size in sizes(posixpath.join(self.delta.root, night)).items():
            path = posixpath.join(night, name)
            settled = locked or (size.modified is not None and size.modified < now - UNLOCKED_SECONDS)
            if path.endswith(".parquet") and path not in self.needed and settled:
                yield Removal("file", posixpath.join(self.delta.root, path), size.bytes)

    def _came(self, version: int) -> float:
        """When a version was committed, in seconds since 1970; infinity where nothing says so."""
        entry = self.delta.entry(version)
        stamp = entry.facts.get("timestamp") if entry is not None else None
        if isinstance(stamp, int | float):
            return stamp / 1000
        size = self.logged.get(f"{version:020d}.json")
        return size.modified if size is not None and size.modified is not None else float("inf")
