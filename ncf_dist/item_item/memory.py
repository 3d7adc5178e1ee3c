"""What fitting on a Gram matrix takes: known before anything is fitted, and without torch."""

from __future__ import annotations

from ncf_dist.config import Ease
from ncf_dist.errors import ConfigError

COPIES = 3
"""Matrices of items x items, float64, at the worst moment of fitting: the Gram matrix, its factor, the inverse."""


def bytes_to_fit(n_items: int) -> int:
    """The most memory that fitting takes.

    >>> bytes_to_fit(1_000)
    24000000
    """
    return COPIES * 8 * n_items**2


def check_gram(ease: Ease, n_items: int) -> None:
    """Raise ConfigError where EASE would take more memory than `parts.ease.gram_bytes`."""
    needed = bytes_to_fit(n_items)
    if needed > ease.gram_bytes:
        raise ConfigError(
            f"parts has ease: {n_items:,} items x {n_items:,} items x 8 bytes x {COPIES} matrices = {needed:,} bytes; "
            f"parts.ease.gram_bytes allows {ease.gram_bytes:,}: raise it where this machine has that much, or leave "
            "parts.ease out"
        )
