"""From a probe to a forecast: pairs, FLOPs, memory and time, by arithmetic."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

USERS_A_SLOT = 8_192
SECONDS_A_SLOT = 10.0
"""A probe scores so many users on each slot, or stops after this time."""
COPIES = 3
"""A file's rows when it is written: as they came, in one piece, and encoded."""


def slots(spark: SparkSession) -> int:
    """Tasks that Spark runs at once with the executors it has now: how it cuts a range by default."""
    return int(spark.range(100_000).select(F.spark_partition_id().alias("p")).distinct().count())


@dataclass(frozen=True)
class Forecast:
    """start_s: the parts of what is spent once, by name. task_s: what a worker's further tasks spend before they
    score; its first one is part of the start."""

    model_users: int
    popular_users: int
    items: int
    eligible: int
    flops_a_pair: float
    pairs_per_s: float
    slots: int
    tasks: int
    start_s: Mapping[str, float]
    task_s: float
    memory_bytes: int
    probe_users: int
    probe_s: float

    @classmethod
    def of(
        cls,
        probe: Sequence[Mapping[str, Any]],
        *,
        model_users: int,
        popular_users: int,
        items: int,
        eligible: int,
        slots: int,
        tasks: int,
        start_s: Mapping[str, float],
        probe_s: float,
    ) -> Forecast:
        """probe: what each task of it says; tasks that got no users say nothing of the rate."""
        ran = [task for task in probe if task["counts"].get("users")]
        users = sum(task["counts"]["users"] for task in ran)
        busy = sum(task["seconds"]["score"] + task["seconds"]["write"] for task in ran)
        pairs = sum(task["counts"]["pairs"] for task in ran)
        held = (
            (model_users + popular_users) / tasks * sum(task["counts"]["table_bytes"] for task in ran) / max(1, users)
        )
        load = max((task["seconds"]["load"] for task in ran), default=0.0)
        inside = max((task["task_s"] for task in ran), default=0.0)
        return cls(
            model_users, popular_users, items, eligible,
            flops_a_pair=max((task["flops"] for task in ran), default=0.0),
            pairs_per_s=pairs / busy if busy else 0.0,
            slots=slots,
            tasks=tasks,
            start_s={**start_s, "workers": max(0.0, probe_s - inside) + load},
            task_s=max((task["reload_s"] for task in ran), default=0.0),
            memory_bytes=int(max((task["memory"] for task in ran), default=0) + COPIES * held),
            probe_users=users,
            probe_s=busy,
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        return self.model_users * self.eligible

    @property
    def scoring_s(self) -> float:
        """Tasks are nearly of one size and run in waves of `slots`."""
        waves = -(-self.tasks // self.slots)
        scoring = self.pairs / self.tasks / self.pairs_per_s if self.pairs_per_s else 0.0
        return waves * scoring + (waves - 1) * self.task_s

    @property
    def seconds(self) -> float:
        return sum(self.start_s.values()) + self.scoring_s

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "forecast.users": self.model_users + self.popular_users,
            "forecast.popular_users": self.popular_users,
            "forecast.pairs": self.pairs,
            "forecast.flops": self.pairs * self.flops_a_pair,
            "forecast.pairs_per_s": round(self.pairs_per_s),
            "forecast.slots": self.slots,
            "forecast.tasks": self.tasks,
            "forecast.memory_bytes": self.memory_bytes,
            "forecast.start_s": round(sum(self.start_s.values()), 3),
            "forecast.scoring_s": round(self.scoring_s, 3),
            "forecast.seconds": round(self.seconds, 3),
        }

    def table(self, ds: str, model_version: str) -> str:
        """For people."""
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.start_s.items())
        lines = [
            ("users", f"{self.model_users + self.popular_users:,}", f"{self.popular_users:,} of them by popularity"),
            ("items", f"{self.items:,}", f"{self.eligible:,} of them eligible"),
            ("pairs", f"{self.pairs:,}", "users by the model x eligible items"),
            ("FLOPs", f"{self.pairs * self.flops_a_pair:.3g}", f"{self.flops_a_pair:,.0f} a pair, matrix products"),
            ("pairs/s a slot", f"{self.pairs_per_s:,.0f}", f"{self.probe_users:,} users in {self.probe_s:.1f} s"),
            ("slots", f"{self.slots:,}", f"{self.tasks:,} tasks"),
            ("start-up", f"{sum(self.start_s.values()):,.0f} s", parts),
            ("scoring", f"{self.scoring_s:,.0f} s", f"{self.task_s:.1f} s of each further task to load the model"),
            ("in all", f"{self.seconds:,.0f} s", str(dt.timedelta(seconds=round(self.seconds)))),
            ("memory a worker", f"{self.memory_bytes / 2**20:,.0f} MiB", "of Python, beside the executor's JVM"),
        ]
        head = f"score, ds {ds}, model {model_version}: a forecast; nothing was written to the lake"
        return "\n".join([head, *(f"  {name:<16}{value:>18}   {note}" for name, value, note in lines)])
