"""What describes a user to a model of histories: the latest items, oldest first, and the coarse time between them.

Letters: R users, L items at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """items: (R, L) int64, oldest first, filled up with 0 on the right; gaps: (R, L) int64, `gaps.gap_code` of the time
    since the item before; length: (R,) int64, how many items are real."""

    items: Tensor
    gaps: Tensor
    length: Tensor

    def rows(self, which: slice | Tensor) -> Sequences:
        """Those of some users."""
        return Sequences(self.items[which], self.gaps[which], self.length[which])

    def last(self, most: int) -> Sequences:
        """The latest `most` items of each, as if what came before were not known: the first has no gap."""
        if self.items.shape[1] <= most:
            return self
        length, slot = self.length.clamp(max=most), torch.arange(most, device=self.length.device)
        place, there = slot + (self.length - length)[:, None], slot < length[:, None]
        items, gaps = (torch.where(there, part.gather(1, place), 0) for part in (self.items, self.gaps))
        return Sequences(items, torch.where(slot > 0, gaps, 0), length)

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(self.items.to(device), self.gaps.to(device), self.length.to(device))


@dataclass(frozen=True)
class Users:
    """Users as a scorer gets them. index: (R,) int64; latest: what they did last, None where nothing asks for it."""

    index: Tensor
    latest: Sequences | None = None

    def __len__(self) -> int:
        """R"""
        return len(self.index)

    def rows(self, which: slice | Tensor) -> Users:
        return Users(self.index[which], None if self.latest is None else self.latest.rows(which))

    def to(self, device: torch.device | str) -> Users:
        return Users(self.index.to(device), None if self.latest is None else self.latest.to(device))


@dataclass(frozen=True)
class Windows:
    """The histories of a training step, in groups of like length. groups: (R, T) each; known: (N,) int64, which of all
    their positions, one after another, have an item to be predicted."""

    groups: tuple[Sequences, ...]
    known: Tensor

    @property
    def padding(self) -> float:
        """The share of positions that hold no item."""
        return 1 - len(self.known) / sum(group.items.numel() for group in self.groups)
