"""How many rows and steps a rank has: arithmetic on the manifest, without torch, for the job and for its ranks."""

from __future__ import annotations

from ncf_dist.errors import ContractError


def rows_per_rank(rows: int, ranks: int) -> int:
    return rows // ranks


def steps_per_epoch(rows: int, ranks: int, batch_size: int) -> int:
    """Steps of every rank; the last batch may be smaller, by as much on all ranks.
    Raises ContractError when a rank would have no row."""
    each = rows_per_rank(rows, ranks)
    if each == 0:
        raise ContractError(
            f"the train table has {rows} rows for {ranks} ranks; needed at least one a rank: "
            "lower train.ranks or give more data"
        )
    return -(-each // batch_size)
