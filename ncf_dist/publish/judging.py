"""All gates of a night together: what they need is gathered here, and what they say is a `Decision`."""

from __future__ import annotations

from dataclasses import replace

from ncf_dist.champion import CHAMPION, champion
from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.publish import data, gates, model, output
from ncf_dist.publish.audit import Audit
from ncf_dist.publish.decision import Decision
from ncf_dist.publish.gates import Verdict
from ncf_dist.publish.past import Measured, good_nights
from ncf_dist.publish.runs import Runs, evaluated, interactions_of, published_interactions
from ncf_dist.publish.table import PublishedTable

OF_ITS_OWN_NIGHT = ("evaluated", "beats_popularity")
"""Gates that a champion passed, or was published in spite of, when it was new."""


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
    nights = good_nights(table.log, ds, config.gates.nights)
    checks, measured = data.judge(config.gates, runs.prepare, nights)
    more, numbers = output.judge(config.gates, runs.score, audited, output.files_before(table.log, ds), nights)
    verdicts, required = _of_the_model(config, runs, facts)
    decision = Decision(ds, runs.score.run_key, [*checks, *more], verdicts, config.gates.overrides, required, train_run)
    return decision, replace(measured, numbers={**measured.numbers, **numbers})


def _of_the_model(config: Config, runs: Runs, facts: gates.Facts) -> tuple[list[Verdict], list[str]]:
    """(what speaks against the model, the gates that were asked)."""
    require: list[str] = list(config.publish.require)
    standing_in = _standing_in(config, runs)
    if standing_in is None:
        verdicts = [*gates.judge(facts, require), *model.judge(config.gates, facts.evaluated)]
        return verdicts, [*require, *model.active(config.gates)]
    require = [gate for gate in require if gate not in OF_ITS_OWN_NIGHT]
    return [*gates.judge(facts, require), Verdict(CHAMPION, standing_in, False)], require


def _standing_in(config: Config, runs: Runs) -> str | None:
    """What is said where the champion ranks in place of tonight's model, which was refused; else None. It was judged
    before it was published."""
    lake, ds, key = Lake(config.paths.lake), runs.score.ds, str(runs.score.inputs.get("train"))
    if runs.evaluate is not None or lake.stage(ds, "train").find(key) is not None:
        return None
    found = champion(lake, config.publish.table, ds)
    if found is None or found.run_key != key:
        return None
    return f"this night is ranked by the champion, train run {found.run_key} of {found.ds}, in place of its own model"


def _published(lake: Lake, table: PublishedTable, ds: str) -> gates.Published | None:
    """The night that readers see, with which this one is compared."""
    if (earlier := table.before(ds)) is None:
        return None
    night, entry = earlier
    key = entry.run_key if entry else None
    kept = published_interactions(lake, night, key)
    return gates.Published(night, key, entry.model_users if entry else None, kept)
