"""Clusters against all pairs written out, and splits that no similar pair crosses."""

from __future__ import annotations

import itertools
import random
import stat
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from common.errors import GraftError
from domains.protein._alphabet import STANDARD
from domains.protein.data._records import Record
from domains.protein.data._similarity import (
    PEPTIDES,
    PROTEINS,
    cluster,
    leak_score,
    nearest,
    rule_for,
    shuffled_sides,
    split_by_cluster,
)
from domains.protein.data._splitting import merge_copies, similarity_split

FRACTIONS = {"train": 0.5, "val": 0.15, "test": 0.35}


def kmers(sequence, k):
    return {sequence[n : n + k] for n in range(len(sequence) - k + 1)}


def jaccard(one, other, k=3):
    a, b = kmers(one, k), kmers(other, k)
    return len(a & b) / len(a | b) if a | b else 0.0


def drawn(rng, length):
    return "".join(rng.choices(STANDARD, k=length))


def mutated(rng, sequence, changes):
    letters = list(sequence)
    for place in rng.sample(range(len(letters)), changes):
        letters[place] = rng.choice(STANDARD)
    return "".join(letters)


def family(seed, count, members, length, changes):
    rng = random.Random(seed)
    parents = [drawn(rng, length) for _ in range(count)]
    return [mutated(rng, parent, changes) for parent in parents for _ in range(members)]


def reference(sequences, linked):
    part = list(range(len(sequences)))
    for one, other in itertools.combinations(range(len(sequences)), 2):
        if linked(sequences[one], sequences[other]):
            old, new = part[other], part[one]
            part = [new if p == old else p for p in part]
    return part


def same_partition(one, other):
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def test_peptides_are_linked_by_the_jaccard_index_of_3mers():
    sequences = [*family(0, 12, 4, 25, 3), "AC", "AD"]
    assert rule_for(sequences) == PEPTIDES
    found = cluster(sequences)
    assert same_partition(found, reference(sequences, lambda a, b: jaccard(a, b) >= 0.2))
    assert 1 < len(set(found)) < len(sequences)


def test_proteins_are_linked_by_shared_6mers():
    sequences = family(1, 8, 4, 150, 40)
    assert rule_for(sequences) == PROTEINS

    def linked(one, other):
        a, b = kmers(one, 6), kmers(other, 6)
        return len(a & b) >= 3 and len(a & b) >= 0.05 * min(len(a), len(b))

    found = cluster(sequences)
    assert same_partition(found, reference(sequences, linked))
    assert 1 < len(set(found)) < len(sequences)


def test_a_cluster_is_named_by_its_content_whatever_the_order():
    sequences = family(2, 6, 3, 25, 3)
    names = dict(zip(sequences, cluster(sequences), strict=True))
    assert names == dict(zip(sequences[::-1], cluster(sequences[::-1]), strict=True))


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 30)), min_size=1, max_size=80))
@settings(max_examples=80, deadline=None)
def test_clusters_stay_whole_no_split_is_empty_and_order_does_not_matter(items):
    labels, clusters = [label for label, _ in items], [str(number) for _, number in items]
    try:
        sides = split_by_cluster(clusters, labels, FRACTIONS)
    except GraftError:
        return
    by_cluster = defaultdict(set)
    for name, side in zip(clusters, sides, strict=True):
        by_cluster[name].add(side)
    assert all(len(found) == 1 for found in by_cluster.values())
    assert set(sides) == set(FRACTIONS)
    assert split_by_cluster(clusters[::-1], labels[::-1], FRACTIONS) == sides[::-1]


def test_every_class_has_its_share_on_every_side():
    labels = ["a"] * 200 + ["b"] * 80
    sides = split_by_cluster([str(n // 2) for n in range(280)], labels, FRACTIONS)
    counts = Counter(zip(labels, sides, strict=True))
    for label, total in (("a", 200), ("b", 80)):
        for side, share in FRACTIONS.items():
            assert counts[label, side] == pytest.approx(share * total, abs=3)


def test_a_large_cluster_goes_to_train():
    clusters = ["big"] * 30 + [str(n) for n in range(70)]
    sides = split_by_cluster(clusters, ["a"] * 100, FRACTIONS)
    assert set(sides[:30]) == {"train"}
    assert Counter(sides)["test"] == pytest.approx(35, abs=3)


def test_three_clusters_fill_three_splits_even_if_large():
    sides = split_by_cluster(["1"] * 5 + ["2"] * 5 + ["3"] * 5, ["a"] * 15, FRACTIONS)
    assert set(sides) == {"train", "val", "test"}


def test_classes_with_too_few_clusters_are_named():
    with pytest.raises(GraftError, match=r"train, val, test: 'b' \(2\)"):
        split_by_cluster([*"123456"], [*"aaaabb"], FRACTIONS)


def test_no_link_and_no_group_crosses_a_split():
    sequences = sorted(set(family(3, 40, 3, 25, 3)))
    records = [Record(str(n), s, "ab"[n % 2], group=f"g{n % 9}" if n < 30 else "") for n, s in enumerate(sequences)]
    sides = similarity_split(records, "classes", FRACTIONS)
    by_group = defaultdict(set)
    for record, side in zip(records, sides, strict=True):
        by_group[record.group].add(side)
    assert all(len(by_group[f"g{n}"]) == 1 for n in range(9))
    for (one, first), (other, second) in itertools.combinations(zip(sequences, sides, strict=True), 2):
        assert first == second or jaccard(one, other) < 0.2
    assert set(sides) == set(FRACTIONS)


def test_nearest_takes_the_largest_jaccard_index():
    references, queries = family(4, 6, 3, 30, 4), family(5, 2, 5, 30, 0) + family(4, 6, 1, 30, 2)
    for query, found in zip(queries, nearest(queries, references), strict=True):
        best = max(jaccard(query, reference) for reference in references)
        assert jaccard(query, references[found]) == pytest.approx(best)


def test_the_leak_is_the_score_of_the_nearest_neighbour():
    sequences = family(6, 20, 4, 30, 3)
    labels = [str(n // 4 % 2) for n in range(80)]
    values = [str(float(n // 4)) for n in range(80)]
    sides = ["test" if n % 4 == 0 else "train" for n in range(80)]
    trains = [n for n in range(80) if n % 4]
    hits = [max(trains, key=lambda t, n=n: jaccard(sequences[n], sequences[t])) for n in range(0, 80, 4)]
    assert leak_score(sequences, labels, sides) == np.mean(
        [labels[h] == labels[n] for h, n in zip(hits, range(0, 80, 4), strict=True)]
    )
    wanted = spearmanr([float(values[h]) for h in hits], [float(values[n]) for n in range(0, 80, 4)]).statistic
    assert leak_score(sequences, values, sides, values=True) == pytest.approx(wanted)
    assert leak_score(sequences, ["1.0"] * 80, sides, values=True) == 0


def test_shuffled_sides_have_the_same_sizes_and_do_not_depend_on_the_order():
    sequences = family(7, 30, 2, 20, 5)
    sides = ["train"] * 40 + ["val"] * 8 + ["test"] * 12
    dealt = shuffled_sides(sequences, sides)
    assert Counter(dealt) == Counter(sides)
    assert dealt != sides
    assert shuffled_sides(sequences[::-1], sides) == dealt[::-1]


def test_copies_are_merged_and_contradictions_dropped():
    records = [
        Record("1", "AAA", "x"), Record("2", "AAA", "x"), Record("3", "CCC", "x"), Record("4", "CCC", "y"),
        Record("5", "DDD", "y"), Record("6", "DDD", "y"),
    ]  # fmt: skip
    found = merge_copies(records, [None, None, None, None, "test", "train"], "classes")
    assert [(r.id, side) for r, side in zip(found.records, found.sides, strict=True)] == [("1", None), ("6", "train")]
    assert found.left_out == {"copies": 1, "copies across splits": 1, "contradictory labels": 2}


def test_a_pair_is_the_same_in_either_order():
    found = merge_copies([Record("1", "AA", "x", "CC"), Record("2", "CC", "x", "AA")], [None, None], "pairs")
    assert len(found.records) == 1


def test_values_of_copies_are_averaged_on_their_side_only():
    records = [Record("1", "AAA", "1"), Record("2", "AAA", "2"), Record("3", "AAA", "9")]
    found = merge_copies(records, ["train", "train", "test"], "value")
    assert [(r.label, side) for r, side in zip(found.records, found.sides, strict=True)] == [("1.5", "train")]


def test_mmseqs_is_asked_for_by_name_and_its_clusters_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraftError, match="no program `mmseqs`"):
        cluster(["AAAA", "CCCC"], "mmseqs2")
    program = tmp_path / "mmseqs"
    program.write_text('#!/bin/sh\n[ "$1" = easy-cluster ] && printf "0\\t0\\n0\\t2\\n1\\t1\\n" > "$3_cluster.tsv"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    assert cluster(["DDDD", "CCCC", "AAAA"], "mmseqs2") == ["AAAA", "CCCC", "AAAA"]
    program.write_text("#!/bin/sh\necho no memory >&2; exit 1\n")
    with pytest.raises(GraftError, match=r"failed \(no memory\)"):
        cluster(["AAAA", "CCCC"], "mmseqs2")
