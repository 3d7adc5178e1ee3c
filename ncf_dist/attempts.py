"""What every attempt at a night leaves: `runs/<ds>/attempts/<attempt>.json`, one file a job that was started for it.

The file is there from the job's first moment and is written again after each stage and at the end, so an attempt that
was killed is known by its outcome `running`; the next attempt, which holds the night, closes it as `lost`. Its schema
is `attempts.schema.json` (`python -m ncf_dist.attempts` prints it). No file that cannot be written stops a night.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import json
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from ncf_dist import __version__, logs
from ncf_dist.errors import ExitCode, NcfError
from ncf_dist.files import list_names, make_dirs, read_json, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.memory import Peak
from ncf_dist.stage import Outcome
from ncf_dist.urls import scrub, scrub_all

log = logging.getLogger(__name__)

FOLDER = "attempts"
StageStatus = Literal["running", "done", "already-done", "refused", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Code(_Part):
    """What ran. sha256: of the package's sources; lock: of requirements.lock, null where it is not beside them."""

    version: str
    sha256: str
    lock: str | None = None


class Stage(_Part):
    """What became of one stage. run: its folder, from the lake on; inputs: upstream run keys and the digests of what
    was read; rows and bytes: of each of its tables; seconds and peak_memory_bytes: of this attempt, null while it runs
    (memory: that of all processes of this machine, once a second)."""

    status: StageStatus = "running"
    run_key: str | None = None
    run: str | None = None
    inputs: dict[str, Any] = Field(default={})
    rows: dict[str, int] = Field(default={})
    bytes: dict[str, int] = Field(default={})
    seconds: float | None = None
    peak_memory_bytes: int | None = None


class Record(_Part):
    """One attempt. began, ended: UTC, ISO 8601. gates: of each gate that was judged its value, bound and outcome.
    run: the experiment's name."""

    attempt: str
    job: str
    ds: str
    began: str
    code: Code
    ended: str | None = None
    seconds: float | None = None
    outcome: Literal["running", "done", "already-done", "refused", "failed", "lost"] = "running"
    exit_code: int | None = None
    error: str | None = None
    run: str | None = None
    run_key: str | None = None
    model_version: str | None = None
    table_version: int | None = None
    stages: dict[str, Stage] = Field(default={})
    gates: dict[str, Any] = Field(default={})
    metrics: dict[str, Any] = Field(default={})
    warnings: list[str] = Field(default=[])


def read(lake: Lake, ds: str) -> list[Record]:
    """Every attempt at this night, the oldest first. A file that cannot be read is logged and passed over."""
    found = []
    for name in list_names(folder := lake.path("runs", ds, FOLDER)):
        if name.endswith(".json"):
            path = posixpath.join(folder, name)
            try:
                found.append(Record.model_validate(read_json(dict[str, Any], path)))
            except (OSError, ValueError) as error:
                log.warning("%s cannot be read (%s): it is passed over", path, " ".join(str(error).split()))
    return sorted(found, key=lambda record: record.attempt)


class Listener:
    """Somebody who is told of an attempt as it goes; whoever does not care about a moment leaves it out."""

    def begun(self, record: Record) -> None: ...

    def stage_begun(self, record: Record, name: str) -> None: ...

    def stage_ended(self, record: Record, name: str) -> None: ...

    def ended(self, record: Record) -> None: ...

    def lost(self, record: Record) -> None:
        """An earlier attempt at this night, which was killed, is closed."""


class Listeners:
    """All who are told. One that fails is heard of once, and told no more: no listener stops a night."""

    def __init__(self, named: Mapping[str, Callable[[], Listener]]) -> None:
        """named: how each is made, by its name."""
        self.warnings: list[str] = []
        self._there: dict[str, Listener] = {}
        for name, make in named.items():
            with self._guarded(name):
                self._there[name] = make()

    def tell(self, moment: str, record: Record, *stage: str) -> None:
        for name, listener in list(self._there.items()):
            with self._guarded(name):
                getattr(listener, moment)(record, *stage)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Libraries of others, and networks.
            self._there.pop(name, None)
            what = " ".join(scrub(str(error)).split())[:300] or type(error).__name__
            install = ": install the extra ops of ncf-dist" if isinstance(error, ImportError) else ""
            warning = f"{name} is told no more of this attempt ({what}){install}"
            log.warning("%s", warning)
            self.warnings.append(warning)


_current: Attempt | None = None


@contextlib.contextmanager
def stage(name: str) -> Iterator[Callable[[Outcome], None]]:
    """One stage of the attempt that this process makes, from its beginning to its end; gives what notes its outcome.
    Without an attempt (a stage called from Python) nothing is noted."""
    if _current is None:
        yield lambda _: None
        return
    with _current.stage(name) as record:
        yield functools.partial(_current.took, record)


class Attempt:
    """An attempt, from its beginning to its end."""

    def __init__(self, lake: Lake, ds: str, job: str, run: str | None, listeners: Listeners) -> None:
        self._lake, self._start, self._listeners = lake, time.monotonic(), listeners
        now = dt.datetime.now(dt.timezone.utc)
        name = f"{now:%Y%m%dT%H%M%S%f}-{os.getpid()}"
        self.record = Record(attempt=name, job=job, ds=ds, began=now.isoformat(), code=code(), run=run)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """One stage, from its beginning to its end; whoever runs it says with `took` what came of it."""
        stage = self.record.stages[name] = Stage()
        start = time.monotonic()
        self.write()
        self._listeners.tell("stage_begun", self.record, name)
        logs.say(stage=name, run_key=self.record.run_key if name == "publish" else None)
        with Peak() as peak:
            try:
                yield stage
                logs.say(stage=None, run_key=None)  # After an error they stay: what is said of it is of this stage.
            except BaseException as error:
                stage.status = "refused" if isinstance(error, NcfError) and error.status == "refused" else "failed"
                raise
            finally:
                stage.seconds, stage.peak_memory_bytes = round(time.monotonic() - start, 3), peak.bytes
                self.write()
                self._listeners.tell("stage_ended", self.record, name)

    def took(self, stage: Stage, outcome: Outcome) -> None:
        """Note what a stage made or found."""
        stage.status, stage.run_key = cast(StageStatus, outcome.status), outcome.run_key
        self.record.run_key = outcome.run_key or self.record.run_key
        if (manifest := outcome.manifest) is not None:
            stage.run = manifest.root.removeprefix(f"{self._lake.root}/")
            stage.inputs = dict(manifest.inputs)
            stage.rows = {name: table.rows for name, table in manifest.tables.items()}
            stage.bytes = {name: sum(file.bytes for file in table.files) for name, table in manifest.tables.items()}
        self._said(outcome.metrics, outcome.extra)

    def ended(self, outcome: Outcome) -> None:
        self._said(outcome.metrics, outcome.extra)
        self._close(outcome.status, ExitCode.DONE, None)

    def failed(self, exit_code: ExitCode, error: BaseException) -> None:
        ours = isinstance(error, NcfError)
        self._said({}, error.extra if isinstance(error, NcfError) else {})
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        self._close(error.status if isinstance(error, NcfError) else "failed", exit_code, text)

    def _said(self, metrics: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        record = self.record
        record.metrics |= metrics
        record.gates |= dict(extra.get("gates") or {})
        record.warnings = list(dict.fromkeys([*record.warnings, *extra.get("warnings", ())]))
        record.model_version = extra.get("model_version", record.model_version)
        record.table_version = extra.get("version", record.table_version)

    def _close(self, outcome: str, exit_code: ExitCode, error: str | None) -> None:
        now = dt.datetime.now(dt.timezone.utc).isoformat()
        seconds = round(time.monotonic() - self._start, 3)
        closed = {"outcome": outcome, "exit_code": int(exit_code), "error": error, "ended": now, "seconds": seconds}
        self.record = self.record.model_copy(update=closed)
        self._listeners.tell("ended", self.record)
        self.record.warnings = [*self.record.warnings, *self._listeners.warnings]
        self.write()

    def write(self) -> None:
        _write(self._lake, self.record)


@contextlib.contextmanager
def begun(
    lake: Lake,
    ds: str,
    job: str,
    run: str | None,
    code_of: Callable[[BaseException], tuple[ExitCode, BaseException]],
    listeners: Listeners,
) -> Iterator[Attempt]:
    """The attempt of a process that holds the night, from its beginning to its end; who is inside says with `ended`
    what came of it. code_of: the exit code of an error, and the error that a person is told of."""
    global _current
    attempt = _current = _begin(lake, ds, job, run, listeners)
    logs.say(ds=ds, attempt=attempt.record.attempt)
    try:
        yield attempt
    except BaseException as error:
        attempt.failed(*code_of(error))
        raise
    finally:
        _current = None


def _begin(lake: Lake, ds: str, job: str, run: str | None, listeners: Listeners) -> Attempt:
    """Those before it that never ended are closed as lost."""
    now = dt.datetime.now(dt.timezone.utc).isoformat()
    for record in read(lake, ds):
        if record.outcome == "running":
            log.warning("the attempt %s of the job %s was killed, or its machine went down", record.attempt, record.job)
            what = f"it left no word; the attempt of {now} found it"
            lost = record.model_copy(update={"outcome": "lost", "ended": now, "error": what})
            _write(lake, lost)
            listeners.tell("lost", lost)
    attempt = Attempt(lake, ds, job, run, listeners)
    attempt.write()
    listeners.tell("begun", attempt.record)
    return attempt


def _write(lake: Lake, record: Record) -> None:
    path = lake.path("runs", record.ds, FOLDER, f"{record.attempt}.json")
    try:
        make_dirs(posixpath.dirname(path))
        body = scrub_all(record.model_dump(mode="json"))
        write_atomic(path, json.dumps(body, indent=1).encode())
    except Exception as error:  # A file system of somebody else may raise anything, and the night is worth more.
        log.warning("%s cannot be written (%s)", path, " ".join(str(error).split()) or type(error).__name__)


@functools.cache
def code() -> Code:
    package = Path(__file__).parent
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    lock = package.parent / "requirements.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None
    return Code(version=__version__, sha256=sources.hexdigest(), lock=digest)


def schema() -> str:
    return json.dumps({"title": "An attempt at a night", **Record.model_json_schema()}, indent=1) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
