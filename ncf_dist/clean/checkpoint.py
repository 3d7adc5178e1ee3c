"""Checkpoints of the Delta log: one file that stands for all entries up to a version, so that the log stays short.

A torn checkpoint would cost every reader the table, as they take the newest one without looking at entries before it.
So it is made beside the table, in a scratch folder, read back and compared with what the entries say, and put in place
whole (delta-rs would write it in place, without fsync); only then is it named in `_last_checkpoint`. Entries stay for
one clean more and for `retention.days`: a reader that has listed the log still finds what it has seen.
"""

from __future__ import annotations

import io
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from deltalake import DeltaTable

from ncf_dist.clean import steps
from ncf_dist.clean.removal import Removal
from ncf_dist.clean.versions import CHECKPOINT, ENTRY, LOG, Published
from ncf_dist.errors import ContractError
from ncf_dist.files import delta_options, make_dirs, read_bytes, read_json, write_atomic, write_bytes
from ncf_dist.scratch import scratch_folder

LAST = "_last_checkpoint"
SCRATCH = "checkpoint"
_ANY = re.compile(r".*\.checkpoint\..*")
log = logging.getLogger(__name__)


def is_due(published: Published) -> bool:
    """Whether a checkpoint at the oldest version that stays would stand for more than there is one for."""
    oldest, there = published.oldest, published.versions_of(CHECKPOINT)
    others = [name for name in published.logged if _ANY.fullmatch(name) and not CHECKPOINT.fullmatch(name)]
    if others:
        log.warning(
            "the log of %s has checkpoints of another kind (%s): it is left as it is", published.delta.root, others[0]
        )
    return not others and oldest > max(there, default=0)


def write(published: Published, work: str) -> None:
    """Put a checkpoint at the oldest version that stays. Raises ContractError where it does not say what the entries
    say; then nothing was changed."""
    version, root = published.oldest, published.delta.root
    base = max((at for at in published.versions_of(CHECKPOINT) if at <= version), default=None)
    first = 0 if base is None else base + 1
    names = [f"{at:020d}.json" for at in range(first, version + 1)]
    names += [] if base is None else [_name(base)]
    with scratch_folder(work, SCRATCH) as folder, published.delta.understood():
        whole, alone = (posixpath.join(folder, name) for name in ("whole", "alone"))
        for name in names:
            _put(whole, name, read_bytes(posixpath.join(root, LOG, name)))
        DeltaTable(whole, version=version).create_checkpoint()
        made = {name: read_bytes(posixpath.join(whole, LOG, name)) for name in (_name(version), LAST)}
        for name, data in made.items():
            _put(alone, name, data)
        if _says(alone, version) != _says(root, version):
            raise ContractError(
                f"a checkpoint of version {version} of {root} does not say what the log says; needed the same "
                "files and columns: nothing was changed, and the log stays as long as it is; report this"
            )
    write_atomic(posixpath.join(root, LOG, _name(version)), made[_name(version)])
    steps.reached("checkpointed")
    write_atomic(posixpath.join(root, LOG, LAST), made[LAST])
    steps.reached("checkpoint-named")


def name_newest(published: Published) -> None:
    """Have `_last_checkpoint` name the newest checkpoint, where a clean was killed before it did: readers begin with
    the one that it names, and a later clean removes the older ones."""
    there, root = published.versions_of(CHECKPOINT), published.delta.root
    if not there or _named(root) == there[-1]:
        return
    data = read_bytes(posixpath.join(root, LOG, _name(there[-1])))
    file = pq.ParquetFile(io.BytesIO(data))
    files = sum(add is not None for add in file.read(columns=["add"])["add"].to_pylist())
    said = {"version": there[-1], "size": file.metadata.num_rows, "sizeInBytes": len(data), "numOfAddFiles": files}
    write_atomic(posixpath.join(root, LOG, LAST), json.dumps(said, separators=(",", ":")).encode())
    steps.reached("checkpoint-named")


def _named(root: str) -> int | None:
    """The version of the checkpoint that `_last_checkpoint` names."""
    try:
        found = read_json(dict[str, Any], posixpath.join(root, LOG, LAST)).get("version")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int) else None


def outdated(published: Published, before: float) -> Iterator[Removal]:
    """Entries and checkpoints that go, the oldest first, so that what is left is a log at every moment. before: seconds
    since 1970; a checkpoint that was written after that stands for nothing yet."""
    ready = []
    for version in published.versions_of(CHECKPOINT):
        modified = published.logged[_name(version)].modified
        if version <= published.oldest and modified is not None and modified < before:
            ready.append(version)
    if not ready:
        return
    needed = published.entries_needed()
    for version in published.versions_of(ENTRY):
        if version < ready[-1] and version not in needed:
            yield _removal(published, f"{version:020d}.json")
    for version in published.versions_of(CHECKPOINT):
        if version < ready[-1]:
            yield _removal(published, _name(version))


def _removal(published: Published, name: str) -> Removal:
    return Removal("entry", posixpath.join(published.delta.root, LOG, name), published.logged[name].bytes)


def _name(version: int) -> str:
    return f"{version:020d}.checkpoint.parquet"


def _put(root: str, name: str, data: bytes) -> None:
    make_dirs(posixpath.join(root, LOG))
    write_bytes(posixpath.join(root, LOG, name), data)


def _says(root: str, version: int) -> tuple[object, ...]:
    """What readers of a version get: its files with their bytes and statistics, columns and partitions."""
    table = DeltaTable(root, version=version, storage_options=delta_options(root))
    actions = table.get_add_actions(flatten=True)
    names = sorted(actions.column_names)
    rows = zip(*(actions.column(name).to_pylist() for name in names), strict=True)
    metadata = table.metadata()
    about = (metadata.id, metadata.name, metadata.partition_columns, metadata.configuration)
    return names, sorted(map(repr, rows)), table.schema().to_json(), about
