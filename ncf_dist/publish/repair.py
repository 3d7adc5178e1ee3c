"""Whether the files of a published night are what was published, and their repair from the score run.

A file's name, size and SHA-256 were fixed when it was published, so one that is damaged is replaced by the same bytes:
no new version is needed, and a reader sees the damaged file or the whole one. Quick: every file is there and has its
size. Deep: every byte is read and compared, one file in memory at a time.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from collections.abc import Mapping

from ncf_dist.errors import ContractError
from ncf_dist.files import filesystem, make_dirs, read_bytes, write_atomic
from ncf_dist.lake import Lake
from ncf_dist.parquet import FileInfo
from ncf_dist.publish import steps
from ncf_dist.publish.audit import checked_bytes
from ncf_dist.publish.log import DeltaLog

log = logging.getLogger(__name__)


def damage(path: str, info: FileInfo, deep: bool) -> str | None:
    """What is wrong with the published file of `info`; None where nothing is."""
    fs, inner = filesystem(path)
    try:
        found = fs.info(inner)
    except FileNotFoundError:
        return "it is gone"
    if found["type"] != "file":
        return f"it is a {found['type']}"
    if found["size"] != info.bytes:
        return f"it has {found['size']:,} bytes, needed {info.bytes:,}"
    if deep:
        digest = hashlib.sha256(read_bytes(path)).hexdigest()
        if digest != info.sha256:
            return f"its SHA-256 is {digest[:12]}…, needed {info.sha256[:12]}…"
    return None


def restore_all(lake: Lake, delta: DeltaLog, deep: bool) -> list[str]:
    """Check the files of every night that readers see, as `restore` does; those of another's commits are left alone."""
    table = delta.opened()
    replaced = []
    for ds in sorted(delta.nights(table)):
        found = delta.explain(table, ds)
        if found is None or not found[1].checksums:
            continue
        version, entry = found
        files = {path: FileInfo(path, 0, 1, info["bytes"], info["sha256"]) for path, info in entry.checksums.items()}
        score = lake.stage(ds, "score").find(str(entry.run_key))
        infos = score.tables["recommendations"].files if score is not None else ()
        made = dict(zip((info.sha256 for info in infos), score.files("recommendations") if score else (), strict=True))
        nowhere = f"a score run {entry.run_key} of ds {ds}"
        sources = {path: made.get(info.sha256, nowhere) for path, info in files.items()}
        remedy = f"put them back from a backup, or run the line again for ds {ds} (version {version} published it)"
        replaced += restore(delta.root, files, sources, deep, remedy)
    return replaced


def restore(root: str, files: Mapping[str, FileInfo], sources: Mapping[str, str], deep: bool, remedy: str) -> list[str]:
    """Check the published `files` and replace what is damaged; the paths that were replaced.

    files: by path relative to `root`; sources: the score run's file of each. Raises ContractError, once all that can be
    replaced is, where the score run's own file is not whole either.
    """
    replaced, lost = [], []
    for name, info in files.items():
        target = posixpath.join(root, name)
        what = damage(target, info, deep)
        if what is None:
            continue
        try:
            data = checked_bytes(sources[name], info)
        except ContractError as error:
            lost.append(f"{target}: {what} ({error})")
            continue
        fs, inner = filesystem(target)
        if fs.isdir(inner):
            fs.rm(inner, recursive=True)
            steps.reached("cleared")
        make_dirs(posixpath.dirname(target))
        steps.reached("folder")
        write_atomic(target, data)
        steps.reached("repaired")
        replaced.append(name)
        log.warning("%s was damaged (%s) and is replaced from the score run", target, what)
    if lost:
        raise ContractError(
            f"{len(lost)} published files are damaged, and the score run cannot replace them: {'; '.join(lost)}; "
            f"readers get errors or other rows from them: {remedy}"
        )
    return replaced
