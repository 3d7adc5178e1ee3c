"""The section `layout`: the files of the train table."""

from __future__ import annotations

from ncf_dist.config.section import PositiveInt, Section


class Layout(Section):
    """How the train table is cut into files."""

    rows_per_file: PositiveInt = 250_000
    """At most this many rows a file. A file is one row group, which is what a reader holds in memory at a time."""
    min_files: PositiveInt = 16
    """At least this many files, where there are rows for them. Every epoch deals the files to the ranks anew, and with
    more files that mixes the rows better."""
    world_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """The number of files is a multiple of each of these numbers of ranks, so that every rank gets whole files."""
