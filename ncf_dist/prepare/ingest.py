"""The step ingest: type every row of the log once, store the whole ones, and write the others to the quarantine.

Workers read one unit at a time (`read_one`); the driver sees counts and the paths of files, never a row.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from ncf_dist import contracts
from ncf_dist.config import Input
from ncf_dist.errors import InputError
from ncf_dist.parquet import TableInfo
from ncf_dist.prepare.chunks import row_by_row
from ncf_dist.prepare.columns import interactions_source
from ncf_dist.prepare.forget import Forget
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.hints import hint, time_warnings
from ncf_dist.prepare.id_types import IdTypes
from ncf_dist.prepare.interactions import LATE, RowSpec, typed
from ncf_dist.prepare.reading import read_unit
from ncf_dist.prepare.records import RecordSpan, read_ranges
from ncf_dist.prepare.run_inputs import RunInputs
from ncf_dist.prepare.source import Source, place_of
from ncf_dist.prepare.values import YEAR_1995
from ncf_dist.prepare.workspace import Workspace
from ncf_dist.spark_files import ROWS_PER_FILE, FileSink, table_info, write_table
from ncf_dist.spark_io import Pass, stats_batch, task_stats

MAX_TASKS = 10_000
ID_COLUMNS = ("user_id", "item_id")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingested:
    """The log as typed rows. rows: user_id, item_id, rating, timestamp, part, and place where asked for; user_ids,
    item_ids: one column, each id once or a few times; read: rows of the input; quarantined: rows by reason; forgotten:
    rows of users to be forgotten; warnings: what a person should know of the times.
    """

    rows: DataFrame
    user_ids: DataFrame
    item_ids: DataFrame
    quarantine: TableInfo
    read: int
    quarantined: Mapping[str, int]
    forgotten: int
    warnings: Sequence[str]

    @property
    def whole(self) -> int:
        """How many rows `rows` has."""
        return self.read - sum(self.quarantined.values()) - self.forgotten


def ingest(
    space: Workspace, config: Input, inputs: RunInputs, ids: IdTypes, forget: Forget, until: dt.date, places: bool
) -> Ingested:
    """Read the log (and the split's test file). until: the first day whose rows are left for later nights; places:
    whether rows keep their place in the log.

    Raises InputError where there is no row, where too many are bad (then the quarantine is written all the same), and
    where a file cannot be read.
    """
    spec = RowSpec(
        interactions_source(config, inputs.log),
        *ids,
        time_unit=config.time_unit,
        until=contracts.day_start(until),
        rating_range=config.rating_range,
        staging=space.staging,
        forget=forget,
        places=places,
    )
    stats = _read_all(space, config, spec)
    if inputs.test:
        test = replace(spec, source=interactions_source(config, inputs.test), part=1)
        stats += _read_all(space, config, test)
    reasons = Counter[str]()
    for unit in stats:
        reasons.update(unit["reasons"])
    total, forgotten = sum(unit["rows"] for unit in stats), sum(unit["forgotten"] for unit in stats)
    if not total:
        raise InputError(
            f"input {', '.join(inputs.log.paths[:3])} is empty (0 rows); "
            f"needed an interaction log of format {config.format}"
        )
    log.info("read %s rows of %d files, %s rejected", f"{total:,}", len(inputs.log.paths), f"{sum(reasons.values()):,}")
    rejects = space.read(_staged_files(stats, "rejects"), contracts.QUARANTINE.schema)
    quarantine = _write_quarantine(space, rejects, sum(reasons.values()))
    if forgotten == total:
        raise InputError(f"all {total:,} rows of {config.path} are of users of input.forget; needed rows of others")
    _judge(space, config, rejects, reasons, total - forgotten, until)
    warnings = time_warnings(config, stats, reasons, total - forgotten, until)
    for warning in warnings:
        log.warning("%s", warning)
    rows = space.read(_staged_files(stats, "rows"), spec.schema)
    users, items = (space.read(_staged_files(stats, name), pa.schema([spec.schema.field(name)])) for name in ID_COLUMNS)
    return Ingested(rows, users, items, quarantine, total, dict(sorted(reasons.items())), forgotten, warnings)


def _staged_files(stats: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
    return [path for unit in stats for path in unit["files"][kind]]


def _read_all(space: Workspace, config: Input, spec: RowSpec) -> list[dict[str, Any]]:
    """The statistics of every unit (`read_one`), in order."""

    def read(source: Source, units: Sequence[int]) -> list[dict[str, Any]]:
        numbers = space.spark.range(0, len(source.units), 1, min(len(units), MAX_TASKS))
        if len(units) < len(source.units):
            log.info("%d of %d ranges are read again: a record begins elsewhere", len(units), len(source.units))
            numbers = numbers.where(F.col("id").isin(*units)).repartition(min(len(units), MAX_TASKS))
        stats = task_stats(numbers, read_pass(replace(spec, source=source)))
        for unit in stats:
            if "error" in unit:
                raise InputError(f"{unit['error']}; needed whole files of format {config.format}: fix them")
        return stats

    return read_ranges(spec.source, read)


def _write_quarantine(space: Workspace, rejects: DataFrame, count: int) -> TableInfo:
    if not count:
        return table_info(contracts.QUARANTINE, [], space.run)
    file = F.pmod(F.xxhash64("file", "place"), F.lit(1 + count // ROWS_PER_FILE))
    return write_table(rejects, space.run, contracts.QUARANTINE, file)


def _judge(
    space: Workspace, config: Input, rejects: DataFrame, reasons: Counter[str], total: int, until: dt.date
) -> None:
    """Raise InputError where more rows are bad than the config allows, or where none is from before `until`. total:
    rows but for those to be forgotten."""
    late = reasons[LATE]
    bad, judged = sum(reasons.values()) - late, total - late
    quarantine = f"{space.run}/quarantine"
    if late:
        log.info("%s rows are from %s on, after this night's window: left for later nights", f"{late:,}", until)
    if bad:
        log.warning("%s of %s rows quarantined: %s (%s)", f"{bad:,}", f"{total:,}", dict(reasons), quarantine)
    if bad > config.max_bad_fraction * judged:
        example = rejects.where(F.col("reason") != LATE).orderBy("file", "place").first()
        assert example is not None
        wanted = FORMATS[config.format].example or f"{config.format} with {config.columns.model_dump()}"
        advice = hint(config, reasons, example["raw"])
        # Where most rows fit, so does the config.
        remedy = (
            f"fix the file, or raise input.max_bad_fraction; or {advice}"
            if bad < judged / 2
            else f"{advice}; or set input.format to what the file is, or fix it"
        )
        raise InputError(
            f"{bad:,} of {judged:,} rows ({bad / judged:.1%}) of {config.path} do not fit "
            f"format {config.format}: {dict(sorted(reasons.items()))}, for example "
            f"{place_of(config.format, example['place'])} of {example['file']} ({example['reason']}); needed lines "
            f"like {wanted!r} and at most {config.max_bad_fraction:.1%} bad: "
            f"{remedy}; every rejected row, what it holds and its reason are in {quarantine}"
        )
    if not judged:
        raise InputError(
            f"all {total:,} rows of {config.path} are from {until} on; needed rows from before it: "
            "check --ds, input.until and input.time_unit"
        )


# ---- on the workers


def read_pass(spec: RowSpec) -> Pass:
    """For mapInArrow over unit numbers (column `id`): writes each unit's rows under `staging` and yields `stats`, the
    JSON of what `read_one` returns."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        stats = [read_one(spec, unit) for batch in batches for unit in batch.column(0).to_pylist()]
        yield stats_batch(*stats)

    return run


def read_one(spec: RowSpec, unit: int) -> dict[str, Any]:
    """Read, type and store one unit, a block at a time.

    Returns its number, rows read, how many of them are forgotten, counts by reason, how many are from before 1995, the
    latest time, the record spans, and files by kind; or `error`, where a file cannot be read.
    """
    writer = _UnitWriter(spec, unit)
    spans: list[RecordSpan] = []
    total = 0
    try:
        for chunk in read_unit(spec.source, spec.source.units[unit], spans):
            total += len(chunk.place)
            for rows, rejects in row_by_row(chunk, lambda part: typed(part, spec)):
                writer.add(rows, rejects)
    except (OSError, pa.ArrowException) as error:
        named = ", ".join(spec.source.files[part.file] for part in spec.source.units[unit][:3])
        return {"unit": unit, "spans": [], "error": f"{named} cannot be read: {error}"}
    forgotten = total - writer.whole - writer.reasons.total()
    return {"unit": unit, "rows": total, "forgotten": forgotten, **writer.close(), "spans": spans}


class _UnitWriter:
    """Writes the rows of a unit, the rejected ones, and the ids, each about once: an index is small beside the rows, so
    Spark need not see the ids of every row."""

    def __init__(self, spec: RowSpec, unit: int) -> None:
        self.unit, self.whole, self.reasons = unit, 0, Counter[str]()
        self._early, self._latest = 0, 0
        keys = {name: pa.schema([spec.schema.field(name)]) for name in ID_COLUMNS}
        schemas = {"rows": spec.schema, "rejects": contracts.QUARANTINE.schema, **keys}
        self._sinks = {kind: FileSink(f"{spec.staging}/{kind}-{spec.part}", schema) for kind, schema in schemas.items()}
        self._ids = [_DistinctIds(self._sinks[name], unit) for name in ID_COLUMNS]

    def add(self, rows: pa.Table, rejects: pa.Table | None) -> None:
        self.whole += rows.num_rows
        self._early += int(pc.sum(pc.less(rows["timestamp"], YEAR_1995)).as_py() or 0)
        self._latest = max(self._latest, pc.max(rows["timestamp"]).as_py() or 0)
        self._sinks["rows"].add(self.unit, rows)
        for ids in self._ids:
            ids.add(rows)
        if rejects is not None:
            self._sinks["rejects"].add(self.unit, rejects)
            self.reasons.update(rejects.column("reason").to_pylist())

    def close(self) -> dict[str, Any]:
        """Statistics of the rows, and `files` by kind."""
        for ids in self._ids:
            ids.flush()
        files = {kind: [f"{sink.folder}/{info.path}" for info in sink.close()] for kind, sink in self._sinks.items()}
        return {"reasons": self.reasons, "early": self._early, "latest": self._latest, "files": files}


class _DistinctIds:
    """The ids of one column of a unit, each about once."""

    def __init__(self, sink: FileSink, unit: int) -> None:
        self.sink, self.unit = sink, unit
        self._held: list[pa.Array] = []
        self._size = 0

    def add(self, rows: pa.Table) -> None:
        [name] = self.sink.schema.names
        self._held.append(pc.unique(rows[name]))
        self._size += len(self._held[-1])
        if self._size > ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if self._size:
            self.sink.add(self.unit, pa.table([pc.unique(pa.chunked_array(self._held))], schema=self.sink.schema))
        self._held, self._size = [], 0
