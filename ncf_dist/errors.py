"""Every failure a person can fix, each with the exit code a scheduler acts on.

A message says what we got, what was needed and what to do. Anything that is not an `NcfError` is our own mistake:
it exits 1 with its stack trace.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every job; README's table is this enum."""

    DONE = 0
    UNEXPECTED = 1
    CONFIG = 2
    INPUT = 3
    GATE_REFUSED = 4
    BUSY_OR_STALE = 5
    PREEMPTED = 75


class NcfError(Exception):
    """Base of every error that a person can fix. `extra` goes into the job's last line as it is."""

    exit_code = ExitCode.UNEXPECTED
    status = "failed"

    def __init__(self, message: str, **extra: object) -> None:
        super().__init__(message)
        self.extra = extra


class ConfigError(NcfError):
    """Wrong usage or configuration: nothing was started."""

    exit_code = ExitCode.CONFIG


class InputError(NcfError):
    """The data handed to us cannot be used, or a place in the lake cannot be read or written."""

    exit_code = ExitCode.INPUT


class ContractError(NcfError):
    """A table or bundle between two stages is missing, damaged, or not what its contract declares."""

    exit_code = ExitCode.INPUT


class GateRefused(NcfError):
    """The night's output is well-formed but not good enough to replace what is published."""

    exit_code = ExitCode.GATE_REFUSED
    status = "refused"


class ScoresNotFinite(GateRefused, ValueError):
    """The model gives scores that are no numbers: nothing can be ranked by it."""

    def __init__(self, message: str, **extra: object) -> None:
        super().__init__(message, **{"refused": ["scores"], **extra})


class StaleRun(NcfError):
    """What is to be published was overtaken: another run has changed this ds meanwhile, or a rollback took it back."""

    exit_code = ExitCode.BUSY_OR_STALE
    status = "refused"


class BusyRun(NcfError):
    """Another run holds this ds."""

    exit_code = ExitCode.BUSY_OR_STALE


class Preempted(NcfError):
    """Stopped from outside after saving its progress; the same command continues."""

    exit_code = ExitCode.PREEMPTED


class TrainingFailed(NcfError):
    """A training rank died; its own log says why."""


class WorkerKilled(NcfError):
    """A process of Spark was killed from outside or died, as a rule for memory."""
