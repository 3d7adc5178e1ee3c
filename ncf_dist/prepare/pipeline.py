"""The job prepare: read → clean → index → split → negatives → trainer-ready Parquet.

Every input row ends in exactly one place: accepted, a duplicate of an accepted row, the quarantine, or forgotten, where
its user is on the list of input.forget. Accepted rows that a filter of the config leaves out are counted by rule.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist import contracts
from ncf_dist.ancestry import DIGESTS, INDEXES, index_sizes
from ncf_dist.config import Config
from ncf_dist.errors import InputError
from ncf_dist.files import remove
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo, read_schema
from ncf_dist.prepare import clean
from ncf_dist.prepare.files import Found, find_files
from ncf_dist.prepare.forget import NOBODY, Forget
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.given import candidate_rows
from ncf_dist.prepare.hints import hint, time_warnings
from ncf_dist.prepare.index import digests, extend_index
from ncf_dist.prepare.layout import write_train
from ncf_dist.prepare.records import settle, uncut
from ncf_dist.prepare.rows import LATE, RowSpec, day_start, read_pass, staged_schema
from ncf_dist.prepare.sides import SideSpec, side_columns, side_contract, write_side
from ncf_dist.prepare.source import Source, id_types, interactions_source, place_of, plan, side_files, side_source
from ncf_dist.prepare.splits import SplitRule, day_of, temporal_rule
from ncf_dist.prepare.users import UserPass, count_pass, staging_schema, train_contract, user_pass
from ncf_dist.spark_io import (
    ROWS_PER_FILE,
    map_in_arrow,
    read_files,
    read_table,
    spark_session,
    table_info,
    write_table,
)
from ncf_dist.stage import Outcome, StageRun, Upstream, production_nights

log = logging.getLogger(__name__)

STAGE = "prepare"
ROWS_PER_USER_FILE = 500_000
MIN_USER_FILES = 8
MAX_TASKS = 10_000
WEIGHT_TOTAL = 2**36
"""About what all items weigh together as negatives: fine enough for a tail, small enough for users x weight."""


def prepare(config: Config, ds: str, given: Upstream | None = None) -> Outcome:
    """Make the tables of night `ds`, or find them made. Raises ConfigError, InputError, ContractError."""
    files = _Files.find(config)
    before = _base(Lake(config.paths.lake), ds)
    forget = Forget.read(config.input.forget, id_types(config.input, files.log, _index_types(before))[0])
    inputs = {**files.fingerprints(), "index": {"ds": before.ds, "run_key": before.run_key} if before else None}
    if forget.digest is not None:
        inputs["forget"] = forget.digest
    stage = StageRun(STAGE, config, ds, inputs)
    if done := stage.find():
        log.info("already prepared: %s", done.root)
        return Outcome.of(done, "already-done", rows=done.facts["rows"])

    run = stage.begin()
    try:
        with spark_session("ncf-prepare", config.spark) as spark:
            tables, facts = _Night(spark, config, ds, files, before, run, forget).make()
    finally:
        remove(posixpath.join(run, "_staging"))
    manifest = stage.finish(tables=tables, facts=facts, noted={"files": files.counts()})
    log.info("prepared %s in %.1f s: %s", run, manifest.seconds, json.dumps(facts["rows"]))
    return Outcome.of(manifest, rows=facts["rows"])


@dataclass(frozen=True)
class _Files:
    """Every file that the tables are made from."""

    log: Found
    test: Found
    candidates: Found
    items: Found
    users: Found

    @classmethod
    def find(cls, config: Config) -> _Files:
        """Raises InputError where one is missing."""
        form, name = FORMATS[config.input.format], config.input.format
        sides = {"items": config.input.items, "users": config.input.users}
        split = config.split
        return cls(
            find_files(config.input.path, form, name),
            find_files(split.test, form, name, "split.test") if split.test else Found(),
            find_files(split.candidates, None, name, "split.candidates") if split.candidates else Found(),
            *(side_files(kind, side, name) if side else Found() for kind, side in sides.items()),
        )

    def fingerprints(self) -> dict[str, Any]:
        named = {"interactions": self.log, "items": self.items}
        further = {"test": self.test, "candidates": self.candidates, "users": self.users}
        return {name: files.fingerprint() for name, files in (named | {k: v for k, v in further.items() if v}).items()}

    def counts(self) -> dict[str, int]:
        """Files of the log that are read, and those beside them that are not."""
        found = (self.log, self.test)
        return {"read": sum(len(f.paths) for f in found), "left_out": sum(len(f.left_out) for f in found)}


@dataclass
class _Counts:
    """Where rows went. unique, filtered: where the rows were cleaned before the pass over users."""

    input: int
    sound: int
    quarantined: dict[str, int]
    forgotten: int
    unique: int | None = None
    filtered: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows that must reach the pass over users."""
        return self.sound if self.unique is None else self.unique - sum(self.filtered.values())


def _needs_unique(config: Config) -> bool:
    """Whether duplicates must be gone before the pass over users removes them on its way."""
    split = config.split
    by_share = split.test_from is None or (split.validation and split.validation_from is None)
    return config.input.filters or (split.strategy == "temporal" and by_share)


class _Night:
    """One night's tables, step by step."""

    def __init__(
        self,
        spark: SparkSession,
        config: Config,
        ds: str,
        files: _Files,
        before: Manifest | None,
        run: str,
        forget: Forget,
    ) -> None:
        self.spark, self.config, self.files, self.before, self.run = spark, config, files, before, run
        self.forget, self.staging = forget, posixpath.join(run, "_staging")
        self.id_types = id_types(config.input, files.log, _index_types(before))
        self.until = config.input.until or dt.date.fromisoformat(ds)
        self.tables: dict[str, TableInfo] = {}
        self.frames: dict[str, DataFrame] = {}
        self.sizes = index_sizes(before)._asdict() if before else dict.fromkeys(INDEXES, 0)
        """How many numbers have been given to users and items."""

    def make(self) -> tuple[dict[str, TableInfo], dict[str, Any]]:
        """Every table of the contracts; (tables, facts)."""
        rows, counts = self._read()
        if _needs_unique(self.config):
            rows = self._clean(rows, counts)
        given = self._candidates()
        self._indexes(given)
        indexed = self._indexed(rows)
        rule = SplitRule(self.config.split, self.config.seed)
        if rule.split.strategy == "temporal":
            rule = temporal_rule(rule, rows, indexed, counts.kept)
        stats = self._pass_over_users(indexed, given, rule, counts.kept)
        for contract in (contracts.INTERACTIONS, contracts.HISTORY, contracts.VALIDATION, contracts.TEST):
            self.tables[contract.name] = table_info(contract, _collected(stats, contract.name), self.run)
        log.info("split: %s", {name: self.tables[name].rows for name in ("interactions", "validation", "test")})
        self.tables["train"] = self._train_table(stats)
        log.info("train: %s rows in %d files", f"{self.tables['train'].rows:,}", len(self.tables["train"].files))
        self.tables["item_stats"] = self._item_stats()
        return self.tables, {**self._facts(counts, stats), **_split_facts(rule), **self._sides()}

    def _clean(self, rows: DataFrame, counts: _Counts) -> DataFrame:
        """Unique rows that pass the filters."""
        config = self.config.input
        rows, counts.unique, counts.filtered = clean.keep(
            self.spark, rows, config, self.id_types, self.config.seed, self.staging
        )
        self.frames |= {name: rows.select(name) for name in ("user_id", "item_id")}
        log.info("%s unique rows, left out: %s", f"{counts.unique:,}", counts.filtered or "none")
        if not counts.kept:
            raise InputError(
                f"input {config.path} has no row left ({counts.input:,} rows read, {counts.filtered} left out); "
                "needed at least one: check the filters of input"
            )
        return rows

    def _facts(self, counts: _Counts, stats: list[dict[str, Any]]) -> dict[str, Any]:
        """The accounting of rows, and what later stages and people want to know."""
        passed = Counter[str]()
        for task in stats:
            passed.update(task["counts"])
        if passed["rows"] != counts.kept:
            raise AssertionError(f"{passed['rows']:,} rows reached the users of {counts.kept:,}: rows were lost")
        accepted = passed["accepted"] if counts.unique is None else counts.unique
        rows: dict[str, Any] = {
            "input": counts.input,
            "accepted": accepted,
            "duplicates": counts.sound - accepted,
            "quarantined": counts.quarantined,
        }
        if counts.filtered:
            rows["filtered"] = counts.filtered
        left: dict[str, int] = {}
        if self.forget.ids is not None:
            rows["forgotten"] = counts.forgotten
            left["forgotten_users"] = self.forgotten_users
        kept = ("tied_users", "train", "validation", "test", "users_without_negatives")
        short = ("validation_short_candidates", "test_short_candidates")
        return {
            **self.sizes,
            DIGESTS: digests(self.spark, {name: self._paths(table) for name, table in INDEXES.items()}),
            "rows": rows,
            **left,
            "feedback": self.config.input.feedback,
            "active_users": passed["users"],
            **{name: passed[name] for name in (*kept, *short)},
            "tied_users_share": round(passed["tied_users"] / max(1, passed["users"]), 6),
        }

    # ---- read

    def _read(self) -> tuple[DataFrame, _Counts]:
        """Type every row once, stage the sound ones, write the quarantine; (sound rows, counts).
        Raises InputError when too many are bad."""
        config = self.config.input
        spec = RowSpec(
            interactions_source(config, self.files.log),
            *self.id_types,
            time_unit=config.time_unit,
            until=day_start(self.until),
            rating_range=config.rating_range,
            staging=self.staging,
            forget=self.forget,
        )
        stats = self._run_read(spec)
        if self.files.test:
            source = interactions_source(config, self.files.test)
            stats += self._run_read(replace(spec, source=source, part=1))
        reasons = Counter[str]()
        for unit in stats:
            reasons.update(unit["reasons"])
        total, rejected = sum(unit["rows"] for unit in stats), sum(reasons.values())
        if not total:
            raise InputError(
                f"input {', '.join(self.files.log.paths[:3])} is empty (0 rows); "
                f"needed an interaction log of format {config.format}"
            )
        log.info("read %s rows of %d files, %s rejected", f"{total:,}", len(self.files.log.paths), f"{rejected:,}")
        rejects = self._staged(
            [path for unit in stats for path in unit["files"]["rejects"]], contracts.QUARANTINE.schema
        )
        file = F.pmod(F.xxhash64("file", "place"), F.lit(1 + rejected // ROWS_PER_FILE))
        if rejected:
            self.tables["quarantine"] = write_table(rejects, self.run, contracts.QUARANTINE, file)
        else:
            self.tables["quarantine"] = table_info(contracts.QUARANTINE, [], self.run)
        forgotten = sum(unit["forgotten"] for unit in stats)
        if forgotten == total:
            raise InputError(f"all {total:,} rows of {config.path} are of users of input.forget; needed rows of others")
        self._judge(rejects, reasons, total - forgotten)
        for warning in time_warnings(config, stats, reasons, total - forgotten, self.until):
            log.warning("%s", warning)
        schema = staged_schema(*self.id_types)
        rows = self._staged([path for unit in stats for path in unit["files"]["rows"]], schema)
        for name in ("user_id", "item_id"):
            keys = [path for unit in stats for path in unit["files"][name]]
            self.frames[name] = self._staged(keys, pa.schema([schema.field(name)]))
        return rows, _Counts(total, total - rejected - forgotten, dict(sorted(reasons.items())), forgotten)

    def _run_read(self, spec: RowSpec) -> list[dict[str, Any]]:
        def read(source: Source, units: Sequence[int]) -> list[dict[str, Any]]:
            numbers = self.spark.range(0, len(source.units), 1, min(len(units), MAX_TASKS))
            if len(units) < len(source.units):
                log.info("%d of %d ranges are read again: a record begins elsewhere", len(units), len(source.units))
                numbers = numbers.where(F.col("id").isin(*units)).repartition(min(len(units), MAX_TASKS))
            passed = map_in_arrow(numbers, read_pass(replace(spec, source=source)), "stats string")
            stats = [json.loads(row["stats"]) for row in passed.collect()]
            for unit in stats:
                if "error" in unit:
                    raise InputError(
                        f"{unit['error']}; needed whole files of format {self.config.input.format}: mend them"
                    )
            return stats

        return settle(spec.source, read)

    def _judge(self, rejects: DataFrame, reasons: Counter[str], total: int) -> None:
        config = self.config.input
        late = reasons[LATE]
        bad, judged = sum(reasons.values()) - late, total - late
        if late:
            log.info(
                "%s rows are from %s on, after this night's window: left for later nights", f"{late:,}", self.until
            )
        if bad:
            log.warning(
                "%s of %s rows quarantined: %s (%s/quarantine)", f"{bad:,}", f"{total:,}", dict(reasons), self.run
            )
        if bad > config.max_bad_fraction * judged:
            example = rejects.where(F.col("reason") != LATE).orderBy("file", "place").first()
            assert example is not None
            wanted = FORMATS[config.format].example or f"{config.format} with {config.columns.model_dump()}"
            raise InputError(
                f"{bad:,} of {judged:,} rows ({bad / judged:.1%}) of {config.path} do not fit "
                f"format {config.format}: {dict(sorted(reasons.items()))}, for example "
                f"{place_of(config.format, example['place'])} of {example['file']} ({example['reason']}); needed lines "
                f"like {wanted!r} and at most {config.max_bad_fraction:.1%} bad: "
                f"{hint(config, reasons, example['raw'])}; or set input.format to what the file is, or fix it; every "
                f"rejected row, what it holds and its reason are in {self.run}/quarantine"
            )
        if not judged:
            raise InputError(
                f"all {total:,} rows of {config.path} are from {self.until} on; needed rows from before it: "
                "check --ds, input.until and input.time_unit"
            )

    # ---- index

    def _indexes(self, given: DataFrame | None) -> None:
        """user_index and item_index: the night before's, and after it every new id."""
        made = zip(INDEXES, self.id_types, (contracts.user_index, contracts.item_index), strict=True)
        for name, contract in ((name, of(id_type)) for name, id_type, of in made):
            id_column, index_column = contract.columns
            old = read_table(self.spark, self.before, contract) if self.before else None
            if old is not None and name == "users":
                old = self.forget.leave(old, id_column)
            keys = self.frames[id_column]
            if given is not None and id_column == "item_id":
                keys = keys.union(given.select(F.col("candidate").alias("item_id")))
            indexed, self.sizes[name] = extend_index(self.spark, keys, old, self.sizes[name], id_column, index_column)
            file = F.floor(F.col(index_column) / F.lit(ROWS_PER_FILE))
            self.tables[contract.name] = write_table(indexed, self.run, contract, file)
            self.frames[contract.name] = read_files(self.spark, self._paths(contract.name), contract.schema)
        log.info("%s", ", ".join(f"{name}: {self.tables[name].rows:,}" for name in ("user_index", "item_index")))

    @property
    def forgotten_users(self) -> int:
        """How many users of the night before's index are in tonight's no more."""
        if self.before is None:
            return 0
        new = self.sizes["users"] - index_sizes(self.before).users
        return self.before.tables["user_index"].rows + new - self.tables["user_index"].rows

    def _indexed(self, rows: DataFrame) -> DataFrame:
        joined = rows.join(self.frames["item_index"], "item_id").join(self.frames["user_index"], "user_id")
        return joined.select("user_idx", "item_idx", "rating", "timestamp", "part")

    def _candidates(self) -> DataFrame | None:
        if not self.files.candidates:
            return None
        files = self.files.candidates.paths
        none = (None,) * len(files)
        line: dict[str, str | int] = {"line": 0}
        source = Source(files, "text", (line,) * len(files), plan(files, "text"), "\t", counts=none,
                        headers=(False,) * len(files), max_line_bytes=2**24)  # fmt: skip
        return candidate_rows(self.spark, source, *self.id_types, self.staging, self.forget)

    def _with_candidates(self, indexed: DataFrame, given: DataFrame) -> DataFrame:
        """A column `candidates`: item indexes, ascending; null on rows that have none."""
        items = self.frames["item_index"]
        of = items.select(F.col("item_id").alias("candidate"), F.col("item_idx").alias("_candidate"))
        lists = (
            given.join(of, "candidate")
            .join(items, "item_id")
            .join(self.frames["user_index"], "user_id")
            .groupBy("user_idx", "item_idx")
            .agg(F.sort_array(F.collect_list("_candidate")).alias("candidates"))
        )
        return indexed.join(lists, ["user_idx", "item_idx"], "left")

    # ---- users

    def _pass_over_users(
        self, indexed: DataFrame, given: DataFrame | None, rule: SplitRule, rows: int
    ) -> list[dict[str, Any]]:
        """Run `users.user_pass` and return its statistics, one a task."""
        config = self.config
        n_users, n_items = self.sizes["users"], self.sizes["items"]
        user_files = max(MIN_USER_FILES, -(-rows // ROWS_PER_USER_FILE))
        spec = UserPass(
            run=self.run,
            staging=posixpath.join(self.staging, "train"),
            n_items=n_items,
            users_per_file=-(-n_users // user_files),
            rule=rule,
            negatives=config.negatives,
            seed=config.seed,
            explicit=config.input.feedback == "explicit",
            given=given is not None,
        )
        if given is not None:
            indexed = self._with_candidates(indexed, given)
        file = F.floor(F.col("user_idx") / F.lit(spec.users_per_file))
        grouped = (
            indexed.withColumn("_file", file)
            .repartition(config.spark.shuffle_partitions, "_file")
            .drop("_file")
            .sortWithinPartitions("user_idx")
        )
        if config.negatives.alpha > 0 and not spec.explicit:
            spec = replace(spec, weights=self._weights(grouped, spec))
        passed = map_in_arrow(grouped, user_pass(spec), "stats string").collect()
        return [json.loads(row["stats"]) for row in passed]

    def _weights(self, grouped: DataFrame, spec: UserPass) -> tuple[str, ...]:
        """Write item_weights: popularity^alpha in integers, so that a sum does not depend on its order. An item
        without train rows counts as one with a single row."""
        counts = map_in_arrow(grouped, count_pass(spec), "item_idx int, train_count bigint")
        counts = counts.groupBy("item_idx").agg(F.sum("train_count").alias("train_count"))
        counts = self.frames["item_index"].select("item_idx").join(counts, "item_idx", "left")
        power = F.pow(F.coalesce("train_count", F.lit(1)), F.lit(self.config.negatives.alpha))
        powers = counts.select("item_idx", F.floor(power * F.lit(float(2**20))).cast("bigint").alias("_power"))
        total = int(powers.agg(F.sum("_power")).collect()[0][0])
        weight = F.greatest(F.lit(1), F.floor(F.col("_power") / F.lit(float(total)) * F.lit(float(WEIGHT_TOTAL))))
        weighted = powers.select("item_idx", weight.cast("bigint").alias("weight"))
        file = F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE))
        self.tables["item_weights"] = write_table(weighted, self.run, contracts.ITEM_WEIGHTS, file)
        return tuple(self._paths("item_weights"))

    def _train_table(self, stats: list[dict[str, Any]]) -> TableInfo:
        """The train table, from what the pass over users staged."""
        explicit = self.config.input.feedback == "explicit"
        contract = train_contract(self.config.negatives, explicit)
        files = [posixpath.join(self.staging, "train", info.path) for info in _collected(stats, "staging")]
        staged = self._staged(files, staging_schema(self.config.negatives, explicit))
        buckets = np.sum([task["buckets"] for task in stats], axis=0)
        return write_train(self.spark, staged, buckets, self.run, contract, self.config.layout)

    # ---- items and users

    def _item_stats(self) -> TableInfo:
        interactions = read_files(self.spark, self._paths("interactions"), contracts.INTERACTIONS.schema)
        counted = (
            interactions.where(F.col("split") != contracts.TEST_SPLIT)
            .groupBy("item_idx")
            .agg(F.count("*").alias("train_count"))
        )
        stats = (
            self.frames["item_index"]
            .join(counted, "item_idx", "left")
            .select("item_idx", F.coalesce("train_count", F.lit(0)).cast("bigint").alias("train_count"))
        )
        return write_table(stats, self.run, contracts.ITEM_STATS, F.floor(F.col("item_idx") / F.lit(ROWS_PER_FILE)))

    def _sides(self) -> dict[str, Any]:
        """Write the side tables; what was found in each."""
        facts: dict[str, Any] = {}
        for kind, id_type in zip(("users", "items"), self.id_types, strict=True):
            side = self.config.input.items if kind == "items" else self.config.input.users
            if side is None:
                continue
            files = self.files.items if kind == "items" else self.files.users
            source = uncut(side_source(kind, side, self.config.input.format, files))
            forget = self.forget if kind == "users" else NOBODY
            spec = SideSpec(source, id_type, side_columns(side, kind), forget)
            contract = side_contract(side, kind, id_type)
            index = self.frames[f"{kind[:-1]}_index"]
            tables, found = write_side(self.spark, spec, contract, index, self.run, self.staging)
            self.tables |= tables
            facts[f"side_{kind}"] = found
            if found["unusable"] or found["repeated"] or found["bad_values"]:
                log.warning("input.%s: %s", kind, found)
        return facts

    # ---- paths

    def _paths(self, table: str) -> list[str]:
        info = self.tables[table]
        return [posixpath.join(self.run, info.path, file.path) for file in info.files]

    def _staged(self, files: Sequence[str], schema: pa.Schema) -> DataFrame:
        if files:
            return read_files(self.spark, list(files), schema)
        return self.spark.createDataFrame([], from_arrow_schema(schema))


def _base(lake: Lake, ds: str) -> Manifest | None:
    """The run whose indexes this night extends: the one it extended last time, or the latest finished one before `ds`.

    A night keeps its base for ever: an earlier night that is made up for later must not renumber it.
    """
    if tonight := lake.stage(ds, STAGE).production():
        recorded = tonight[0].inputs["index"]
        return lake.stage(recorded["ds"], STAGE).load(recorded["run_key"]) if recorded else None
    return next(production_nights(lake, STAGE, before=ds), None)


def _index_types(before: Manifest | None) -> tuple[pa.DataType | None, pa.DataType | None]:
    """The types of user_id and item_id in the indexes that a night extends; None where they hold nothing."""
    files = [before.files(f"{side}_index") if before else [] for side in ("user", "item")]
    user, item = (read_schema(paths[0]).types[0] if paths else None for paths in files)
    return user, item


def _split_facts(rule: SplitRule) -> dict[str, Any]:
    """Where a temporal split cut."""
    cuts = {"test_cutoff": rule.test, "validation_cutoff": rule.validation}
    return {name: day_of(cut.time) for name, cut in cuts.items() if cut is not None and cut.time < 2**62}


def _collected(stats: list[dict[str, Any]], name: str) -> list[FileInfo]:
    return [FileInfo(**info) for task in stats for info in task["files"][name]]
