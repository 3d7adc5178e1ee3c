"""The section `status`: what the jobs status and runs show."""

from __future__ import annotations

from typing import Literal

from ncf_dist.config.section import PositiveInt, Section


class Status(Section):
    nights: PositiveInt = 30
    """status: so many of the latest nights are shown."""
    format: Literal["table", "json"] = "table"
    """`table`: for people, on stderr · `json`: one object on stdout, before the last line."""
