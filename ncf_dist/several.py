"""Several nights by one command, one after the other: which are asked for, and what a scheduler is told of them.

Each is a night as if it had been asked for alone: it holds its ds, ends with an outcome and an exit code of its own,
and leaves its own file of details. A night that failed does not stop the ones after it, unless `--stop` says so. The
same command finishes what is left, because a night that is published already is found done.
"""

from __future__ import annotations

import argparse
import datetime as dt
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ncf_dist.config import parse_ds
from ncf_dist.errors import ConfigError, ExitCode, NcfError, Preempted
from ncf_dist.stage import Outcome
from ncf_dist.stopping import asked

log = logging.getLogger(__name__)

Report = Mapping[str, Any]
NOT_STARTED = "not-started"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", metavar="YYYY-MM-DD", dest="first", help="the first of several nights, in order")
    parser.add_argument("--to", metavar="YYYY-MM-DD", dest="last", help="the last of them")
    parser.add_argument("--stop", action="store_true", help="of several nights: none after one that failed")


def nights(args: argparse.Namespace) -> list[str]:
    """The nights that the command line asks for, in its order, each once. Raises ConfigError."""
    given: list[str] = args.ds if isinstance(args.ds, list) else [args.ds] if args.ds else []
    first, last = vars(args).get("first"), vars(args).get("last")
    if first is None and last is None:
        return list(dict.fromkeys(parse_ds(ds, args.allow_future) for ds in (given or (None,))))
    if first is None or last is None or given:
        raise ConfigError(
            f"--ds is {', '.join(given) or 'not given'}, --from {first} and --to {last}; needed --from and --to "
            "for nights in order, or --ds for each of them"
        )
    begin, end = (dt.date.fromisoformat(parse_ds(ds, args.allow_future)) for ds in (first, last))
    if end < begin:
        raise ConfigError(f"--from is {first} and --to {last}; needed a first night that is not after the last one")
    return [(begin + dt.timedelta(days=day)).isoformat() for day in range((end - begin).days + 1)]


def run_each(wanted: Sequence[str], run: Callable[[str], Report], stop: bool) -> Outcome:
    """Run the nights in this order. run: one night, to its report, whose `exit_code` says how it ended.

    Raises NcfError with the exit code of the first that failed; Preempted where this process is asked to stop.
    """
    ended: dict[str, Report] = {}
    for number, ds in enumerate(wanted, 1):
        log.info("══ %d/%d ds %s ══", number, len(wanted), ds)
        ended[ds] = run(ds)
        if asked() or (stop and ended[ds]["exit_code"]):
            break
    statuses = {ds: ended[ds]["status"] if ds in ended else NOT_STARTED for ds in wanted}
    said: dict[str, Any] = {
        "nights": statuses,
        "warnings": [f"{ds}: {warning}" for ds, report in ended.items() for warning in report.get("warnings", ())],
        "details_of_nights": {ds: report["details"] for ds, report in ended.items()},
    }
    failed = {ds: report for ds, report in ended.items() if report["exit_code"]}
    left = [ds for ds in wanted if ds not in ended]
    if asked():
        raise Preempted(
            f"stopped by {asked()} in ds {list(ended)[-1]}, {len(left)} of {len(wanted)} nights not started; what was "
            "finished is kept: run the same command again, which does what is left",
            **said,
        )
    if failed:
        raise _failed(failed, left, len(wanted), said)
    status = "already-done" if set(statuses.values()) == {"already-done"} else "done"
    last = ended[wanted[-1]]
    return Outcome(status, outputs=last["outputs"], extra=said)


def _failed(failed: Mapping[str, Report], left: Sequence[str], count: int, said: dict[str, Any]) -> NcfError:
    """What a scheduler is told where nights failed: that of the first decides."""
    each = "; ".join(f"{ds} {report['status']}: {report.get('error')}" for ds, report in failed.items())
    not_started = f", and {len(left)} were not started (--stop)" if left else ""
    error = NcfError(
        f"{len(failed)} of {count} nights failed ({', '.join(failed)}){not_started}; the others are done: {each}. Do "
        "what is said there and run the same command again, which does what is left",
        **said,
    )
    error.exit_code = ExitCode(next(iter(failed.values()))["exit_code"])
    error.status = "refused" if all(report["status"] == "refused" for report in failed.values()) else "failed"
    return error
