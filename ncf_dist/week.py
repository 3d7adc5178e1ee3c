"""Seven nights of a small made-up shop, with what goes wrong in a year: what a person on call would see.

    python -m ncf_dist.week --config conf/nightly-demo.yaml

1, 2   two nights by one command
3      the log is cut to a tenth: a gate refuses the night, readers keep the second; the whole log then publishes it
4      the training learns nothing: a gate refuses its model; the right settings then publish the night
5      the process is killed while it trains: the same command goes on
6      published, and taken back by `rollback`
7      an ordinary night

Each step is a command as a scheduler would give it, printed before it runs, and its exit code is checked. The table of
`status` ends it.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ncf_dist import last_line
from ncf_dist.cli import parser
from ncf_dist.config import load_config
from ncf_dist.errors import ExitCode

LAUNCHER = Path(__file__).parent.parent / "spark-submit.sh"
FIRST = dt.date(2023, 6, 20)
"""The made-up users come until July."""
TRAINING = "epoch 2 of"
"""What the log says when a training is under way."""
BAD_MODEL = ("train.lr=0.0000001", "train.epochs=1")


class Week:
    def __init__(self, config: str) -> None:
        self.config = config

    def run(self, wanted: int, job: str, *options: str) -> dict[str, Any]:
        """Run a job to its end. Stops the week where it ends in another way than `wanted`."""
        done = subprocess.run(self._command(job, *options), stdout=subprocess.PIPE, text=True, check=False)
        report = last_line.read(done.stdout.splitlines()[-1]) if done.stdout else {}
        self._say(f"exit {done.returncode}: {report.get('error') or report.get('status')}")
        if done.returncode != wanted:
            sys.exit(f"{job} ended with {done.returncode}; needed {wanted}: its log is above")
        return report

    def kill_while_training(self, *options: str) -> None:
        """Start a night and end it the hard way in its training."""
        command = self._command("nightly", *options)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as night:
            assert night.stderr is not None
            for line in night.stderr:
                sys.stderr.write(line)
                if TRAINING in line:
                    os.killpg(night.pid, signal.SIGKILL)
        self._say("killed while it trained (SIGKILL)")

    def _command(self, job: str, *options: str) -> list[str]:
        self._say(f"$ ./spark-submit.sh {job} --config {self.config} {' '.join(options)}")
        return [str(LAUNCHER), job, "--config", self.config, *options]

    @staticmethod
    def _say(text: str) -> None:
        print(f"week: {text}", flush=True)


def cut(log: Path, share: float) -> Path:
    """A copy of the log that ends early."""
    lines = log.read_bytes().splitlines(keepends=True)
    short = log.with_name(f"cut-{log.name}")
    short.write_bytes(b"".join(lines[: int(len(lines) * share)]))
    return short


def main(argv: Sequence[str] | None = None) -> int:
    args = parser("week").parse_args(argv)
    config = load_config(args.config, args.overrides)
    nights = [(FIRST + dt.timedelta(days=day)).isoformat() for day in range(7)]
    week, start = Week(args.config), time.monotonic()
    done, refused = int(ExitCode.DONE), int(ExitCode.GATE_REFUSED)
    assert isinstance(config.input.path, str)
    week.run(done, "fetch")
    week.run(done, "nightly", "--from", nights[0], "--to", nights[1])
    short = cut(Path(config.input.path), 0.1)
    week.run(refused, "nightly", "--ds", nights[2], "--set", f"input.path={short}")
    bad = [part for setting in BAD_MODEL for part in ("--set", setting)]
    week.run(refused, "nightly", "--ds", nights[3], *bad)
    week.kill_while_training("--ds", nights[4])
    week.run(done, "nightly", "--from", nights[2], "--to", nights[5])
    week.run(done, "rollback", "--ds", nights[5])
    week.run(done, "nightly", "--ds", nights[6])
    week.run(done, "status")
    print(f"week: {time.monotonic() - start:.0f} s")
    return done


if __name__ == "__main__":
    sys.exit(main())
