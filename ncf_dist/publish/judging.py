"""All gates of a night together: what they need is gathered here, and what they say is a `Decision`."""

from __future__ import annotations

from dataclasses import replace

from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.publish import data, gates, output
from ncf_dist.publish.audit import Audit
from ncf_dist.publish.decision import Decision
from ncf_dist.publish.past import Measured, good_nights
from ncf_dist.publish.runs import Runs, evaluated, interactions_of, published_interactions
from ncf_dist.publish.table import PublishedTable


def judge(config: Config, table: PublishedTable, runs: Runs, audited: Audit) -> tuple[Decision, Measured]:
    """What the gates say of the night, and what they measured."""
    ds, train_run = runs.score.ds, str(runs.score.inputs.get("train"))
    facts = gates.Facts(
        score_run=runs.score.run_key,
        train_run=train_run,
        rows=sum(file.info.rows for file in audited.files),
        model_users=audited.model_users,
        published=_published(Lake(config.paths.lake), table, ds),
        evaluated=evaluated(runs.evaluate),
        held_out=runs.prepare.config.get("split", {}).get("strategy") != "none",
        interactions=interactions_of(runs.prepare),
    )
    require = config.publish.require
    nights = good_nights(table.log, ds, config.gates.nights)
    checks, measured = data.judge(config.gates, runs.prepare, nights)
    then = output.files_before(table.log, ds)
    more, numbers = output.judge(config.gates, runs.score, audited, then, nights)
    checks, measured = [*checks, *more], replace(measured, numbers={**measured.numbers, **numbers})
    verdicts = gates.judge(facts, require)
    return Decision(ds, runs.score.run_key, checks, verdicts, config.gates.overrides, require, train_run), measured


def _published(lake: Lake, table: PublishedTable, ds: str) -> gates.Published | None:
    """The night that readers see, with which this one is compared."""
    if (earlier := table.before(ds)) is None:
        return None
    night, entry = earlier
    key = entry.run_key if entry else None
    kept = published_interactions(lake, night, key)
    return gates.Published(night, key, entry.model_users if entry else None, kept)
