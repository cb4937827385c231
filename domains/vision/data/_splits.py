"""Splits that depend on what an image is, never on a seed, a file order or the clock.

Images are ranked by a hash of their group and the ranking is cut once per split, class by class. So every class has its
share on every side, a group (an image and its near-duplicates) is never torn apart, and an image added later moves at
most its neighbours at a cut.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from common.errors import GraftError
from common.splits import cut_ranking, joined, stable_hash


def assign_splits(labels: Sequence[str], groups: Sequence[str], fractions: Mapping[str, float]) -> list[str]:
    """Choose a split for each image.

    Args:
        labels: Class of each image.
        groups: Group of each image; images of one group get one split, whatever their classes.
        fractions: Share of each split, in order; they add up to 1.

    Returns:
        The split of each image.

    Raises:
        GraftError: A class has fewer groups than there are splits.
    """
    members: dict[str, list[int]] = collections.defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    home: dict[str, list[str]] = collections.defaultdict(list)
    for group, positions in members.items():
        counts = collections.Counter(labels[p] for p in positions)
        home[min(counts, key=lambda label: (-counts[label], label))].append(group)
    sides = [""] * len(labels)
    too_small: list[str] = []
    for label in sorted(set(labels)):
        ranked = sorted(home[label], key=lambda group: (stable_hash(group), group))
        if len(ranked) < len(fractions):
            too_small.append(f"'{label}' ({len(ranked)})")
            continue
        cuts = cut_ranking([len(members[group]) for group in ranked], list(fractions.values()))
        for side, (start, stop) in zip(fractions, itertools.pairwise([0, *cuts, len(ranked)]), strict=True):
            for group in ranked[start:stop]:
                for position in members[group]:
                    sides[position] = side
    if too_small:
        raise GraftError(
            f"Too few different images to split into {', '.join(fractions)}: {', '.join(too_small)}. "
            f"Give every class at least {len(fractions)}, or leave the class out with `classes`."
        )
    return sides


def tied(contents: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Name what has to stay together: copies, and images of one stated group, directly or over others.

    Args:
        contents: Content of each image.
        groups: Group of each image; "" where none is stated.

    Returns:
        A name for each image, whatever the order of the images; its content where no group is stated at all.
    """
    if not any(groups):
        return [*contents]
    names = [f"content {content}" for content in contents]
    home = joined((name, f"group {group}" if group else name) for name, group in zip(names, groups, strict=True))
    return [str(home[name]) for name in names]


def near_duplicates(hashes: np.ndarray, mirrored: np.ndarray, max_distance: int) -> list[int]:
    """Group images whose perceptual hashes are near, directly or over others, mirror images included.

    Args:
        hashes: (N, bits) bool, one perceptual hash a row.
        mirrored: (N, bits) bool, the hashes of the mirrored images.
        max_distance: Largest Hamming distance, in bits, of a near-duplicate.

    Returns:
        For each image the position of its group's first image.
    """
    packed, flipped = (np.packbits(bits, axis=1) for bits in (hashes, mirrored))
    parent = list(range(len(hashes)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one in range(1, len(packed)):
        straight = np.bitwise_count(packed[:one] ^ packed[one]).sum(axis=1, dtype=np.int64)
        crossed = np.bitwise_count(packed[:one] ^ flipped[one]).sum(axis=1, dtype=np.int64)
        for other in np.flatnonzero(np.minimum(straight, crossed) <= max_distance):
            low, high = sorted((root(one), root(int(other))))
            parent[high] = low
    return [root(node) for node in range(len(hashes))]
