"""One commit to the published table: a compare-and-swap of the files of one ds.

It succeeds only as the successor of the very version that its caller has looked at. delta-rs' own rebase would let a
run pass one that has changed what it was checked against, so its retries are off.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from ncf_dist import locks
from ncf_dist.contracts import PARTITION, Contract
from ncf_dist.errors import BusyRun, StaleRun
from ncf_dist.files import delta_options
from ncf_dist.publish import steps
from ncf_dist.publish.log import DeltaLog, digest

HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
UNDONE = "undone"
"""What lets a run be published again that a rollback took back (`--override`)."""

log = logging.getLogger(__name__)

Checksums = Mapping[str, Mapping[str, Any]]
"""Of files, by path: {"bytes", "sha256"}."""


def create(delta: DeltaLog, contract: Contract, schema: Schema, ds: str, actions: list[AddAction], facts: Any) -> None:
    """The table's first commit. Raises BusyRun where somebody else has made the table."""
    said = _facts(delta, None, ds, facts, ())
    locks.confirm()
    steps.reached("committing")
    with delta.understood():
        try:
            create_table_with_add_actions(
                delta.root,
                schema,
                actions,
                mode="error",
                partition_by=[PARTITION],
                name=contract.name,
                description=contract.meaning,
                storage_options=delta_options(delta.root),
                commit_properties=CommitProperties(custom_metadata=said, max_commit_retries=0),
                post_commithook_properties=HOOKS,
            )
        except DeltaError as error:
            _say_who_won(delta, None, ds, error, said)
    steps.reached("committed")


def swap(delta: DeltaLog, table: DeltaTable, ds: str, actions: list[AddAction], facts: Mapping[str, Any]) -> None:
    """Make `actions` the files of `ds`, as the successor of `table`; without any the partition goes.

    facts: what the commit says about itself, `ncf.files` (Checksums of all `actions`) among it. What is to outlive
    older entries of the log is added here.

    Raises StaleRun where another run has changed this ds meanwhile, BusyRun where one has changed another ds.
    """
    sizes = _sizes(delta, table, ds)
    kept = sorted(sizes.keys() & {action.path for action in actions})
    said = _facts(delta, table, ds, facts, kept)
    # A commit must not name a file twice, so those that stay are neither added nor removed.
    now, gone = int(time.time() * 1000), [path for path in sizes if path not in kept]
    removed = [RemoveAction(path, True, now, sizes[path], {PARTITION: ds}) for path in gone] if kept else []
    how: dict[str, Any] = {"mode": "append"} if kept else {"mode": "overwrite"}
    if not kept:
        how["partition_filters"] = [(PARTITION, "=", ds)]
    locks.confirm()
    steps.reached("committing")
    with delta.understood():
        try:
            table.create_write_transaction(
                [*(action for action in actions if action.path not in kept), *removed],
                schema=table.schema(),
                partition_by=[PARTITION],
                commit_properties=CommitProperties(custom_metadata=said, max_commit_retries=0),
                post_commithook_properties=HOOKS,
                **how,
            )
        except DeltaError as error:
            _say_who_won(delta, table, ds, error, said)
    steps.reached("committed")


def _sizes(delta: DeltaLog, table: DeltaTable, ds: str) -> dict[str, int]:
    """Bytes by path of the files that `ds` has in `table`."""
    with delta.understood():
        actions = table.get_add_actions(flatten=True)
        columns = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", "path", "size_bytes"))
        return {path: size for night, path, size in zip(*columns, strict=True) if night == ds}


def _facts(
    delta: DeltaLog, table: DeltaTable | None, ds: str, facts: Mapping[str, Any], kept: Iterable[str]
) -> dict[str, Any]:
    """What the commit says about itself, with what every commit carries on. `ncf.commit` tells it from that of another
    process which publishes the same run at the same time."""
    said = {"ncf.ds": ds, **facts, "ncf.commit": os.urandom(8).hex(), **({"ncf.kept": list(kept)} if kept else {})}
    undone = set(delta.undone(table.version())) if table is not None else set()
    undone |= {(ds, str(one["run_key"])) for one in facts.get("ncf.undoes", ())}
    undone -= {(ds, str(facts.get("ncf.run_key")))}
    if undone:
        said["ncf.undone"] = [list(one) for one in sorted(undone)]
    return {**said, "ncf.digest": digest(said)}


def _say_who_won(
    delta: DeltaLog, table: DeltaTable | None, ds: str, error: DeltaError, said: Mapping[str, Any]
) -> None:
    """Raise what it means that the commit has failed. said: what it would say about itself: a store may have made it,
    and its answer was lost, so that the next try found it there."""
    now, seen = delta.open(), table.version() if table else -1
    if now is None or seen == now.version():
        raise error
    mine = delta.entry(seen + 1)
    if mine is not None and mine.facts.get("ncf.digest") == said["ncf.digest"]:
        log.info("version %d was committed, though its store did not say so (%s)", seen + 1, error)
        return
    before, after = (delta.nights(each).get(ds, []) if each is not None else [] for each in (table, now))
    why = " ".join(str(error).split())[:200]
    if sorted(before) != sorted(after):
        raise StaleRun(
            f"another run changed ds {ds} of {delta.root} while this one was under way ({why}), and this one changed "
            "nothing; needed a ds that stays as it was looked at: look at which run is to be published, and run it "
            "again"
        ) from None
    raise BusyRun(
        f"another publication to {delta.root} came first ({why}); this one changed nothing: run it again"
    ) from None
