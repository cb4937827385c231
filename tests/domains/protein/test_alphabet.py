from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import GraftError
from domains.protein._alphabet import ALPHABET, PAD, STANDARD, encode, looks_like_dna


@given(st.text(ALPHABET, min_size=1, max_size=50))
def test_numbers_are_positions_in_the_alphabet_in_either_case(sequence):
    assert encode(sequence) == [ALPHABET.index(letter) for letter in sequence] == encode(sequence.lower())


def test_the_alphabet_starts_with_the_standard_residues_and_has_each_letter_once():
    assert STANDARD == "".join(sorted(STANDARD))
    assert (len(STANDARD), len(set(ALPHABET)), PAD) == (20, 26, 26)
    assert ALPHABET.startswith(STANDARD)


def test_one_stop_at_the_end_is_left_out():
    assert encode("MKV*") == encode("MKV")


@pytest.mark.parametrize(
    ("sequence", "named"),
    [
        ("MK-V", "'-' at position 3 is no amino acid .*gap"),
        ("MK*V", r"'\*' at position 3 is no amino acid .*stop"),
        ("MKV**", r"'\*' at position 4"),
        ("1MKV", "'1' at position 1 .*write X"),
        ("MKVé", "'é' at position 4"),
        ("MK V", "' ' at position 3"),
        ("", "is empty"),
        ("*", "is empty"),
    ],
)
def test_other_letters_are_named_with_their_position(sequence, named):
    with pytest.raises(GraftError, match=named):
        encode(sequence)


def test_dna_is_recognised_by_its_letters_and_length():
    assert looks_like_dna("ACGT" * 5)
    assert looks_like_dna("acgun" * 4)
    assert not looks_like_dna("ACGT" * 4)
    assert not looks_like_dna("ACGT" * 5 + "M")
