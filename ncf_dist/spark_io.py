"""The shared pyspark module: the session, passes over rows, reading tables of the contracts.

DataFrame API and mapInArrow only, so it also runs on Spark Connect.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from ncf_dist import config as settings
from ncf_dist import errors, gateway, spark_tables, urls
from ncf_dist.contracts import Contract
from ncf_dist.files import file_url
from ncf_dist.manifests import Manifest
from ncf_dist.spark_errors import from_executors
from ncf_dist.spark_tasks import Pass as Pass
from ncf_dist.spark_tasks import forget_archives as forget_archives
from ncf_dist.spark_tasks import freeze_imports as freeze_imports
from ncf_dist.spark_tasks import map_in_arrow as map_in_arrow
from ncf_dist.stopping import asked, handlers_kept

log = logging.getLogger(__name__)

BATCH_ROWS = 65_536
"""Rows of an Arrow batch between the JVM and Python."""
LIST_BATCH_ROWS = 4_096
"""The same where a row holds a user's whole history."""
BATCH_BYTES = 2**26
"""However long the histories are, a batch ends after the row that goes past this. (Spark 3.5 does not know it.)"""

KEPT_CLASSES = ("spark.sql.codegen.cache.maxEntries", "1000")
"""How many of the classes that it generates from plans Spark keeps. A small night has more than the 100 of Spark's own
choice, of which none is left when the next one comes to the same plan."""

_SECRET = "spark.authenticate.secret"

_open: list[SparkSession] = []
"""Sessions that `spark_session` has handed out, the innermost last."""
_keeping: Callable[[SparkSession], bool] | None = None
_kept: SparkSession | None = None


@contextlib.contextmanager
def kept_session(config: settings.Spark) -> Iterator[None]:
    """Have one session serve all that ask for one while inside: starting Spark's context takes seconds, and a cluster's
    executors would have to come, and to get the environment, again. Where `config.one_application` is false, each
    session gives them back."""
    global _keeping, _kept
    before, _keeping = _keeping, lambda spark: config.one_application or _on_this_machine(spark)
    try:
        yield
    finally:
        _keeping = before
        if before is None and _kept is not None:
            kept, _kept = _kept, None
            if not asked():
                kept.stop()


@contextlib.contextmanager
def spark_session(app: str, config: settings.Spark, batch_rows: int = BATCH_ROWS) -> Iterator[SparkSession]:
    """A session with our settings; stopped at the end, so that a cluster gets its executors back.
    One that was already there stays.

    `batch_rows`: rows of an Arrow batch; small where rows hold long lists.

    Under the launcher and spark-submit the master and the memory are theirs. Started from plain Python, they are the
    config's.

    What fails on executors is raised here as our own error where it is one: see `from_executors`.
    """
    global _kept
    options = {
        "spark.sql.shuffle.partitions": config.shuffle_partitions,
        "spark.sql.execution.arrow.maxRecordsPerBatch": batch_rows,
        "spark.sql.execution.arrow.maxBytesPerBatch": BATCH_BYTES,
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
    }
    # Which session is active is known to a thread of the JVM, which py4j may replace: so we remember our own.
    ours = not _open and _kept is None and SparkSession.getActiveSession() is None
    if ours and "SPARK_REMOTE" not in os.environ:
        lent = _start_context("ncf-nightly" if _keeping else app, options, config)
        ours = not lent
    builder = SparkSession.builder.appName(app)
    for key, value in options.items():
        builder = builder.config(key, str(value))
    spark = builder.getOrCreate()
    if "SPARK_REMOTE" not in os.environ:
        # Whatever started the job: a module of the working folder, such as random.py, is not for the workers.
        spark.sparkContext.environment["PYTHONSAFEPATH"] = "1"
        _tell_credentials(spark.sparkContext.environment)
    _open.append(spark)
    try:
        yield spark
    except (Py4JError, PySparkException) as error:
        if (known := from_executors(error)) is None:
            raise
        raise known from error
    finally:
        _open.pop()
        if ours and _keeping is not None and _keeping(spark):
            _kept = spark
        # A JVM that was ended because this process is, or that owes an answer, is asked nothing any more.
        elif ours and not asked():
            spark.stop()


def _tell_credentials(workers: dict[str, Any]) -> None:
    """Workers on this and on other machines open the same URLs, with what this process has in its environment."""
    for name in (urls.SECRETS, *urls.CREDENTIALS):
        workers.pop(name, None)
        if name in os.environ:
            workers[name] = os.environ[name]


def lent_to_ranks(config: settings.Config) -> contextlib.AbstractContextManager[None]:
    """While inside, ranks that train on the executors do so in the kept session's application. It begins with them
    where no stage before has needed one, as in a night that goes on at train: else there would be one for them, and one
    for the stages after them."""
    on_executors = "spark" in (config.train.launcher, config.train.other_nodes)
    if not on_executors or _keeping is None:
        return contextlib.nullcontext()
    return gateway.lender(lambda: _lent(config.spark))


def _lent(config: settings.Spark) -> contextlib.AbstractContextManager[None]:
    if _kept is None and config.one_application:
        with spark_session("ncf-nightly", config):
            pass
    return contextlib.nullcontext() if _kept is None else gateway.lent()


def open_session() -> SparkSession | None:
    """The session that is open in this process, or kept for the next stage; None where there is none."""
    return _open[-1] if _open else _kept


def _on_this_machine(spark: SparkSession) -> bool:
    return "SPARK_REMOTE" not in os.environ and str(spark.sparkContext.master).startswith("local")


def _start_context(app: str, options: Mapping[str, Any], config: settings.Spark) -> bool:
    """The JVM, where there is none yet, and Spark's context in it. True where another process has started it there,
    which keeps it: only one fits into a JVM."""
    from pyspark import SparkConf, SparkContext

    if SparkContext._active_spark_context is not None:
        return False
    given = gateway.handed_over()
    where: dict[str, str] = {}
    if SparkContext._gateway is None and "PYSPARK_GATEWAY_PORT" not in os.environ:
        if given is None:
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        where = gateway.start(given if given is not None else gateway.plain_options(config))
    with handlers_kept():
        with gateway.told(where):
            SparkContext._ensure_initialized()
        conf = SparkConf(_jvm=SparkContext._jvm).setAppName(app).setAll([(k, str(v)) for k, v in options.items()])
        conf.setIfMissing(*KEPT_CLASSES)
        for key, value in guarded(dict(conf.getAll()), given or [], config.authenticate).items():
            conf.set(key, value)
        jvm: Any = SparkContext._jvm
        lent, jsc = gateway.LENT in os.environ, None
        if lent:
            jsc = jvm.JavaSparkContext.fromSparkContext(jvm.org.apache.spark.SparkContext.getOrCreate())
        context = SparkContext(conf=conf, jsc=jsc)
    # As spark-submit does for the Python that it starts.
    context.pythonExec = conf.get("spark.pyspark.python", None) or context.pythonExec
    return lent


def guarded(found: Mapping[str, str], given: Sequence[str], authenticate: bool | None) -> dict[str, str]:
    """The settings that keep other people out of Spark: loopback for a local master, authentication and encryption on
    clusters where Spark can make, or was given, a secret.

    found: what is set for Spark; given: the options that a person gave, which win; authenticate: the config's word.
    """
    master = found.get("spark.master", "local[*]")
    if master.startswith("local"):
        local = {"spark.driver.bindAddress": gateway.LOOPBACK, "spark.driver.host": gateway.LOOPBACK}
        return {key: value for key, value in local.items() if gateway.option(given, key) is None}
    if authenticate is False:
        return {}
    its_own = master.startswith(("yarn", "k8s"))
    secret = {} if its_own or gateway.SECRET not in os.environ else {_SECRET: os.environ[gateway.SECRET]}
    secret = {key: value for key, value in secret.items() if key not in found}
    if found.get("spark.authenticate") == "true":
        return secret
    makes_one = its_own and found.get("spark.shuffle.service.enabled") != "true"
    if found.get("spark.authenticate") is None and (makes_one or gateway.SECRET in os.environ):
        keys = ("spark.authenticate", "spark.network.crypto.enabled", "spark.io.encryption.enabled")
        return {key: "true" for key in keys if key not in found} | secret
    log.warning(
        "Spark on %s is neither authenticated nor encrypted: whoever reaches its ports can run code as this user. "
        "Needed spark.authenticate=true and a secret that the cluster knows (a standalone one: export %s), or "
        "spark.authenticate: false in the config where the network is closed",
        master,
        gateway.SECRET,
    )
    return {}


def task_stats(frame: DataFrame, work: Pass) -> list[dict[str, Any]]:
    """What `work` says of itself: it returns rows of one column `stats`, JSON objects."""
    return [json.loads(row["stats"]) for row in map_in_arrow(frame, work, "stats string").collect()]


def stats_batch(*stats: Mapping[str, Any]) -> pa.RecordBatch:
    """What a pass for `task_stats` yields."""
    return pa.RecordBatch.from_pydict({"stats": [json.dumps(each) for each in stats]})


@contextlib.contextmanager
def arrow_batches(spark: SparkSession, rows: int) -> Iterator[None]:
    """Inside, batches between the JVM and Python have `rows` rows: for few and large ones."""
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    usual = spark.conf.get(name)
    spark.conf.set(name, rows)
    try:
        yield
    finally:
        spark.conf.set(name, str(usual))


def on_executor(entry: str, *given: Any) -> Pass:
    """The pass that the function `entry`, written "module:function", makes of `given`. For `map_in_arrow`.

    The module is imported on the executor, so that a driver sends work which needs torch, and needs none itself:

        task_stats(rows, on_executor("ncf_dist.score.ranker:score_pass", spec))
    """

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        make: Callable[..., Pass] = pkgutil.resolve_name(entry)
        return make(*given)(batches)

    return run


def on_one_executor(spark: SparkSession, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns (of JSON's types) in a Python worker of an executor. Raises the NcfError that it raises. On
    this machine all workers do it at once, so that what it imports is there when the first large task comes."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            try:
                body: dict[str, Any] = {"found": work()}
            except errors.NcfError as error:
                body = {"kind": type(error).__name__, "message": str(error)}
            yield pa.RecordBatch.from_pydict({"body": [json.dumps(body)]})

    workers = spark.sparkContext.defaultParallelism if _on_this_machine(spark) else 1
    rows = map_in_arrow(spark.range(0, workers, 1, workers), run, "body string").collect()
    body = json.loads(rows[0]["body"])
    if "kind" in body:
        raise getattr(errors, body["kind"])(body["message"])
    found: dict[str, Any] = body["found"]
    return found


def read_table(spark: SparkSession, manifest: Manifest, contract: Contract) -> DataFrame:
    """Table `contract.name` of a finished run, exactly the files of its manifest.
    Raises ContractError on a mismatch."""
    manifest.table(contract)
    return read_files(spark, manifest.files(contract.name), contract.schema)


def read_files(spark: SparkSession, files: list[str], schema: pa.Schema) -> DataFrame:
    """The rows of Parquet files of ours: by Spark's reader where its store is one that Spark always knows."""
    if not all(map(spark_tables.spark_reads, files)):
        return spark_tables.rows_of(spark, files, from_arrow_schema(schema))
    return spark.read.schema(from_arrow_schema(schema)).parquet(*map(spark_path, files))


def spark_path(path: str) -> str:
    """`path` for Spark's readers: a local one stays local whatever the cluster's default file system is,
    and what they would take for a glob is part of the name."""
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", file_url(path))


def batch_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=schema)
