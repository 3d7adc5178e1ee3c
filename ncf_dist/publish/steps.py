"""The steps of what changes the published table, by name, so that each can be a place where a run is killed.

Between two steps at most one thing changes that a reader or the next run could see. Tests hold the code to that, and
kill it at every step; nothing else looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping

STEPS = {
    "begun": "nothing has been looked at",
    "checked": "the log is whole and the fence has let this run pass",
    "cleared": "a folder that stood in a published file's place is gone",
    "repaired": "a damaged file of a night that is published already has been replaced",
    "audited": "every row that is to be published has been read",
    "judged": "the gates have let the night pass",
    "verified": "every file that is to be readers' again has been read",
    "swept": "something that a killed run had left is gone",
    "folder": "the partition's folder is there",
    "staged": "a file is in place, which nobody reads yet",
    "durable": "the staged files and their names survive a power cut",
    "committing": "everything is ready and the log is as it was",
    "committed": "readers of the log see the new version",
    "logged": "the log's new entry survives a power cut",
    "described": "latest.json names the newest night",
    "settled": "the log and latest.json agree",
}
"""What has been done when a step is reached."""


def reached(step: str, among: Mapping[str, str] = STEPS) -> None:
    """Tell whoever listens; nobody does outside of tests. among: the list that the step is on."""
    assert step in among, step
    listener(step)


def listener(step: str) -> None:
    """Tests put something else in its place."""
