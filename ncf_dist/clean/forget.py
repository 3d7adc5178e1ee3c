"""People on the list of input.forget leave the nights that are published: files that name them are written again
without their rows, in one commit a night, of the same run as before.

Versions before that commit name them until `retention` lets them go; no rollback goes back to them, and publish refuses
a run that does not know of the list (`ncf.forget`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import posixpath
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from ncf_dist.clean import steps
from ncf_dist.contracts import PARTITION
from ncf_dist.errors import ContractError
from ncf_dist.files import is_local, read_bytes, sync, write_atomic
from ncf_dist.parquet import encoded
from ncf_dist.prepare.forget import Forget
from ncf_dist.publish.commits import swap
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.undo import of_the_run

log = logging.getLogger(__name__)
ListOf = Callable[[pa.DataType], Forget]
"""The list for user ids of a type."""


def forget_in(delta: DeltaLog, ds: str, list_of: ListOf) -> int:
    """Take them out of night `ds`, which nobody else changes meanwhile; how many rows that were. Raises ContractError
    where a file is damaged or the night is not ours, BusyRun or StaleRun where another commit came first."""
    table = delta.opened()
    found = delta.explain(table, ds)
    if found is None:
        raise ContractError(
            f"no commit of ours explains the files of ds {ds} in {delta.root} (somebody has rewritten them); needed "
            "one to replace: run the line again for this ds, with input.forget as it is now"
        )
    entry, gone, digest = found[1], 0, None
    sums, actions = dict[str, dict[str, Any]](), list[AddAction]()
    for path, size in sorted(entry.files.items()):
        rows = _read(delta, path, size, entry.checksums.get(path, {}).get("sha256"))
        listed = list_of(rows.schema.field("user_id").type)
        left = rows.filter(pa.array(~listed.among(rows["user_id"].combine_chunks())))
        gone, digest = gone + len(rows) - len(left), listed.digest
        if len(left) == len(rows):
            sums[path] = entry.checksums.get(path) or {"bytes": size}
            actions.append(AddAction(path, size, {PARTITION: ds}, 0, True, "{}"))  # It stays as it is in the log.
        elif len(left):
            data = encoded(left)
            new = _renamed(path, data)
            write_atomic(posixpath.join(delta.root, new), data)
            steps.reached("rewritten")
            sums[new] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            actions.append(AddAction(new, len(data), {PARTITION: ds}, int(time.time() * 1000), True, _statistics(left)))
    if not gone:
        return 0
    if is_local(delta.root):
        sync(posixpath.join(delta.root, f"{PARTITION}={ds}"))
    facts = {name: value for name, value in entry.facts.items() if of_the_run(name)}
    swap(delta, table, ds, actions, {**facts, "ncf.forget": digest, "ncf.files": sums})
    log.info("took %d rows out of ds %s of %s", gone, ds, delta.root)
    return gone


def _read(delta: DeltaLog, path: str, size: int, sha256: str | None) -> pa.Table:
    """A published file. sha256: None for nights that were published before there was any."""
    full = posixpath.join(delta.root, path)
    try:
        data = read_bytes(full)
    except FileNotFoundError:
        data = b""
    if len(data) != size or sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise ContractError(
            f"{full} is gone or damaged; needed it as it was published: run publish --repair, and this again"
        )
    return pq.read_table(io.BytesIO(data), partitioning=None)


def _renamed(path: str, data: bytes) -> str:
    """The name of what is left of a file: that of the file, but for the digest of its content, with which it ends."""
    stem, _, _ = path.rpartition("-")
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def _statistics(rows: pa.Table) -> str:
    """What readers skip files by, as `publish` gives it."""
    ranges = {name: pc.min_max(rows[name]).as_py() for name in ("user_id", "rank") if name in rows.column_names}
    return json.dumps(
        {
            "numRecords": len(rows),
            "minValues": {name: found["min"] for name, found in ranges.items()},
            "maxValues": {name: found["max"] for name, found in ranges.items()},
            "nullCount": {field.name: 0 for field in rows.schema if not pa.types.is_nested(field.type)},
        }
    )
