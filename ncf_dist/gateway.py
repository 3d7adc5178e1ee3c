"""Spark's JVM as a child of this process, started when the first session is asked for.

Python leads: signals reach the job and not the JVM, which has a session of its own and ends with its standard input.
A stage without Spark starts none. The options of spark-submit are a list of arguments, never text to be split.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from ncf_dist import archives, stopping
from ncf_dist import config as settings
from ncf_dist.errors import NcfError

OPTIONS = "NCF_SPARK_OPTIONS"
"""Holds what spark-submit gets, for this process and those it starts: a JSON list."""
LENT = "NCF_SPARK_LENT"
"""Set for a process that shares its parent's context of Spark."""
SECRET = "SPARK_AUTHENTICATE_SECRET"
"""Holds the secret of a standalone cluster, which Spark cannot make by itself. Never an argument: others see these."""
LOOPBACK = "127.0.0.1"
QUICK = "-XX:TieredStopAtLevel=1"
"""Has a JVM leave out its second compiler, which takes a third of a small night's processor time."""
_SECRET_SETTING = re.compile(
    r"\A((?:--conf=)?[^=]*(?:secret|password|token|credential|access\.?key|account\.key)[^=]*)=.*", re.I | re.S
)
"""As Spark tells them, `spark.redaction.regex`, and stores' own."""
END_S = 10.0
"""What the JVM has to stop its context and remove its scratch."""

_process: subprocess.Popen[bytes] | None = None
_where: dict[str, str] = {}
_lend: Callable[[], contextlib.AbstractContextManager[None]] | None = None


def spark_options(config: settings.Spark) -> list[str]:
    """What the config says and spark-submit must know before the JVM starts."""
    options = ["--driver-memory", config.driver_memory, "--executor-memory", config.executor_memory]
    if config.compiler == "quick":
        options += ["--conf", f"spark.driver.defaultJavaOptions={QUICK}"]
    return ["--master", config.master, *options] if config.master else options


def plain_options(config: settings.Spark) -> list[str]:
    """The options where no launcher gave any."""
    bar = str(sys.stderr.isatty()).lower()
    master = [] if config.master else ["--master", "local[*]"]
    settings = ("--conf", "spark.ui.enabled=false", "--conf", f"spark.ui.showConsoleProgress={bar}")
    return with_environment(config, [*master, *spark_options(config), *settings])


def with_environment(config: settings.Spark, options: Sequence[str]) -> list[str]:
    """`options`, and what sends the environment to executors as `config.environment` says. Raises ConfigError."""
    deploy_mode = option(options, "spark.submit.deployMode", "deploy-mode")
    theirs = option(options, "spark.archives", "archives")
    return [*options, *archives.options(config, master(options), deploy_mode, theirs)]


def hand_over(options: Sequence[str]) -> None:
    """Have this process, and those it starts, begin Spark with these options."""
    os.environ[OPTIONS] = json.dumps(list(options))


def handed_over() -> list[str] | None:
    return list(json.loads(os.environ[OPTIONS])) if OPTIONS in os.environ else None


def option(options: Sequence[str], key: str, name: str | None = None) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, or else of `--conf key=VALUE`; the last one counts."""
    named = of_conf = None
    for flag, value in zip(options, [*options[1:], ""], strict=False):
        flag, equals, inner = flag.partition("=")
        value = inner if equals else value
        if name and flag == f"--{name}":
            named = value
        elif flag in ("--conf", "-c") and value.startswith(f"{key}="):
            of_conf = value.partition("=")[2]
    return of_conf if named is None else named


def master(options: Sequence[str]) -> str:
    """The master that spark-submit will take: from the options, else from the files of properties, else its default."""
    if given := option(options, "spark.master", "master"):
        return given
    files = [option(options, "", "properties-file")]
    if files == [None] or "--load-spark-defaults" in options:
        folder = os.environ.get("SPARK_CONF_DIR") or os.path.join(_spark_home(), "conf")
        files.append(os.path.join(folder, "spark-defaults.conf"))
    for file in files:
        with contextlib.suppress(OSError, TypeError):
            text = Path(str(file)).read_text(encoding="utf-8", errors="replace")
            if found := re.findall(r"^[ \t]*spark\.master[ \t]*[= \t:][ \t]*(\S+)", text, re.MULTILINE):
                return str(found[-1])
    return "local[*]"


def submit_program() -> str:
    """The spark-submit of SPARK_HOME, or else pyspark's own; spark-submit.sh names another one."""
    return os.environ.get("NCF_SPARK_SUBMIT") or os.path.join(_spark_home(), "bin", "spark-submit")


def _spark_home() -> str:
    if home := os.environ.get("SPARK_HOME"):
        return home
    found = importlib.util.find_spec("pyspark")
    if found is None or not found.submodule_search_locations:
        raise NcfError("there is no Spark: pyspark is not installed and SPARK_HOME is not set; run make install")
    return str(found.submodule_search_locations[0])


def environment(options: Sequence[str], ours: Mapping[str, str]) -> dict[str, str]:
    """The JVM's environment. With a local master everything is on loopback, so that nobody else reaches it and a host
    name that does not resolve does no harm. In a POSIX locale a JVM cannot name files beyond ASCII."""
    # The JVM that spark-submit starts first only puts together the other's command. No choice of a garbage collector
    # here: it would not start where JAVA_TOOL_OPTIONS has another.
    theirs = {"SPARK_LAUNCHER_OPTS": QUICK, **ours}
    if master(options).startswith("local"):
        theirs |= {"SPARK_LOCAL_IP": LOOPBACK, "SPARK_LOCAL_HOSTNAME": LOOPBACK}
    locale = ours.get("LC_ALL") or ours.get("LC_CTYPE") or ours.get("LANG") or "C"
    if locale in ("C", "POSIX"):
        theirs["LC_ALL"] = "C.UTF-8"
    # Spark splits these options at spaces. Ours come first, so that a person's own win; the log would say of an archive
    # that it does not fit.
    if (archive := class_archive()).exists() and not re.search(r"\s", str(archive)):
        mapped = f"-XX:SharedArchiveFile={archive} -Xlog:cds=off -Xlog:cds+dynamic=off"
        theirs["SPARK_SUBMIT_OPTS"] = f"{mapped} {ours.get('SPARK_SUBMIT_OPTS', '')}".rstrip()
    return theirs


def class_archive() -> Path:
    """Where `spark_classes` keeps the parsed classes of this environment's Spark."""
    return Path(sys.prefix) / "spark-classes.jsa"


def start(options: Sequence[str]) -> dict[str, str]:
    """Start the JVM; returns the environment in which pyspark finds it.

    Raises NcfError where it ends instead; what it had to say is on stderr.
    """
    global _process
    command = [submit_program(), *options, "pyspark-shell"]
    with tempfile.TemporaryDirectory(prefix="ncf-gateway-") as folder:
        told = os.path.join(folder, "connection")
        mine = {"_PYSPARK_DRIVER_CONN_INFO_PATH": told, "SPARK_CONNECT_MODE": "0"}
        # stdout is the job's: its last line is the report.
        _process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=2,
            env=environment(options, os.environ) | mine,
            start_new_session=True,
        )
        atexit.register(end)
        # pyspark asks the JVM for more while an exception passes, over a connection in the middle of an answer.
        stopping.before_raising[:] = [end]
        while not os.path.exists(told):
            if (code := _process.poll()) is not None:
                _process = None
                raise NcfError(
                    f"Spark ended with code {code} before it was ready, and says why above; needed a JVM that starts: "
                    f"look at the options that it got: {_shown(command[1:])}"
                )
            time.sleep(0.05)
        port, secret = _connection(Path(told).read_bytes())
    _where.update(PYSPARK_GATEWAY_PORT=str(port), PYSPARK_GATEWAY_SECRET=secret)
    return dict(_where)


def _shown(options: Sequence[str]) -> str:
    """Options for a message: without the values of settings whose names say that they are secret."""
    return shlex.join(_SECRET_SETTING.sub(r"\1=***", each) for each in options)


@contextlib.contextmanager
def lender(lend: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """While inside, `lending` is what `lend` returns."""
    global _lend
    before, _lend = _lend, lend
    try:
        yield
    finally:
        _lend = before


def lending() -> contextlib.AbstractContextManager[None]:
    """For who starts a process that may work in the Spark of this night: while inside, the environment says where that
    is, if there is one to be lent (`spark_io.lent_to_ranks`). The trainer asks here, as it imports no pyspark."""
    return contextlib.nullcontext() if _lend is None else _lend()


def lent() -> contextlib.AbstractContextManager[None]:
    """While inside, processes that this one starts find its JVM, and know that Spark's context in it is for them."""
    return told({**(_where if _process is not None else {}), LENT: "1"})


@contextlib.contextmanager
def told(where: Mapping[str, str]) -> Iterator[None]:
    """What `start` returned is in the environment while inside, and not in that of any process started later."""
    os.environ.update(where)
    try:
        yield
    finally:
        for name in where:
            os.environ.pop(name, None)


def _connection(told: bytes) -> tuple[int, str]:
    """Port and secret, as Spark writes them: an int, the length of a text, the text; big-endian."""
    port, length = struct.unpack_from(">ii", told)
    return port, told[8 : 8 + length].decode()


def _forget() -> None:
    """Have py4j tell the JVM no more of Java objects that Python has let go of: its thread for that would log a stack
    trace for each once the JVM is gone, below the job's last line."""
    context = getattr(sys.modules.get("pyspark"), "SparkContext", None)
    if connected := getattr(context, "_gateway", None):
        connected._gateway_client.is_connected = False


def end() -> bool:
    """End the JVM that this process started, and all that it started; False where there is none."""
    global _process
    process, _process = _process, None
    if process is None:
        return False
    _forget()
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for child in psutil.wait_procs(tree, timeout=2)[1]:
        with contextlib.suppress(psutil.Error):
            child.kill()
    return True
