"""The step account: where every row of the input went, and what later stages and people want to know of a run."""

from __future__ import annotations

from typing import Any

from ncf_dist.ancestry import DIGESTS
from ncf_dist.prepare.filters import Filtered
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.index import Indexes
from ncf_dist.prepare.ingest import Ingested
from ncf_dist.prepare.user_tables import UserTables

USER_COUNTS = (
    "tied_users", "train", "validation", "test", "users_without_negatives", "validation_short_candidates",
    "test_short_candidates",
)  # fmt: skip


def account(
    ingested: Ingested, filtered: Filtered, indexes: Indexes, users: UserTables, forget: Forget, feedback: str
) -> dict[str, Any]:
    """The facts of a run. Input rows = accepted + duplicates + quarantined + forgotten; those that filters left out are
    among the accepted."""
    counts = users.counts
    accepted = counts["accepted"] if filtered.unique is None else filtered.unique
    rows: dict[str, Any] = {
        "input": ingested.read,
        "accepted": accepted,
        "duplicates": ingested.whole - accepted,
        "quarantined": dict(ingested.quarantined),
    }
    if filtered.left_out:
        rows["filtered"] = dict(filtered.left_out)
    forgotten: dict[str, int] = {}
    if forget.ids is not None:
        rows["forgotten"] = ingested.forgotten
        forgotten["forgotten_users"] = indexes.forgotten_users
    return {
        **indexes.sizes._asdict(),
        DIGESTS: dict(indexes.digests),
        "rows": rows,
        **forgotten,
        "feedback": feedback,
        "active_users": counts["users"],
        **{name: counts[name] for name in USER_COUNTS},
        "tied_users_share": round(counts["tied_users"] / max(1, counts["users"]), 6),
    }
