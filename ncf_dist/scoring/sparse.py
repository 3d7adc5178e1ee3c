"""The parts of a score that are no dot product: rows of a sparse item-item matrix, one for each item of a user's
history.

    score(u, b) += Σ_j share_j · value(a_j, b)     a_j: the user's latest items, oldest first; share_j: by their age

A block of scores gets its share before its best are looked for, so a list is exact. A cell adds up in the order of the
history, each product rounded before it is added: its bits depend on no block, call or partition, nor on whether the
compiled code (`sparse_rows.cpp`) or torch's operations add.

Letters: U users, L items looked back on, I items, P places, n slots of a history, E entries of a matrix.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ncf_dist import native
from ncf_dist.item_item.part import Part
from ncf_dist.item_item.rows import ItemRows
from ncf_dist.models import Sequences

LIBRARY = "ncf_dist.scoring._sparse_rows"


class Expansion:
    """A part over the places of a catalogue, a block of scores after another.

    Holds what the part's tensors hold, which are read where they are (those of a local bundle are memory-mapped), and
    16 bytes a slot of each user of a block. Without compiled code, 12 bytes an entry more.
    """

    def __init__(self, part: Part, places: Tensor | None, compiled: bool = True) -> None:
        """places: (I,) int32 on the part's device, the place of each item in the catalogue, ascending, -1 for an item
        that is not in it. None: every item is its own place. compiled: False for torch's operations."""
        self.rows, self.places = part.rows, places
        self.decay = part.decay.to(part.rows.values.device)
        self.total = torch.cat([self.decay.new_zeros(1), self.decay.double().cumsum(0).float()])
        """(last + 1,) what items of so many ages are worth together."""
        on_cpu = self.decay.device.type == "cpu"
        self.library = native.library(LIBRARY) if compiled and on_cpu else None
        if self.library is None:
            self.span, self.keys, self.values = _by_place(part.rows, places)

    def take(self, latest: Sequences) -> None:
        """The users of the next blocks."""
        age = torch.arange(min(len(self.decay), latest.items.shape[1]), device=latest.length.device).flip(0)
        place = latest.length[:, None] - 1 - age
        item, there = latest.items.gather(1, place.clamp(min=0)), place >= 0
        self.shares = self.decay[age]
        if self.library is not None:
            offsets = self.rows.offsets
            self.at, self.end = (torch.where(there, offsets[item + step], 0).contiguous() for step in (0, 1))
        else:
            self.first = torch.where(there, item, self.rows.n_items).T.contiguous() * self.span
            self.at = torch.searchsorted(self.keys, self.first)

    def worth(self, latest: Sequences) -> Tensor:
        """(U, 1) what all of a user's slots are worth together: the user's side of the part's column."""
        return self.total[latest.length.clamp(max=len(self.decay))][:, None]

    def column(self, items: Tensor) -> Tensor:
        """(R,) item indexes → (R, 1) the items' side."""
        assert self.rows.column is not None
        return self.rows.column[items][:, None]

    def add(self, first: int, scores: Tensor) -> None:
        """Add to scores (U, width) of the places from `first` on. Blocks come in ascending order of place, none left
        out."""
        if self.library is None:
            self._add(first, scores)
            return
        assert scores.is_contiguous()
        users, slots = self.at.shape
        tensors = (self.rows.items, self.rows.values, self.places, self.shares, self.end, self.at)
        self.library.add_sparse_rows(
            *(None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            *map(ctypes.c_int64, (users, slots, first, first + scores.shape[1])),
            ctypes.c_void_p(scores.data_ptr()),
            ctypes.c_int64(scores.shape[1]),
        )

    def _add(self, first: int, scores: Tensor) -> None:
        """The same, with torch's operations: the entries of a slot are of different cells, so they add at once."""
        end = torch.searchsorted(self.keys, self.first + min(first + scores.shape[1], self.span))
        size, began = (end - self.at).flatten(), self.at.flatten()
        self.at = end
        ends = size.cumsum(0)
        pair = torch.arange(len(size), device=size.device).repeat_interleave(size)
        entry = torch.arange(len(pair), device=size.device) + (began - ends + size)[pair]
        slot, user = pair // len(scores), pair % len(scores)
        cell = user * scores.shape[1] + self.keys[entry] % self.span - first
        added, flat = self.values[entry] * self.shares[slot], scores.view(-1)
        by_slot = size.view(len(self.shares), -1).sum(1).cpu().tolist()
        for cells, values in zip(cell.split(by_slot), added.split(by_slot), strict=True):
            flat[cells] += values


def _by_place(rows: ItemRows, places: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """(span, keys (E,) int64, values (E,)) of the entries whose item has a place: row · span + place, ascending."""
    row = torch.arange(rows.n_items, device=rows.items.device).repeat_interleave(rows.offsets.diff())
    place, values = rows.items.long() if places is None else places[rows.items.long()].long(), rows.values
    there = place >= 0
    span = max(1, rows.n_items)
    return span, (row * span + place)[there], values[there]


def moved(part: Part, device: torch.device) -> Part:
    """The part with its tensors on `device`."""
    rows = part.rows
    column = None if rows.column is None else rows.column.to(device)
    return replace(part, rows=ItemRows(rows.offsets.to(device), rows.items.to(device), rows.values.to(device), column))
