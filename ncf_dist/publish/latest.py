"""latest.json: the newest night of the log, for readers without Delta. It is derived: it can be made again at any
time."""

from __future__ import annotations

import json
import logging
import posixpath
from typing import Any

from deltalake import DeltaTable

from ncf_dist.files import (
    Tagged,
    create,
    exists,
    is_conditional,
    read_bytes,
    read_tagged,
    remove,
    replace,
    write_atomic,
)
from ncf_dist.publish import steps
from ncf_dist.publish.log import LATEST, DeltaLog

log = logging.getLogger(__name__)


def settle(delta: DeltaLog) -> DeltaTable:
    """Make the log durable and latest.json true, also after a run that died; the version that it then describes."""
    path = posixpath.join(delta.root, LATEST)
    while True:
        before = _tagged(path)
        table = delta.opened()
        delta.sync(table.version())
        steps.reached("logged")
        body = _body(delta, table)
        if body is None:
            remove(path)
        elif not _described(path, body, before):
            continue
        steps.reached("described")
        # Whoever committed meanwhile may have written latest.json before us: then ours is the older one.
        if delta.opened().version() == table.version():
            steps.reached("settled")
            return table


def _tagged(path: str) -> Tagged | None:
    """latest.json before the log is read, where its store can tell whether it was changed since."""
    if not is_conditional(path):
        return None
    try:
        return read_tagged(path)
    except FileNotFoundError:
        return None


def _described(path: str, body: bytes, before: Tagged | None) -> bool:
    """Whether latest.json is `body` now. False where somebody else has changed it since `before`, who may have seen a
    newer version of the log than this run has."""
    if not is_conditional(path):
        if not exists(path) or read_bytes(path) != body:
            write_atomic(path, body)
        return True
    if before is None:
        return create(path, body) is not None
    return before.data == body or replace(path, body, before.tag) is not None


def _body(delta: DeltaLog, table: DeltaTable) -> bytes | None:
    """What latest.json has to hold; None where there must be none, as no night is left."""
    nights = delta.nights(table)
    newest = describe(delta, table, max(nights)) if nights else None
    if newest is not None or not nights:
        return json.dumps(newest, indent=1).encode() if newest is not None else None
    # Somebody else has rewritten that night. What latest.json names is there until it is cleaned, unless it was undone.
    log.warning("%s: no commit of ours explains the files of ds %s, so %s stays", delta.root, max(nights), LATEST)
    path, now = posixpath.join(delta.root, LATEST), delta.latest()
    if now is not None and (now.ds, now.run_key) not in delta.undone(table.version()):
        return read_bytes(path)
    others = (describe(delta, table, ds) for ds in sorted(nights, reverse=True))
    known = next((found for found in others if found is not None), None)
    return json.dumps(known, indent=1).encode() if known is not None else None


def describe(delta: DeltaLog, table: DeltaTable, ds: str) -> dict[str, Any] | None:
    """latest.json for `ds`: its files in this snapshot and the facts of their commit; None if not ours."""
    found = delta.explain(table, ds)
    if found is None:
        return None
    version, entry = found
    files = delta.nights(table)[ds]
    return {
        "ds": ds,
        "version": version,
        "model_version": entry.facts["ncf.model_version"],
        "run_key": entry.run_key,
        "files": sorted(path for path, _ in files),
        "rows": sum(rows for _, rows in files),
        "k": int(entry.facts["ncf.k"]),
        "model_users": entry.model_users,
        "checksums": {path: entry.checksums[path] for path in sorted(entry.checksums)},
    }


def standing(delta: DeltaLog, table: DeltaTable) -> str:
    """What latest.json says of the table's newest version, as a clause."""
    path, now, wanted = posixpath.join(delta.root, LATEST), delta.latest(), _body(delta, table)
    if wanted == (read_bytes(path) if exists(path) else None):
        return f"and {LATEST} agrees with it"
    return f"while {LATEST} " + ("is not written yet" if now is None else f"still names version {now.version}")
