"""One line: what was given, the nearest name, what is allowed."""

from __future__ import annotations

import pytest

from common.errors import GraftError, suggest, unknown

NAMES = ["LoRA", "IA3", "BitFit", "NormTuning"]


@pytest.mark.parametrize(
    ("given", "near"),
    [("lora", "LoRA"), ("LORA", "LoRA"), ("Bitfit", "BitFit"), ("normtuning", "NormTuning"), ("ia3", "IA3")],
)
def test_the_nearest_name_is_suggested(given, near):
    assert f"Did you mean '{near}'?" in suggest(given, NAMES)


def test_nothing_near_lists_all_sorted():
    assert suggest("xyzzy", NAMES) == " Allowed: BitFit, IA3, LoRA, NormTuning."


def test_an_exact_case_wins_over_another():
    assert "Did you mean 'ab'?" in suggest("abc", ["AB", "ab"])


@pytest.mark.parametrize("given", ["", "x\ny"])
def test_any_text_makes_one_error(given):
    error = unknown("method", given, NAMES)
    assert isinstance(error, GraftError)
    assert f"Unknown method '{given}'" in str(error)
    assert "Allowed: BitFit" in str(error)
