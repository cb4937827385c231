"""Tiny protein networks with random weights, and batches of random proteins."""

from __future__ import annotations

from domains.protein.specimens import SIZES, proteins, tiny_esm, tiny_unirep

__all__ = ["SIZES", "WIDTH", "proteins", "tiny"]

WIDTH = {"esm2": 16, "esm1b": 16, "unirep": 6}


def tiny(key, seed=0):
    """A backbone of two blocks, in eval mode."""
    return tiny_unirep(WIDTH[key], seed) if key == "unirep" else tiny_esm(SIZES[key], seed, key)
