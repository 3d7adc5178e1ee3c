"""The last nights as a table of text: one line a night, the oldest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ncf_dist.charts.text import (
    NONE,
    aligned,
    bytes_text,
    called,
    count_text,
    metric_text,
    percent_text,
    seconds_text,
    signed_text,
    visible,
)
from ncf_dist.status.nights import Night

WHY = 60
"""Characters of an error that are shown; the record has all of it."""


def outcome_text(night: Night) -> str:
    """done · refused (publish) · lost (train) · undone"""
    if night.outcome is None:
        return "published" if night.published is not None else NONE
    said = "done" if night.outcome == "already-done" else night.outcome
    return f"{said} ({night.failed})" if night.failed else "undone" if night.undone and said == "done" else said


def version_text(night: Night) -> str:
    return NONE if night.published is None or night.published.version is None else str(night.published.version)


def champion_text(night: Night) -> str:
    """A tilde where the two models were judged on the rows of their own nights."""
    return ("" if night.paired or night.champion is None else "~") + signed_text(night.champion)


def why_text(night: Night) -> str:
    """The gates that refused it, or else the beginning of what stopped it; then the gates that refused it earlier."""
    text = ", ".join(night.refused) or " ".join((night.error or "").split())
    text = text if len(text) <= WHY else f"{text[: WHY - 1]}…"
    before = {gate: None for refusal in night.refusals for gate in refusal.gates if gate not in night.refused}
    earlier = f"earlier: {', '.join(before)}" if before else ""
    return visible("; ".join(filter(None, (text, earlier))))


def metric_name(nights: Sequence[Night]) -> str:
    """At the head of the metric's column."""
    name = next((night.metric for night in reversed(nights) if night.metric), None)
    return called(name.partition(".")[2]) if name else "metric"


def columns(nights: Sequence[Night]) -> dict[str, Callable[[Night], str]]:
    """How each column is written."""
    return {
        "ds": lambda night: night.ds,
        "outcome": outcome_text,
        "version": version_text,
        metric_name(nights): lambda night: metric_text(night.value),
        "− popular": lambda night: signed_text(
            None if night.value is None or night.popularity is None else night.value - night.popularity
        ),
        "− champion": champion_text,
        "rows": lambda night: count_text(night.rows),
        "interactions": lambda night: count_text(night.interactions),
        "quarantine": lambda night: percent_text(night.quarantined),
        "churn": lambda night: percent_text(night.churn),
        "time": lambda night: NONE if night.seconds is None else seconds_text(night.seconds),
        "size": lambda night: NONE if night.bytes is None else bytes_text(night.bytes),
        "attempts": lambda night: str(night.attempts or NONE),
        "stopped by": why_text,
    }


TO_THE_LEFT = {"ds", "outcome", "stopped by"}


def text_table(nights: Sequence[Night]) -> str:
    written = columns(nights)
    return aligned(written, [[write(night) for write in written.values()] for night in nights], TO_THE_LEFT)
