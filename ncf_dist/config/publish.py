"""The section `publish`: the published table, and what a night must pass to become visible."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncf_dist.config.section import Section

Gate = Literal["users", "interactions", "beats_popularity", "evaluated"]
RESERVED = ("runs", "raw")
"""Folders that the lake itself has at its top."""
_PLAIN_NAME = re.compile(r"[^\W_](?:[\w .-]{0,62}[\w-])?")
"""Begins with a letter or a digit, because readers leave out what begins with a dot or an underscore."""


class Publish(Section):
    table: str = "recommendations"
    """Folder of the published Delta table inside the lake: one plain name."""
    require: tuple[Gate, ...] = ("users", "interactions", "beats_popularity", "evaluated")
    """What a night must pass to replace the published one; leave one out to switch it off. `users`: the model ranks for
    at least half as many users as in the night that is published · `interactions`: at least half as many are accepted
    as in that night · `beats_popularity`: the paired 95 % interval of the
    headline metric does not lie wholly below popularity's · `evaluated`: the very model that score used was evaluated.
    A night without rows is never published."""
    verify: Literal["quick", "deep"] = "quick"
    """How the files of a night that is published already are checked: `quick` looks at existence and size · `deep`
    reads all of them and compares SHA-256. What is damaged is replaced from the score run."""

    rollback_to: Annotated[int, Field(ge=0)] | Literal["PREVIOUS"] = "PREVIOUS"
    """What the job rollback makes of a night again, its `--to`: what it was at a version of the table, or `PREVIOUS`,
    what its last publication replaced."""

    @model_validator(mode="after")
    def _one_plain_name(self) -> Publish:
        if not _PLAIN_NAME.fullmatch(self.table) or self.table.casefold() in RESERVED:
            raise ValueError(
                f"publish.table is {self.table!r}; needed one plain name of a folder in the lake: letters, digits, "
                f"spaces, '.', '_' or '-', a letter or digit first, at most 64, and not {' or '.join(RESERVED)}, "
                "which the lake uses itself"
            )
        return self
