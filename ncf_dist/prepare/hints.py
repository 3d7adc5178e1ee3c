"""Advice on the config when rows do not fit, by the reason for which they were rejected."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ncf_dist.config import Input
from ncf_dist.contracts import day_start
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.interactions import FAR, LATE
from ncf_dist.prepare.values import MICROSECONDS, YEAR_1995

_DATE = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_YEAR = 366 * 86_400_000_000


def hint(config: Input, reasons: Mapping[str, int], raw: str, key: str = "input") -> str:
    """Advice for the most common reason. raw: a line that was rejected; key: the section of the config."""
    judged = {reason: n for reason, n in reasons.items() if reason != LATE}
    reason = max(sorted(judged), key=lambda r: judged[r])
    side = reason.removeprefix("empty ").partition(" ")[0]
    of_side = f"{key}.columns.{side} to the column of the {side} ids"
    separator = config.separator or FORMATS[config.format].separator
    count = raw.count(separator) + 1
    past = [
        f"{key}.columns.{name} is {place}"
        for name, place in config.columns.model_dump().items()
        if isinstance(place, int) and place >= count
    ]
    advice = {
        "too few fields": f"{', '.join(past)}: " * bool(past)
        + f"set {key}.separator to what parts the fields ({separator!r} makes {count} of that line), or "
        f"{key}.columns to positions from 0 to {count - 1}",
        "too many fields": f"set {key}.separator to what parts the fields, or {key}.fields to how many there are",
        "a quoted field does not end": f"set {key}.format=tsv and {key}.separator={separator!r} if quotes mean nothing",
        "text is not in the charset": f"set {key}.encoding={'utf-8' if config.encoding == 'latin-1' else 'latin-1'}",
        "line is too long": f"raise {key}.max_line_bytes ({config.max_line_bytes})",
        "line is not a JSON object": f"set {key}.format to what the file is",
        "rating is not a number": f"set {key}.columns.rating to the column of the ratings",
        "rating is out of range": f"set {key}.rating_range to the lowest and the highest rating there is",
        "timestamp is not an integer": f"set {key}.time_unit=iso if times are written as dates"
        if _DATE.search(raw) else f"set {key}.columns.timestamp to the column of the times",
        "timestamp is not ISO 8601": f"set {key}.time_unit to what numbers count since 1970: s, ms or us",
        FAR: f"set {key}.time_unit to what the times count: {_finer(config.time_unit)}",
        f"{side} id is null": f"set {of_side}",
        f"empty {side} id": f"set {of_side}",
        f"{side} id is not an integer": f"set {key}.{side}_type=string if ids are text, or {of_side}",
        f"{side} id is an inexact float": f"write the {side} ids as integers or text: floats beyond 2^53 are not exact",
    }  # fmt: skip
    return advice.get(reason, f"set {key}.format to what the file is")


def _finer(unit: str) -> str:
    """The smaller units, which a number that is too large may count."""
    scales = [name for name, scale in MICROSECONDS.items() if scale < MICROSECONDS.get(unit, 10**7)]
    return " or ".join(scales) or "what is in that column?"


def timed(config: Input) -> bool:
    """Whether the log has times."""
    return config.format.startswith("movielens") or config.columns.timestamp is not None


def time_warnings(
    config: Input, stats: Iterable[Mapping[str, Any]], reasons: Counter[str], total: int, until: dt.date
) -> list[str]:
    """Warnings where most rows are from before 1995, or from after the night's window."""
    if not timed(config):
        return []
    warnings = []
    early = sum(unit["early"] for unit in stats)
    if early > (total - sum(reasons.values())) / 2:
        latest = max(unit["latest"] for unit in stats)
        day = dt.date(1970, 1, 1) + dt.timedelta(microseconds=latest)
        warnings.append(
            f"{early:,} of {total:,} rows are from before 1995, and no row is later than {day}: "
            f"{_likely(config, latest, until)}"
        )
    if reasons[LATE] > total / 2:
        warnings.append(
            f"{reasons[LATE]:,} of {total:,} rows are from {until} on, after this night's window: are --ds, "
            f"input.until and input.time_unit ({config.time_unit}) right?"
        )
    return warnings


def _likely(config: Input, latest: int, until: dt.date) -> str:
    """latest: microseconds since 1970 as they were read."""
    scale = MICROSECONDS.get(config.time_unit, 1)
    # The units that make this moment one of a log's.
    for unit, other in MICROSECONDS.items():
        if unit != config.time_unit and YEAR_1995 <= latest // scale * other < day_start(until) + _YEAR:
            return f"is input.time_unit {unit}? It is {config.time_unit}"
    return f"are input.time_unit ({config.time_unit}) and input.columns.timestamp right?"
