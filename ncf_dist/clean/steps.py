"""The steps of the job clean by name, so that each can be a place where it is killed (as `ncf_dist/publish/steps.py`,
whose listener hears of them too, has those of a commit).

Between two steps at most one thing changes that a reader or the next run could see.
"""

from __future__ import annotations

import functools

from ncf_dist.publish import steps

STEPS = {
    "looked-up": "what goes of a night, or of the log, is known, and is there as it was",
    "unmade": "a run has no manifest any more, so that it does not exist",
    "removed": "one thing has gone",
    "empty": "a folder that held nothing any more has gone",
    "checkpointed": "a checkpoint is in place, whole, and nothing names it",
    "checkpoint-named": "_last_checkpoint names it",
    "rewritten": "a file without the people who are to be forgotten is in place, which nobody reads yet",
}
"""What has been done when a step is reached."""

reached = functools.partial(steps.reached, among=STEPS)
