"""The command line that all jobs share: parse, load the config, hold the night, call one function, report, exit.

Logs go to stderr. The last line of stdout is one JSON object that a scheduler can read (`last_line.py`).
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ncf_dist import attempts, gateway, last_line, logs, retries, several
from ncf_dist.config import Config, load_config
from ncf_dist.errors import ConfigError, ExitCode, NcfError, Preempted
from ncf_dist.files import resolve
from ncf_dist.lake import Lake
from ncf_dist.sinks import sinks
from ncf_dist.stage import Outcome
from ncf_dist.stopping import Stopped, asked, interruptible, listening
from ncf_dist.urls import scrub_all

LOOKING = ("status", "runs")
"""Jobs that show what is there."""

STAGES = ("fetch", "prepare", "train", "evaluate", "score", "publish")
JOBS = (*STAGES, "refit", "nightly", "rollback", "sweep", "doctor", "clean", *LOOKING)
UNLOCKED = ("fetch", "doctor", "clean", *LOOKING)
"""Jobs that make nothing for a ds; clean holds the nights that it changes, one at a time."""

VERIFYING = ("publish", "nightly")
"""Jobs that check what is published already."""

INSTEAD = {
    "publish": ("repair", "publish nothing; make latest.json anew from the log, and damaged files from the runs"),
    "doctor": ("cluster", "look at every executor of the cluster too"),
    "clean": ("forget", "take people on the list of input.forget out of every published night, and clean nothing"),
}
"""Jobs with another function beside their own, which an option of its name asks for and which makes nothing for a
ds; and what it does."""

JUDGING = ("refit", "publish", "nightly")
"""Jobs that gates may refuse."""

NAMED = ("prepare", "train", "evaluate", "refit", "score", "nightly")
"""Jobs whose runs can be an experiment's."""

ON_CLUSTER = (*STAGES, "refit", "nightly", "sweep")
"""Jobs that may run on Spark's executors."""

SEVERAL = ("nightly",)
"""Jobs that take several nights."""

WHOLE = ("nightly",)
"""Jobs that run stages, and note each; any other is noted as a stage of its own."""

DRY_RUN = {"score": "forecast", "clean": "forecast"}
"""Jobs that can say what they would take, or remove, and the function that does."""

JobFunction = Callable[[Config, str], Outcome]
log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.format_usage().strip()}")


def parser(job: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=job, description=f"ncf-dist job {job}")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the configuration of this line")
    many = job in SEVERAL
    more = "; may be repeated, in any order" if many else ""
    how = "append" if many else "store"
    parser.add_argument("--ds", metavar="YYYY-MM-DD", action=how, help=f"the night; default today (UTC){more}")
    if many:
        several.add_arguments(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="overrides one value of the config",
    )
    _add_short_ones(parser, job)
    if job in INSTEAD:
        option, what = INSTEAD[job]
        parser.add_argument(f"--{option}", action="store_true", help=what)
    if job in NAMED:
        parser.add_argument("--run", metavar="NAME", help="an experiment: production never builds on its runs")
    parser.add_argument("--allow-future", action="store_true", help="take a --ds after tomorrow, for a backtest")
    if job in ON_CLUSTER:
        parser.add_argument(
            "--cluster",
            action="store_true",
            help="executors get what make package made, unless spark.environment says where they have it",
        )
    if job in DRY_RUN:
        parser.add_argument(
            "--dry-run", action="store_true", help="change nothing; say what the job would take, or remove"
        )
    return parser


def _add_short_ones(parser: argparse.ArgumentParser, job: str) -> None:
    """Options that are short for a setting."""

    def short(option: str, key: str, metavar: str, says: str) -> None:
        set_key = f"{key}={{}}".format
        parser.add_argument(option, action="append", type=set_key, metavar=metavar, dest="overrides", help=says)

    if job in VERIFYING:
        short(
            "--verify",
            "publish.verify",
            "{quick|deep}",
            "how the files of a published night are checked; short for --set publish.verify=…",
        )
    if job == "rollback":
        short(
            "--to",
            "publish.rollback_to",
            "{VERSION|PREVIOUS}",
            "the version of the table to go back to; default PREVIOUS, what the last publication replaced",
        )
    if job in JUDGING:
        parser.add_argument(
            "--override", action="append", default=[], metavar="GATE", help="publish this night in spite of a gate"
        )
        parser.add_argument(
            "--why",
            action="append",
            default=[],
            metavar="TEXT",
            help="the reason, kept with the night: one an --override",
        )
    if job == "sweep":
        short("--trials", "sweep.trials", "N", "models that are trained; short for --set sweep.trials=N")
    if job in LOOKING:
        parser.add_argument(
            "--json",
            action="append_const",
            const="status.format=json",
            dest="overrides",
            help="one JSON object on stdout, before the last line, in place of the table",
        )


def overrides(args: argparse.Namespace) -> list[str]:
    """What the command line changes of the config, as `section.key=value`. Raises ConfigError unless each --override
    has its --why."""
    known = vars(args)
    gates, reasons = known.get("override") or [], known.get("why") or []
    if len(gates) != len(reasons):
        raise ConfigError(
            f"{len(gates)} --override and {len(reasons)} --why; needed one --why TEXT for each --override GATE, in the "
            "same order: the reason is kept with the night"
        )
    made = list(args.overrides)
    if gates:
        made.append(f"gates.overrides={json.dumps(dict(zip(gates, reasons, strict=True)))}")
    if known.get("run") is not None:
        made.append(f"run={json.dumps(known['run'])}")
    return made


def run_job(
    job: str, function: JobFunction, argv: Sequence[str] | None = None, dry_run: JobFunction | None = None
) -> int:
    """Run one job to its end and return its exit code; everything a person or a scheduler needs has been printed.

    SIGTERM and SIGINT end it with exit code 75. What was finished stays, and nothing unfinished is visible: outputs are
    immutable and complete or not there, so the same command goes on.

    argv: the job's arguments; after `--` options for spark-submit.
    dry_run: what runs in place of `function` under --dry-run; it writes nothing, so it holds no night.
    """
    logs.log_to_stderr()
    # Says good-bye after the last line, which under plain spark-submit shares stdout with the log.
    logging.getLogger("py4j").setLevel(logging.WARNING)
    args = list(sys.argv[1:] if argv is None else argv)
    start, report = time.monotonic(), _blank(job, args)
    with listening(), logs.saying():
        exit_code = _run(job, lambda: _outcome(job, function, args, dry_run, report), report)
        report = _closed(report, exit_code, start)
        print(last_line.line(report), flush=True)
    return int(exit_code)


def _blank(job: str, args: Sequence[str]) -> dict[str, Any]:
    """The report of a job of which nothing is known yet."""
    report: dict[str, Any] = {"job": job, "ds": None, "run_key": None, "status": "failed"}
    # From here on; more nights than one may be run in one process.
    return report | {"outputs": {}, "metrics": {}, "retries": -retries.OURS.taken, "command": [job, *args]}


def _closed(report: dict[str, Any], exit_code: ExitCode, start: float) -> dict[str, Any]:
    """All that is known of a job that has ended, without secrets; its file of details is written."""
    if told := report.pop("of_sinks", None):
        report["warnings"] = [*report.get("warnings", ()), *told]
    report["retries"] = report["retries"] + retries.OURS.taken or None
    report.update(exit_code=int(exit_code), seconds=round(time.monotonic() - start, 3))
    report = scrub_all(report)
    sys.stderr.flush()
    report["details"] = _details(report)
    return report


def _details(report: dict[str, Any]) -> str | None:
    """The file with all of `report`. None where no config was read: then nothing was begun, and the error is all."""
    if "work" not in report:
        return None
    return last_line.keep(report, report.pop("night", None), report["work"])


def _run(job: str, call: Callable[[], Outcome], report: dict[str, Any]) -> ExitCode:
    """The job itself; what is known of it is put into `report`."""
    try:
        with interruptible():
            outcome = call()
        report.update(
            run_key=outcome.run_key,
            status=outcome.status,
            outputs=dict(outcome.outputs),
            metrics=dict(outcome.metrics),
            runs=dict(outcome.runs),
        )
        report.update(outcome.extra)
        return ExitCode.DONE
    except (Exception, Stopped, KeyboardInterrupt) as error:
        report["traceback"] = traceback.format_exc()
        exit_code, told = _said_of(job, error)
        if isinstance(told, NcfError):
            report.update(told.extra, status=told.status, error=str(told))
            log.error("%s", told)
            return exit_code
        report.update(error=f"{type(told).__name__}: {told}")
        log.exception("%s failed unexpectedly", job)
        return exit_code


def _said_of(job: str, error: BaseException) -> tuple[ExitCode, BaseException]:
    """The exit code of what a job has raised, and the error that a person is told of."""
    # A connection to the JVM that we ended is an OSError, of which a stage may have made an error of its own.
    ours = isinstance(error, NcfError) and not isinstance(error.__cause__, OSError)
    if not ours and (not isinstance(error, Exception) or asked()):
        # Whatever a library made of the interruption, this is what happened.
        error = Preempted(
            f"the job {job} was stopped by {asked() or 'SIGINT'}; what it had finished is kept and nothing "
            f"unfinished is visible: run the same command again"
        )
    return (error.exit_code if isinstance(error, NcfError) else ExitCode.UNEXPECTED), error


def _outcome(
    job: str, function: JobFunction, argv: list[str], dry_run: JobFunction | None, report: dict[str, Any]
) -> Outcome:
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser(job).parse_args(argv[:cut])
    nights = several.nights(args)
    report["ds"] = ds = nights[0] if len(nights) == 1 else None
    config = load_config(args.config, overrides(args))
    if vars(args).get("cluster") and config.spark.environment is None:
        config = config.model_copy(update={"spark": config.spark.model_copy(update={"environment": "archive"})})
    logs.say(format=config.log.format)
    if config.paths.umask is not None:
        os.umask(int(config.paths.umask, 8))  # Ranks inherit it, and `spark_io.map_in_arrow` hands it on.
    if cut < len(argv):
        options = gateway.with_environment(config.spark, [*gateway.spark_options(config.spark), *argv[cut + 1 :]])
        if gateway.option(options, "spark.submit.deployMode", "deploy-mode") == "cluster":
            _submit(job, options, argv[:cut])
        gateway.hand_over(options)
    lake, free = Lake(config.paths.lake), job in UNLOCKED
    if bool(vars(args).get("dry_run")):
        assert dry_run is not None
        function, free = dry_run, True
    if job in INSTEAD and vars(args)[INSTEAD[job][0]]:
        function, free = getattr(importlib.import_module(f"ncf_dist.{job}.pipeline"), INSTEAD[job][0]), True
    report.update(lake=lake.root, work=resolve(config.paths.work))
    if free:
        return function(config, nights[0])
    if ds is not None:
        return _night(job, function, config, lake, ds, report)
    known = {name: report[name] for name in ("lake", "work")}

    def one_of_them(ds: str) -> dict[str, Any]:
        start, own = time.monotonic(), {**_blank(job, argv), **known, "ds": ds}
        with logs.saying():
            return _closed(own, _run(job, lambda: _night(job, function, config, lake, ds, own), own), start)

    return several.run_each(nights, one_of_them, args.stop)


def _night(job: str, function: JobFunction, config: Config, lake: Lake, ds: str, report: dict[str, Any]) -> Outcome:
    """The job for one night, which nobody else gets meanwhile."""
    report["night"] = lake.path("runs", ds)
    with lake.hold(ds), _attempt(job, config, lake, ds, report) as attempt:
        if job in WHOLE:
            outcome = function(config, ds)
        else:
            with attempts.stage(job) as took:
                took(outcome := function(config, ds))
        attempt.ended(outcome)
        return outcome


@contextlib.contextmanager
def _attempt(job: str, config: Config, lake: Lake, ds: str, report: dict[str, Any]) -> Iterator[attempts.Attempt]:
    """The attempt that this job makes, of which the config's sinks are told; what they fail at is a warning."""
    listeners = attempts.Listeners(sinks(config))
    try:
        with attempts.begun(lake, ds, job, config.run, partial(_said_of, job), listeners) as attempt:
            yield attempt
    finally:
        report["of_sinks"] = listeners.warnings


def _submit(job: str, options: list[str], args: list[str]) -> NoReturn:
    """Become spark-submit: in deploy mode cluster the job runs somewhere else."""
    program = gateway.submit_program()
    os.execv(program, [program, *options, str(Path(__file__).parent.parent / "jobs" / f"{job}.py"), *args])


def main(argv: Sequence[str] | None = None) -> int:
    """`ncf-dist JOB …` runs a job in this process, as jobs/JOB.py does."""
    args = list(sys.argv[1:] if argv is None else argv)
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


if __name__ == "__main__":
    sys.exit(main())
