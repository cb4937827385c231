"""The three splits of a set, and hashes that choose them alike everywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from common.errors import GraftError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def stable_hash(text: str, salt: str = "") -> int:
    """Hash a text to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest(), "big")


def check_share(name: str, share: float | None, shots: int | None) -> None:
    """Check the option `share` of a datamodule.

    Raises:
        GraftError: It is no share, or `shots` is given too.
    """
    if share is not None and not 0 < share <= 1:
        raise GraftError(f"{name}: share is {share} (above 0 and at most 1).")
    if share is not None and shots is not None:
        raise GraftError(f"{name}: share is {share} and shots is {shots}. Give one of them.")


def take_share(ids: Sequence[str], labels: Sequence[str], share: float, salt: str) -> set[str]:
    """Choose a share of each class's examples by a hash of their ids, at least one; less is a part of more.

    Args:
        ids: The examples' names.
        labels: Their classes.
        share: The share, above 0 and at most 1.
        salt: Another text, other examples.

    Returns:
        The names that are chosen.
    """
    counts, taken, kept = Counter(labels), Counter[str](), set[str]()
    for name, label in sorted(zip(ids, labels, strict=True), key=lambda pair: (stable_hash(pair[0], salt), pair[0])):
        if taken[label] < max(1, round(share * counts[label])):
            taken[label] += 1
            kept.add(name)
    return kept
