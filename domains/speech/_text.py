"""Texts in one spelling, so that a word error is an error in a word. The rule's name is part of every metric's name."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Mapping
from typing import Literal

from common.errors import unknown

Normalizer = Literal["none", "lower", "english", "characters"]

_APOSTROPHES = frozenset("'\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}")


def normalize(text: str, name: str) -> str:
    """Write a text by a rule.

    - "none": as it is, in NFC, with one space where there is white space.
    - "lower": lower case; every sign that is no letter, mark or digit is a space, but an apostrophe between two letters
      stays, and so do a point or comma between two digits. Accents stay: they tell words apart.
    - "english": the rule of Whisper's paper for English (Radford et al. 2022, appendix C): contractions and numbers in
      one spelling, no fillers; without its table of British spellings, which is a file of its own.
    - "characters": as "lower", with a space between all characters, so that a word error rate counts characters. For
      scripts that write no spaces.

    Numbers stay as they are written, "english" excepted: how a number is said cannot be known from it.

    Args:
        text: Any text.
        name: The rule.

    Returns:
        The text; "" if nothing is left of it.

    Raises:
        GraftError: There is no such rule.
    """
    if name not in NORMALIZERS:
        raise unknown("normalizer", name, NORMALIZERS)
    return NORMALIZERS[name](text)


def _none(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _lower(text: str) -> str:
    # Lower case first: it may split a letter into a letter and a mark.
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).lower())
    signs = [_kept(text, place) for place in range(len(text))]
    return " ".join("".join(signs).split())


def _kept(text: str, place: int) -> str:
    sign = text[place]
    if unicodedata.category(sign)[0] in "LMN":
        return sign
    before = text[place - 1] if place else " "
    after = text[place + 1] if place + 1 < len(text) else " "
    if sign in _APOSTROPHES and before.isalpha() and after.isalpha():
        return "'"
    if sign in ".," and before.isdigit() and after.isdigit():
        return sign
    # What is written but not seen (soft hyphens, marks of direction) parts no words.
    return "" if unicodedata.category(sign) == "Cf" else " "


def _english(text: str) -> str:
    return _whisper_english()(_none(text)).strip()


@functools.cache
def _whisper_english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def _characters(text: str) -> str:
    return " ".join(sign for sign in _clusters(_lower(text)) if sign != " ")


def _clusters(text: str) -> list[str]:
    """Split a text into characters, each with the marks that stand on it."""
    found: list[str] = []
    for sign in text:
        if found and unicodedata.category(sign)[0] == "M":
            found[-1] += sign
        else:
            found.append(sign)
    return found


NORMALIZERS: Mapping[str, Callable[[str], str]] = {
    "none": _none,
    "lower": _lower,
    "english": _english,
    "characters": _characters,
}
