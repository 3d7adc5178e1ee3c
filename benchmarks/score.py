"""Ranking every user against the whole catalogue: the job score beside Spark's ALS, the kernel beside implicit's.

    .venv/bin/python benchmarks/score.py [--sizes 6040x3706 50000x20000] [--repeats 3] [--implicit PYTHON]

The job: `score`, as `nightly` runs it, from Parquet tables to Parquet files with 10 recommendations a user, seen items
masked (100 a user, 50 in the smaller size), score.tasks=4. Beside it `ALSModel.recommendForAllUsers(10)`, rank 64,
written as Parquet; it masks nothing. Both in one session on local[2], warm (the first round of each size is not
counted), in turns, `repeats` times; a ratio is one round's own, since other work on the machine slows both, and is
given in CPU seconds too (the JVM's, its Python workers' and the driver's), which it touches less. Models, with random
weights:

- gaussian: mf with 64 factors, all N(0, 1): no item is much longer than another, which is the hardest to rank
- spread: mf with 64 factors whose sizes fall as d^(-1/2), as those of a trained model do, and item lengths log-normal
  with sigma 0.5
- biases: gaussian with a bias a user and an item
- neumf: 8 factors, layers 64-32-16-8

The kernel: `scoring.recommend` alone on one core, 512 users a call; beside `recommend` of implicit 0.7.3 (PYTHON: the
interpreter of an environment that has it) over the same factors and seen items, on one thread too; beside what one
core's matrix products (2,048 x 2,048) would allow, 2 x 64 operations a pair. In CPU seconds, which other work on the
machine touches less. With bf16 products: the share of the 10 best that fp32 has too (overlap).

Prints one table and writes benchmarks/results/score.json. pairs: users x items, in millions a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import torch
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from torch import nn

from ncf_dist import config as settings
from ncf_dist import contracts, scoring
from ncf_dist.bundle import save_bundle
from ncf_dist.config import Config, Model
from ncf_dist.lake import Lake
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest
from ncf_dist.models import MF, Recommender, Users, build_model
from ncf_dist.parquet import write_parts
from ncf_dist.score.pipeline import score
from ncf_dist.scoring import Lists, ModelScorer
from ncf_dist.spark_io import spark_session

ROOT = Path(__file__).parent.parent
DS, K, RANK = "2026-01-31", 10, 64
CORES, TASKS, USERS_A_CALL, FILES = 2, 4, 512, 16
MODELS = {
    "gaussian": Model(name="mf", factors=RANK),
    "spread": Model(name="mf", factors=RANK),
    "biases": Model(name="mf", factors=RANK, biases=True),
    "neumf": Model(name="neumf", factors=8, layers=(64, 32, 16, 8)),
}
SPARK = settings.Spark(master=f"local[{CORES}]", driver_memory="3g", shuffle_partitions=4)
Array = npt.NDArray[Any]


def factors(name: str, users: int, items: int) -> tuple[Array, Array]:
    """(U, 64) and (I, 64) float32, from seed 1; implicit's script makes the same."""
    rng = np.random.default_rng(1)
    user, item = rng.standard_normal((users, RANK)), rng.standard_normal((items, RANK))
    if name == "spread":
        user = user * np.arange(1, RANK + 1) ** -0.5
        item = item * np.exp(0.5 * rng.standard_normal((items, 1)))
    return user.astype(np.float32), item.astype(np.float32)


def seen_items(users: int, items: int) -> Array:
    """(U, S) ascending, S = 100, or 50 of a smaller catalogue: one item of each of S equal stretches."""
    count = 100 if items > 5000 else 50
    edges = np.linspace(0, items, count + 1).astype(np.int64)
    return np.random.default_rng(2).integers(edges[:-1], edges[1:], (users, count))


def model_of(name: str, users: int, items: int) -> Recommender:
    torch.manual_seed(1)
    model = build_model(MODELS[name], users, items).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    if isinstance(model, MF):
        user, item = factors(name, users, items)
        model.user.weight.copy_(torch.from_numpy(user))
        model.item.weight.copy_(torch.from_numpy(item))
    return model


# ---- the job -----------------------------------------------------------------------------------------------


def prepare(lake: str, users: int, items: int) -> None:
    """A finished prepare run with what `score` reads. Customers' ids are 1,000,000 above the indexes."""
    runs = Lake(lake).stage(DS, "prepare")
    run = runs.begin("p1")
    seen = pa.array(list(seen_items(users, items).astype(np.int32)), contracts.INDEX_LIST)
    none = pa.array([[]] * users, contracts.INDEX_LIST)
    columns = {
        contracts.user_index(pa.int64()): [1_000_000 + np.arange(users), np.arange(users)],
        contracts.item_index(pa.int64()): [1_000_000 + np.arange(items), np.arange(items)],
        contracts.HISTORY: [np.arange(users), seen, none],
    }
    tables = {}
    for contract, values in columns.items():
        table = pa.table([pa.array(v) for v in values], names=contract.schema.names).cast(contract.schema)
        step = -(-len(table) // FILES)
        tables[contract.name] = write_parts((table.slice(n * step, step) for n in range(FILES)), run, contract)
    runs.finish(
        Manifest(
            stage="prepare",
            ds=DS,
            run_key="p1",
            root=run,
            config={},
            inputs={},
            tables=tables,
            facts={"users": users, "items": items},
        )
    )


def train(lake: str, name: str, users: int, items: int) -> None:
    """A finished train run with the model's weights."""
    runs = Lake(lake).stage(DS, "train")
    run = runs.begin(name)
    save_bundle(f"{run}/bundle", model_of(name, users, items), MODELS[name], users, items, {})
    runs.finish(Manifest(stage="train", ds=DS, run_key=name, root=run, config={}, inputs={"prepare": "p1"}))


USED: dict[tuple[int, float], float] = {}
"""CPU seconds of every process below this one that was ever looked at. Spark ends Python workers that are idle."""


def cpu_seconds() -> float:
    """Of this process and all below it: the JVM, its Python workers."""
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            USED[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
    return sum(USED.values())


def timed(work: Callable[[], Any]) -> dict[str, float]:
    start, used = time.monotonic(), cpu_seconds()
    work()
    return {"seconds": time.monotonic() - start, "cpu": cpu_seconds() - used}


def job(lake: str, name: str) -> dict[str, float]:
    """The job score, its checks of the weights and its manifest included."""
    shutil.rmtree(f"{lake}/runs/{DS}/score", ignore_errors=True)
    made = {"prepare": Lake(lake).stage(DS, "prepare").newest(), "train": Lake(lake).stage(DS, "train").load(name)}
    config = Config.model_validate(
        {
            "paths": {"lake": lake, "work": f"{lake}/work"},
            "input": {"path": "unused"},
            "score": {"k": K, "users_per_block": USERS_A_CALL, "tasks": TASKS, "fallback_days": None},
            "spark": SPARK.model_dump(),
        }
    )
    spent = timed(lambda: score(config, DS, made))
    outcome = Lake(lake).stage(DS, "score").newest()
    assert (outcome.metrics["score.rows"], outcome.metrics["score.short_users"]) == (outcome.facts["users"] * K, 0)
    return spent


def als_model(spark: SparkSession, users: int, items: int) -> ALSModel:
    """Every user and every item has one rating at least; what they are does not change the time that ranking takes."""
    rows = spark.range(max(users, items)).select(
        (F.col("id") % users).alias("user"), (F.col("id") % items).alias("item"), F.lit(1.0).alias("rating")
    )
    model = ALS(rank=RANK, maxIter=1, userCol="user", itemCol="item", ratingCol="rating", seed=1).fit(rows)
    assert (model.userFactors.count(), model.itemFactors.count()) == (users, items)
    return model


def als_job(model: ALSModel, folder: str) -> dict[str, float]:
    return timed(lambda: model.recommendForAllUsers(K).write.mode("overwrite").parquet(f"{folder}/als"))


def jobs(names: list[str], users: int, items: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds and CPU seconds of each way and round."""
    seconds: dict[str, list[dict[str, float]]] = {}
    with spark_session("bench-score", SPARK) as spark, tempfile.TemporaryDirectory() as lake:
        spark.sparkContext.setLogLevel("ERROR")
        prepare(lake, users, items)
        for name in names:
            train(lake, name, users, items)
        als = als_model(spark, users, items)
        ways: dict[str, Callable[[], dict[str, float]]] = {"als": partial(als_job, als, lake)}
        ways |= {name: partial(job, lake, name) for name in names}
        for number in range(1 + repeats):
            for way, run in ways.items():
                if way == names[0]:
                    run()  # Not counted: Spark ends workers that were idle for a minute, as they are beside ALS.
                spent = run()
                seconds.setdefault(way, []).extend([spent] if number else [])
                print(f"round {number}, {way}: {spent}", file=sys.stderr, flush=True)
    return seconds


# ---- the kernel --------------------------------------------------------------------------------------------


def rank(name: str, users: int, items: int, precision: Any, repeats: int) -> tuple[list[float], Array]:
    """CPU seconds of each repeat, and the items."""
    scorer = ModelScorer(model_of(name, users, items), items, precision=precision)
    seen = seen_items(users, items)
    lists = Lists(seen.reshape(-1), np.arange(users + 1) * seen.shape[1])
    times, found = [], np.empty((users, K), np.int64)
    for _ in range(1 + repeats):
        start = time.process_time()
        for first in range(0, users, USERS_A_CALL):
            some = torch.arange(first, min(first + USERS_A_CALL, users))
            found[some] = scoring.recommend(scorer, Users(some), lists.part(first, first + len(some)), K)[1]
        times.append(time.process_time() - start)
    return times[1:], found


def product_rate() -> float:
    """GFLOP/s of large products, the best of five."""
    a, b, times = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(6):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * 2048**3 / min(times) / 1e9


IMPLICIT = """
import sys, json, time
import numpy as np
from scipy.sparse import csr_matrix
from implicit.cpu.als import AlternatingLeastSquares
users, items, repeats, k = map(int, sys.argv[1:5])
arrays = np.load(sys.argv[5])
model = AlternatingLeastSquares(factors=64, num_threads=1)
model.user_factors, model.item_factors = arrays["user"], arrays["item"]
seen = arrays["seen"]
count = seen.shape[1]
matrix = csr_matrix((np.ones(seen.size, np.float32), seen.reshape(-1), np.arange(users + 1) * count), (users, items))
times = []
for _ in range(1 + repeats):
    start = time.process_time()
    found, _ = model.recommend(np.arange(users), matrix, N=k, filter_already_liked_items=True)
    times.append(time.process_time() - start)
np.save(sys.argv[6], found)
print("RESULT" + json.dumps(times[1:]))
"""


def implicit(python: str, name: str, users: int, items: int, repeats: int) -> tuple[list[float], Array]:
    """CPU seconds of each repeat, and the items. Its kernel has threads of its own: it asks for a BLAS without."""
    with tempfile.TemporaryDirectory() as folder:
        user, item = factors(name, users, items)
        np.savez(f"{folder}/in.npz", user=user, item=item, seen=seen_items(users, items))
        command = [python, "-c", IMPLICIT, *map(str, (users, items, repeats, K)), "in.npz", "out.npy"]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        return json.loads(line.removeprefix("RESULT")), np.load(f"{folder}/out.npy")


def overlap(one: Array, other: Array) -> float:
    """Mean share of a row's items that the same row of `other` has."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(one.tolist(), other.tolist(), strict=True)]))


def kernels(names: list[str], users: int, items: int, repeats: int, python: str | None) -> dict[str, dict[str, Any]]:
    """Each way's seconds, millions of pairs a second, and how much of the 10 best it shares with fp32."""
    torch.set_num_threads(1)
    rate = product_rate()
    out: dict[str, dict[str, Any]] = {"products": {"gflops": rate, "pairs": rate * 1e9 / (2 * RANK) / 1e6}}
    best: dict[str, Array] = {}

    def add(way: str, name: str, seconds: list[float], found: Array) -> None:
        shared = overlap(found, best.setdefault(name, found))
        pairs = users * items / statistics.median(seconds) / 1e6
        out[way] = {"seconds": seconds, "pairs": pairs, "overlap": shared}

    for name in names:
        for precision in ("fp32", "bf16"):
            add(f"{name} {precision}", name, *rank(name, users, items, precision, repeats))
    for name in [name for name in ("gaussian", "spread") if python and name in names]:
        add(f"implicit {name}", name, *implicit(str(python), name, users, items, repeats))
    return out


# ---- the table ---------------------------------------------------------------------------------------------


def show_jobs(users: int, items: int, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    title = f"the job, {users:,} x {items:,}"
    print(f"{title:38} {'seconds':>10} {'from - to':>16} {'pairs':>8} {'x ALS':>7} {'CPU':>7} {'x ALS':>7}")
    out = {}
    for way, rounds in found.items():
        one: dict[str, Any] = {"rounds": rounds}
        for kind in ("seconds", "cpu"):
            times = [r[kind] for r in rounds]
            one[kind] = statistics.median(times)
            one[f"{kind}_times_als"] = statistics.median(
                als[kind] / own for als, own in zip(found["als"], times, strict=True)
            )
        walls = [r["seconds"] for r in rounds]
        one["pairs"] = users * items / one["seconds"] / 1e6
        between = f"{min(walls):.1f} - {max(walls):.1f}"
        print(
            f"{way:38} {one['seconds']:10.2f} {between:>16} {one['pairs']:8.0f} {one['seconds_times_als']:7.2f} "
            f"{one['cpu']:7.2f} {one['cpu_times_als']:7.2f}",
            flush=True,
        )
        out[way] = one
    return out


def show_kernels(users: int, items: int, found: dict[str, dict[str, Any]]) -> None:
    title = f"the kernel, {users:,} x {items:,}"
    print(f"{title:38} {'pairs':>10} {'x implicit':>16} {'products':>8} {'overlap':>7}")
    for way, one in found.items():
        base = found.get(f"implicit {'spread' if 'spread' in way else 'gaussian'}", {}).get("pairs", float("nan"))
        shared = f"{one['overlap']:7.4f}" if "overlap" in one else ""
        share = one["pairs"] / found["products"]["pairs"]
        print(f"{way:38} {one['pairs']:10.0f} {one['pairs'] / base:16.2f} {share:8.0%} {shared}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="*", default=["6040x3706", "50000x20000"], metavar="USERSxITEMS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--implicit", metavar="PYTHON")
    parser.add_argument("--parts", nargs="*", default=["jobs", "kernels"], choices=["jobs", "kernels"])
    args = parser.parse_args()
    machine = f"{cores()} cores, {processor()}, torch {torch.__version__}"
    print(f"{machine}; K = {K}, median of {args.repeats}")
    results: dict[str, Any] = {"machine": machine, "k": K, "repeats": args.repeats}
    path = ROOT / "benchmarks/results/score.json"
    path.parent.mkdir(exist_ok=True)
    for size in args.sizes:
        users, items = map(int, size.split("x"))
        one = results.setdefault(size, {})
        if "jobs" in args.parts:
            one["jobs"] = show_jobs(users, items, jobs(args.models, users, items, args.repeats))
        if "kernels" in args.parts:
            one["kernels"] = kernels(args.models, users, items, args.repeats, args.implicit)
            show_kernels(users, items, one["kernels"])
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
