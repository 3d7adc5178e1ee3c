"""The section `paths`: where the lake and the scratch folder are."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ncf_dist.config.section import Section


class Paths(Section):
    lake: str
    """Root of everything the line writes: `runs/` and the published table. A folder or an fsspec URL."""
    work: str = "work"
    """Local scratch of this machine: rank logs, downloads in progress. Safe to delete between runs."""
    umask: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] | None = None
    """What group and others may not do with files and folders that the jobs write, in quoted octal digits: "027" lets
    the group read and others nothing; default: what the job was started with. Scratch folders are this user's alone."""
