"""Starts the ranks of the other machines of a training as barrier tasks of Spark, one a machine:
`python -m ncf_dist.other_nodes --spec FILE`, a process of its own beside the job train (train.other_nodes=spark).

So nobody has to log in there: Spark's workers are there already, and have the environment that every job has. A task
runs the supervisor of its machine's ranks, as the printed command would. It ends with them; when Spark ends the task,
they end, too. Spark's master needs a free slot on each machine at once: an executor with one slot a machine, else two
of them may be on one.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pyarrow as pa

from ncf_dist.config import Config
from ncf_dist.files import exists, read_bytes, write_atomic
from ncf_dist.spark_io import Pass, on_executor, spark_session
from ncf_dist.train.launchers import torchrun
from ncf_dist.train.processes import dying_with_us


def node_pass(config_json: str, spec: str) -> Pass:
    """What a task does: run the supervisor of node 1 + its partition. Its row is how that ended."""
    config = Config.model_validate_json(config_json)

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield pa.RecordBatch.from_pydict({"code": pa.array([run_node(config, spec, 1 + number)], pa.int32())})

    return run


def run_node(config: Config, spec: str, node: int) -> int:
    """The exit code of a node's ranks. 75 where Spark runs the task again: the others do not wait for new ranks, they
    end, and the job train is run again."""
    if exists(begun := posixpath.join(posixpath.dirname(spec), f"node-{node}")):
        return 75
    write_atomic(begun, b"")
    # What this worker imports from, too: its packages and this code may have come with the job.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    command = dying_with_us(torchrun(config, spec, node), signal.SIGTERM)
    return subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    spec = parser.parse_args().spec
    config_json = json.loads(read_bytes(spec))["config"]
    config = Config.model_validate_json(config_json)
    others = config.train.nodes - 1
    with spark_session("ncf-train-nodes", config.spark) as spark:
        work = on_executor("ncf_dist.other_nodes:node_pass", config_json, spec)
        nodes = spark.range(0, others, 1, others).mapInArrow(work, "code int", barrier=True)
        codes = [int(row["code"]) for row in nodes.collect()]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
