"""Splits that depend on what a case is, never on a seed, a file order or the clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from common.errors import GraftError
from common.splits import Split, stable_hash


def assign_splits(groups: Sequence[str], targets: Sequence[str], fractions: Mapping[Split, float]) -> list[Split]:
    """Choose a split for each case: groups are ranked by a hash, and the ranking of each class is cut.

    Args:
        groups: Group of each case (its subject, or its content); cases of one group stay together.
        targets: Class of each case; "" for all where cases have none.
        fractions: Share of each split; they add up to 1.

    Raises:
        GraftError: A class has fewer groups than there are splits.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    ranked: dict[str, list[str]] = defaultdict(list)
    for group in sorted(members, key=lambda group: (stable_hash(group), group)):
        ranked[targets[members[group][0]]].append(group)
    sides: list[Split] = ["train"] * len(groups)
    for target, ranking in sorted(ranked.items()):
        if len(ranking) < len(fractions):
            kind = f" of class '{target}'" if target else ""
            raise GraftError(
                f"{len(ranking)} different cases{kind} cannot be split into {', '.join(fractions)}: give at least "
                f"{len(fractions)}, or state the splits yourself."
            )
        for split, part in zip(fractions, _cut(ranking, [*fractions.values()]), strict=True):
            for group in part:
                for position in members[group]:
                    sides[position] = split
    return sides


def _cut(ranking: Sequence[str], fractions: Sequence[float]) -> list[Sequence[str]]:
    """Cut a ranking so that no part is empty."""
    parts: list[Sequence[str]] = []
    start, share = 0, 0.0
    for number, fraction in enumerate(fractions, start=1):
        share += fraction
        last = len(ranking) - (len(fractions) - number)
        stop = last if number == len(fractions) else min(max(round(share * len(ranking)), start + 1), last)
        parts.append(ranking[start:stop])
        start = stop
    return parts


def refuse_leaks(groups: Sequence[str], splits: Sequence[Split | None], ids: Sequence[str]) -> None:
    """Refuse a group that stands in two of the given splits.

    Raises:
        GraftError: It names the first such pair of cases.
    """
    first: dict[str, int] = {}
    for position, (group, split) in enumerate(zip(groups, splits, strict=True)):
        if split is None:
            continue
        other = first.setdefault(group, position)
        if splits[other] != split:
            raise GraftError(
                f"'{ids[other]}' ({splits[other]}) and '{ids[position]}' ({split}) are of one subject, or copies of "
                "one image: keep a subject in one split."
            )
