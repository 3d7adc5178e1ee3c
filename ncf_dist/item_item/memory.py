"""What fitting on a Gram matrix takes: known before anything is fitted, and without torch."""

from __future__ import annotations

COPIES = 3
"""Matrices of items x items, float64, at the worst moment of fitting: the Gram matrix, its factor, the inverse."""


def bytes_to_fit(n_items: int) -> int:
    """The most memory that fitting takes.

    >>> bytes_to_fit(1_000)
    24000000
    """
    return COPIES * 8 * n_items**2
