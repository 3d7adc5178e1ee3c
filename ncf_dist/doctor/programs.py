"""What the programs of this machine say of it: facts only, no judgement. None means: could not be told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

TIMEOUT_S = 30


def java() -> tuple[str, str] | None:
    """(version, path) of the Java that the driver would use: JAVA_HOME's, else the one on PATH."""
    home = os.environ.get("JAVA_HOME")
    path = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if path is None:
        return None
    version = re.search(r'version "([^"]+)"', _said(path, "-version"))
    return (version.group(1), path) if version else None


def java_major(version: str) -> int:
    """17 for 17.0.15, 8 for 1.8.0_392."""
    parts = [int(part) for part in re.findall(r"\d+", version)]
    return parts[1] if parts[0] == 1 and len(parts) > 1 else parts[0]


def gpus() -> int:
    """CUDA devices that the driver tool lists."""
    tool = shutil.which("nvidia-smi")
    return len(re.findall(r"^GPU \d+:", _said(tool, "-L"), re.MULTILINE)) if tool else 0


def _said(*command: str) -> str:
    """All that a program printed; nothing where it cannot be run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout + ran.stderr
