"""One session serves a whole night, on a cluster unless the config says otherwise. With a Spark that only counts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from ncf_dist import gateway, spark_io
from ncf_dist.config import Model, Spark
from ncf_dist.spark_io import kept_session, open_session, spark_session
from tests.tables import small_config


class Counting:
    """Stands for SparkSession, its builder and its context."""

    def __init__(self, master: str) -> None:
        self.master, self.started, self.stopped, self.conf = master, 0, 0, dict[str, str]()
        self.environment: dict[str, str] = {}

    builder = sparkContext = property(lambda self: self)

    def getActiveSession(self) -> Any:
        return None  # A thread of the JVM that is new does not know it.

    def appName(self, _: str) -> Any:
        return self

    def config(self, key: str, value: str) -> Any:
        self.conf[key] = value
        return self

    def getOrCreate(self) -> Any:
        return self

    def stop(self) -> None:
        self.stopped += 1


def night(spark: Counting, stages: list[tuple[int, bool]], keep: bool) -> None:
    """A stage a (batch rows, whether it fails)."""
    for rows, fails in stages:
        with spark_session("stage", Spark(), rows):
            assert spark.conf["spark.sql.execution.arrow.maxRecordsPerBatch"] == str(rows)
            assert spark.started > spark.stopped, "nobody gets one that was stopped"
            with spark_session("inner", Spark()):
                pass
            if fails:
                raise ZeroDivisionError
        assert (spark.started > spark.stopped) == keep
        assert (open_session() is None) != keep, "between stages, too"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["local[2]", "local", "yarn", "k8s://https://host", "spark://host:7077"]),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_a_night_starts_spark_once(master: str, stages: list[tuple[int, bool]], keep: bool, one: bool) -> None:
    """And never where no stage asks for it. With `one_application: false` a cluster gets its executors back from every
    stage."""
    spark = Counting(master)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark_io, "SparkSession", spark)
        patch.setattr(spark_io, "_open", [])
        patch.setattr(spark_io, "_start_context", lambda *_: setattr(spark, "started", spark.started + 1))
        kept = keep and (one or master.startswith("local"))
        ran = next((n + 1 for n, (_, fails) in enumerate(stages) if fails), len(stages))
        try:
            if keep:
                with kept_session(Spark(one_application=one)):
                    night(spark, stages, kept)
            else:
                night(spark, stages, kept)
        except ZeroDivisionError:
            assert any(fails for _, fails in stages)
        assert spark.started == (min(1, ran) if kept else ran)
        assert spark.stopped == spark.started
        assert spark_io._kept is None


def test_a_session_that_another_process_keeps_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one that runs the ranks of a night on executors finds it."""
    spark = Counting("yarn")
    monkeypatch.setattr(spark_io, "SparkSession", spark)
    monkeypatch.setattr(spark_io, "_open", [])
    monkeypatch.setattr(spark_io, "_start_context", lambda *_: True)
    for keep in (False, True):
        with kept_session(Spark()) if keep else contextlib.nullcontext(), spark_session("stage", Spark()):
            pass
        assert (spark.stopped, spark_io._kept) == (0, None)


@pytest.mark.parametrize("launcher", ["spark", "torchrun"])
@pytest.mark.parametrize(("one", "stages"), [(True, ()), (True, ("prepare",)), (False, ())])
def test_ranks_begin_the_application_that_the_night_goes_on_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: bool, stages: tuple[str, ...], launcher: str
) -> None:
    """A night that goes on at train, where no stage has needed Spark before: once ranks are started, and not where the
    model is found done. The executors would get the environment twice."""
    spark = Counting("spark://host:7077")
    monkeypatch.setattr(spark_io, "SparkSession", spark)
    monkeypatch.setattr(spark_io, "_open", [])
    monkeypatch.setattr(spark_io, "_start_context", lambda *_: setattr(spark, "started", spark.started + 1))
    config = small_config(tmp_path, Model(), launcher=launcher).model_copy(update={"spark": Spark(one_application=one)})
    with kept_session(config.spark):
        for stage in stages:
            with spark_session(stage, config.spark):
                pass
        with spark_io.lent_to_ranks(config):
            assert spark.started == len(stages), "of a training that is found done"
            for _ in range(2):
                with gateway.lending():
                    assert (gateway.LENT in os.environ) == (one and launcher == "spark")
        assert gateway.LENT not in os.environ
        with gateway.lending():
            assert gateway.LENT not in os.environ, "nobody lends any more"
        assert spark.started == (1 if one and launcher == "spark" else len(stages))
        with spark_session("score", config.spark):
            assert spark.started == 1
    assert spark.stopped == 1


def test_another_process_works_in_the_context_that_it_was_lent(spark: SparkSession) -> None:
    """In the same application, which goes on when that process ends."""
    script = (
        "from ncf_dist.config import Spark\n"
        "from ncf_dist.spark_io import spark_session\n"
        "with spark_session('ranks', Spark()) as spark:\n"
        "    print(spark.sparkContext.applicationId, spark.range(7).count())"
    )
    with gateway.lent():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [spark.sparkContext.applicationId, "7"]
    assert spark.range(5).count() == 5


def test_a_small_night_may_leave_the_second_compiler_out() -> None:
    key = "spark.driver.defaultJavaOptions"
    assert gateway.option(gateway.spark_options(Spark()), key) is None
    assert gateway.option(gateway.spark_options(Spark(compiler="quick")), key) == "-XX:TieredStopAtLevel=1"
