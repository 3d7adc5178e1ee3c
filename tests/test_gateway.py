"""What is said of a Spark that does not start."""

from __future__ import annotations

import pytest

from ncf_dist import gateway
from ncf_dist.errors import NcfError


def test_a_spark_that_does_not_start_shows_no_secret_of_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_process", None)  # Whose JVM is that of the other tests.
    monkeypatch.setenv("NCF_SPARK_SUBMIT", "false")
    names = ("hadoop.fs.s3a.secret.key", "hadoop.fs.s3a.access.key", "hadoop.fs.s3a.session.token", "ssl.keyPassword")
    hidden = [part for name in names for part in ("--conf", f"spark.{name}=Hidden=1")]
    with pytest.raises(NcfError, match="look at the options that it got") as failed:
        gateway.start([*hidden, "--conf=spark.authenticate.secret=Hidden", "--conf", "spark.app.name=shown=1"])
    assert "Hidden" not in str(failed.value)
    assert "spark.hadoop.fs.s3a.secret.key=***" in str(failed.value)
    assert "spark.app.name=shown=1" in str(failed.value)
