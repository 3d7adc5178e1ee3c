"""Attempts and their stages as OpenLineage events, to a file (one event a line) or an HTTP address.

An attempt is a run of the job; each of its stages is a run below it. Each START is followed by one COMPLETE or FAIL:
for an attempt that was killed the next one sends the FAIL. Datasets are the tables, which have names of their own
whatever the night is, and what `input.path` names. No row and no user's id is in any event.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from ncf_dist import __version__
from ncf_dist.attempts import Listener, Record, Stage
from ncf_dist.config import Config
from ncf_dist.files import is_local, make_dirs, resolve
from ncf_dist.urls import real_url

PRODUCER = f"urn:ncf-dist:{__version__}"
_RUNS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:ncf-dist")
TIMEOUT_S = 5.0


class Lineage(Listener):
    """place: a file, or the address of a server. sources: what prepare reads."""

    def __init__(self, place: str, namespace: str, sources: tuple[str, ...], table: str) -> None:
        from openlineage.client.transport.file import FileConfig, FileTransport
        from openlineage.client.transport.http import HttpConfig, HttpTransport

        self.namespace, self.sources, self.table = namespace, sources, table
        self._transport: Any
        if place.startswith(("http://", "https://")):
            self._transport = HttpTransport(HttpConfig(url=real_url(place), timeout=TIMEOUT_S, retry={"total": 1}))
        else:
            path = resolve(place)
            if is_local(path):
                make_dirs(path.rpartition("/")[0])
            self._transport = FileTransport(FileConfig(log_file_path=path, append=True))

    def begun(self, record: Record) -> None:
        self._emit("START", record)

    def stage_begun(self, record: Record, name: str) -> None:
        self._emit("START", record, name)

    def stage_ended(self, record: Record, name: str) -> None:
        self._emit("COMPLETE" if record.stages[name].status in ("done", "already-done") else "FAIL", record, name)

    def ended(self, record: Record) -> None:
        self._emit("FAIL" if record.exit_code else "COMPLETE", record)

    def lost(self, record: Record) -> None:
        for name, stage in record.stages.items():
            if stage.status == "running":
                self._emit("FAIL", record, name)
        self._emit("FAIL", record)

    def _emit(self, kind: str, record: Record, name: str | None = None) -> None:
        from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run, nominal_time_run, parent_run

        facets: dict[str, Any] = {"nominalTime": nominal_time_run.NominalTimeRunFacet(f"{record.ds}T00:00:00Z")}
        if name is not None:
            above = parent_run.Run(run_id(record)), parent_run.Job(self.namespace, record.job)
            facets["parent"] = parent_run.ParentRunFacet(*above)
        if kind == "FAIL" and record.error:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(record.error, "python")
        job = Job(self.namespace, record.job if name is None else f"{record.job}.{name}")
        stage = record.stages[name] if name is not None else None
        self._transport.emit(
            RunEvent(
                eventType=RunState[kind],
                eventTime=dt.datetime.now(dt.timezone.utc).isoformat(),
                producer=PRODUCER,
                run=Run(run_id(record, name), facets),
                job=job,
                inputs=self._inputs(record, name, stage) if stage and name and kind == "COMPLETE" else [],
                outputs=self._outputs(name, stage) if stage and name and kind == "COMPLETE" else [],
            )
        )

    def _inputs(self, record: Record, name: str, stage: Stage) -> list[Any]:
        from openlineage.client.event_v2 import InputDataset

        if name == "prepare":
            return [InputDataset(self.namespace, source) for source in self.sources]
        above = {before: record.stages[before] for before in record.stages if before in stage.inputs}
        if name == "publish" and "score" in record.stages:
            above = {"score": record.stages["score"]}
        return [
            InputDataset(self.namespace, f"{of}.{table}") for of, run in above.items() for table in run.rows or ["run"]
        ]

    def _outputs(self, name: str, stage: Stage) -> list[Any]:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

        if name == "publish":
            return [OutputDataset(self.namespace, self.table)]
        return [
            OutputDataset(
                self.namespace,
                f"{name}.{table}",
                {"outputStatistics": statistics.OutputStatisticsOutputDatasetFacet(rows, stage.bytes.get(table))},
            )
            for table, rows in stage.rows.items()
        ] or [OutputDataset(self.namespace, f"{name}.run")]


def run_id(record: Record, stage: str | None = None) -> str:
    """The same for whoever tells of this attempt, or of this stage of it."""
    return str(uuid.uuid5(_RUNS, f"{record.ds}/{record.attempt}/{stage or ''}"))


def sink(config: Config) -> Listener:
    place = config.sinks.openlineage
    assert place is not None
    path = config.input.path
    return Lineage(place, config.sinks.namespace, (path,) if isinstance(path, str) else path, config.publish.table)
