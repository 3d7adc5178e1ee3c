"""One training rank: `python -m ncf_dist.train.worker --spec FILE`, whichever launcher runs it.

Everything it needs is in the spec, and everything it writes is in the run's folder. It reports a failure to the job
(`reports.py`). On SIGTERM, SIGINT or a file `stop` beside the spec, all ranks save a checkpoint after their current
step and end.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import posixpath
import re
import signal
import sys
import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ncf_dist import contracts, no_compiler, products
from ncf_dist.ancestry import DIGESTS, index_sizes
from ncf_dist.bundle import BUNDLE, read_bundle, save_bundle
from ncf_dist.config import Config
from ncf_dist.errors import ExitCode, NcfError
from ncf_dist.files import exists, is_local, read_bytes, resolve, write_atomic
from ncf_dist.item_item.part import Part
from ncf_dist.logs import log_to_stderr
from ncf_dist.manifests import Manifest, read_manifest
from ncf_dist.models import NeuMF, Recommender, build_model
from ncf_dist.train import checkpoints
from ncf_dist.train.copies import Copies, copies_for
from ncf_dist.train.item_parts import parts_of
from ncf_dist.train.loaders import Task, TrainLoader, verify_files
from ncf_dist.train.lr_find import rate_curve
from ncf_dist.train.memory_check import check_memory
from ncf_dist.train.processes import die_with_parent
from ncf_dist.train.reports import LOST, UNEXPECTED, report, tell_retries
from ncf_dist.train.spec import CHECKPOINTS, HISTORY, PARTS, RATES, STOP, Spec, train_contract
from ncf_dist.train.start_weights import pretrained_start, users_there, warm_start
from ncf_dist.train.trainer import Trainer
from ncf_dist.train.validation import Validator
from ncf_dist.train.waiting import Waiting
from ncf_dist.train.windows import WindowLoader
from ncf_dist.train.world import World

log = logging.getLogger(__name__)

POLL_S, FAR_POLL_S = 1.0, 5.0


class StopRequest:
    """Whether somebody asked this rank to end early: a signal to it, or (looked for by rank 0) the file `path`."""

    def __init__(self, path: str, world: World) -> None:
        self.path, self.world, self.asked, self.looked = path, world, False, 0.0
        # A step waits for the answer.
        self.every = POLL_S if is_local(path) else FAR_POLL_S

    def on_signal(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        if not self.asked and self.world.is_main and time.monotonic() - self.looked > self.every:
            self.looked = time.monotonic()
            self.asked = exists(self.path)
        return self.asked


def loader_of(config: Config, prepare: Manifest, task: Task, world: World, copies: Copies | None = None) -> TrainLoader:
    if config.sequential:
        return WindowLoader(prepare, task, config.loader, world, copies)
    return TrainLoader(prepare, train_contract(prepare, config), task, config.loader, world, copies)


def task_of(config: Config, prepare: Manifest) -> Task:
    """What the loss in force needs of a row. How many negatives the table has is what prepare says of it."""
    sizes, source, stored = index_sizes(prepare), config.negatives_from, prepare.config["negatives"]
    counts = {"table": stored["per_positive"], "online": config.negatives.per_positive}
    return Task(
        n_users=sizes.users,
        n_items=sizes.items,
        batch_size=config.train.batch_size,
        seed=config.seed,
        negatives=counts[source] if source else 0,
        draws=stored["draws"] if source == "table" else 0,
        shared=config.train.shared_negatives if config.shares_negatives else 0,
        explicit=config.input.feedback == "explicit",
    )


def check_fits(config: Config, prepare: Manifest, world: World) -> None:
    """Refuse a training that needs more memory than there is where this rank runs, before it waits for others, reads or
    builds anything. Raises ConfigError."""
    if config.model.trained:
        table = prepare.table(train_contract(prepare, config))
        largest = max(file.rows for file in table.files)
        check_memory(config, *index_sizes(prepare), table.rows, largest, world.device)


def starting_model(config: Config, spec: Spec, prepare: Manifest) -> Recommender:
    """The same weights on all ranks."""
    torch.manual_seed(config.seed)
    sizes = index_sizes(prepare)
    model = build_model(config.model, *sizes)
    if spec.start:
        warm_start(model, read_bundle(spec.start), users_there(prepare))
    if config.train.pretrained:
        assert isinstance(model, NeuMF)
        pretrained_start(model, config.train.pretrained, config.model, *sizes, users_there(prepare))
    return model


def train_rank(spec: Spec, world: World, stop: StopRequest | None = None) -> None:
    """Train this rank's share; rank 0 writes the bundle and history.json, and parts.json where there are parts."""
    config = Config.model_validate_json(spec.config)
    how = products.facts(world.device)
    prepare = read_manifest(spec.prepare)
    if not config.model.trained:
        return save_model(config, spec, prepare, starting_model(config, spec, prepare))
    task = task_of(config, prepare)
    copies = copies_for(prepare.root, resolve(config.paths.work), config.loader.local_bytes)
    verify_files(prepare, train_contract(prepare, config), world, copies)
    for table in (contracts.VALIDATION, *([contracts.RECENT] * config.sequential)):
        verify_files(prepare, table, world)
    trainer = Trainer(
        starting_model(config, spec, prepare),
        loader_of(config, prepare, task, world, copies),
        Validator(prepare, world, task.explicit, config.model.history if config.sequential else 0),
        config.train,
        world,
        loss=config.loss,
        seed=config.seed,
        folder=posixpath.join(spec.run, CHECKPOINTS),
        stop=stop or (lambda: False),
    )
    if config.train.lr_find:
        curve = rate_curve(trainer)
        if world.is_main:
            write_atomic(posixpath.join(spec.run, RATES), json.dumps(curve).encode())
        return
    if world.is_main:
        step = "one compiled call" if trainer.signals.compiled else "torch's operations"
        log.info("loss and gradients of a step: %s, %d threads", step, torch.get_num_threads())
    _go_on(trainer, world)
    # The garbage collector no longer visits what was imported: it would stop a step for a tenth of a second at times.
    gc.freeze()
    history = trainer.fit()
    if config.item_parts.named:
        world.leave()  # The other ranks need not wait while rank 0 makes the parts.
    if world.is_main:
        save_model(config, spec, prepare, trainer.model)
        record = {**made_from(config, prepare), "epoch": history.best_epoch, "epochs": history.epochs}
        record |= {"curve": history.curve, "products": how}
        write_atomic(posixpath.join(spec.run, HISTORY), json.dumps(record, indent=1).encode())


def made_from(config: Config, prepare: Manifest) -> dict[str, Any]:
    return {"prepare_run": prepare.run_key, "seed": config.seed}


def save_model(config: Config, spec: Spec, prepare: Manifest, model: Recommender) -> None:
    """Write the bundle, with the item-to-item parts that the config names."""
    parts: list[Part] = []
    if config.item_parts.named:
        parts = parts_of(config, prepare, model, posixpath.join(spec.run, PARTS))
    facts = {**made_from(config, prepare), "ds": prepare.ds, DIGESTS: prepare.facts.get(DIGESTS)}
    save_bundle(posixpath.join(spec.run, BUNDLE), model, config.model, *index_sizes(prepare), facts, parts)


def _go_on(trainer: Trainer, world: World) -> None:
    """From the latest whole checkpoint, chosen by rank 0, where there is one."""
    assert trainer.folder is not None
    found = checkpoints.latest(trainer.folder) if world.is_main else None
    path = world.gather(found.path if found else None)[0]
    if path is not None:
        trainer.resume(found or checkpoints.read(path))
        if world.is_main:
            log.info("going on from %s: epoch %d, %s", path, trainer.progress.epoch, trainer.progress.phases)


def failure(error: BaseException) -> tuple[str, str]:
    """(kind, message) for the report of what is no NcfError."""
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return UNEXPECTED, f"{type(error).__name__}: {error}"[:1000]
    return LOST, (
        f"{_lost(str(error))}; needed all ranks within train.timeout_s: another was ended, stands still or cannot be "
        "reached, and its log, on its own machine, says why; run the job train again: it goes on from the last "
        "checkpoint"
    )


_SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")
_LOST = {
    "another rank, or its machine, has ended": re.compile("closed|reset|broken pipe|refused", re.IGNORECASE),
    "another rank did not answer in time": re.compile("time ?d? ?out", re.IGNORECASE),
}


def _lost(said: str) -> str:
    """What became of another rank, of what gloo or the store says that the ranks meet in: its first sentence, without
    the line of its source. All of it is in the log."""
    cause = _SOURCE_LINE.sub("", said.strip().partition("\n")[0]).partition(". ")[0][:200]
    what = (what for what, told in _LOST.items() if told.search(cause))
    return f"{next(what, 'the other ranks cannot be reached')} ({cause})"


def run(path: str) -> NoReturn:
    """Run this process as a rank, and end it."""
    rank = os.environ.get("RANK", "0")
    try:
        spec = Spec(**json.loads(read_bytes(path)))
        config = Config.model_validate_json(spec.config)
        world = World.from_environment(config.train.device)
        if world.device == "cpu":
            no_compiler.leave_out()
        stop = StopRequest(posixpath.join(posixpath.dirname(path), STOP), world)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop.on_signal)
        # Signals that came while torch was imported are delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        check_fits(config, read_manifest(spec.prepare), world)
        world.join(config.train.timeout_s)
        with Waiting():
            train_rank(spec, world, stop)
        world.leave()
        tell_retries(path, rank)
        code = int(ExitCode.DONE)
    except NcfError as error:
        report(path, rank, type(error).__name__, str(error))
        code = int(error.exit_code)
    except BaseException as error:
        log.exception("rank %s failed", rank)
        report(path, rank, *failure(error))
        code = int(ExitCode.UNEXPECTED)
    logging.shutdown()
    sys.stderr.flush()
    # At once, without Python's clean-up: after a failure the process group would wait for ranks that wait for us.
    os._exit(code)


def main() -> NoReturn:
    die_with_parent()
    # Spark runs this file by its path, and Python then looks for modules in its folder first. Ours are not top-level
    # modules: a library that imports `progress` must not get this folder's.
    sys.path[:] = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    path: str = parser.parse_args().spec
    log_to_stderr(f"rank {os.environ.get('RANK', '0')}")
    logging.getLogger("petastorm").setLevel(logging.WARNING)
    run(path)


if __name__ == "__main__":
    main()
