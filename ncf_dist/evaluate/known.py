"""Ranking by a model of an earlier night, which does not know all of tonight's users and items.

As score does: a user whom it does not know is ranked by the fallback, popularity; an item that it does not know is
offered to nobody, so it comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ncf_dist.bundle import Bundle
from ncf_dist.models import Users
from ncf_dist.scoring import Scores
from ncf_dist.scoring import blocks as kernel

if TYPE_CHECKING:
    from ncf_dist.evaluate.ranks import Judged, Score


def known_users(judged: Judged, bundle: Bundle) -> np.ndarray:
    """(U,) whether the model knows the user: `score.task_rows.known` says the same of a row."""
    if not bundle.by_history:
        known: np.ndarray = judged.users.index.numpy() < bundle.n_users
        return known
    seen = judged.seen
    return np.bincount(seen.row[seen.values < bundle.n_items], minlength=len(judged.users)) > 0


def where_known(model: Score, popular: Callable[[int], Scores], bundle: Bundle, n_items: int) -> Score:
    """Scores of tonight's `n_items`. model: of the bundle's. popular: of tonight's, for so many users."""

    def scores(judged: Judged) -> Scores:
        unknown = torch.from_numpy(~known_users(judged, bundle))
        # An index that the model has, for users whose scores are not looked at.
        users = Users(judged.users.index.masked_fill(unknown, 0))
        own, fallback = model(replace(judged, users=users)), popular(len(users))

        def of(items: Tensor) -> Tensor:
            found, known = fallback.of(items).clone(), items < bundle.n_items
            found[:, ~known] = -torch.inf
            if known.any():
                found[:, known] = torch.where(unknown[:, None], found[:, known], own.of(items[known]))
            return found

        def blocks() -> Iterator[Tensor]:
            nothing = torch.full((len(unknown), kernel.ITEMS), -torch.inf)
            pairs = zip(chain(own.blocks(), repeat(nothing)), fallback.blocks(), strict=False)
            for number, (block, other) in enumerate(pairs):
                other[:, max(0, bundle.n_items - number * kernel.ITEMS) :] = -torch.inf
                yield torch.where(unknown[:, None], other, block)

        return Scores(n_items, of, blocks, bundle.n_items)

    return scores
