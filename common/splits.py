"""The three splits of a set, and hashes that choose them alike everywhere."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def stable_hash(text: str, salt: str = "") -> int:
    """Hash a text to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest(), "big")
