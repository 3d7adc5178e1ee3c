"""The run of evaluate that this model is compared with: which run it is, and whether it judged the same rows."""

from __future__ import annotations

import hashlib
import re

from ncf_dist import contracts
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.files import resolve
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest, read_manifest

STAGE = "evaluate"
JUDGED_ON = (contracts.TEST.name, contracts.HISTORY.name, contracts.USER_INDEX, contracts.ITEM_INDEX)
"""Tables that decide who is judged on what, and what is masked."""


def judged_on(prepare: Manifest) -> dict[str, str]:
    """A digest of each table of `JUDGED_ON`."""
    digests = {}
    for name in JUDGED_ON:
        files = "".join(info.sha256 for info in prepare.tables[name].files)
        digests[name] = hashlib.sha256(files.encode()).hexdigest()[:16]
    return digests


def find_run(lake: Lake, ds: str, wanted: str, name: str | None = None) -> Manifest:
    """The finished run that `evaluate.compare` names: a folder, a ds or a model_version. Of experiments only those
    called `name` are looked at, or the folder that is named.
    Raises ConfigError or ContractError where there is none."""
    if wanted == ds:
        raise ConfigError(
            f"evaluate.compare is {wanted}, this very night; needed the folder or the model_version of a run"
        )
    if re.fullmatch(r"\d{4}-\d\d-\d\d", wanted):
        return _checked(lake.stage(wanted, STAGE).newest())
    if "/" in wanted:
        return _checked(read_manifest(resolve(wanted)))
    nights = sorted(lake.nights(), reverse=True)
    for night in sorted(nights, key=lambda night: night != ds):
        for run in lake.stage(night, STAGE).finished():
            ours = run.name is None or run.name == name
            if ours and run.facts.get("model_version") == wanted and contracts.RANKS.name in run.tables:
                return _checked(run)
    raise ContractError(
        f"evaluate.compare is {wanted!r}, and no run of evaluate in {lake.root} judged a model of that version; "
        "needed the folder of a run, its model_version or its ds: run evaluate for that model first"
    )


def _checked(run: Manifest) -> Manifest:
    if run.stage != STAGE:
        raise ContractError(f"evaluate.compare names {run.root}, a run of {run.stage}; needed one of {STAGE}")
    run.table(contracts.RANKS)
    return run


def check_same_rows(other: Manifest, ours: dict[str, str], prepare: Manifest) -> None:
    """Raise ContractError, saying what differs, unless both runs judged the same held-out rows with the same masks."""
    theirs = other.facts.get("judged_on", {})
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        raise ContractError(
            f"{other.root} judged {other.facts.get('model_version')} on other rows: {', '.join(different)} of its "
            f"prepare run {other.inputs.get('prepare')} (ds {other.ds}) differ from those of {prepare.run_key} "
            f"(ds {prepare.ds}); "
            "needed the same held-out rows and masks: evaluate both models on one prepare run"
        )
