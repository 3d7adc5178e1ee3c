"""The last attempt as a file for the textfile collector of Prometheus' node exporter.

The file is replaced whole, so whoever reads it meanwhile finds the old or the new one.
"""

from __future__ import annotations

import contextlib
import datetime as dt

from ncf_dist.attempts import Listener, Record
from ncf_dist.config import Config
from ncf_dist.files import make_dirs, read_bytes, resolve, write_atomic

SUCCESS = "ncf_last_success_timestamp_seconds"
"""Kept while later attempts fail, so that an alert can say how old the newest good night is."""


class Textfile(Listener):
    """path: of the file; `{job}` in it stands for the job's name."""

    def __init__(self, path: str) -> None:
        self.path = resolve(path)

    def ended(self, record: Record) -> None:
        path = self.path.replace("{job}", record.job)
        make_dirs(path.rpartition("/")[0])
        write_atomic(path, exposition(record, _success_before(path, record.job)))


def sink(config: Config) -> Listener:
    assert config.sinks.prometheus is not None
    return Textfile(config.sinks.prometheus)


def exposition(record: Record, success: float | None) -> bytes:
    """success: when an attempt of this job last went well, before this one; seconds since 1970."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, about: str, value: float | None, **labels: str) -> None:
        if value is not None:
            labels = {"job": record.job, **labels}
            found = gauges.get(name) or Gauge(name, about, list(labels), registry=registry)
            gauges[name] = found
            found.labels(**labels).set(value)

    gauges: dict[str, Gauge] = {}
    ended = dt.datetime.fromisoformat(record.ended or record.began).timestamp()
    night = dt.datetime.fromisoformat(record.ds).replace(tzinfo=dt.timezone.utc).timestamp()
    gauge("ncf_last_attempt_timestamp_seconds", "When the last attempt ended.", ended)
    gauge("ncf_ds_timestamp_seconds", "The night of the last attempt.", night)
    gauge(SUCCESS, "When the last attempt ended that went well.", success if record.exit_code else ended)
    gauge("ncf_exit_code", "Exit code of the last attempt.", record.exit_code)
    gauge("ncf_attempt_seconds", "What the last attempt took.", record.seconds)
    gauge("ncf_warnings", "Warnings of the last attempt.", len(record.warnings))
    gauge("ncf_table_version", "Version of the published table.", record.table_version)
    for name, stage in record.stages.items():
        gauge("ncf_stage_ok", "Whether the stage went well.", stage.status in ("done", "already-done"), stage=name)
        gauge("ncf_stage_seconds", "What the stage took.", stage.seconds, stage=name)
        gauge("ncf_stage_peak_memory_bytes", "What all processes held.", stage.peak_memory_bytes, stage=name)
        for table, rows in stage.rows.items():
            gauge("ncf_table_rows", "Rows of a stage's table.", rows, stage=name, table=table)
            gauge("ncf_table_bytes", "Bytes of a stage's table.", stage.bytes.get(table), stage=name, table=table)
    for name, value in record.metrics.items():
        if isinstance(value, int | float):
            gauge("ncf_metric", "A metric of the night, by its name.", value, metric=name)
    for name, judged in record.gates.items():
        ok = isinstance(judged, dict) and judged.get("outcome") != "refused"
        gauge("ncf_gate_ok", "Whether the gate let the night pass.", ok, gate=name)
    return bytes(generate_latest(registry))


def _success_before(path: str, job: str) -> float | None:
    """What the file that is there says of it."""
    from prometheus_client.parser import text_string_to_metric_families

    with contextlib.suppress(OSError, ValueError):
        for family in text_string_to_metric_families(read_bytes(path).decode()):
            for sample in family.samples:
                if (sample.name, sample.labels.get("job")) == (SUCCESS, job):
                    return float(sample.value)
    return None
