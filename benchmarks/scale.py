"""The line at scale: seconds and memory of prepare, one epoch of NeuMF, and the ranking of a tenth of the users, at 1,
10 and 100 million interactions, and what the first two forecast of the third.

    .venv/bin/python -m benchmarks.scale [--millions 1 10 100] [--folder FOLDER]

Each size is a synthetic CSV log: users of about 100 rows, a catalogue that grows with the square root of the rows, both
long-tailed, no (user, item) pair in a place of its own. One user in ten is active in the last of TIMES, which is when
`score.active_since` begins, so these are ranked. Every stage is the job itself, launcher and JVM included, on two
cores: `prepare` (leave-one-out, 4 negatives × 1 draw, 99 candidates), `train` (NeuMF, 8 factors, layers 64-32-16, both
ranks; all rows of an epoch and their negatives), `score` (K = 10, the whole catalogue but what each user has seen).

What a stage handles: prepare rows of the log, train its examples (rows × 5), score pairs (users × items). From the two
smallest sizes follows a line through what they took, fixed seconds + seconds a unit; `forecast` is where it meets a
larger size. A billion rows on 20 such machines: the slope of the two largest sizes / 20, as if work divided without
loss; what the network costs comes on top. A step of `train` goes through every row of the tables of embeddings, not
through those alone that it looked up: it clears their gradients, the ranks hand them on, and Adam's moments move all of
them. So it takes longer where tables are longer, and no line forecasts it: with three sizes its seconds are fixed + a ·
examples + b · steps · rows of the tables, and that says what the billion takes, where 20 machines' ranks take 20 times
as many examples a step. Prints a table and writes benchmarks/results/scale.json after each size.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from benchmarks._job import ROOT, job
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import read_manifest

RESULTS = ROOT / "benchmarks/results/scale.json"
NAMES = ["user", "item", "rating", "time"]
ROWS_A_USER, ACTIVE, NEGATIVES, BATCH = 100, 10, 4, 16_384
YEAR = 365 * 86_400
TIMES = (1_577_836_800, 1_577_836_800 + YEAR)
"""When the two years begin, in seconds: 2020-01-01 and 2020-12-31 (UTC). Users that are not ranked have rows in the
first alone."""
CHUNK = 1_000_000
STAGES = {"prepare": "rows", "train": "examples", "score": "pairs"}
"""By stage: what it handles."""
BILLION, WORKERS = 1e9, 20


def catalogue(rows: int) -> int:
    return int(8 * math.sqrt(rows))


def write_log(path: Path, rows: int) -> None:
    """`rows` lines, in no order."""
    rng = np.random.default_rng(1)
    with open(path, "wb") as out:
        out.write((",".join(NAMES) + "\n").encode())
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            user = (rows // ROWS_A_USER * rng.random(n) ** 1.5).astype(np.int64)
            item = (catalogue(rows) * rng.random(n) ** 3).astype(np.int64)
            time = rng.integers(0, YEAR, n) + np.where(user % ACTIVE == 0, TIMES[1], TIMES[0])
            columns = [user, item, rng.integers(1, 6, n), time]
            pa.csv.write_csv(pa.table(columns, names=NAMES), out, pa.csv.WriteOptions(include_header=False))


def base(folder: Path) -> dict[str, Any]:
    named = {"user": "user", "item": "item", "rating": "rating", "timestamp": "time"}
    return {
        "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
        "input": {
            "path": str(folder / "log.csv"), "format": "csv", "columns": named, "user_type": "int", "item_type": "int",
        },
        "split": {"strategy": "leave-one-out"},
        "negatives": {"per_positive": NEGATIVES, "draws": 1, "candidates": 99},
        "model": {"name": "neumf", "factors": 8, "layers": [64, 32, 16]},
        "train": {"ranks": cores(), "batch_size": BATCH, "lr": 0.001, "epochs": 1},
        "score": {"k": 10, "active_since": "2020-12-31"},
        "spark": {"master": f"local[{cores()}]", "driver_memory": "2g", "shuffle_partitions": 16},
    }  # fmt: skip


def measure(rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """By stage: what it handled, and its `seconds` and MiB of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder / "log.csv", rows)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(base(folder)))
    found: dict[str, dict[str, float]] = {}
    units: dict[str, float] = {"rows": rows}
    for stage, unit in STAGES.items():
        said = job(stage, config, [])
        if stage == "prepare":
            prepared = read_manifest(str(folder / "lake" / said["runs"]["prepare"]))
            units["examples"] = prepared.tables["train"].rows * (1 + NEGATIVES)
        units |= {name.removeprefix("score."): value for name, value in said["metrics"].items()}
        found[stage] = {
            unit: units[unit], "seconds": said["wall"], "python": said["python"], "all": said["all"],
        }  # fmt: skip
        print(f"{rows:13,} {stage:8} {found[stage]}", flush=True)
    shutil.rmtree(folder)
    return found


def line(small: dict[str, float], large: dict[str, float], unit: str) -> tuple[float, float]:
    """(fixed seconds, seconds a unit) of the line through both."""
    slope = (large["seconds"] - small["seconds"]) / (large[unit] - small[unit])
    return small["seconds"] - slope * small[unit], slope


def show(sizes: dict[int, dict[str, dict[str, float]]]) -> None:
    ordered = sorted(sizes)
    for stage, unit in STAGES.items():
        for rows in ordered:
            found = sizes[rows][stage]
            text = f"{rows:13,} {stage:8} {found[unit]:18,.0f} {unit:8} {found['seconds']:9.1f} s"
            if rows not in ordered[:2]:
                fixed, slope = line(sizes[ordered[0]][stage], sizes[ordered[1]][stage], unit)
                forecast = fixed + slope * found[unit]
                text += f"  forecast {forecast:9.1f} s ({found['seconds'] / forecast - 1:+.0%})"
            print(f"{text}  MiB: largest Python {found['python']:,.0f}, all {found['all']:,.0f}")
        if len(ordered) > 1:
            last = sizes[ordered[-1]][stage]
            units = last[unit] * (BILLION / ordered[-1]) ** (1.5 if stage == "score" else 1.0)
            fixed, slope = line(sizes[ordered[-2]][stage], last, unit)
            seconds = max(fixed, 0.0) + slope * units / WORKERS
            if stage == "train" and len(ordered) > 2:
                seconds = training(sizes, units)
            print(
                f"{BILLION:13,.0f} {stage:8} {units:18,.0f} {unit:8} {seconds / 3600:9.2f} h on {WORKERS} such machines"
            )


def training(sizes: dict[int, dict[str, dict[str, float]]], examples: float) -> float:
    """Seconds of an epoch of the billion on WORKERS machines, from the three largest sizes."""
    measured = sorted(sizes)[-3:]
    terms = np.array([[1, *work(rows, sizes[rows]["train"]["examples"])] for rows in measured])
    fixed, a, b = np.linalg.solve(terms, [sizes[rows]["train"]["seconds"] for rows in measured])
    own, updates = work(int(BILLION), examples / WORKERS)
    print(
        f"{'':13} train    {fixed:.1f} s + {a * 1e6:.3f} µs an example + {b * 1e9:.0f} ns a step and row of the tables"
    )
    return float(fixed + a * own + b * updates)


def work(rows: int, examples: float) -> tuple[float, float]:
    """(examples of this machine, its steps x rows of the tables) in an epoch."""
    steps = examples / (1 + NEGATIVES) / (BATCH * cores())
    return examples, steps * (rows // ROWS_A_USER + catalogue(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--folder", type=Path, help="where logs and lakes go; default: a temporary folder")
    args = parser.parse_args()
    machine = f"{cores()} cores, {processor()}"
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sizes = {int(rows): found for rows, found in old.get("sizes", {}).items()} if old.get("machine") == machine else {}
    for millions in args.millions:
        rows = int(millions * 1e6)
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            sizes[rows] = measure(rows, Path(name) / "scale")
        body = {"machine": machine, "sizes": {str(rows): sizes[rows] for rows in sorted(sizes)}}
        RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(machine)
    show(sizes)


if __name__ == "__main__":
    main()
