"""Runs the training ranks as barrier tasks of Spark: `python -m ncf_dist.distribute --ranks N --spec FILE`.

A process of its own beside the job train, so that the trainer never imports pyspark. It starts a JVM with the options
that the job has (`gateway`); in a night whose Spark is kept, and under plain spark-submit, it finds the job's own in
the environment. TorchDistributor runs `worker.py` with torchrun on each executor, which must see the lake under the
same paths. Spark's master needs N free slots at once, and no dynamic allocation.

What it opens: torchrun's store listens on every interface of the first executor while the training lasts, without a
password, and Spark's log server at the driver's address. The ranks' own connections are held to the interface that
faces the first executor. So it needs a network that only the cluster reaches; on one machine `torchrun` opens nothing.
"""

from __future__ import annotations

import argparse
import json
import sys

from ncf_dist.config import Config
from ncf_dist.files import read_bytes
from ncf_dist.spark_io import spark_session

WORKER = "ncf_dist.train.worker"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--spec", required=True)
    args = parser.parse_args()
    config = Config.model_validate_json(json.loads(read_bytes(args.spec))["config"])
    with spark_session("ncf-train", config.spark):
        from pyspark.ml.torch.distributor import TorchDistributor

        distributor = TorchDistributor(num_processes=args.ranks, local_mode=False, use_gpu=args.gpu)
        # A module, where TorchDistributor has a file in mind: executors may have this project under another path.
        distributor.run("-m", WORKER, "--spec", args.spec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
