"""From the stored ranks to sums over users, on an executor: of every metric, of its bootstrap replicates, by segment.

A sum is named `scorer/protocol/metric`, or `scorer/segment/kind/code/metric`, and `n` is its number of users. Each is
(1 + B,): the plain sum, then one a replicate; where no interval is wanted, (1,). Files are read one at a time and added
up in their order, so a sum depends on no partition, and the driver sees one sum a name whatever the users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession

from ncf_dist import metrics
from ncf_dist.champion import CHAMPION
from ncf_dist.evaluate import segments
from ncf_dist.evaluate.bootstrap import poisson_weights
from ncf_dist.evaluate.lists import train_counts
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.parquet import read_table
from ncf_dist.spark_io import Pass, map_in_arrow

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sums = dict[str, FloatArray]

WEIGHTS_A_BLOCK = 2**18
"""Bootstrap weights held at once (B x U)."""
SUMS = "name string, file long, sums binary"
MODEL, POPULARITY = "model", "popularity"


@dataclass(frozen=True)
class Ranks:
    """Rows of `ranks` of one scorer, U users with S held-out items. rated: its scores are predicted ratings."""

    rated: bool
    user: IntArray
    seen_items: IntArray
    offsets: IntArray
    flat: dict[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, table: pa.Table, rated: bool = False) -> Ranks:
        table = table.sort_by("user_idx").combine_chunks()
        ragged = [f.name for f in table.schema if pa.types.is_list(f.type) and f.name != "top"]
        columns = {name: table.column(name).combine_chunks() for name in ragged}
        sizes = columns["item_idx"].value_lengths().to_numpy(zero_copy_only=False)
        return cls(
            rated,
            table.column("user_idx").to_numpy().astype(np.int64),
            table.column("seen_items").to_numpy().astype(np.int64),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()},
        )

    def __len__(self) -> int:
        return len(self.user)


def sum_up(spark: SparkSession, spec: FiguresPass, partitions: int) -> Sums:
    """Every sum over all users, by name."""
    files = spark.range(0, len(spec.files), 1, min(partitions, len(spec.files)))
    return added_up(map_in_arrow(files, _file_sums(spec), SUMS), partitions)


def added_up(parts: DataFrame, partitions: int) -> Sums:
    """Rows of SUMS, a sum a file, to the sum over all files by name."""
    ordered = parts.repartition(partitions, "name").sortWithinPartitions("name", "file")
    rows = map_in_arrow(ordered, _in_order, SUMS).collect()
    return {row["name"]: np.frombuffer(row["sums"], dtype=np.float64) for row in rows}


def _file_sums(spec: FiguresPass) -> Pass:
    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        counts = train_counts(spec.stats_files)
        for batch in batches:
            for file in batch.column(0).to_pylist():
                sums = file_sums(read_ranks(spec.files[file], spec.explicit), counts, spec)
                yield sums_batch(list(sums), [file] * len(sums), list(sums.values()))

    return run


def _in_order(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Rows ascending in (name, file): adds up each name's sums in the order of files."""
    name, total = None, np.zeros(0)
    for batch in batches:
        for next_name, data in zip(batch.column("name").to_pylist(), batch.column("sums"), strict=True):
            sums = np.frombuffer(data.as_buffer(), dtype=np.float64)
            if next_name == name:
                total = total + sums
                continue
            if name is not None:
                yield sums_batch([name], [0], [total])
            name, total = next_name, sums
    if name is not None:
        yield sums_batch([name], [0], [total])


def sums_batch(names: list[str], files: list[int], sums: list[FloatArray]) -> pa.RecordBatch:
    """Rows of SUMS."""
    columns = {"name": names, "file": files, "sums": [values.tobytes() for values in sums]}
    types = {"name": pa.string(), "file": pa.int64(), "sums": pa.binary()}
    return pa.RecordBatch.from_pydict({name: pa.array(columns[name], kind) for name, kind in types.items()})


def read_ranks(files: tuple[tuple[str, str, str], ...], explicit: bool = False) -> dict[str, Ranks]:
    """(name to give, scorer in the file, path) → ranks by name. explicit: the model predicts ratings."""
    tables = {path: read_table(path) for _, _, path in files}
    return {
        name: Ranks.of(
            tables[path].filter(pc.equal(tables[path].column("scorer"), scorer)), explicit and scorer == MODEL
        )
        for name, scorer, path in files
    }


def file_sums(ranks: dict[str, Ranks], train_count: IntArray, spec: FiguresPass) -> Sums:
    """Sums over the users of one file. Raises ValueError unless every scorer ranked the same users: differences are
    paired."""
    users = next(iter(ranks.values())).user
    columns: dict[str, FloatArray] = {}
    for name, rows in ranks.items():
        if not np.array_equal(rows.user, users):
            raise ValueError(
                f"{name} ranked {len(rows):,} users, others {len(users):,}; needed the same ones in a file"
            )
        values = user_values(rows, spec)
        if name in (MODEL, POPULARITY, CHAMPION):
            values |= segment_values(rows, train_count, spec)
        columns |= {f"{name}/{metric}": column for metric, column in values.items()}
    return totals(columns, users, spec)


def totals(columns: dict[str, FloatArray], users: IntArray, spec: FiguresPass) -> Sums:
    """Columns of users (U,) → (1 + B,): the sum, and its bootstrap replicates where an interval is wanted."""
    found = {name: np.array([column.sum()]) for name, column in columns.items()}
    if spec.replicates:
        wanted = {name: columns[name] for name in sorted(columns) if _with_interval(name)}
        for name, replicates in resampled(wanted, users, spec).items():
            found[name] = np.concatenate([found[name], replicates])
    return found


def _with_interval(name: str) -> bool:
    """Segments have intervals for the model's NDCG alone, so that their number stays small."""
    scorer, protocol, *rest = name.split("/")
    return protocol != "segment" or (scorer == MODEL and (rest[-1] == "n" or rest[-1].startswith("ndcg")))


def user_values(rows: Ranks, spec: FiguresPass) -> dict[str, FloatArray]:
    """Metrics of each user, (U,), by `protocol/metric`; `protocol/n` is 1 a user, of ratings how many there are."""
    flat, offsets = rows.flat, rows.offsets
    greater, equal, among = (flat[name].astype(np.int64) for name in ("greater", "equal", "candidates"))
    by_protocol = {
        "full": metrics.per_user(flat["full_rank"].astype(np.float64), spec.ks, offsets),
        "candidates": metrics.per_user_among_candidates(greater, equal, among, offsets, spec.ks),
    }
    values = {f"{p}/{name}": column for p, columns in by_protocol.items() for name, column in columns.items()}
    values |= {f"{protocol}/n": np.ones(len(rows)) for protocol in by_protocol}
    values["rows/n"] = np.diff(offsets).astype(np.float64)
    if rows.rated:
        errors = metrics.rating_sums(flat["score"], flat["rating"], offsets)
        values |= {f"rating/{name}": column for name, column in errors.items()}
    return values


def segment_values(rows: Ranks, train_count: IntArray, spec: FiguresPass) -> dict[str, FloatArray]:
    """HR and NDCG over the full catalogue of each user (U,), by `segment/kind/code/metric`. A user whose held-out items
    fall into several segments counts in each, with the items that are in it; 0 in the others."""
    flat, by_name = rows.flat, {}
    user = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    items = train_count[flat["item_idx"].astype(np.int64)]
    for kind in spec.segments:
        code = segments.codes_of(kind, rows.seen_items[user], items, flat["timestamp"].astype(np.int64), spec.deciles)
        order, offsets, codes = segments.regroup(code, rows.offsets)
        rank, group_user = flat["full_rank"][order].astype(np.float64), user[order][offsets[:-1]]
        values = {
            f"hr@{spec.lead_k}": metrics.hit(rank, spec.lead_k, offsets),
            f"ndcg@{spec.lead_k}": metrics.ndcg(rank, spec.lead_k, offsets),
            "n": np.ones(len(codes)),
        }
        for segment in np.unique(codes):
            chosen = codes == segment
            for metric, column in values.items():
                spread = np.zeros(len(rows))
                spread[group_user[chosen]] = column[chosen]
                by_name[f"segment/{kind}/{segment}/{metric}"] = spread
    return by_name


def resampled(columns: dict[str, FloatArray], user: IntArray, spec: FiguresPass) -> dict[str, FloatArray]:
    """Bootstrap sums (B,) of each column (U,)."""
    x = np.column_stack(list(columns.values()))
    total = np.zeros((spec.replicates, x.shape[1]))
    step = max(1, WEIGHTS_A_BLOCK // spec.replicates)
    for start in range(0, len(user), step):
        part = slice(start, start + step)
        total += poisson_weights(spec.seed, user[part], spec.replicates) @ x[part]
    return dict(zip(columns, total.T, strict=True))


def with_other(spec: FiguresPass, name: str, paths: list[str]) -> FiguresPass:
    """The pass with the model of another run as scorer `name`; `paths` are its files of ranks, in the same order."""
    files = tuple((*own, (name, MODEL, path)) for own, path in zip(spec.files, paths, strict=True))
    return replace(spec, files=files)
