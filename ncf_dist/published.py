"""What readers see of the published table, and what a rollback took from them: all that stages which do not publish
need of its log. `ncf_dist/publish/log.py` holds the log to its rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ncf_dist.contracts import PARTITION
from ncf_dist.errors import ContractError
from ncf_dist.files import delta_options, exists
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest


@dataclass(frozen=True)
class Shown:
    """The table's newest version. nights: ds to the path of one of its files; undone: (ds, key of the score run) of all
    that a rollback took back and nobody has published again since."""

    nights: Mapping[str, str] = field(default_factory=dict)
    undone: frozenset[tuple[str, str]] = frozenset()

    def score_run(self, lake: Lake, ds: str) -> Manifest | None:
        """The run that readers see of `ds`: whoever published a file named it by its run. None where it is gone."""
        path = self.nights.get(ds, "")
        return next((run for run in lake.stage(ds, "score").finished() if f"-{run.run_key}-" in path), None)


def shown(lake: Lake, table: str) -> Shown:
    """Nothing where nothing was published. Raises ContractError where the log cannot be read."""
    from deltalake import DeltaTable  # Ranks and most jobs never get here, and it takes a while to load.
    from deltalake.exceptions import DeltaError

    root = lake.path(table)
    if not exists(f"{root}/_delta_log"):
        return Shown()
    try:
        now = DeltaTable(root, storage_options=delta_options(root))
        actions = now.get_add_actions(flatten=True)
        columns = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", "path"))
        # Each commit of ours carries on what was undone before it.
        undone = next((commit.get("ncf.undone", ()) for commit in now.history() if "ncf.ds" in commit), ())
        return Shown(dict(zip(*columns, strict=True)), frozenset((ds, key) for ds, key in undone))
    except (DeltaError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise ContractError(
            f"the Delta log of {root} cannot be read ({type(error).__name__}: {said}); the job publish says what to do"
        ) from None


def nights_before(nights: Iterable[str], ds: str) -> list[str]:
    """Those before `ds`, the newest first: the first of them is the one that `ds` follows."""
    return sorted((night for night in nights if night < ds), reverse=True)
