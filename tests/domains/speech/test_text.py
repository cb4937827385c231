"""Texts in one spelling."""

# ruff: noqa: RUF001

from __future__ import annotations

import unicodedata

import pytest

from common.errors import GraftError
from domains.speech._text import NORMALIZERS, normalize


@pytest.mark.parametrize(
    ("text", "lower"),
    [
        ("¡Whisky!  ¿Qué\ttal?", "whisky qué tal"),
        ("Räuchermännchen – «Holz»", "räuchermännchen holz"),
        ("ΤΟ ΣΎΜΒΟΛΟ ΣΑΣ", "το σύμβολο σας"),
        ("Пирожное-корзиночка.", "пирожное корзиночка"),
        ("L’eau, c'est 'bon'", "l'eau c'est bon"),
        ("3.14 km, 1,000 m.", "3.14 km 1,000 m"),
        ("हिन्दी।", "हिन्दी"),
        ("co\u00adoperate", "cooperate"),
        ("...", ""),
    ],
)
def test_lower(text, lower):
    assert normalize(text, "lower") == lower


def test_none_keeps_capitals_and_signs():
    assert normalize("  Ah\n—  Né! ", "none") == "Ah — Né!"


def test_english_spells_contractions_and_numbers_one_way():
    assert normalize("I won't, um, pay twenty-five!", "english") == normalize("i will not pay 25", "english")


def test_characters_count_characters_with_their_marks():
    assert normalize("日本 語。", "characters") == "日 本 語"
    assert normalize("हिन्दी", "characters").split() == ["हि", "न्", "दी"]


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("text", ["¡Una RAÑA, dos!", "Ёлка — 9-й", "Είναι «καλό»", "日本語です。", ""])
def test_a_rule_is_idempotent_and_blind_to_composition(name, text):
    once = normalize(text, name)
    assert normalize(once, name) == once
    assert normalize(unicodedata.normalize("NFD", text), name) == once


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(GraftError, match=r"Unknown normalizer 'lowr'\. Did you mean 'lower'"):
        normalize("a", "lowr")
