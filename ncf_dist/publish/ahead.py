"""Before a night begins: whether publishing it would fail whatever its stages make."""

from __future__ import annotations

import os
import posixpath

import pyarrow as pa

from ncf_dist.config import Config
from ncf_dist.contracts import recommendations
from ncf_dist.errors import InputError
from ncf_dist.files import is_local, make_dirs, resolve
from ncf_dist.lake import Lake
from ncf_dist.publish.table import PublishedTable

ID_TYPES = {"int": (pa.int64(),), "string": (pa.string(),), None: (pa.int64(), pa.string())}
"""By input.user_type and input.item_type; left out, the log decides."""


def check_ahead(config: Config, ds: str) -> None:
    """Raise what `publish` would raise tonight whatever the stages before it make: the lake, the table or the work
    folder cannot be written, or the table is damaged or has other columns."""
    lake = Lake(config.paths.lake)
    lake.check_writable()
    root, work = lake.path(config.publish.table), resolve(config.paths.work)
    try:
        make_dirs(work)
    except OSError as error:
        raise InputError(f"paths.work {work} cannot be made ({error.strerror or error}); set paths.work") from None
    inside = (posixpath.join(root, name) for name in ("_delta_log", f"ds={ds}"))
    places = [work, *((root, *inside) if is_local(root) else ())]
    for place in places:
        if os.path.lexists(place) and not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
            raise InputError(
                f"{place} is not a folder that this user may write; needed one for publishing ds {ds}: fix its "
                "permissions, or set publish.table or paths.work"
            )
    user_types, item_types = ID_TYPES[config.input.user_type], ID_TYPES[config.input.item_type]
    contracts = [recommendations(user, item, config.score.form) for user in user_types for item in item_types]
    PublishedTable(root, contracts[0]).check_ahead(contracts)
