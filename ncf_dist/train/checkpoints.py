"""Checkpoints: a folder each, which a reader sees whole or not at all.

    <folder>/step-000001200/tensors.safetensors   weights, best weights, optimiser
    <folder>/step-000001200/progress.json         how far the training was
    <folder>/step-000001200/SHA256SUMS            of the two; `sha256sum -c` checks it too

A checkpoint is written to a temporary folder, synced, then renamed; in a store without renames, SHA256SUMS is written
last. One that does not agree with its SHA256SUMS is damaged: `latest` logs it and takes the one before. Tensors and
JSON only.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import safetensors.torch
from torch import Tensor

from ncf_dist.files import (
    exists,
    is_local,
    list_names,
    make_dirs,
    read_bytes,
    remove,
    sync,
    write_bytes,
    write_verified,
)
from ncf_dist.stored import parse_json, parse_tensors

log = logging.getLogger(__name__)

TENSORS, PROGRESS, SUMS = "tensors.safetensors", "progress.json", "SHA256SUMS"
KEEP = 2
PREFIX, TEMPORARY = "step-", "tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: str
    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def save(folder: str, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], keep: int = KEEP) -> str:
    """Write the checkpoint of `step` and drop all but the `keep` latest. Returns its path."""
    path = posixpath.join(folder, f"{PREFIX}{step:09d}")
    target = posixpath.join(folder, f"{TEMPORARY}{step:09d}") if is_local(folder) else path
    for name in list_names(folder):
        if name.startswith(TEMPORARY):
            remove(posixpath.join(folder, name))
    remove(target)
    make_dirs(target)
    files = {
        TENSORS: safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        PROGRESS: json.dumps(progress, indent=1).encode(),
    }
    files[SUMS] = _sums(files)
    for name, data in files.items():
        if is_local(folder):
            write_bytes(posixpath.join(target, name), data)
            sync(posixpath.join(target, name))
        else:
            write_verified(posixpath.join(target, name), data)
    if is_local(folder):
        sync(target)
        remove(path)
        os.rename(target, path)
        sync(folder)
    for name in _names(folder)[:-keep]:
        remove(posixpath.join(folder, name))
    return path


def read(path: str) -> Checkpoint:
    """The checkpoint at `path`. Raises ValueError where it is not whole."""
    try:
        files = {name: read_bytes(posixpath.join(path, name)) for name in (TENSORS, PROGRESS)}
        sums = read_bytes(posixpath.join(path, SUMS))
    except OSError as error:
        raise ValueError(f"a file cannot be read ({error})") from None
    if sums != _sums(files):
        raise ValueError(f"its files do not agree with its {SUMS}")
    return Checkpoint(path, parse_tensors(files[TENSORS]), parse_json(dict[str, Any], files[PROGRESS]))


def latest(folder: str) -> Checkpoint | None:
    """The latest whole checkpoint, or None. Damaged ones are reported and passed over."""
    for name in reversed(_names(folder)):
        path = posixpath.join(folder, name)
        try:
            return read(path)
        except ValueError as error:
            log.warning("checkpoint %s is damaged: %s; the one before it is used", path, error)
    return None


def _names(folder: str) -> list[str]:
    return [name for name in list_names(folder) if name.startswith(PREFIX)] if exists(folder) else []


def _sums(files: Mapping[str, bytes]) -> bytes:
    return "".join(f"{sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()
