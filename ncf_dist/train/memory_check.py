"""What memory a training needs: arithmetic on the config and the manifest. A rank asks, which knows its own device."""

from __future__ import annotations

import torch

from ncf_dist import machine
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError
from ncf_dist.models import parameter_count
from ncf_dist.train.optimisers import MOMENTS
from ncf_dist.train.windows import row_bytes

MEMORY_SHARE = 0.8


def memory_parts(config: Config, n_users: int, n_items: int, rows: int, file_rows: int) -> dict[str, int]:
    """Bytes of one rank, by what they are for. `rows`: of the train table, `file_rows`: of its largest file."""
    train, loader, count = config.train, config.loader, parameter_count(config.model, n_users, n_items)
    moments, source, negatives = MOMENTS[train.optimiser], config.negatives_from, config.negatives.per_positive
    from_table = negatives if source == "table" else 0
    row = 4 * (2 + from_table + (config.input.feedback == "explicit"))
    if config.sequential:
        row = row_bytes(config.sequences.length)
    cached = rows * (row + 4 * max(0, config.negatives.draws - 1) * from_table)
    if loader.cache != "none" and cached <= loader.cache_bytes:
        table, table_bytes = "the train table in loader.cache", cached
    else:
        # A window four times: as it is used, and the next one as it is read, side by side, and permuted.
        table = "a window of loader.shuffle_files files"
        table_bytes = 4 * row * min(rows, loader.shuffle_files * file_rows)
    of_row = 1 + (train.shared_negatives if config.shares_negatives else negatives if source else 0)
    weights = f"{count:,} parameters x 4 bytes x {3 + moments} (weights, gradients, {moments} moment(s), best epoch)"
    return {
        weights: 4 * count * (3 + moments),
        table: table_bytes,
        "train positives for online negatives": 8 * (rows + n_users + 1) if source == "online" else 0,
        **(_step_of_windows(config) if config.sequential else _step_of_pairs(config, of_row)),
    }


def _step_of_pairs(config: Config, of_row: int) -> dict[str, int]:
    """The value and the gradient of every unit of a scored pair. of_row: pairs of a row."""
    pairs = config.train.batch_size * of_row
    return {f"a step of {pairs:,} scored pairs": 2 * 4 * pairs * pair_width(config)}


def _step_of_windows(config: Config) -> dict[str, int]:
    """What a tower keeps of every position until its gradient is computed: measured, 19 vectors a block and 7 beside.
    Some more are gradients on their way, and a block of scores is a few MiB."""
    positions, model = config.train.batch_size * config.sequences.length, config.model
    return {f"a step of {positions:,} positions": 4 * positions * model.factors * (25 * model.blocks + 15)}


def pair_width(config: Config) -> int:
    """How many numbers the model computes for each scored pair."""
    model = config.model
    hidden = sum(model.layers) if model.name in ("mlp", "neumf", "embedding_nn") else 0
    factors = model.factors if model.name in ("gmf", "neumf", "mf") and not config.shares_negatives else 1
    return hidden + 2 * factors


def check_memory(config: Config, n_users: int, n_items: int, rows: int, file_rows: int, device: str = "cpu") -> None:
    """Refuse a training that cannot fit where this process runs. device: as in `World`. Raises ConfigError with the
    arithmetic."""
    on_gpu = device != "cpu"
    ranks = 1 if on_gpu or config.train.launcher == "none" else config.train.ranks
    parts = {what: size * ranks for what, size in memory_parts(config, n_users, n_items, rows, file_rows).items()}
    if not on_gpu:
        copies = 2 + MOMENTS[config.train.optimiser]
        parts["a checkpoint being written, once"] = 4 * copies * parameter_count(config.model, n_users, n_items)
    have = torch.cuda.get_device_properties(device).total_memory if on_gpu else machine.memory()
    limit = config.train.max_model_bytes or int(have * MEMORY_SHARE)
    needed = sum(parts.values())
    if needed > limit:
        lines = " + ".join(f"{what}: {size / 2**30:.2f} GiB" for what, size in parts.items() if size)
        raise ConfigError(
            f"model {config.model.name} for {n_users:,} users and {n_items:,} items needs {needed / 2**30:.2f} GiB on "
            f"this {'GPU' if on_gpu else 'machine'}, {ranks} rank(s): {lines}; at most {limit / 2**30:.2f} GiB can be "
            "had: lower model.factors or model.layers, train.batch_size, loader.shuffle_files or train.ranks, set "
            "train.optimiser=sgd (one moment), or train on a machine with more memory"
        )
