"""Every file that one prepare run reads: the log, and, where the config names them, test rows, candidates and side
tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ncf_dist.config import Config
from ncf_dist.prepare.columns import side_files
from ncf_dist.prepare.formats import FORMATS
from ncf_dist.prepare.input_files import InputFiles, find_files


@dataclass(frozen=True)
class RunInputs:
    """The files by what they hold; no files where the config names none."""

    log: InputFiles
    test: InputFiles
    candidates: InputFiles
    items: InputFiles
    users: InputFiles

    @classmethod
    def find(cls, config: Config) -> RunInputs:
        """Raises InputError where one is missing."""
        form, name = FORMATS[config.input.format], config.input.format
        sides = {"items": config.input.items, "users": config.input.users}
        split = config.split
        return cls(
            find_files(config.input.path, form, name),
            find_files(split.test, form, name, "split.test") if split.test else InputFiles(),
            find_files(split.candidates, None, name, "split.candidates") if split.candidates else InputFiles(),
            *(side_files(kind, side, name) if side else InputFiles() for kind, side in sides.items()),
        )

    def fingerprints(self) -> dict[str, Any]:
        """What changes when a file is added, removed or rewritten, by the names that manifests use."""
        always = {"interactions": self.log, "items": self.items}
        optional = {"test": self.test, "candidates": self.candidates, "users": self.users}
        files = always | {name: named for name, named in optional.items() if named}
        return {name: named.fingerprint() for name, named in files.items()}

    def counts(self) -> dict[str, int]:
        """How many files of the log are read, and how many beside them are not."""
        logs = (self.log, self.test)
        return {"read": sum(len(log.paths) for log in logs), "left_out": sum(len(log.left_out) for log in logs)}
