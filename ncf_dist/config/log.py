"""The section `log`: what the lines on stderr look like."""

from __future__ import annotations

from typing import Literal

from ncf_dist.config.section import Section


class Log(Section):
    format: Literal["text", "json"] = "text"
    """`text`: a line for people · `json`: one object a line with `time`, `level`, `logger`, `message`, `ds`, `stage`,
    `run_key` and `attempt`. What Spark's JVM says of itself stays text (conf/log4j2.properties)."""
