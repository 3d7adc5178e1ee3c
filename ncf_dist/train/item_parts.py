"""The item-to-item parts of a model's scores: made by one rank from what prepare wrote, of train rows alone.

Their weights are chosen on the validation rows, once training has ended (`part_weights.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import numpy as np

from ncf_dist import contracts
from ncf_dist.ancestry import index_sizes
from ncf_dist.config import Config
from ncf_dist.files import write_atomic
from ncf_dist.item_item.counts import follow_rows, train_rows_of
from ncf_dist.item_item.gram import ease, gram
from ncf_dist.item_item.memory import check_gram
from ncf_dist.item_item.part import Part
from ncf_dist.item_item.rows import largest
from ncf_dist.manifests import Manifest
from ncf_dist.models import Recommender
from ncf_dist.parquet import read_table
from ncf_dist.sampling import IntArray
from ncf_dist.train.loaders import verify_files
from ncf_dist.train.part_weights import Candidate, choose
from ncf_dist.train.world import World

log = logging.getLogger(__name__)


def parts_of(config: Config, prepare: Manifest, model: Recommender, record: str) -> list[Part]:
    """The parts that `config` names, with the weights that suit `model`; one whose weight is 0 is left out. How every
    combination did is written to `record`. Raises ContractError where a table is missing or damaged."""
    candidates = _made(config, prepare)
    choice = choose(model, candidates, prepare, config.seed, may_be_nothing=config.model.trained)
    write_atomic(record, json.dumps(choice.as_json(), indent=1).encode())
    log.info("weights of the item-to-item parts: %s (%s)", choice.weights, choice.chosen_by)
    chosen = (candidate.weighing(choice.weights[candidate.part.name]) for candidate in candidates)
    return [part for part in chosen if part.weight > 0]


def _made(config: Config, prepare: Manifest) -> list[Candidate]:
    parts, n_items = config.item_parts, index_sizes(prepare).items
    length, made = int(prepare.config["sequences"]["length"]), []
    if counts := parts.counts:
        tables = [list(_files(prepare, contract)) for contract in (contracts.NEXT_ITEMS, contracts.NEXT_TOTALS)]
        train_rows = train_rows_of((read_table(path) for path in tables[1]), n_items)
        rows = follow_rows((read_table(path) for path in tables[0]), train_rows, counts.smoothing)
        part = Part("counts", 1.0, counts.half_life, min(counts.last, length), rows)
        made.append(Candidate(part, counts.weights))
    if found := parts.ease:
        check_gram(found, n_items)
        matrix = ease(gram(train_histories(_files(prepare, contracts.INTERACTIONS)), n_items), found.ridge)
        part = Part("ease", 1.0, found.half_life, min(found.last, length), largest(matrix, found.kept))
        made.append(Candidate(part, found.weights))
    return made


def _files(prepare: Manifest, contract: contracts.Contract) -> list[str]:
    verify_files(prepare, contract, World())
    return prepare.files(contract.name)


def train_histories(interactions: list[str]) -> Iterator[tuple[IntArray, IntArray]]:
    """The train items of each user, a file of users at a time: (values (S,), offsets (users+1,))."""
    for path in interactions:
        table = read_table(path, ["user_idx", "item_idx", "split"])
        user, item, split = (table[name].to_numpy() for name in table.column_names)
        known = split == contracts.TRAIN_SPLIT
        _, sizes = np.unique(user[known], return_counts=True)
        yield item[known].astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
