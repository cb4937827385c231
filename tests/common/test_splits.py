"""Hashes that choose splits."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from common.errors import GraftError
from common.splits import check_share, cut_ranking, joined, stable_hash, take_share


def test_a_hash_is_the_first_64_bits_of_a_salted_blake2b():
    expected = hashlib.blake2b("salt\0é".encode(), digest_size=8).hexdigest()
    assert f"{stable_hash('é', 'salt'):016x}" == expected
    assert stable_hash("é") != stable_hash("é", "salt")


def test_a_hash_is_the_same_in_another_process():
    code = "from common.splits import stable_hash; print(stable_hash('a'))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(found) == stable_hash("a")


def test_a_ranking_is_cut_nearest_to_the_shares_and_no_part_is_empty():
    assert cut_ranking([1] * 10, [0.5, 0.2, 0.3]) == [5, 7]
    assert cut_ranking([8, 1, 1], [0.5, 0.25, 0.25]) == [1, 2]
    assert cut_ranking([1, 1, 8], [0.5, 0.25, 0.25]) == [1, 2]
    assert cut_ranking([3, 3, 3, 3], [0.7, 0.3]) == [3]


def test_a_share_is_of_each_class_and_less_is_a_part_of_more():
    ids, labels = [f"e{n}" for n in range(60)], ["a"] * 40 + ["b"] * 19 + ["c"]
    half, tenth = (take_share(ids, labels, share, "s") for share in (0.5, 0.1))
    assert [sum(labels[ids.index(name)] == label for name in half) for label in "abc"] == [20, round(9.5), 1]
    assert [sum(labels[ids.index(name)] == label for name in tenth) for label in "abc"] == [4, 2, 1]
    assert tenth < half
    assert take_share(ids, labels, 1.0, "s") == set(ids)
    assert take_share(ids, labels, 0.5, "other") != half
    assert take_share(ids[::-1], labels[::-1], 0.5, "s") == half


@pytest.mark.parametrize(("share", "shots"), [(0.0, None), (1.1, None), (0.5, 5)])
def test_what_is_no_share_or_one_too_many_is_refused(share, shots):
    with pytest.raises(GraftError, match=f"Toys: share is {share}"):
        check_share("Toys", share, shots)


def test_ties_join_directly_and_over_others():
    first = joined([("b", "1"), ("b", "2"), ("a", "2"), ("c", "3")])
    assert len({first["a"], first["b"], first["1"]}) == 1
    assert first["c"] != first["a"]
