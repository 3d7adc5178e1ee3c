"""A download that resumes where it stopped and is checked against the published MD5.

Bytes are written to `<name>.part`; a later attempt, or a later run, asks for the rest (HTTP Range, RFC 9110,
section 14). The file gets its real name only after its MD5 is the published one, so a file that was not checked is
never unpacked. A resumed file with a wrong checksum is fetched once more from its start, as its halves may be of
different files.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import posixpath
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from ncf_dist.errors import InputError
from ncf_dist.fetch.delivery import alone
from ncf_dist.files import make_dirs

BASE_URL = "https://files.grouplens.org/datasets/movielens"
MAX_BYTES = 2 << 30
"""The largest known archive (ml-25m, ml-32m: about 0.25 GiB) is an eighth of it."""
CHUNK = 1 << 18
LOG_EVERY_S = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a download is tried."""

    attempts: int = 5
    """How many attempts in a row may bring no new byte."""
    pause: float = 1.0
    """Seconds before the next attempt; doubled after each attempt that brought nothing."""
    timeout: float = 30.0
    """Seconds a connection may be silent."""


def download(url: str, md5: str, folder: str, patience: Patience = Patience()) -> str:
    """Path in `folder` of the file behind `url`, whose MD5 is `md5`; not fetched where it is there already.

    Raises InputError: not reachable, refused by the server, too long, wrong checksum.
    Raises BusyRun: another process downloads it.
    """
    make_dirs(folder)
    path = posixpath.join(folder, posixpath.basename(url))
    with alone(f"{path}.lock", path):
        if not (os.path.exists(path) and md5_of(path) == md5):
            _fetch_checked(url, md5, f"{path}.part", patience)
            os.replace(f"{path}.part", path)
    return path


def md5_of(path: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch_checked(url: str, md5: str, part: str, patience: Patience) -> None:
    resumed = _size(part) > 0
    while True:
        _fetch(url, part, patience)
        found, size = md5_of(part), _size(part)
        if found == md5:
            return
        os.remove(part)
        if not resumed:
            raise InputError(
                f"{url} came with MD5 {found} ({size:,} bytes); needed {md5}, the published archive's: "
                "run the job again, and if that does not help set fetch.from to a copy you trust"
            )
        log.warning("%s, continued from an earlier attempt, has a wrong checksum; fetching it from its start", url)
        resumed = False


def _fetch(url: str, part: str, patience: Patience) -> None:
    """Try until the file is complete; give up after `patience.attempts` in a row that brought nothing new."""
    fruitless, most = 0, _size(part)
    while True:
        problem = _attempt(url, part, patience.timeout)
        if problem is None:
            return
        fruitless = 0 if _size(part) > most else fruitless + 1
        most = max(most, _size(part))
        if fruitless >= patience.attempts:
            raise InputError(
                f"{url} could not be downloaded: {problem} ({fruitless} attempts in a row brought nothing; "
                f"{_size(part):,} bytes are kept in {part}); needed a connection to it: "
                "run the job again, it goes on from there, or set fetch.from to a copy of the zip"
            )
        pause = patience.pause * 2**fruitless
        log.warning("%s: %s; trying again in %.1f s from byte %d", url, problem, pause, _size(part))
        time.sleep(pause)


def _attempt(url: str, part: str, timeout: float) -> str | None:
    """One request for what is missing. Returns None when the file is complete, else what went wrong."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return _receive(response, part, have)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return None  # nothing after what we have: complete, or the checksum will tell
        if error.code < 500 and error.code not in (408, 429):
            raise InputError(
                f"{url} was refused by the server ({error.code} {error.reason}); needed the archive: "
                "try later, or set fetch.from to a copy of the zip"
            ) from None
        return f"{error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _receive(response: http.client.HTTPResponse, part: str, have: int) -> str | None:
    continues = response.status == 206
    if continues and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
        os.remove(part)
        return f"the server sent {response.headers.get('Content-Range')} when asked for bytes from {have} on"
    start = have if continues else 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    size = start
    with open(part, "ab" if start else "wb") as out:
        for chunk in _with_progress(iter(lambda: response.read(CHUNK), b""), os.path.basename(part), start, total):
            size += len(chunk)
            if size > MAX_BYTES:
                raise InputError(
                    f"{response.url} sends more than {MAX_BYTES:,} bytes; needed an archive of "
                    "GroupLens: check what answers in its place, or set fetch.from to a copy of the zip"
                )
            out.write(chunk)
    return None if total is None or size >= total else f"the connection ended at byte {size:,} of {total:,}"


def _with_progress(chunks: Iterable[bytes], name: str, start: int, total: int | None) -> Iterator[bytes]:
    """The same chunks, with a progress bar on a terminal and a log line every LOG_EVERY_S seconds elsewhere."""
    done, said = start, time.monotonic()
    with tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            bar.update(len(chunk))
            if bar.disable and time.monotonic() - said >= LOG_EVERY_S:
                said = time.monotonic()
                log.info("%s: %.1f of %s MB", name, done / 1e6, f"{total / 1e6:.1f}" if total else "?")
    log.info("%s: %.1f MB received", name, done / 1e6)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0
