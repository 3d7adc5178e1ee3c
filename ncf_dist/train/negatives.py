"""Negatives drawn on the model's device, by the hash that prepare draws them with: the same examples, and none stored.

A positive's negatives in epoch e are those of draw e (`ncf_dist/sampling.py`): uniform over the items its user has not
interacted with in train, found by rank in the user's sorted items. The train positives of all users are held on the
device: 8 bytes a row and 8 a user.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ncf_dist import sampling
from ncf_dist.sampling import IntArray, Purpose, hash64


class OnlineNegatives:
    """Draws for any train positive. user, item: (R,) all train positives, in any order, each once."""

    def __init__(self, seed: int, user: IntArray, item: IntArray, n_users: int, n_items: int, device: str) -> None:
        order = np.lexsort((item, user))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=n_users))]).astype(np.int64)
        gaps = sampling.seen_gaps(item[order].astype(np.int64), offsets, n_items + 1)
        self.seed, self.n_items = seed, n_items
        self.offsets, self.gaps = torch.from_numpy(offsets).to(device), torch.from_numpy(gaps).to(device)

    def draw(self, epoch: int, user: Tensor, item: Tensor, count: int) -> Tensor:
        """user, item: (B,) int64 positives → (B, count) int64, the slots of draw `epoch`."""
        key = sampling.prefix(self.seed, user, item)[:, None]
        slots = torch.arange(count, device=user.device)[None]
        drawn: Tensor = sampling.negatives_of(
            key, epoch, slots, user[:, None], self.gaps, self.offsets, self.n_items, torch.searchsorted
        )
        return drawn


def shared_items(seed: int, epoch: int, rows_used: int, count: int, n_items: int, device: str) -> Tensor:
    """(count,) items, uniform, that all rows of a step share, the same on all ranks. rows_used: how many rows of the
    epoch all ranks used before the step, which tells steps apart in any world."""
    slot = torch.arange(count, device=device)
    items: Tensor = hash64(slot, seed=hash64(seed, int(Purpose.SHARED_NEGATIVE), epoch, rows_used)) % n_items
    return items
