"""The first rows of the log and of the side tables, read by prepare's own code: what each column holds, and which key
of the config to change where rows do not fit.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist.config import Config, SideTable
from ncf_dist.contracts import QUARANTINE, day_start
from ncf_dist.doctor.check import Check, Status
from ncf_dist.errors import NcfError
from ncf_dist.inputs import NoInput

if TYPE_CHECKING:
    from ncf_dist.prepare.chunks import Chunk
    from ncf_dist.prepare.source import Source

ROWS = 1_000
EXAMPLES = 3
PERSONAL = ("user", "users")
"""Columns whose values no message shows."""


def looked_at(config: Config, ds: str) -> list[Check]:
    """`samples`, of a process of its own: prepare's code imports packages that doctor is to judge first."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", "from ncf_dist.doctor.sample import main; main()"],
        input=json.dumps([config.model_dump(mode="json", by_alias=True), ds]),
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("input rows", "warn", f"are not looked at ({last}): run make install")]
    return [Check(**check) for check in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    tree, ds = json.load(sys.stdin)
    print(json.dumps([dataclasses.asdict(check) for check in samples(Config.model_validate(tree), ds)]))


def samples(config: Config, ds: str) -> Iterator[Check]:
    """A line a column; nothing for a log that is not there yet."""
    reads: dict[str, Callable[[], Iterator[Check]]] = {"input": partial(_log, config, ds)}
    for kind, side in (("items", config.input.items), ("users", config.input.users)):
        if side is not None:
            reads[kind] = partial(_side, config, kind, side)
    for name, read in reads.items():
        try:
            yield from read()
        except NoInput:
            continue  # places.inputs has said so.
        except ImportError as error:
            yield Check(f"{name} rows", "warn", f"are not looked at ({error}): run make install")
        except NcfError as error:
            yield Check(f"{name} rows", "fail", str(error), "data")
        except OSError as error:
            yield Check(f"{name} rows", "fail", f"cannot be read ({error}): check its permissions", "data")


def _log(config: Config, ds: str) -> Iterator[Check]:
    from ncf_dist.prepare.columns import interactions_source
    from ncf_dist.prepare.formats import FORMATS
    from ncf_dist.prepare.hints import hint, time_warnings
    from ncf_dist.prepare.id_types import id_types
    from ncf_dist.prepare.input_files import find_files
    from ncf_dist.prepare.interactions import LATE, RowSpec, typed
    from ncf_dist.prepare.source import place_of
    from ncf_dist.prepare.values import YEAR_1995

    section = config.input
    files = find_files(section.path, FORMATS[section.format], section.format)
    source = interactions_source(section, files)
    until = section.until or dt.date.fromisoformat(ds)
    spec = RowSpec(source, *id_types(section, files), section.time_unit, day_start(until), section.rating_range, "")
    parts = [typed(chunk, spec) for chunk in _first(source)]
    rows = pa.concat_tables([good for good, _ in parts]) if parts else None
    rejects = pa.concat_tables([bad for _, bad in parts if bad is not None] or [QUARANTINE.schema.empty_table()])
    reasons = Counter[str](rejects["reason"].to_pylist())
    total = (rows.num_rows if rows else 0) + rejects.num_rows
    if files.left_out:
        yield Check("input files", "warn", f"{len(files.left_out)} left out, such as {files.left_out[0]}")
    bad = total - reasons[LATE] - (rows.num_rows if rows else 0)
    if bad:
        shown = rejects.filter(pc.not_equal(rejects["reason"], LATE))
        too_many = bad > section.max_bad_fraction * (total - reasons[LATE])
        # Where few do not fit the config is likely right.
        few = "" if too_many else "a night goes on without them; if they should fit, "
        advice = few + hint(section, reasons, shown["raw"][0].as_py())
        where = f"{place_of(section.format, shown['place'][0].as_py())} of {shown['file'][0].as_py()}"
        detail = f"{bad:,} of the first {total:,} do not fit: {dict(reasons)}, for example {where}"
        yield Check("input rows", "fail" if too_many else "warn", f"{detail}: {advice}", "data")
    else:
        yield Check("input rows", "ok" if total else "warn", f"the first {total:,} fit" if total else "there is none")
    if rows is None:
        return
    early = pc.sum(pc.less(rows["timestamp"], YEAR_1995)).as_py() or 0
    stats = [{"early": early, "latest": pc.max(rows["timestamp"]).as_py() or 0}]
    for warning in time_warnings(section, stats, reasons, total, until):
        yield Check("input.time_unit", "warn", warning)
    if not rows.num_rows:
        return
    places = dict(FORMATS[section.format].fields or section.columns.model_dump())
    for name, column in (("user", "user_id"), ("item", "item_id"), ("rating", "rating"), ("timestamp", "timestamp")):
        if places.get(name) is not None:
            said = f"{places[name]}: {_said(name, rows[column])}"
            if pointed := pa.types.is_string(rows[column].type) and _all_pointed(rows[column]):
                said += f": whole numbers written as floats, published as such text: set input.{name}_type=int"
            yield Check(f"input.columns.{name}", "warn" if pointed else "ok", said)


def _side(config: Config, kind: str, side: SideTable) -> Iterator[Check]:
    from ncf_dist.prepare.columns import side_files, side_source
    from ncf_dist.prepare.side_tables import SideSpec, side_columns, typed

    family, key = config.input.format, f"input.{kind}"
    source = side_source(kind, side, family, side_files(kind, side, family))
    spec = SideSpec(source, pa.string(), side_columns(side, kind))
    chunks = list(_first(source))
    rows = pa.Table.from_batches([typed(chunk, spec) for chunk in chunks], spec.schema)
    reasons = Counter(reason for chunk in chunks for reason in chunk.reason if reason is not None)
    unusable = pc.sum(rows["_unusable"]).as_py() or 0
    good = rows.filter(pc.invert(rows["_unusable"]))
    if unusable:
        status: Status = "warn" if good.num_rows else "fail"
        why = f" ({', '.join(f'{n} x {reason}' for reason, n in sorted(reasons.items()))})" if reasons else ""
        advice = f"set {key}.id to the column of the ids, or {key}.separator and {key}.header to how it is written"
        yield Check(
            f"{kind} rows",
            status,
            f"{unusable:,} of the first {rows.num_rows:,} have no usable id{why}: {advice}",
            "data",
        )
    else:
        yield Check(f"{kind} rows", "ok" if good.num_rows else "warn", f"the first {rows.num_rows:,} have an id")
    names: Mapping[str, str] = {"id": f"{key}.id", "title": f"{key}.title"}
    for name in ("id", *spec.columns):
        if good.num_rows and not (name == "title" and good[name].null_count == good.num_rows):
            gaps = good[name].null_count
            detail = _said("users" if kind == "users" else name, good[name]) + (f", {gaps:,} without" if gaps else "")
            yield Check(names.get(name, f"{key}.columns.{name}"), "warn" if gaps == good.num_rows else "ok", detail)


def _first(source: Source) -> Iterator[Chunk]:
    """The first ROWS rows."""
    from ncf_dist.prepare.reading import read_unit

    left = ROWS
    for chunk in chain.from_iterable(read_unit(source, unit) for unit in source.units):
        yield chunk.slice(0, min(left, len(chunk.place)))
        left -= len(chunk.place)
        if left <= 0:
            return


def _all_pointed(ids: pa.ChunkedArray) -> bool:
    """Whether each id is text such as 454.0, which a column of integers with gaps becomes in pandas."""
    return bool(pc.all(pc.match_substring_regex(ids, r"^-?[0-9]+\.0$")).as_py())


def _said(name: str, column: pa.ChunkedArray) -> str:
    """What a reader wants to know of a column: its range, or some of its values; not where they are about a person."""
    if name in ("rating", "timestamp"):
        low, high = (pc.min_max(column)[end].as_py() for end in ("min", "max"))
        if name == "timestamp":
            low, high = (_moment(value) for value in (low, high))
        return f"{low} to {high}"
    values = [value for value in pc.unique(column).to_pylist() if value is not None]
    if name in PERSONAL:
        return f"{column.type}, {len(values):,} different"
    examples = ", ".join(repr(value) for value in values[:EXAMPLES])
    return f"{column.type}, {len(values):,} different, such as {examples}"


def _moment(microseconds: Any) -> str:
    return (dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=microseconds)).isoformat(" ", "seconds")
