"""What one check found: a line for a person, an entry for the report.

`fail`: the line cannot run like this · `warn`: it can, but a person should know · `ok`: what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """`place`: whether a failure is of the environment and config (exit 2) or of the lake and the input (exit
    3).
    """

    name: str
    status: Status
    detail: str
    place: Literal["environment", "data"] = "environment"

    def __str__(self) -> str:
        return f"{self.status.upper() if self.status == 'fail' else self.status:<4} {self.name} {self.detail}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
