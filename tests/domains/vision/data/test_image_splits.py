from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import GraftError
from common.splits import stable_hash
from domains.vision.data._splits import assign_splits, near_duplicates, tied

THREE = {"train": 0.5, "val": 0.15, "test": 0.35}


def test_stable_hash_never_changes():
    # Published splits rest on these bits: another value here is another split everywhere.
    assert stable_hash("a") == int.from_bytes(hashlib.blake2b(b"\0a", digest_size=8).digest(), "big")
    assert stable_hash("a", "b") == int.from_bytes(hashlib.blake2b(b"b\0a", digest_size=8).digest(), "big")


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 30)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_groups_stay_together_and_order_does_not_matter(items):
    labels, groups = [label for label, _ in items], [f"{group}" for _, group in items]
    try:
        sides = assign_splits(labels, groups, THREE)
    except GraftError:
        return
    by_group = defaultdict(set)
    for group, side in zip(groups, sides, strict=True):
        by_group[group].add(side)
    assert all(len(found) == 1 for found in by_group.values())
    assert set(sides) == set(THREE)
    again = assign_splits(labels[::-1], groups[::-1], THREE)
    assert again[::-1] == sides


def test_shares_are_met_in_every_class():
    labels = ["a"] * 100 + ["b"] * 40
    sides = assign_splits(labels, [str(n) for n in range(140)], THREE)
    assert Counter(zip(labels, sides, strict=True)) == {
        ("a", "train"): 50, ("a", "val"): 15, ("a", "test"): 35,
        ("b", "train"): 20, ("b", "val"): 6, ("b", "test"): 14,
    }  # fmt: skip


def test_an_added_image_moves_at_most_one_at_each_cut():
    names = [f"image {n}" for n in range(200)]
    before = dict(zip(names, assign_splits(["a"] * 200, names, THREE), strict=True))
    after = dict(zip([*names, "new"], assign_splits(["a"] * 201, [*names, "new"], THREE), strict=True))
    assert sum(before[name] != after[name] for name in names) <= 2


def test_three_images_fill_three_splits():
    assert sorted(assign_splits(["a"] * 3, ["1", "2", "3"], THREE)) == ["test", "train", "val"]


def test_too_few_images_are_named():
    with pytest.raises(GraftError, match=r"'b' \(2\), 'c' \(1\)"):
        assign_splits([*"aaaa", *"bb", *"cc"], ["1", "2", "3", "4", "5", "6", "7", "7"], THREE)


def test_near_duplicates_match_all_pairs_and_follow_chains():
    rng = np.random.default_rng(0)
    base = rng.random((6, 64)) < 0.5
    chain = base[:1].repeat(4, axis=0)
    for step in range(1, 4):
        chain[step, : 3 * step] ^= True  # each 3 bits from the one before, the last 9 from the first
    mirror = base[2:3]
    hashes = np.concatenate([base, chain[1:], ~base[:1]])
    mirrored = np.concatenate([~hashes[:-1] ^ (rng.random((9, 64)) < 0.5), mirror])
    found = near_duplicates(hashes, mirrored, max_distance=3)
    assert found[0] == found[6] == found[7] == found[8] == 0
    assert found[9] == 2  # its mirror image is near image 2
    assert [found[n] for n in (1, 3, 4, 5)] == [1, 3, 4, 5]
    # The reference: connected components over every pair.
    near = [
        (a, b)
        for a, b in itertools.combinations(range(10), 2)
        if min((hashes[a] ^ hashes[b]).sum(), (hashes[a] ^ mirrored[b]).sum()) <= 3
    ]
    component = list(range(10))
    for _ in range(10):
        for a, b in near:
            component[a] = component[b] = min(component[a], component[b])
    assert component == found


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_copies_and_stated_groups_are_joined_over_others_and_order_does_not_matter(items):
    contents, groups = [f"c{content}" for content, _ in items], [f"g{group}" if group else "" for _, group in items]
    found = tied(contents, groups)
    joined = [{place} for place in range(len(items))]
    for one, other in itertools.combinations(range(len(items)), 2):
        if contents[one] == contents[other] or (groups[one] and groups[one] == groups[other]):
            both = joined[one] | joined[other]
            for place in both:
                joined[place] = both
    for one, other in itertools.combinations(range(len(items)), 2):
        assert (found[one] == found[other]) == (other in joined[one])
    assert tied(contents[::-1], groups[::-1])[::-1] == found


def test_without_stated_groups_contents_are_what_they_were():
    assert tied(["b", "a", "b"], ["", "", ""]) == ["b", "a", "b"]
