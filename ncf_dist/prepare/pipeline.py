"""The job prepare: raw logs → trainer-ready Parquet, step by step. `make_tables` below is the whole stage.

Every input row ends in exactly one place: accepted, a duplicate of an accepted row, the quarantine, or forgotten, where
its user is on the list of input.forget. Accepted rows that a filter of the config leaves out are counted by rule.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from pyspark.sql import DataFrame

from ncf_dist.config import Config
from ncf_dist.contracts import INTERACTIONS, TEST, VALIDATION
from ncf_dist.files import remove
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.account import account
from ncf_dist.prepare.filters import filter_rows
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.given_candidates import given_candidates, with_candidates
from ncf_dist.prepare.id_types import IdTypes, id_types
from ncf_dist.prepare.index import Indexes, base_run, base_types, extend_indexes
from ncf_dist.prepare.ingest import ingest
from ncf_dist.prepare.item_tables import write_item_tables
from ncf_dist.prepare.layout import write_sequences_table, write_train_table
from ncf_dist.prepare.next_items import write_next_items
from ncf_dist.prepare.profile import PROFILE, last_published, profile
from ncf_dist.prepare.run_inputs import RunInputs
from ncf_dist.prepare.sequences import sequence_facts
from ncf_dist.prepare.side_tables import write_side_tables
from ncf_dist.prepare.splits import split_facts, split_rule
from ncf_dist.prepare.user_tables import UserTables, write_user_tables
from ncf_dist.prepare.workspace import STAGING, Workspace
from ncf_dist.spark_io import spark_session
from ncf_dist.stage import Outcome, StageRun, Upstream

log = logging.getLogger(__name__)

STAGE = "prepare"


def prepare(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Make the tables of night `ds`, or find them made. Raises ConfigError, InputError, ContractError."""
    inputs = RunInputs.find(config)
    base = base_run(Lake(config.paths.lake), ds)
    ids = id_types(config.input, inputs.log, base_types(base))
    forget = Forget.read(config.input.forget, ids.user)
    made_from = {**inputs.fingerprints(), "index": {"ds": base.ds, "run_key": base.run_key} if base else None}
    if forget.digest is not None:
        made_from["forget"] = forget.digest
    stage = StageRun(STAGE, config, ds, made_from)
    if done := stage.find():
        log.info("already prepared: %s", done.root)
        return Outcome.of(done, "already-done", rows=done.facts["rows"], warnings=done.facts.get("warnings", []))

    run = stage.begin()
    until = config.input.until or dt.date.fromisoformat(ds)
    before = last_published(Lake(config.paths.lake), config.publish.table, base, ds)
    try:
        with spark_session("ncf-prepare", config.spark) as spark:
            made = make_tables(Workspace(spark, run), config, ds, until, inputs, ids, forget, base, before)
            tables, facts, warnings = made
    finally:
        remove(posixpath.join(run, STAGING))
    facts["warnings"] = list(warnings)
    manifest = stage.finish(tables=tables, facts=facts, noted={"files": inputs.counts()})
    log.info("prepared %s in %.1f s: %s", run, manifest.seconds, json.dumps(facts["rows"]))
    return Outcome.of(manifest, rows=facts["rows"], warnings=facts["warnings"])


def make_tables(
    space: Workspace,
    config: Config,
    ds: str,
    until: dt.date,
    inputs: RunInputs,
    ids: IdTypes,
    forget: Forget,
    base: Manifest | None,
    before: Manifest | None,
) -> tuple[Mapping[str, TableInfo], dict[str, Any], Sequence[str]]:
    """(every table of the contracts, the facts of the run, what a person should know). until: the first day whose rows
    are left for later nights; base: the run whose indexes this one extends; before: the last published night's."""
    # Type every row; write the bad ones to the quarantine.
    ingested = ingest(space, config.input, inputs, ids, forget, until, places=config.split.ties == "file")
    # Remove what the config's filters leave out.
    filtered = filter_rows(space, config, ingested, ids.item)
    # Number users and items, and also those items that are only candidates.
    given = given_candidates(space, inputs.candidates, ids, forget)
    indexes = extend_indexes(space, filtered, given, ids, base, forget)
    indexed = indexes.of(filtered.rows)
    # Decide which rows are held out.
    rule = split_rule(config, filtered, indexed)
    # A user at a time: remove duplicates, hold rows out, draw negatives and candidates.
    if given is not None:
        indexed = with_candidates(indexed, given, indexes)
    users = write_user_tables(space, config, indexes, indexed, rule, filtered.count, given is not None)
    log.info("split: %s", {table.name: users.tables[table.name].rows for table in (INTERACTIONS, VALIDATION, TEST)})
    # Lay the train rows, and windows of the users' order, out in equal files, in hashed order.
    train = write_train_table(space, config, users)
    log.info("train: %s rows in %d files", f"{train.rows:,}", len(train.files))
    ordered, followed = write_order_tables(space, config, indexes, users)
    # What belongs to items and users.
    items = write_item_tables(space, indexes, users.tables[INTERACTIONS.name], followed)
    sides = write_side_tables(space, config.input, inputs, indexes, ids, forget)

    made = {"quarantine": ingested.quarantine, **indexes.tables, **users.tables, "train": train, **ordered}
    facts = account(ingested, filtered, indexes, users, forget, config.input.feedback)
    facts |= sequence_facts(config.sequences, users.counts)
    facts[PROFILE] = profile(space, ds, ingested, indexes, users, base, before)
    tables = {**made, **items, **sides.tables}
    return tables, {**facts, **split_facts(rule), **sides.facts}, ingested.warnings


def write_order_tables(
    space: Workspace, config: Config, indexes: Indexes, users: UserTables
) -> tuple[Mapping[str, TableInfo], DataFrame | None]:
    """(what models of histories read beside `recent`, how much follows each item where that is counted); nothing where
    sequences.length is 0."""
    if not config.sequences.length:
        return {}, None
    sequences = write_sequences_table(space, config, users)
    log.info("sequences: %s windows in %d files", f"{sequences.rows:,}", len(sequences.files))
    if not config.sequences.next_items:
        return {sequences.path: sequences}, None
    kept, followed = write_next_items(space, config.sequences, indexes.sizes.items, users.pairs)
    return {sequences.path: sequences, kept.path: kept}, followed
