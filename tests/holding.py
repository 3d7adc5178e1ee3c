"""The S3 server of the cluster tests: `python3 -m tests.holding HOST URL` on one of their machines.

It can keep another machine waiting in the middle of a put, so that a test loses it there whatever the speed of things:
puts wait whose path matches the pattern in the file HOLD, until that file has another pattern or is gone.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

from tests.s3 import Store, _Handler, _Server

HOLD, PORT = "/tmp/hold", 9000
_FIRST = threading.Lock()


class Holding(_Handler):
    here = ""
    """The address of its own machine, whose puts never wait."""

    def do_PUT(self) -> None:
        pattern, client = _pattern(), self.client_address[0]
        if pattern is not None and client != self.here and re.search(pattern, unquote(self.path)):
            with _FIRST:
                if not (held := Path(_held(pattern))).exists():
                    write(held, client)
            while _pattern() == pattern:
                time.sleep(0.05)
        self._answer()


def _pattern() -> str | None:
    try:
        return Path(HOLD).read_text()
    except FileNotFoundError:
        return None


def _held(pattern: str) -> str:
    return f"/tmp/held-{hashlib.sha256(pattern.encode()).hexdigest()}"


def write(path: Path, text: str) -> None:
    """Whoever finds the file finds all of the text in it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.rename(path)


def hold(pattern: str, root: Path) -> Path:
    """From now on others' puts of such paths wait, and no others. root: the file system of the server's machine, as the
    test sees it. The file that is returned has the first one's address, as soon as one waits."""
    write(root / HOLD.lstrip("/"), pattern)
    return root / _held(pattern).lstrip("/")


def release(root: Path) -> None:
    (root / HOLD.lstrip("/")).unlink()


def main() -> None:
    host, url = sys.argv[1:]
    Holding.store, Holding.here = Store(url=url), socket.gethostbyname(host)
    _Server((host, PORT), Holding).serve_forever(0.05)


if __name__ == "__main__":
    main()
