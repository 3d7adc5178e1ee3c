"""The command line that all jobs share: parse, load the config, hold the night, call one function, report, exit.

Logs go to stderr. The last line of stdout is one JSON object that a scheduler can read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ncf_dist.artifacts import Lake, Outcome
from ncf_dist.config import Config, load_config, parse_ds
from ncf_dist.errors import ConfigError, ExitCode, NcfError

JOBS = ("fetch", "prepare", "train", "evaluate", "score", "publish", "nightly", "doctor")
UNLOCKED = ("fetch", "doctor")
"""Jobs that make nothing for a ds."""

VERIFYING = ("publish", "nightly")
"""Jobs that check what is published already."""

NAMED = ("prepare", "train", "evaluate", "score", "nightly")
"""Jobs whose runs can be an experiment's."""

DRY_RUN = {"score": "forecast"}
"""Jobs that can say what they would take, and the function that does."""

JobFunction = Callable[[Config, str], Outcome]
log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.format_usage().strip()}")


def parser(job: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=job, description=f"ncf-dist job {job}")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the configuration of this line")
    parser.add_argument("--ds", metavar="YYYY-MM-DD", help="the night; default today (UTC)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="overrides one value of the config",
    )
    if job in VERIFYING:
        parser.add_argument(
            "--verify",
            action="append",
            type="publish.verify={}".format,
            metavar="{quick|deep}",
            dest="overrides",
            help="how the files of a published night are checked; short for --set publish.verify=…",
        )
    if job in NAMED:
        parser.add_argument("--run", metavar="NAME", help="an experiment: production never builds on its runs")
    if job in DRY_RUN:
        parser.add_argument(
            "--dry-run", action="store_true", help="write nothing; say what the job would take, from a sample"
        )
    return parser


def overrides(args: argparse.Namespace) -> list[str]:
    """What the command line changes of the config, as `section.key=value`."""
    name = vars(args).get("run")
    return [*args.overrides, f"run={json.dumps(name)}"] if name is not None else list(args.overrides)


def run_job(
    job: str, function: JobFunction, argv: Sequence[str] | None = None, dry_run: JobFunction | None = None
) -> int:
    """Run one job to its end and return its exit code; everything a person or a scheduler needs has been printed.

    dry_run: what runs in place of `function` under --dry-run; it writes nothing, so it holds no night.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    # Says good-bye after the last line, which under plain spark-submit shares stdout with the log.
    logging.getLogger("py4j").setLevel(logging.WARNING)
    start = time.monotonic()
    report: dict[str, Any] = {
        "job": job,
        "ds": None,
        "run_key": None,
        "status": "failed",
        "outputs": {},
        "metrics": {},
    }
    exit_code = ExitCode.DONE
    try:
        args = parser(job).parse_args(argv)
        report["ds"] = ds = parse_ds(args.ds)
        config = load_config(args.config, overrides(args))
        if config.paths.umask is not None:
            os.umask(int(config.paths.umask, 8))  # Ranks inherit it, and `spark_io.map_in_arrow` hands it on.
        if dry := bool(vars(args).get("dry_run")):
            assert dry_run is not None
            function = dry_run
        with contextlib.nullcontext() if dry or job in UNLOCKED else Lake(config.paths.lake).hold(ds):
            outcome = function(config, ds)
        report.update(
            run_key=outcome.run_key,
            status=outcome.status,
            outputs=dict(outcome.outputs),
            metrics=dict(outcome.metrics),
        )
        report.update(outcome.extra)
    except NcfError as error:
        exit_code = error.exit_code
        report.update(error.extra, status=error.status, error=str(error))
        log.error("%s", error)
    except Exception as error:
        exit_code = ExitCode.UNEXPECTED
        report.update(error=f"{type(error).__name__}: {error}"[:2000])
        log.exception("%s failed unexpectedly", job)
    report["seconds"] = round(time.monotonic() - start, 3)
    sys.stderr.flush()
    print(json.dumps(report), flush=True)
    return int(exit_code)


def spark_options(config: Config) -> list[str]:
    """What only the launcher can tell Spark: it must be known before the driver's JVM starts."""
    options = [
        "--driver-memory",
        config.spark.driver_memory,
        "--executor-memory",
        config.spark.executor_memory,
    ]
    return ["--master", config.spark.master, *options] if config.spark.master else options


def main(argv: Sequence[str] | None = None) -> int:
    """`ncf-dist JOB …` runs a job in this process; `spark-options JOB …` prints the launcher's options, one a line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["spark-options"]:
        return _launcher(args[1:])
    if not args or args[0] not in JOBS:
        print(
            f"usage: ncf-dist {{{'|'.join(JOBS)}}} --config FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…",
            file=sys.stderr,
        )
        return int(ExitCode.CONFIG)
    job = args[0]
    module = importlib.import_module(f"ncf_dist.{job}.pipeline")
    function: JobFunction = getattr(module, job)
    return run_job(job, function, args[1:], getattr(module, DRY_RUN[job]) if job in DRY_RUN else None)


def _launcher(args: list[str]) -> int:
    """Options on success; on a bad config exactly what the job itself would have printed,
    so that it need not be started."""
    job = args[0] if args else "spark-options"
    try:
        parsed = parser(job).parse_args(args[1:])
        parse_ds(parsed.ds)
        print("\n".join(spark_options(load_config(parsed.config, overrides(parsed)))))
    except NcfError:
        return run_job(job, _unreachable, args[1:])
    return 0


def _unreachable(config: Config, ds: str) -> Outcome:
    raise AssertionError("the config was refused a moment ago")


if __name__ == "__main__":
    sys.exit(main())
