"""This machine against the config: Java, memory, devices, slots, the Spark master.

Each check says what it found, what is needed and what to do.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from ncf_dist import machine
from ncf_dist.ancestry import index_sizes
from ncf_dist.config import Config, Model, Train, embedding_size
from ncf_dist.config import Spark as SparkSection
from ncf_dist.doctor import programs
from ncf_dist.doctor.check import Check, size
from ncf_dist.errors import NcfError
from ncf_dist.lake import Lake
from ncf_dist.stage import production_runs

JAVA = (17, 21)
COMPILED = Path(__file__).parent.parent / "train"
CONNECT_S = 5


def java() -> Check:
    needed = (
        f"needed Java {JAVA[0]} to {JAVA[1]}: run apt-get install openjdk-17-jre-headless, or export "
        "JAVA_HOME=/path/to/jdk-17"
    )
    found = programs.java()
    if found is None:
        home = os.environ.get("JAVA_HOME")
        return Check("java", "fail", f"not found {f'at JAVA_HOME={home}' if home else 'on PATH'}: {needed}")
    version, path = found
    if not JAVA[0] <= programs.java_major(version) <= JAVA[1]:
        return Check("java", "fail", f"{version} at {path}: {needed}")
    return Check("java", "ok", version)


def gpu(train: Train) -> Check:
    found = programs.gpus()
    if train.device == "cuda" and found < train.ranks:
        return Check(
            "gpu",
            "fail",
            f"{found} seen: needed one for each of {train.ranks} ranks: set train.device=auto or "
            f"train.ranks={max(1, found)}",
        )
    used = found >= train.ranks and train.device != "cpu"
    return Check("gpu", "ok", f"{found or 'none'} seen: training uses {'CUDA' if used else 'the CPU'}")


def compiled(train: Train) -> Check:
    """What `make install` built of ncf_dist/train/neumf_step.cpp."""
    built = [path.name.split(".")[0].rpartition("_")[2] for path in sorted(COMPILED.glob("_neumf_step_*"))]
    if built or not train.compiled:
        return Check("compiled", "ok", f"steps of gmf, mlp and neumf on a CPU: {', '.join(built) or 'none asked for'}")
    return Check(
        "compiled",
        "warn",
        "nothing: slower, not wrong, where gmf, mlp or neumf are trained on a CPU: run apt-get install g++, then "
        "make -B install",
    )


def memory(config: Config) -> Check:
    driver = _bytes(config.spark.driver_memory)
    model = _model_bytes(config.model, config.train, _sizes(Lake(config.paths.lake)))
    parts = f"driver {size(driver)}" + (
        f" + model {size(model)}" if model is not None else "; the model's size is known after prepare"
    )
    free = machine.memory_available()
    if free is None:
        return Check(
            "memory",
            "warn",
            f"cannot be told here: needed about {size(driver + (model or 0))} ({parts}): look yourself",
        )
    if free < driver + (model or 0):
        needed = f"needed about {size(driver + (model or 0))} ({parts})"
        return Check(
            "memory",
            "fail",
            f"{size(free)} available: {needed}: lower spark.driver_memory, model.factors or train.ranks, or free some",
        )
    return Check("memory", "ok", f"{size(free)} available ({parts})")


def slots(spark: SparkSection, train: Train) -> Iterator[Check]:
    cores = machine.cores()
    local = re.fullmatch(r"local(?:\[(\d+|\*)(?:,\s*\d+)?\])?", spark.master or "")
    if local:
        asked = cores if local[1] == "*" else int(local[1] or 1)
        many = asked > cores
        advice = f": slower, not wrong: set spark.master=local[{cores}]" if many else ""
        yield Check("slots", "warn" if many else "ok", f"{spark.master} on {cores} cores{advice}")
    else:
        yield Check("slots", "ok", f"{cores} cores here; Spark's are those of {spark.master or 'spark-submit'}")
    if train.launcher != "none" and train.ranks > max(cores, programs.gpus()):
        yield Check("ranks", "warn", f"{train.ranks} on {cores} cores: slower, not wrong: set train.ranks={cores}")
    else:
        yield Check("ranks", "ok", f"{1 if train.launcher == 'none' else train.ranks}")


def master(spark: SparkSection) -> Iterator[Check]:
    """Only a standalone master has an address that can be tried without its client's configuration."""
    for host, port in re.findall(r"(?:spark://|,)([^:,/]+):(\d+)", spark.master or ""):
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            yield Check("master", "ok", f"{host}:{port} answers")
        except OSError as error:
            yield Check(
                "master",
                "fail",
                f"{host}:{port} does not answer ({error}): needed a running Spark master: start it or set spark.master",
            )


def _sizes(found: Lake) -> tuple[int, int] | None:
    """Users and items of the newest prepared night."""
    try:
        newest = next(production_runs(found, "prepare"), None)
        return index_sizes(newest) if newest else None
    except (NcfError, KeyError, ImportError, ValueError, OSError):
        return None


def _model_bytes(model: Model, train: Train, sizes: tuple[int, int] | None) -> int | None:
    """Embeddings of all ranks: weights, gradients and Adam's two moments, four bytes each. The tower is small
    beside them.
    """
    if sizes is None:
        return None
    width = model.factors if model.name in ("gmf", "neumf", "mf") else 0
    width += model.layers[0] // 2 if model.name in ("mlp", "neumf") else 0
    widths = [width, width]
    if model.name == "embedding_nn":
        widths = list(model.embedding_sizes or map(embedding_size, sizes))
    ranks = 1 if train.launcher == "none" else train.ranks
    return sum(rows * dim for rows, dim in zip(sizes, widths, strict=True)) * 4 * 4 * ranks


def _bytes(text: str) -> int:
    return int(text[:-1]) * 1024 ** ("kmgt".index(text[-1]) + 1)
