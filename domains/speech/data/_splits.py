"""Splits that depend on who speaks and what is said, never on a seed, a file order or the clock."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence

from common.errors import GraftError
from common.splits import SPLITS, Split, cut_ranking, stable_hash


def split_by_group(groups: Sequence[str], strata: Sequence[str], fractions: Mapping[Split, float]) -> list[Split]:
    """Choose a split for each clip: groups are ranked by a hash, and the ranking is cut once a split.

    Args:
        groups: Group of each clip (a speaker, a text); a group is never torn apart.
        strata: Class of each clip, each with its share on every side; "" where there are none. A group belongs to
            the class that most of its clips have.
        fractions: Share of each split, in order; they add up to 1.

    Raises:
        GraftError: There are fewer groups than splits, in all or in a class.
    """
    members: dict[str, list[int]] = collections.defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    home: dict[str, list[str]] = collections.defaultdict(list)
    for group, positions in members.items():
        counts = collections.Counter(strata[p] for p in positions)
        home[min(counts, key=lambda name: (-counts[name], name))].append(group)
    sides: list[Split] = ["train"] * len(groups)
    for stratum in sorted(set(strata)):
        ranked = sorted(home[stratum], key=lambda group: (stable_hash(group), group))
        if len(ranked) < len(fractions):
            where = f" of class '{stratum}'" if stratum else ""
            raise GraftError(
                f"{len(ranked)} different speakers or texts{where} cannot be cut into {', '.join(fractions)}: give at "
                f"least {len(fractions)}, or state the split of each clip."
            )
        cuts = cut_ranking([len(members[group]) for group in ranked], list(fractions.values()))
        for side, (start, stop) in zip(fractions, itertools.pairwise([0, *cuts, len(ranked)]), strict=True):
            for position in itertools.chain.from_iterable(members[group] for group in ranked[start:stop]):
                sides[position] = side
    return sides


def part_texts(
    sides: Sequence[Split], texts: Sequence[str], fractions: Mapping[Split, float] | None
) -> list[Split | None]:
    """Let no text stand in two splits: None for each clip whose text belongs to another one.

    Args:
        sides: The split of each clip.
        texts: What is said in it.
        fractions: How a text that stands in several splits chooses between them, by a hash; None leaves it in the test
            if it is there, else in val: for splits that were given.
    """
    where: dict[str, set[Split]] = collections.defaultdict(set)
    for side, text in zip(sides, texts, strict=True):
        where[text].add(side)
    chosen = {text: _home(text, [s for s in SPLITS if s in found], fractions) for text, found in where.items()}
    return [side if chosen[text] == side else None for side, text in zip(sides, texts, strict=True)]


def _home(text: str, found: Sequence[Split], fractions: Mapping[Split, float] | None) -> Split:
    if fractions is None or len(found) == 1:
        return found[-1]
    place = stable_hash(text, "text") / 2**64 * sum(fractions[side] for side in found)
    for side, bound in zip(found, itertools.accumulate(fractions[side] for side in found), strict=True):
        if place < bound:
            return side
    return found[-1]
