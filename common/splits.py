"""The three splits of a set, and hashes that choose them alike everywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate
from typing import Literal

from common.errors import GraftError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def stable_hash(text: str, salt: str = "") -> int:
    """Hash a text to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest(), "big")


def cut_ranking(sizes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Choose where to cut a ranking of groups so that no part is empty and each is as near its share as can be.

    Args:
        sizes: Members of each group, in the order of the ranking; as many groups as parts or more.
        fractions: Share of each part; they add up to 1.

    Returns:
        For each cut the number of groups before it.
    """
    running = list(accumulate(sizes))
    cuts: list[int] = []
    for number, share in enumerate(accumulate(fractions[:-1]), start=1):
        first = cuts[-1] + 1 if cuts else 1
        last = len(sizes) - (len(fractions) - number)
        wanted = share * running[-1]
        cuts.append(min(range(first, last + 1), key=lambda cut, wanted=wanted: abs(running[cut - 1] - wanted)))
    return cuts


def joined(ties: Iterable[tuple[Hashable, Hashable]]) -> dict[Hashable, Hashable]:
    """Join keys that are tied, directly or over others; each is mapped to the first of its group by `repr`."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for one, other in ties:
        low, high = sorted((root(one), root(other)), key=repr)
        parent[high] = low
    return {key: root(key) for key in [*parent]}


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
