"""From labelled records to three splits: copies merged, contradictions dropped, similar proteins kept together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from common.splits import SPLITS, Split
from domains.protein.data._records import Contents, Kind, Record
from domains.protein.data._similarity import Clusters, cluster, leak_score, shuffled_sides, split_by_cluster


class Merged(NamedTuple):
    """Records without copies.

    Attributes:
        records: What is left.
        sides: The split that each was given; None where none was.
        left_out: What was merged or dropped, in words, with counts.
    """

    records: list[Record]
    sides: list[Split | None]
    left_out: dict[str, int]


def merge_copies(records: Sequence[Record], sides: Sequence[Split | None], kind: Kind) -> Merged:
    """Keep each sequence (or pair, in either order) once.

    A copy in two splits stays on the side nearest to train. Sequences with different labels are dropped; different
    values of one sequence are averaged.
    """
    order = sorted(range(len(records)), key=lambda n: SPLITS.index(sides[n] or "train"))
    copies: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position in order:
        record = records[position]
        copies[tuple(sorted((record.sequence, record.second)))].append(position)
    kept: dict[int, Record] = {}
    left_out = dict.fromkeys(("copies", "copies across splits", "contradictory labels", "values averaged"), 0)
    for positions in copies.values():
        first = records[positions[0]]
        labels = [records[position].label for position in positions]
        across = sum(sides[position] != sides[positions[0]] for position in positions)
        if len(set(labels)) > 1 and kind != "value":
            left_out["contradictory labels"] += len(positions)
            continue
        left_out["copies across splits"] += across
        left_out["copies"] += len(positions) - 1 - across
        if len(set(labels)) > 1:
            # Only copies on the same side: a test value must not reach training.
            same = [float(records[p].label) for p in positions if sides[p] == sides[positions[0]]]
            left_out["values averaged"] += 1
            first = Record(first.id, first.sequence, repr(float(np.mean(same))), first.second, first.group)
        kept[positions[0]] = first
    chosen = sorted(kept)
    found = {why: count for why, count in left_out.items() if count}
    return Merged([kept[n] for n in chosen], [sides[n] for n in chosen], found)


def similarity_split(
    records: Sequence[Record], kind: Kind, fractions: Mapping[Split, float], clusters: Clusters | None = "kmers"
) -> list[Split]:
    """Split records so that neither similar sequences nor a stated group stand in two splits.

    Args:
        records: Records without copies.
        kind: Classes are stratified, other labels are not.
        fractions: Share of each split.
        clusters: How similar sequences are found; None takes every sequence by itself.

    Raises:
        GraftError: There are too few clusters.
    """
    sequences = [record.sequence for record in records]
    names = cluster(sequences, clusters) if clusters else sequences
    strata = [record.label if kind == "classes" else "" for record in records]
    return split_by_cluster(_joined(names, [record.group for record in records]), strata, fractions)


def data_card(
    records: Sequence[Record], sides: Sequence[Split], kind: Kind, name: str = "similarity"
) -> dict[str, float]:
    """Score the nearest neighbour under a random split and under the one in use; see `ProteinFacts.leak`."""
    if kind not in ("classes", "value"):
        return {}
    sequences, labels = [record.sequence for record in records], [record.label for record in records]
    found = {"random": shuffled_sides(sequences, sides), name: sides}
    return {how: round(leak_score(sequences, labels, under, values=kind == "value"), 4) for how, under in found.items()}


def contents(
    records: Sequence[Record],
    sides: Sequence[Split],
    kind: Kind,
    class_names: Sequence[str],
    left_out: Mapping[str, int],
    leak: Mapping[str, float],
    skipped: int = 0,
) -> Contents:
    """Sort records into their splits, in the order of their ids."""
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for record, side in sorted(zip(records, sides, strict=True), key=lambda pair: pair[0].id):
        splits[side].append(record)
    return Contents(
        kind=kind, splits=splits, class_names=tuple(class_names), skipped=skipped, left_out=left_out, leak=leak
    )


def _joined(clusters: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Join clusters that share a stated group; each is named after the first of its clusters in alphabetic order."""
    if not any(groups):
        return [*clusters]
    names = sorted({*(f"c{name}" for name in clusters), *(f"g{group}" for group in groups if group)})
    number = {name: position for position, name in enumerate(names)}
    ends = [(number[f"c{name}"], number[f"g{g}"]) for name, g in zip(clusters, groups, strict=True) if g]
    one, two = zip(*ends, strict=True)
    graph = sparse.coo_array((np.ones(len(ends), dtype=bool), (one, two)), shape=(len(names),) * 2)
    parts = connected_components(graph, directed=False)[1]
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(int(parts[number[name]]), name)
    return [first[int(parts[number[f"c{name}"]])] for name in clusters]
