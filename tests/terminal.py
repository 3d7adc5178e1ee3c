"""A terminal to start a job on, and a Python for Spark's workers that waits until somebody has looked."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
GATE_S = 300


class Terminal:
    """A terminal of 120 columns; `screen` is all that was written to it so far."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Nobody has the other end any more.
                return
            if not data:
                return
            self.written += data

    @property
    def screen(self) -> str:
        return self.written.decode(errors="replace")

    def close(self) -> None:
        """To be called when those who write have ended."""
        os.close(self.slave)
        self._reader.join(timeout=60)
        os.close(self.master)


def gate(folder: Path) -> tuple[Path, Path]:
    """(a Python for Spark's workers that waits for a file before it becomes one, that file): so that a stage of Spark
    lasts until it was seen."""
    python, opened = folder / "waiting python", folder / "opened"
    python.write_text(
        f"#!/bin/bash\nend=$((SECONDS + {GATE_S}))\n"
        f"while [[ ! -e '{opened}' && $SECONDS -lt $end ]]; do sleep 0.1; done\n"
        f"exec '{ROOT}/.venv/bin/python' \"$@\"\n"
    )
    python.chmod(0o755)
    return python, opened
