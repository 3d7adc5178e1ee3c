"""The gates of the output: how much of the catalogue and of each list there is, who gets the fallback, and how far
tonight's lists are from the last published night's.

Churn is measured on a sample of users, who are in it by a hash of their id: the same ones every night, and at most some
10,000 in memory however many there are.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.config import Gates
from ncf_dist.config.gates import OUTPUT_GATES
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import open_parquet
from ncf_dist.publish import measures
from ncf_dist.publish.audit import Audit
from ncf_dist.publish.log import DeltaLog
from ncf_dist.publish.measures import Check
from ncf_dist.publish.past import Night, before
from ncf_dist.publish.unseen import bucket_of
from ncf_dist.published import nights_before

SAMPLED_USERS = 10_000


def judge(
    gates: Gates, score: Manifest, audited: Audit, then: Sequence[str], nights: list[Night]
) -> tuple[list[Check], dict[str, float]]:
    """(the verdict of each gate of the output, what was measured). then: the published files of the night before; none
    where there is none. nights: good ones, the newest first."""
    found = measured(audited, int(score.facts["k"]), [file.source for file in audited.files], then)
    run = f"score run {score.run_key}"
    checks = [
        measures.judge(gate, getattr(gates, gate), found.get(gate), before(nights, gate), gates.spread, run)
        for gate in OUTPUT_GATES
    ]
    return checks, found


def measured(audited: Audit, k: int, now: Sequence[str], then: Sequence[str]) -> dict[str, float]:
    """coverage: the share of the items that may be offered that anybody is; filled: of the places of all lists;
    fallback: of the users who are ranked by popularity; churn: of the items of the night before, in the lists of those
    who had one, that are not in tonight's. Without users there is nothing to measure."""
    if not audited.users:
        return {}
    found = {
        "coverage": audited.coverage,
        "filled": audited.rows / (audited.users * k),
        "fallback": 1 - audited.model_users / audited.users,
    }
    every = -(-audited.users // SAMPLED_USERS)
    if then and (share := churn(sampled(now, every), sampled(then, every))) is not None:
        found["churn"] = share
    return found


def sampled(files: Sequence[str], every: int) -> pa.Table:
    """(user_id, item_id) of one in `every` users, a file in memory at a time."""
    parts = []
    for path in files:
        with open_parquet(path) as file:
            names = [name for name in ("user_id", "item_id", "items") if name in file.schema_arrow.names]
            rows = file.read(columns=names)
        rows = rows.filter(pa.array(bucket_of(rows["user_id"], every) == 0))
        parts.append(_pairs(rows))
    return pa.concat_tables(parts)


def _pairs(rows: pa.Table) -> pa.Table:
    if "items" in rows.column_names:
        lists = rows["items"].combine_chunks()
        users = rows["user_id"].combine_chunks().take(pc.list_parent_indices(lists))
        rows = pa.table({"user_id": users, "item_id": pc.list_flatten(lists).field("item_id")})
    return rows.select(["user_id", "item_id"])


def churn(now: pa.Table, then: pa.Table) -> float | None:
    """The mean, over the users who have a list both nights, of the share of the earlier one's items that are gone. None
    without such users."""
    both = pc.is_in(then["user_id"], value_set=pc.unique(now["user_id"]))
    then = then.filter(both)
    if not len(then):
        return None
    kept = then.join(now.append_column("kept", pa.array(np.ones(len(now), np.int64))), ["user_id", "item_id"])
    shares = kept.group_by("user_id").aggregate([("kept", "count"), ("item_id", "count")])
    return float(1 - np.mean(shares["kept_count"].to_numpy() / shares["item_id_count"].to_numpy()))


def files_before(log: DeltaLog, ds: str) -> list[str]:
    """The published files of the newest night before `ds`; none where there is none."""
    table = log.open()
    nights = log.nights(table) if table is not None else {}
    return [posixpath.join(log.root, path) for night in nights_before(nights, ds)[:1] for path, _ in nights[night]]
