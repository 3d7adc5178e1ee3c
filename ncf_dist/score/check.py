"""Does the table say what the model says? A few users' rows are read back from the written files and compared with the
trained model, pair by pair. The weights are read and verified again, the ids looked up again, and no scorer is used.

This finds scores of another model, a shifted item map and a scorer that ranks wrongly. publish reads no model, so it
cannot find these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ncf_dist.bundle import load_model, load_parts, verify_weights
from ncf_dist.contracts import in_long_form
from ncf_dist.item_item.part import Part, dense_scores
from ncf_dist.models import Recommender, Users
from ncf_dist.parquet import read_table
from ncf_dist.score.ranker import users_of
from ncf_dist.score.spec import ScorePass
from ncf_dist.spark_io import Pass

ITEMS_A_CALL = 16_384
TOLERANCE = {"fp32": 1e-4, "bf16": 2**-5}
"""Relative to a user's largest score: the scorer adds up in another order, and so rounds differently."""


def check_pass(spec: ScorePass, user_ids: dict[int, Any], files: tuple[str, ...]) -> Pass:
    """For mapInArrow: rows of contracts.HISTORY of the users to check, and `recent` where the model looks back. Their
    ids by index are `user_ids`, and their recommendations are in `files`. One row `problem` out for each user whose
    rows are wrong."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        torch.set_num_threads(1)
        users = [
            (row, users_of(batch.slice(n, 1), spec)) for batch in batches for n, row in enumerate(batch.to_pylist())
        ]
        if not users:
            return
        verify_weights(spec.bundle)
        model, parts = load_model(spec.bundle), load_parts(spec.bundle)
        catalogue = pa.concat_tables([read_table(path) for path in spec.item_files]).sort_by("item_idx")["item_id"]
        ids = catalogue.combine_chunks()
        wanted = pa.array(user_ids.values(), spec.contract.schema.field("user_id").type)
        tables = (read_table(path) for path in files)
        offers = pa.concat_tables([in_long_form(t.filter(pc.is_in(t["user_id"], value_set=wanted))) for t in tables])
        allowed, known = spec.lists.may(ids), spec.bundle.n_items
        allowed[known:] = False
        for user, described in users:
            user_id = user_ids[user["user_idx"]]
            mine = offers.filter(pc.equal(offers["user_id"], pa.scalar(user_id, wanted.type))).sort_by("rank")
            may = allowed.copy()
            may[[item for column in spec.masked for item in user[column]]] = False
            if problem := _problem(spec, mine, all_scores(model, parts, described, known), may, ids):
                yield pa.RecordBatch.from_pydict({"problem": [f"user_idx {user['user_idx']}: {problem}"]})

    return run


@torch.no_grad()
def all_scores(model: Recommender, parts: Sequence[Part], user: Users, n_items: int) -> np.ndarray:
    """(I,) the scores of one user, the model's as training computes them."""
    latest = user.latest
    described: Any = user.index if latest is None or not model.sequential else latest.last(model.history)
    some = torch.arange(n_items).split(ITEMS_A_CALL)
    scores = torch.cat([model(described, part).float() for part in some])
    for part in parts:
        assert latest is not None
        scores += dense_scores(part, latest.items, latest.length)[0]
    return scores.numpy()


def _problem(spec: ScorePass, rows: pa.Table, scores: np.ndarray, may: np.ndarray, ids: pa.Array) -> str | None:
    """What is wrong with a user's rows, in order of rank."""
    wanted = min(spec.config.k, int(may.sum()))
    if rows.num_rows != wanted:
        return f"{rows.num_rows} rows; needed {wanted}"
    given = rows["score"].to_numpy()
    item = pc.index_in(rows["item_id"], value_set=ids).to_numpy()
    if (item >= len(scores)).any():
        at = int(np.argmax(item >= len(scores)))
        return f"item {rows['item_id'][at].as_py()!r} has rank {at + 1}; the model knows nothing of it"
    best = np.sort(scores[may[: len(scores)]])[::-1][:wanted]
    slack = TOLERANCE[spec.products.precision] * float(np.abs(scores).max())
    for of, needed in (("the model gives this pair", scores[item]), ("the model's score at this rank is", best)):
        off = ~(np.abs(given - needed) <= slack)  # A score that is not a number is off, too.
        if off.any():
            at = int(np.argmax(off))
            stored = f"item {rows['item_id'][at].as_py()!r} has score {given[at]:.6g} at rank {at + 1}"
            return f"{stored}; {of} {needed[at]:.6g}"
    return None
