"""Where things live in the lake, and the rule that makes them trustworthy: `manifest.json` is written last.

    <lake>/runs/<ds>/<stage>/<run_key>/…             one immutable output a (config, inputs)
    <lake>/runs/<ds>/<stage>/<run_key>/manifest.json written last: without it the output does not exist

An attempt that died leaves a folder without a manifest, which the next attempt with that key empties first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import logging
import posixpath
import re
import uuid
from collections.abc import Iterator, Sequence

from filelock import FileLock, Timeout

from ncf_dist import locks
from ncf_dist.errors import BusyRun, ContractError, InputError, StaleRun
from ncf_dist.files import (
    create,
    exists,
    is_conditional,
    is_local,
    list_names,
    make_dirs,
    remove,
    resolve,
    takes_conditions,
    write_atomic,
    write_bytes,
)
from ncf_dist.manifests import MANIFEST, Manifest, read_manifest

log = logging.getLogger(__name__)

LOCK = ".lock"
"""In the folder of a night."""


class Lake:
    """The root of everything the line stores."""

    def __init__(self, root: str) -> None:
        self.root = resolve(root)

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def stage(self, ds: str, stage: str) -> StageRuns:
        return StageRuns(self, ds, stage)

    def check_writable(self) -> None:
        """Raise InputError unless a file can be made and removed at the root."""
        # Not the process's number: in containers, and on several machines, that is often the same.
        probe = self.path(f".probe-{uuid.uuid4().hex}")
        try:
            make_dirs(self.root)
            write_bytes(probe, b"")
            remove(probe)
        except OSError as error:
            raise InputError(
                f"the lake {self.root} cannot be written ({error.strerror or error}); "
                "needed a place this user may write: fix its permissions or set paths.lake"
            ) from None

    def nights(self) -> list[str]:
        """Every ds for which a run was begun, ascending."""
        return [name for name in list_names(self.path("runs")) if re.fullmatch(r"\d{4}-\d\d-\d\d", name)]

    @contextlib.contextmanager
    def hold(self, ds: str) -> Iterator[None]:
        """Keep every other run away from this ds while inside. The lock of a local or mounted folder dies with its
        process, that of an object store soon after (`locks`). Raises BusyRun.

        Where a store cannot let one writer win there is no lock: schedule one run a ds.
        """
        path = self.path("runs", ds, LOCK)
        self.check_writable()
        if not is_local(self.root):
            with locks.held(path, f"ds {ds} of {self.root}") if takes_conditions(path) else contextlib.nullcontext():
                yield
            return
        make_dirs(self.path("runs", ds))
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BusyRun(
                f"another run holds ds {ds} of {self.root}; wait for it, or stop it, and run this again"
            ) from None
        try:
            yield
        finally:
            lock.release()


class StageRuns:
    """The runs of one stage of one night."""

    def __init__(self, lake: Lake, ds: str, stage: str) -> None:
        self.ds, self.stage = ds, stage
        self.root = lake.path("runs", ds, stage)

    def run_path(self, run_key: str) -> str:
        return posixpath.join(self.root, run_key)

    def find(self, run_key: str) -> Manifest | None:
        """The finished run of this key, or None. Raises ContractError for a manifest that is damaged, or another's."""
        path = self.run_path(run_key)
        if not exists(posixpath.join(path, MANIFEST)):
            return None
        run = read_manifest(path)
        says, wanted = (run.stage, run.ds, run.run_key), (self.stage, self.ds, run_key)
        if says != wanted:
            raise ContractError(
                f"{path}/{MANIFEST} says that it is of {' '.join(says)}; needed that of {' '.join(wanted)}: delete the "
                "folder and rerun the job"
            )
        return run

    def load(self, run_key: str) -> Manifest:
        """The finished run of this key. Raises ContractError where there is none."""
        manifest = self.find(run_key)
        if manifest is None:
            raise ContractError(
                f"{self.run_path(run_key)} cannot be read: it is no finished run, but a later one was made from it; "
                f"needed it whole: rerun the job {self.stage}, and what comes after it"
            )
        return manifest

    def finished(self) -> list[Manifest]:
        """Every finished run, experiments included, the newest first. A damaged manifest is logged and passed over."""
        found = []
        for name in list_names(self.root):
            try:
                if manifest := self.find(name):
                    found.append(manifest)
            except ContractError as error:
                log.warning("%s", error)
        return sorted(found, key=lambda run: (run.finished, run.run_key), reverse=True)

    def production(self) -> list[Manifest]:
        """The finished runs that are no experiment's, whatever their config, the newest first."""
        return [run for run in self.finished() if run.name is None]

    def newest(self) -> Manifest:
        """The first of `production`. Raises ContractError where this stage has not finished for this ds."""
        found = self.production()
        if not found:
            raise ContractError(self.what_is_missing())
        return found[0]

    def what_is_missing(self) -> str:
        """The message where this stage has not finished for this ds."""
        return (
            f"{self.root} has no finished run; needed the output of {self.stage} for ds {self.ds}: run the job "
            f"{self.stage} first"
        )

    def begin(self, run_key: str, keep: Sequence[str] = ()) -> str:
        """A folder for this run; what an attempt that died left there is removed, but for the names in `keep`. Raises
        StaleRun where another run holds this night by now: it may have finished this very one."""
        path = self.run_path(run_key)
        locks.confirm()
        for name in list_names(path):
            if name not in keep:
                remove(posixpath.join(path, name))
        make_dirs(path)
        return path

    def finish(self, manifest: Manifest) -> Manifest:
        """Make the run exist, finished now. Returns it as it is stored. Raises StaleRun where another run holds this
        night by now, or, in an object store, has finished the same one."""
        manifest = dataclasses.replace(manifest, finished=dt.datetime.now(dt.timezone.utc).isoformat())
        body = {k: v for k, v in dataclasses.asdict(manifest).items() if k != "root"}
        path, data = posixpath.join(manifest.root, MANIFEST), json.dumps(body, indent=1, sort_keys=True).encode()
        locks.confirm()
        if not is_conditional(path):
            write_atomic(path, data)
        elif create(path, data) is None:
            raise StaleRun(
                f"another run has finished {manifest.root} meanwhile, and this one changed its manifest in nothing; "
                "needed one run at a time: run this again"
            )
        return manifest
