"""Tables written by Spark: the bytes follow from the rows, whatever the partitions, the order or a task that died."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zipimport
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py4j.java_gateway import GatewayParameters, JavaGateway
from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from ncf_dist import config, gateway, last_line
from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.contracts import INDEX_LIST, ITEM_STATS, NEXT_TOTALS, QUARANTINE, Contract
from ncf_dist.errors import ContractError, InputError, NcfError, WorkerKilled
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import FileInfo, TableInfo
from ncf_dist.spark_errors import from_executors
from ncf_dist.spark_files import FileSink, part_name, runs_of, write_table, write_tables
from ncf_dist.spark_io import Pass, guarded, map_in_arrow, read_table, spark_session
from ncf_dist.spark_tables import local_rows
from ncf_dist.stage import Outcome

ROOT = Path(__file__).parent.parent
ROWS = 2_000
SEEN = Contract(
    "seen",
    pa.schema([pa.field("user_idx", pa.int32(), nullable=False), pa.field("item_idx", INDEX_LIST, nullable=False)]),
    ("user_idx",),
    "user n has seen the items 0 … n mod 5",
    "prepare",
)


def seen_rows(spark: SparkSession) -> DataFrame:
    items = F.expr("transform(sequence(0L, id % 5), i -> int(i))")
    return spark.range(ROWS).select(items.alias("item_idx"), F.col("id").cast("int").alias("user_idx"))


@pytest.fixture
def partitions(spark: SparkSession) -> Iterator[SparkSession]:
    """The shared session, its number of shuffle partitions put back afterwards."""
    before = spark.conf.get("spark.sql.shuffle.partitions")
    yield spark
    spark.conf.set("spark.sql.shuffle.partitions", before or "2")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- map_in_arrow ------------------------------------------------------------------------------------------


def test_a_worker_does_not_read_its_archives_anew_for_every_task(spark: SparkSession) -> None:
    """Before Python 3.12, each importer of an archive that is left costs some 20 ms at the start of every later task.
    One may come back when a task imports something."""

    def importers(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        assert len([*batches]) == 1  # Spark ends a worker that leaves some of its rows.
        import pyspark.sql.functions  # noqa: F401  From the archive, where it is the worker's first.

        archives = [i for i in sys.path_importer_cache.values() if isinstance(i, zipimport.zipimporter)]
        yield pa.RecordBatch.from_pydict({"pid": [os.getpid()], "archives": [len(archives)]})

    seen: dict[int, list[int]] = {}
    for _ in range(4):
        one = spark.range(0, 1, 1, 1)
        [row] = map_in_arrow(one, importers, "pid bigint, archives bigint").collect()
        seen.setdefault(row["pid"], []).append(row["archives"])
    later = [count for counts in seen.values() for count in counts[1:]]
    assert later, "no worker had two tasks"
    assert max(later) <= 2 or sys.version_info >= (3, 12)


def test_what_a_worker_has_imported_is_not_collected_as_garbage(spark: SparkSession) -> None:
    def frozen(batches: object) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"frozen": [gc.get_freeze_count()]})

    [row] = map_in_arrow(spark.range(0, 1, 1, 1), frozen, "frozen bigint").collect()
    assert row["frozen"] > 10_000


of_spark_4 = pytest.mark.skipif(pyspark.__version__.startswith("3."), reason="Spark 3.5 takes no Arrow tables")


@pytest.mark.parametrize("version", ["3.5.6", pytest.param("4.0.5", marks=of_spark_4)])
def test_rows_of_this_process_are_rows_of_spark(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(pyspark, "__version__", version)
    schema = pa.schema([("number", pa.int32()), ("items", pa.list_(pa.int64())), ("name", pa.string())])
    rows = [{"number": 2**31 - 1, "items": [1, 2], "name": "ü"}, {"number": -1, "items": [], "name": None}]
    found = local_rows(spark, pa.Table.from_pylist(rows, schema))
    assert [row.asDict() for row in found.collect()] == rows
    assert [field.dataType.typeName() for field in found.schema] == ["integer", "array", "string"]
    empty = local_rows(spark, schema.empty_table())
    assert (empty.schema, empty.collect()) == (found.schema, [])


@of_spark_4
def test_rows_of_this_process_start_no_python_worker(spark: SparkSession, capsys: pytest.CaptureFixture[str]) -> None:
    local_rows(spark, pa.table({"number": [1, 2, 3]})).where("number > 1").explain()
    plan = capsys.readouterr().out
    assert "LocalTableScan" in plan
    assert "ExistingRDD" not in plan


def test_the_same_plan_is_compiled_once_a_session(spark: SparkSession) -> None:
    """However many others come between: Spark keeps 100 by itself."""
    jvm: Any = spark._jvm
    compiled = jvm.org.apache.spark.metrics.source.CodegenMetrics.METRIC_COMPILATION_TIME().getCount
    plan = spark.range(0, 1, 1, 1).where("id % 7 > 3")
    plan.collect()
    before = compiled()
    others = [spark.range(0, 1, 1, 1).where(f"id % {number} > 3") for number in range(1_000, 1_110)]
    functools.reduce(DataFrame.union, others).collect()
    between = compiled()
    assert between - before >= len(others)
    plan.collect()
    assert compiled() == between


def test_a_worker_writes_with_the_modes_of_the_driver(spark: SparkSession) -> None:
    def masks(batches: object) -> Iterator[pa.RecordBatch]:
        umask = os.umask(0)
        os.umask(umask)
        yield pa.RecordBatch.from_pydict({"umask": [umask]})

    before = os.umask(0o027)
    try:
        rows = map_in_arrow(spark.range(0, 1, 1, 1), masks, "umask bigint")
    finally:
        os.umask(before)
    assert [row["umask"] for row in rows.collect()] == [0o027]


# ---- write_table -------------------------------------------------------------------------------------------


def test_partitions_and_order_change_no_byte(partitions: SparkSession, tmp_path: Path) -> None:
    spark, written = partitions, {}
    for shuffle_partitions in (1, 2, 7):
        spark.conf.set("spark.sql.shuffle.partitions", shuffle_partitions)
        mixed = F.xxhash64("user_idx", F.lit(shuffle_partitions))
        frame = seen_rows(spark).repartition(shuffle_partitions, mixed).sortWithinPartitions(mixed)
        run = str(tmp_path / str(shuffle_partitions))
        written[shuffle_partitions] = write_table(frame, run, SEEN, F.col("user_idx") % 3)
    assert written[1] == written[2] == written[7]
    table = written[1]
    assert [(f.path, f.rows, f.row_groups) for f in table.files] == [
        (part_name(file, 0), len(range(file, ROWS, 3)), 1) for file in range(3)
    ]
    for file, info in enumerate(table.files):
        for run in ("1", "2", "7"):
            assert sha256(tmp_path / run / "seen" / info.path) == info.sha256
        stored = pq.ParquetFile(tmp_path / "1" / "seen" / info.path)
        assert stored.metadata.num_row_groups == 1
        assert stored.schema_arrow.equals(SEEN.schema)
        assert stored.read()["user_idx"].to_pylist() == list(range(file, ROWS, 3))


def test_two_tables_of_one_pass_are_those_of_a_pass_each(spark: SparkSession, tmp_path: Path) -> None:
    """And what is said of the pieces is said of each row once."""
    columns = {"train_count": F.col("id") * 3, "train_rows": F.col("id") * 2, "weight": F.xxhash64("id")}
    frame = spark.range(ROWS).select(
        F.col("id").cast("int").alias("item_idx"), *[c.alias(n) for n, c in columns.items()]
    )
    both, file = (ITEM_STATS, NEXT_TOTALS), F.col("item_idx") % 3
    found, said = write_tables(frame, str(tmp_path / "one"), both, file, lambda part: part["item_idx"].to_pylist())
    assert found == [write_table(frame, str(tmp_path / "each"), contract, file) for contract in both]
    assert sorted(item for part in said for item in part) == list(range(ROWS))
    assert write_tables(frame, str(tmp_path / "none"), both, file) == (found, [])


def test_equal_rows_are_all_kept_where_there_is_no_key(spark: SparkSession, tmp_path: Path) -> None:
    rows = [("f", 1, "r2", "b"), ("f", 1, "r1", "c"), ("f", 1, "r1", "c"), ("e", 2, "r9", "a")]
    frame = spark.createDataFrame(rows, "file string, place long, reason string, raw string")
    keyless = dataclasses.replace(QUARANTINE, key=())
    table = write_table(frame, str(tmp_path), keyless, F.lit(0))
    stored = pq.ParquetFile(tmp_path / "quarantine" / table.files[0].path).read().to_pylist()
    assert [tuple(row.values()) for row in stored] == sorted(rows)


def test_a_table_without_rows_has_one_empty_file_with_its_schema(spark: SparkSession, tmp_path: Path) -> None:
    table = write_table(seen_rows(spark).where("user_idx < 0"), str(tmp_path), SEEN, F.lit(0))
    assert [(file.path, file.rows) for file in table.files] == [(part_name(0, 0), 0)]
    stored = pq.ParquetFile(tmp_path / "seen" / part_name(0, 0)).read()
    assert (stored.num_rows, stored.schema.equals(SEEN.schema)) == (0, True)


# A class of __main__ travels to the workers by value, so their FileSink is the one that dies.
DIES_ONCE = """
import json, os, signal, sys
from pathlib import Path
from pyspark.sql import functions as F
from ncf_dist import spark_files, spark_io
from ncf_dist.config import Spark
from ncf_dist.contracts import ITEM_STATS

root = Path(sys.argv[1])

class DiesOnce(spark_files.FileSink):
    def _write(self, table):
        super()._write(table)
        if len(self.files) == 2 and not (root / "died").exists():
            (root / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

spark_files.FileSink = DiesOnce
with spark_io.spark_session("retried", Spark(master="local[2,3]", shuffle_partitions=2)) as spark:
    spark.sparkContext.setLogLevel("OFF")
    rows = spark.range(1000).select(F.col("id").cast("int").alias("item_idx"), F.xxhash64("id").alias("train_count"))
    table = spark_files.write_table(rows, str(root / "bad"), ITEM_STATS, F.col("item_idx") % 5)
print(json.dumps([vars(file) for file in table.files]))
"""


@pytest.mark.slow
def test_a_task_that_was_killed_between_files_is_retried_to_the_same_bytes(spark: SparkSession, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK", "PYSPARK"))} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DIES_ONCE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        rows = spark.range(1000).select(
            F.col("id").cast("int").alias("item_idx"), F.xxhash64("id").alias("train_count")
        )
        good = write_table(rows, str(tmp_path / "good"), ITEM_STATS, F.col("item_idx") % 5)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    bad = [FileInfo(**file) for file in json.loads(output.splitlines()[-1])]
    assert (tmp_path / "died").exists()
    assert len(bad) == 5
    assert bad == list(good.files)
    assert [sha256(tmp_path / "bad" / "item_stats" / file.path) for file in bad] == [file.sha256 for file in bad]


# ---- read_table --------------------------------------------------------------------------------------------


def test_a_table_reads_back_as_it_was_written_and_not_as_another(spark: SparkSession, tmp_path: Path) -> None:
    frame = seen_rows(spark).where("user_idx < 7")
    table = write_table(frame, str(tmp_path), SEEN, F.col("user_idx") % 2)
    (tmp_path / "seen" / "stray.parquet").write_bytes(b"not of the manifest")
    manifest = Manifest(
        stage="prepare", ds="2026-01-31", run_key="k1", root=str(tmp_path), config={}, inputs={}, tables={"seen": table}
    )
    found = {row["user_idx"]: list(row["item_idx"]) for row in read_table(spark, manifest, SEEN).collect()}
    assert found == {user: list(range(user % 5 + 1)) for user in range(7)}
    other = Contract("seen", ITEM_STATS.schema, ("item_idx",), "", "prepare")
    with pytest.raises(
        ContractError, match=r"table seen: column item_idx is list.*, needed int32; rerun the job prepare"
    ):
        read_table(spark, manifest, other)


def test_a_local_lake_of_any_name_is_read_where_it_is(partitions: SparkSession, tmp_path: Path) -> None:
    """Also on a cluster whose default file system is another one."""
    run = str(tmp_path / "a lake {of} [any] na*me, 100%20")
    table = write_table(seen_rows(partitions), run, SEEN, F.lit(0))
    manifest = Manifest(
        stage="prepare", ds="2026-01-31", run_key="k1", root=run, config={}, inputs={}, tables={"seen": table}
    )
    partitions.conf.set("fs.defaultFS", "hdfs://elsewhere:8020")
    try:
        assert read_table(partitions, manifest, SEEN).count() == ROWS
    finally:
        partitions.conf.unset("fs.defaultFS")


# ---- FileSink ----------------------------------------------------------------------------------------------

PAIRS = pa.schema([pa.field("n", pa.int32(), nullable=False), pa.field("items", INDEX_LIST, nullable=False)])


def pairs(numbers: range) -> pa.Table:
    return pa.table({"n": list(numbers), "items": [[n] * (n % 3) for n in numbers]}, schema=PAIRS)


def sink_of(folder: str, rows: pa.Table, files: list[int], cuts: list[int], rows_per_file: int) -> list[FileInfo]:
    """Give `rows` to a sink, row i to file files[i], in pieces that end at `cuts`."""
    sink = FileSink(folder, rows.schema, rows_per_file)
    for file, start, end in runs_of(np.array(files)):
        inner = sorted({start, end, *[cut for cut in cuts if start < cut < end]})
        for a, b in pairwise(inner):
            sink.add(file, rows.slice(a, b - a))
    return sink.close()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40).map(sorted), st.integers(1, 9), st.data())
def test_how_rows_arrive_changes_no_byte_of_a_file(files: list[int], rows_per_file: int, data: st.DataObject) -> None:
    rows = pairs(range(len(files)))
    cuts = data.draw(st.lists(st.integers(0, len(files))))
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        whole, pieces = sink_of(a, rows, files, [], rows_per_file), sink_of(b, rows, files, cuts, rows_per_file)
        assert whole == pieces
        stored = [pq.ParquetFile(f"{a}/{info.path}").read() for info in whole]
    assert pa.concat_tables(stored).equals(rows)
    assert [info.path for info in whole] == [
        part_name(file, part) for file in sorted(set(files)) for part in range(-(-files.count(file) // rows_per_file))
    ]
    assert all(info.rows == table.num_rows <= rows_per_file for info, table in zip(whole, stored, strict=True))


def test_also_files_of_many_pages_are_the_same_bytes(tmp_path: Path) -> None:
    """Parquet ends a page when it has grown past its size, which must not follow the pieces that rows came in."""
    values = np.random.default_rng(1).integers(0, 2**62, 400_000)
    rows = pa.table({"n": values})
    cuts = np.random.default_rng(2).integers(0, len(values), 200).tolist()
    ways: tuple[list[int], ...] = ([], cuts)
    whole, pieces = (sink_of(str(tmp_path / str(len(c))), rows, [0] * len(values), c, 10**6) for c in ways)
    assert whole == pieces


def test_a_sink_without_rows_writes_nothing(tmp_path: Path) -> None:
    sink = FileSink(str(tmp_path), PAIRS)
    sink.add(3, pairs(range(0)))
    assert sink.close() == []
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 3)))
def test_runs_tile_the_rows_with_equal_neighbours(values: list[int]) -> None:
    runs = list(runs_of(np.array(values, dtype=np.int64)))
    assert [value for value, start, end in runs for _ in range(start, end)] == values
    assert all(a[0] != b[0] and a[2] == b[1] for a, b in pairwise(runs))


# ---- spark_session -----------------------------------------------------------------------------------------


def test_a_session_that_was_there_stays_and_takes_the_settings(partitions: SparkSession) -> None:
    with spark_session("inner", config.Spark(shuffle_partitions=3), batch_rows=77) as inner:
        assert inner.conf.get("spark.sql.shuffle.partitions") == "3"
        assert inner.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") == "77"
    assert partitions.range(3).count() == 3


def test_times_are_utc_and_overflow_is_an_error(spark: SparkSession) -> None:
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.conf.get("spark.sql.ansi.enabled") == "true"


def test_table_info_counts_rows() -> None:
    files = tuple(FileInfo(part_name(n, 0), n, 1, 10, "") for n in (1, 2))
    assert TableInfo("t", "", files).rows == 1 + 2


def test_an_inner_session_never_stops_an_outer_one(spark: SparkSession) -> None:
    """Even where the JVM's thread has forgotten which session is active, as a new thread of py4j has."""
    assert spark._jvm is not None
    spark._jvm.SparkSession.clearActiveSession()
    with spark_session("inner", config.Spark(shuffle_partitions=2)):
        pass
    assert spark.range(3).count() == 3


# ---- what fails on executors -------------------------------------------------------------------------------


def dying(how: str) -> Pass:
    """A worker that the kernel kills, one that raises an error of ours, or one with a mistake of ours."""

    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "refused":
                raise ContractError(f"{batch.num_rows} rows; needed none: rerun the job train")
            yield batch.select(["ours"])

    return work


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("killed", 1, r"a worker of Spark was killed .*memory.*fewer tasks at once .*lower score\.users_per_block"),
        ("refused", 3, r"^\d rows; needed none: rerun the job train$"),
        ("mistaken", 1, "PythonException: .*KeyError"),
    ],
)
def test_a_job_whose_worker_dies_says_so_in_its_last_line(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, code: int, said: str
) -> None:
    def job(config: Config, ds: str) -> Outcome:
        with spark_session("dies", config.spark) as session:
            map_in_arrow(session.range(4), dying(how), "id long").collect()
        return Outcome("done")

    path = tmp_path / "config.yaml"
    path.write_text(f"paths: {{lake: {tmp_path}/lake, work: {tmp_path}/work}}\ninput: {{path: unused}}\n")
    assert run_job("score", job, ["--config", str(path), "--ds", "2026-01-31"]) == code
    report = last_line.read(capsys.readouterr().out.splitlines()[-1])
    assert report["status"] == "failed"
    assert re.search(said, report["error"], re.DOTALL)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ExecutorLostFailure (executor 1 exited): Command exited with code 137", WorkerKilled),
        ("Container from a bad node. Exit status: 137. Diagnostics: killed", WorkerKilled),
        ("Reason: Container killed by YARN for exceeding memory limits. 5.5 GB of 5 GB", WorkerKilled),
        ("The executor 3 was OOMKilled", WorkerKilled),
        ("java.lang.OutOfMemoryError: Java heap space\n at a.b", WorkerKilled),
        ("Traceback\nncf_dist.errors.InputError: the file is gone\n\n at a.b", InputError),
        ("Traceback\nncf_dist.errors.NoSuchError: x\n", None),
        ("Traceback\nValueError: exit code 3\n", None),
    ],
)
def test_what_clusters_say_of_a_process_that_died(text: str, kind: type[NcfError] | None) -> None:
    found = from_executors(PySparkException(text))
    assert type(found) is (kind or type(None))


# ---- who else may reach Spark --------------------------------------------------------------------------------

LOCAL = {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
GUARDED = dict.fromkeys(("spark.authenticate", "spark.network.crypto.enabled", "spark.io.encryption.enabled"), "true")


@pytest.mark.parametrize(
    ("found", "authenticate", "wanted", "warned"),
    [
        ({}, None, LOCAL, False),
        ({"spark.master": "local[2]", "spark.driver.bindAddress": "0.0.0.0"}, None, LOCAL, False),
        ({"spark.master": "yarn"}, None, GUARDED, False),
        ({"spark.master": "k8s://https://host"}, True, GUARDED, False),
        ({"spark.master": "yarn", "spark.authenticate": "true"}, None, {}, False),
        ({"spark.master": "yarn", "spark.authenticate": "false"}, None, {}, True),
        ({"spark.master": "yarn", "spark.shuffle.service.enabled": "true"}, None, {}, True),
        ({"spark.master": "spark://host:7077"}, None, {}, True),
        ({"spark.master": "spark://host:7077"}, False, {}, False),
        ({"spark.master": "yarn"}, False, {}, False),
    ],
)
def test_nobody_else_gets_into_spark(
    found: dict[str, str],
    authenticate: bool | None,
    wanted: dict[str, str],
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(gateway.SECRET, raising=False)
    assert guarded(found, [], authenticate) == wanted
    assert ("neither authenticated nor encrypted" in caplog.text) == warned


def test_a_standalone_cluster_gets_its_secret_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gateway.SECRET, "s3cret")
    """Also where Spark's own files turn authentication on; a secret that is in them wins, and YARN makes one itself."""
    secret, on = {"spark.authenticate.secret": "s3cret"}, {"spark.authenticate": "true"}
    standalone = {"spark.master": "spark://host:7077"}
    assert guarded(standalone, [], None) == GUARDED | secret
    assert guarded(standalone | on, [], None) == secret
    assert guarded(standalone | on | {"spark.authenticate.secret": "theirs"}, [], None) == {}
    assert guarded(standalone, [], False) == {}
    assert guarded({"spark.master": "yarn"}, [], None) == GUARDED
    started = gateway.environment(["--master", "spark://host:7077"], {gateway.SECRET: "s3cret"})
    assert "SPARK_LOCAL_IP" not in started


def test_a_person_may_bind_spark_to_another_address() -> None:
    given = ["--conf", "spark.driver.bindAddress=0.0.0.0"]
    assert guarded({}, given, None) == {"spark.driver.host": "127.0.0.1"}


@pytest.mark.parametrize(
    ("ours", "locale"),
    [({}, "C.UTF-8"), ({"LANG": "POSIX"}, "C.UTF-8"), ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, "C.UTF-8"),
     ({"LANG": "de_DE.UTF-8"}, None), ({"LC_ALL": "en_US.UTF-8", "LC_CTYPE": "C"}, "en_US.UTF-8")],
)  # fmt: skip
def test_the_jvm_gets_a_locale_in_which_it_can_name_files(ours: dict[str, str], locale: str | None) -> None:
    assert gateway.environment(["--master", "local[1]"], ours).get("LC_ALL") == locale


def test_a_jvm_maps_the_archive_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one whose name Spark does not split; a person's own options come after ours, and win."""
    theirs = {"SPARK_SUBMIT_OPTS": "-Xshare:off"}
    for name, mapped in (("env", True), ("an env", False)):
        monkeypatch.setattr(sys, "prefix", str(tmp_path / name))
        assert gateway.environment([], theirs)["SPARK_SUBMIT_OPTS"] == "-Xshare:off", "there is none"
        assert "SPARK_SUBMIT_OPTS" not in gateway.environment([], {})
        gateway.class_archive().parent.mkdir()
        gateway.class_archive().touch()
        given = gateway.environment([], theirs)["SPARK_SUBMIT_OPTS"]
        assert (f"-XX:SharedArchiveFile={tmp_path}/{name}/spark-classes.jsa " in given) == mapped
        assert given.endswith("-Xshare:off")


def test_the_jvm_that_puts_the_command_together_starts_beside_any_collector() -> None:
    """A JVM that is told of two garbage collectors ends."""
    options = gateway.environment([], {})["SPARK_LAUNCHER_OPTS"]
    java = os.path.join(os.environ["JAVA_HOME"], "bin/java") if "JAVA_HOME" in os.environ else "java"
    for collector in ("-XX:+UseParallelGC", "-XX:+UseG1GC"):
        env = {**os.environ, "JAVA_TOOL_OPTIONS": collector}
        subprocess.run([java, *options.split(), "-version"], env=env, check=True, capture_output=True)
    assert gateway.environment([], {"SPARK_LAUNCHER_OPTS": "-Xmx1g"})["SPARK_LAUNCHER_OPTS"] == "-Xmx1g"


def test_the_archive_of_the_installation_fits(spark: SparkSession) -> None:
    """The JVM of these tests has mapped it; it passes over one that was made by another Java or for other jars."""
    archive = gateway.class_archive()
    if not archive.exists():
        pytest.skip("make install made no archive of classes: .venv/install.log says why")
    assert gateway._process is not None
    assert str(archive) in {region.path for region in psutil.Process(gateway._process.pid).memory_maps()}


@pytest.mark.parametrize("ended", [False, True])
def test_a_jvm_that_was_ended_is_told_nothing_more(
    ended: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """py4j writes a stack trace where it tells a JVM that is gone of an object that Python has let go of."""
    with socket.create_server((gateway.LOOPBACK, 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        port = server.getsockname()[1]
        theirs = JavaGateway(gateway_parameters=GatewayParameters(gateway.LOOPBACK, port))
        monkeypatch.setattr(SparkContext, "_gateway", theirs)
        monkeypatch.setattr(gateway, "_process", subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=2))
        with caplog.at_level("INFO"):
            if ended:
                assert gateway.end()
            theirs._gateway_client.garbage_collect_object("o7")
        assert ("Exception while sending command" in caplog.text) != ended
        gateway.end()
        server.shutdown(socket.SHUT_RDWR)


def test_a_session_of_ours_listens_on_loopback_alone(spark: SparkSession) -> None:
    conf = spark.sparkContext.getConf()
    assert {key: conf.get(key) for key in LOCAL} == LOCAL
    assert conf.get("spark.ui.enabled") == "false"
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = []
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # A worker that Spark ended meanwhile.
            found += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert found
    assert not [ip for ip in found if not ip.endswith(("127.0.0.1", "::1"))]
