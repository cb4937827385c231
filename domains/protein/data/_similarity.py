"""Which proteins are similar, splits that keep similar ones on one side, and how much a random split would flatter.

Two sequences are linked when they share many k-mers; a cluster is everything linked directly or over others, so that no
link crosses a split. This stands in for an alignment: evenly spread changes hide relatives below about 60 % identical
residues (peptides: 70 %). `mmseqs2` finds more of them, where that program is installed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from common.errors import GraftError
from common.splits import Split, stable_hash
from domains.protein._alphabet import ALPHABET, encode

Clusters = Literal["kmers", "mmseqs2"]
CLUSTERS: tuple[Clusters, ...] = ("kmers", "mmseqs2")

_PEPTIDE_LENGTH = 60
_ROWS = 512
# The data card compares at most so many test sequences with so many training sequences.
_MOST_QUERIES, _MOST_REFERENCES = 2000, 20_000


class Rule(NamedTuple):
    """When two sequences are linked.

    Attributes:
        k: Letters of a k-mer.
        share: Least share of k-mers in common.
        of: What it is a share of: of the k-mers of both ("union", the Jaccard index) or of the one that has fewer.
        least: Least number of k-mers in common.
    """

    k: int
    share: float
    of: Literal["union", "smaller"]
    least: int


PEPTIDES = Rule(k=3, share=0.2, of="union", least=1)
# Two unrelated proteins of 350 residues share a 6-mer once in 500 pairs, and three almost never.
PROTEINS = Rule(k=6, share=0.05, of="smaller", least=3)


def rule_for(sequences: Sequence[str]) -> Rule:
    """Choose the rule by the median length: peptides up to 60 residues share too few 6-mers to be compared by them."""
    return PEPTIDES if statistics.median(map(len, sequences)) <= _PEPTIDE_LENGTH else PROTEINS


def cluster(sequences: Sequence[str], method: Clusters = "kmers", rule: Rule | None = None) -> list[str]:
    """Group similar sequences.

    Args:
        sequences: Letters of `ALPHABET`.
        method: "kmers" links by shared k-mers; "mmseqs2" calls `mmseqs easy-cluster` at 30 % identity over 80 % of
            both sequences.
        rule: When k-mers link two sequences; by default chosen by length.

    Returns:
        For each sequence the first, in alphabetic order, of its cluster.

    Raises:
        GraftError: MMseqs2 is asked for and not installed, or fails.
    """
    if method == "mmseqs2":
        numbers = _mmseqs(sequences)
    else:
        numbers = _components(sequences, rule or rule_for(sequences))
    first: dict[int, str] = {}
    for number, sequence in zip(numbers, sequences, strict=True):
        first[number] = min(first.get(number, sequence), sequence)
    return [first[number] for number in numbers]


def split_by_cluster(clusters: Sequence[str], labels: Sequence[str], fractions: Mapping[Split, float]) -> list[Split]:
    """Choose a split for each record so that a cluster stays whole and every class has its share on every side.

    Clusters come in the order of a hash; each goes where its class (the most frequent one in it) is farthest below its
    share. A cluster larger than half the smallest share of its class goes to train: elsewhere it would rule the score.

    Args:
        clusters: Cluster of each record.
        labels: Class of each record; the same text for all where there are none.
        fractions: Share of each split; they add up to 1.

    Raises:
        GraftError: A class has fewer clusters than there are splits.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(clusters):
        members[name].append(position)
    homes: dict[str, list[str]] = defaultdict(list)
    for name in sorted(members, key=lambda name: (stable_hash(name), name)):
        counts = Counter(labels[position] for position in members[name])
        homes[min(counts, key=lambda label: (-counts[label], label))].append(name)
    small = sorted(label for label in set(labels) if len(homes[label]) < len(fractions))
    if small:
        named = ", ".join(f"'{label}' ({len(homes[label])})" if label else str(len(homes[label])) for label in small)
        raise GraftError(
            f"Too few groups of similar sequences to split into {', '.join(fractions)}: {named}. Give at least "
            f"{len(fractions)} of each class that are not similar, or state the splits yourself."
        )
    sides: list[Split] = ["train"] * len(clusters)
    for names in homes.values():
        for name, side in _fill({name: len(members[name]) for name in names}, fractions).items():
            for position in members[name]:
                sides[position] = side
    return sides


def _fill(sizes: Mapping[str, int], fractions: Mapping[Split, float]) -> dict[str, Split]:
    """Share out the clusters of one class, given in their order; no split stays empty."""
    total = sum(sizes.values())
    large = min(fractions.values()) * total / 2
    filled = dict.fromkeys(fractions, 0)
    # The order decides among equals, and the least share is served first, so that no side stays empty.
    sides = sorted(fractions, key=lambda side: fractions[side])
    found: dict[str, Split] = {}
    big = [name for name in sizes if sizes[name] > max(large, 1)]
    if len(sizes) - len(big) < len(fractions) - 1:
        big = []
    for name in [*big, *(name for name in sizes if name not in set(big))]:
        if name in big:
            side: Split = "train"
        else:
            empty = [side for side in sides if not filled[side]]
            left = len(sizes) - len(found)
            choice = empty if left <= len(empty) else sides
            side = min(choice, key=lambda side: (filled[side] + sizes[name] / 2) / (fractions[side] * total))
        found[name] = side
        filled[side] += sizes[name]
    return found


def nearest(queries: Sequence[str], references: Sequence[str], k: int = 3) -> np.ndarray:
    """Find for each query the reference with the largest Jaccard index of k-mers; the first among equals.

    Returns:
        int64 (queries,), positions in `references`.
    """
    table = _kmers([*queries, *references], k)
    sizes = np.diff(table.indptr)
    ours, theirs = table[: len(queries)], table[len(queries) :].T.tocsc()
    found = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS):
        block = ours[start : start + _ROWS]
        shared = (block @ theirs).toarray()
        union = np.diff(block.indptr)[:, None] + sizes[None, len(queries) :] - shared
        found[start : start + _ROWS] = (shared / np.maximum(union, 1)).argmax(axis=1)
    return found


def leak_score(sequences: Sequence[str], labels: Sequence[str], sides: Sequence[str], *, values: bool = False) -> float:
    """Score the nearest training sequence's label on the test sequences.

    Args:
        sequences: All sequences.
        labels: The class of each, or the value as text.
        sides: The split of each.
        values: Compare values by Spearman's correlation instead of classes by accuracy.
    """
    tests = _some(sequences, [n for n, side in enumerate(sides) if side == "test"], _MOST_QUERIES)
    trains = _some(sequences, [n for n, side in enumerate(sides) if side == "train"], _MOST_REFERENCES)
    hits = nearest([sequences[n] for n in tests], [sequences[n] for n in trains])
    guessed, true = [labels[trains[hit]] for hit in hits], [labels[n] for n in tests]
    if not values:
        return float(np.mean([one == other for one, other in zip(guessed, true, strict=True)]))
    from scipy.stats import rankdata

    ranks = [rankdata(np.array(column, dtype=float)) for column in (guessed, true)]
    if min(len(set(column)) for column in (guessed, true)) < 2:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def shuffled_sides(sequences: Sequence[str], sides: Sequence[str]) -> list[str]:
    """Deal the same splits out at random (by a hash of the sequence), whatever is similar."""
    order = sorted(range(len(sequences)), key=lambda n: (stable_hash(sequences[n], "random"), sequences[n]))
    dealt = [""] * len(sides)
    for position, side in zip(order, sorted(sides), strict=True):
        dealt[position] = side
    return dealt


def _some(sequences: Sequence[str], positions: Sequence[int], count: int) -> list[int]:
    if len(positions) <= count:
        return [*positions]
    return sorted(positions, key=lambda n: (stable_hash(sequences[n], "leak"), sequences[n]))[:count]


def _kmers(sequences: Sequence[str], k: int) -> sparse.csr_array:
    """Tell which k-mers each sequence holds: int32 (sequences, k-mers), 1 or 0."""
    rows, columns = [], []
    weights = len(ALPHABET) ** np.arange(k, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        if len(sequence) >= k:
            windows = np.lib.stride_tricks.sliding_window_view(np.array(encode(sequence), dtype=np.int64), k)
            found = np.unique(windows @ weights)
            columns.append(found)
            rows.append(np.full(len(found), row))
    if not columns:
        return sparse.csr_array((len(sequences), 1), dtype=np.int32)
    names, numbers = np.unique(np.concatenate(columns), return_inverse=True)
    ones = np.ones(len(numbers), dtype=np.int32)
    return sparse.csr_array((ones, (np.concatenate(rows), numbers)), shape=(len(sequences), len(names)))


def _components(sequences: Sequence[str], rule: Rule) -> list[int]:
    table = _kmers(sequences, rule.k)
    sizes = np.diff(table.indptr)
    other = table.T.tocsc()
    links: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(sequences), _ROWS):
        shared = (table[start : start + _ROWS] @ other).tocoo()
        one, two = shared.coords[0] + start, shared.coords[1]
        whole = sizes[one] + sizes[two] - shared.data if rule.of == "union" else np.minimum(sizes[one], sizes[two])
        near = (one < two) & (shared.data >= rule.least) & (shared.data >= rule.share * whole)
        links.append((one[near], two[near]))
    one, two = (np.concatenate([pair[side] for pair in links]) for side in (0, 1))
    graph = sparse.coo_array((np.ones(len(one), dtype=bool), (one, two)), shape=(len(sequences),) * 2)
    return [int(number) for number in connected_components(graph, directed=False)[1]]


def _mmseqs(sequences: Sequence[str]) -> list[int]:
    program = shutil.which("mmseqs")
    if program is None:
        raise GraftError('clusters is "mmseqs2", and there is no program `mmseqs`: install MMseqs2, or use "kmers".')
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fasta = folder / "all.fasta"
        fasta.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
        command = [program, "easy-cluster", str(fasta), str(folder / "found"), str(folder / "tmp")]
        options = ["--min-seq-id", "0.3", "-c", "0.8", "--cluster-mode", "1", "-v", "1"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        table = folder / "found_cluster.tsv"
        if done.returncode or not table.is_file():
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise GraftError(f'`mmseqs easy-cluster` failed ({said}): mend the installation, or use clusters: "kmers".')
        numbers = list(range(len(sequences)))
        for line in table.read_text().splitlines():
            representative, member = map(int, line.split("\t"))
            numbers[member] = representative
        return numbers
