"""The section `spark`: what sessions are started with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ncf_dist.config.section import PositiveInt, Section

MEMORY_PATTERN = r"^[1-9][0-9]*[kmgt]$"


def _is_word(text: str) -> bool:
    """Whether a command line takes `text` as one word and nothing else."""
    return text.isprintable() and " " not in text and not text.startswith("-") and bool(text)


def _master(text: str) -> str:
    """`text`, if it is one word. Raises ValueError."""
    if not _is_word(text):
        raise ValueError(
            f"spark.master is {text!r}; needed one word without white space, control characters or a leading -, "
            "such as local[*], yarn, spark://host:7077 or k8s://https://host:443"
        )
    return text


def _archive(text: str) -> str:
    """`text`, if it is one word, and one archive where Spark reads a list of them. Raises ValueError."""
    if not _is_word(text) or set(text) & set(",#"):
        raise ValueError(
            f"spark.environment_archive is {text!r}; needed a path or URL without white space, control characters, a "
            "leading -, a comma or #, as Spark reads a list of archives and their names there"
        )
    return text


class Spark(Section):
    master: Annotated[str, AfterValidator(_master)] | None = None
    """Given to spark-submit as --master; `null` leaves the cluster's default."""
    driver_memory: Annotated[str, Field(pattern=MEMORY_PATTERN)] = "1g"
    """Heap of the driver; in local mode it is also the executors'."""
    executor_memory: Annotated[str, Field(pattern=MEMORY_PATTERN)] = "2g"
    """Heap of each executor on a cluster."""
    compiler: Literal["full", "quick"] = "full"
    """How the driver's JVM compiles; in local mode that is the tasks', too. `quick`: with its first compiler only, a
    third less processor time as long as Spark works for a minute or two; what it works for longer is faster with
    both. No byte depends on it."""
    environment: Literal["archive", "image", "none"] | None = None
    """Where executors of a cluster find Python, its packages and this code. `archive`: in what `make package` made,
    which is sent with the job · `image`: in the image that conf/schedulers/Dockerfile makes · `none`: where Spark's
    own settings say, which by default is where the driver has them. `null`: none, and archive with `--cluster`."""
    environment_archive: Annotated[str, AfterValidator(_archive)] | None = None
    """The environment's archive, a path or a URL that Spark opens; default dist/ncf-dist-env-VERSION.tar.gz beside the
    code, which executors get from the driver."""
    one_application: bool = True
    """A night is one application: executors, with the environment that they have unpacked, serve it from its first
    stage to its last, also while the driver's machine trains. `false`: on a cluster each stage has an application of
    its own and gives its executors back."""
    shuffle_partitions: PositiveInt = 8
    """Partitions of a shuffle. Changes the speed, never a byte of the tables."""
    authenticate: bool | None = None
    """On a cluster: `null` turns Spark's authentication and encryption on where that needs nothing else (YARN,
    Kubernetes; a standalone cluster with SPARK_AUTHENTICATE_SECRET in the environment), and warns elsewhere · `false`
    leaves both off, without a warning."""
