"""The section `retention`: what the job clean leaves in the lake."""

from __future__ import annotations

from ncf_dist.config.section import NonNegativeInt, PositiveInt, Section


class Retention(Section):
    """What the job clean leaves. A thing goes only when every bound that speaks of it lets it go, and nothing else
    needs it: what readers see, the model that is published, a warm start, an index that a later one extends."""

    nights: PositiveInt = 7
    """So many of the latest nights keep all their runs."""
    days: NonNegativeInt = 7
    """Nothing goes that was finished, or that readers were still shown, in the last so many days. 0: the other bounds
    decide alone."""
    versions: PositiveInt = 7
    """So many of the newest versions of the published table stay readable, each with all its files."""
    published: PositiveInt | None = 7
    """So many of the latest nights stay in the published table; those before them leave it in a commit of their own,
    and stay readable in the versions before it. null: all stay."""
    records: PositiveInt = 400
    """So many of the latest nights keep what their jobs said (`jobs`, `attempts` and `gates` in `runs/<ds>`),
    which the job status reads."""
