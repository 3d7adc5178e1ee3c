"""One session serves a whole night where Spark runs on this machine. With a Spark that only counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist import spark_io
from ncf_dist.config import Spark
from ncf_dist.spark_io import kept_session, open_session, spark_session


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
)
def test_a_night_on_this_machine_starts_spark_once(master: str, stages: list[tuple[int, bool]], keep: bool) -> None:
    """And never where no stage asks for it. On a cluster every stage gives its executors back."""
    spark = Counting(master)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark_io, "SparkSession", spark)
        patch.setattr(spark_io, "_open", [])
        patch.setattr(spark_io, "_start_context", lambda *_: setattr(spark, "started", spark.started + 1))
        kept = keep and master.startswith("local")
        ran = next((n + 1 for n, (_, fails) in enumerate(stages) if fails), len(stages))
        try:
            if keep:
                with kept_session():
                    night(spark, stages, kept)
            else:
                night(spark, stages, kept)
        except ZeroDivisionError:
            assert any(fails for _, fails in stages)
        assert spark.started == (min(1, ran) if kept else ran)
        assert spark.stopped == spark.started
        assert spark_io._kept is None
