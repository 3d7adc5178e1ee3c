"""The section `layout`: the files of the train table."""

from __future__ import annotations

from ncf_dist.config.section import PositiveInt, Section


class Layout(Section):
    """How the train table is cut into files."""

    rows_per_file: PositiveInt = 250_000
    """Upper bound of rows a file (one row group each): what a reader holds in memory at a time."""
    min_files: PositiveInt = 16
    """At least this many files where there are rows for them, so that re-dealing files mixes them."""
    world_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of ranks that shall get whole files: the file count is a multiple of each."""
