"""How fast Petastorm hands windows of sequences over, by the way they are stored.

    .venv/bin/python benchmarks/windows.py [--length 100] [--windows 40000] [--repeats 3]

One table of `windows` windows of L + 1 items and as many gaps, in 8 files of one row group, is stored in three ways and
read through `train/loaders.py`, one thread, file after file, into matrices (windows, L + 1):

- binary: two fixed-width binary columns, decoded by one NumPy call a file (the table `sequences`)
- lists: two list columns, which Petastorm stacks itself
- columns: 2 (L + 1) scalar columns, one a position

Every way is read once to warm it up, then `repeats` times in turn; the median counts. Half of the windows are full, the
others have some length from 2 to L + 1, as short users' have. `arrow` is the same files through the twin without
Petastorm. Prints one table and writes benchmarks/results/windows.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ncf_dist.machine import cores, processor
from ncf_dist.parquet import write_parquet
from ncf_dist.train.loaders import Columns, arrow_tables, petastorm_tables

ROOT = Path(__file__).parent.parent
FILES, ITEMS, CODES = 8, 20_000, 64
Array = npt.NDArray[Any]
Matrices = tuple[Array, Array]
"""items (R, L + 1) int32, gaps (R, L + 1) uint8"""


def some_windows(windows: int, length: int) -> Matrices:
    rng = np.random.default_rng(1)
    sizes = np.where(rng.random(windows) < 0.5, length + 1, rng.integers(2, length + 2, windows))
    real = np.arange(length + 1) < sizes[:, None]
    items = np.where(real, (ITEMS * rng.random((windows, length + 1)) ** 3), 0).astype("<i4")
    return items, np.where(real, rng.integers(0, CODES, items.shape), 0).astype(np.uint8)


def fixed(matrix: Array) -> pa.Array:
    width = matrix.shape[1] * matrix.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(matrix), [None, pa.py_buffer(matrix.tobytes())])


def lists(matrix: Array) -> pa.Array:
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.ravel()))


def as_binary(items: Array, gaps: Array) -> dict[str, Any]:
    return {"items": fixed(items), "gaps": fixed(gaps)}


def as_lists(items: Array, gaps: Array) -> dict[str, Any]:
    return {"items": lists(items), "gaps": lists(gaps)}


def as_columns(items: Array, gaps: Array) -> dict[str, Any]:
    named = (("items", items), ("gaps", gaps))
    return {f"{name}_{place}": column for name, matrix in named for place, column in enumerate(matrix.T)}


def from_binary(table: Columns) -> Matrices:
    rows = len(table["items"])
    items, gaps = (b"".join(table[name].tolist()) for name in ("items", "gaps"))
    return np.frombuffer(items, "<i4").reshape(rows, -1), np.frombuffer(gaps, "u1").reshape(rows, -1)


def from_lists(table: Columns) -> Matrices:
    columns = (table[name] for name in ("items", "gaps"))
    items, gaps = (np.vstack(column.tolist()) if column.dtype == object else column for column in columns)
    return items, gaps


def from_columns(table: Columns) -> Matrices:
    width = len(table) // 2
    items, gaps = (np.column_stack([table[f"{name}_{place}"] for place in range(width)]) for name in ("items", "gaps"))
    return items, gaps


WAYS: dict[str, tuple[Callable[[Array, Array], dict[str, Any]], Callable[[Columns], Matrices]]] = {
    "binary": (as_binary, from_binary),
    "lists": (as_lists, from_lists),
    "columns": (as_columns, from_columns),
}


def stored(folder: Path, way: str, items: Array, gaps: Array) -> tuple[list[str], list[str], int]:
    """(files, columns, bytes) of the table, written as a stage writes one."""
    paths, size = [], 0
    names: list[str] = []
    for number, rows in enumerate(np.array_split(np.arange(len(items)), FILES)):
        table = pa.table(WAYS[way][0](items[rows], gaps[rows]))
        info = write_parquet(table, str(folder / way), f"{number}.parquet")
        names, size = table.column_names, size + info.bytes
        paths.append(str(folder / way / info.path))
    return paths, names, size


def seconds(read: Any, way: str, paths: list[str], names: list[str]) -> tuple[float, int]:
    """(wall seconds, the sum of all items, by which the ways are compared)."""
    start, total = time.perf_counter(), 0
    for table in read(paths, names, 1):
        items, gaps = WAYS[way][1](table)
        total += int(items.sum(dtype=np.int64)) + int(gaps.sum(dtype=np.int64))
    return time.perf_counter() - start, total


def measure(length: int, windows: int, repeats: int) -> list[dict[str, Any]]:
    items, gaps = some_windows(windows, length)
    total = int(items.sum(dtype=np.int64)) + int(gaps.sum(dtype=np.int64))
    readers = {"petastorm": petastorm_tables, "arrow": arrow_tables}
    with tempfile.TemporaryDirectory() as folder:
        tables = {way: stored(Path(folder), way, items, gaps) for way in WAYS}
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(1 + repeats):
            for way, (paths, names, _) in tables.items():
                for reader, read in readers.items():
                    wall, found = seconds(read, way, paths, names)
                    if found != total:
                        raise AssertionError(f"{way} through {reader} gives other windows")
                    taken.setdefault((way, reader), []).append(wall)
    found_rows = []
    for way, (_, _, size) in tables.items():
        times = {reader: statistics.median(taken[way, reader][1:]) for reader in readers}
        rates = {reader: items.size / wall for reader, wall in times.items()}
        found_rows.append({"length": length, "way": way, "bytes": size, "seconds": times, "items_per_s": rates})
    return found_rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--windows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    machine = f"{cores()} cores, {processor()}, Python {platform.python_version()}"
    print(f"{args.windows:,} windows, million items/s, {machine}")
    print(f"{'L':>5} {'way':8} {'petastorm':>10} {'arrow':>8} {'MB':>6}")
    results = []
    for length in args.length:
        for row in measure(length, args.windows, args.repeats):
            rate = row["items_per_s"]
            print(
                f"{length:5} {row['way']:8} {rate['petastorm'] / 1e6:10.1f} {rate['arrow'] / 1e6:8.1f} "
                f"{row['bytes'] / 1e6:6.1f}",
                flush=True,
            )
            results.append(row)
    path = ROOT / "benchmarks/results/windows.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "windows": args.windows, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
