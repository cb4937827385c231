"""What a voice reads: espeak-ng's phonemes with the text's marks, letters, and lines cut into pieces."""

from __future__ import annotations

import pytest

from common.errors import GraftError
from domains.speech.voices import Phonemes, build_voice, pieces
from domains.speech.voices._espeak import phonemes
from tests.domains.speech.voices.nets import IPA, toy_folder

TOY = Phonemes({symbol: number for number, symbol in enumerate(IPA)}, "en-us")


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Hello, world! Well... yes; no: why?", ",!.;:?"),
        ("Hello world", ""),
        ('He said "no". (Yes!) It\'s fine.', ".!."),
        ("It costs 3.14 in the U.S. today.", "."),
        ("one — two", ","),
        ("Mr. Smith and Dr. Jones are in.", "."),
        ("See you at St.", "."),
        ("first\nsecond", ""),
    ],
)
def test_marks_stay_where_the_text_has_them(text, marks):
    found = phonemes(text, "en-us")
    assert "".join(letter for letter in found if letter in ",.:;!?") == marks
    assert found.replace(" ", "").strip(",.:;!?")


def test_each_sentence_sounds_as_it_does_alone():
    parts = ("The cat sat.", "Is it you?", "A big dog ran!")
    assert phonemes(" ".join(parts), "en-us") == " ".join(phonemes(part, "en-us") for part in parts)


def test_language_changes_the_sounds_and_leaves_no_flag():
    assert phonemes("chat", "fr") != phonemes("chat", "en-us")
    found = phonemes("le weekend parfait", "fr")
    assert "(" not in found


def test_an_unknown_language_is_refused():
    with pytest.raises(GraftError, match="no voice 'xx-yy'"):
        phonemes("a", "xx-yy")


def test_ids_are_laid_out_as_piper_does():
    number = TOY.ids
    assert TOY.encode("ab") == [number["^"], 0, number["a"], 0, number["b"], 0, number["$"]]


def test_a_phoneme_that_the_voice_has_not_is_named():
    with pytest.raises(GraftError, match=r"no phoneme 'ʃ' \(U\+0283\), which espeak-ng \(en-us\) writes for 'she'"):
        Phonemes({symbol: 1 for symbol in IPA if symbol != "ʃ"}, "en-us").spell("she")


@pytest.mark.parametrize("text", ["", "  ", "...", "?!", "-"])
def test_nothing_to_pronounce_is_refused(text, tmp_path):
    for symbols in (TOY, build_voice(toy_folder(tmp_path / "v")).symbols):
        with pytest.raises(GraftError, match="nothing to pronounce"):
            symbols.spell(text)


def test_letters_that_the_voice_has_not_are_named(tmp_path):
    symbols = build_voice(toy_folder(tmp_path / "v")).symbols
    assert symbols.spell("Bad Cab!") == "bad cab"
    with pytest.raises(GraftError, match="no letter '3', 'é'"):
        symbols.spell("a 3 é")


def test_a_line_of_two_thousand_words_is_cut_where_it_may_be():
    sentence = "The cat sat, and the dog ran off"
    line = ". ".join([sentence] * 250) + "."
    spelled = phonemes(line, "en-us")
    found = pieces(spelled, 120)
    assert len(found) == 250
    assert " ".join(found) == spelled
    long = " ".join(["cat"] * 2000)
    found = pieces(long, 100)
    assert all(len(piece) <= 100 for piece in found)
    assert " ".join(found) == long


def test_pieces_prefer_clauses_and_keep_a_word_whole_where_it_fits():
    assert pieces("aaa bbb, ccc ddd, eee", 11) == ["aaa bbb,", "ccc ddd,", "eee"]
    assert pieces("aaa bbb, ccc", 40) == ["aaa bbb, ccc"]
    assert pieces("aaaaaaaaaa bb", 4) == ["aaaa", "aaaa", "aa", "bb"]
    assert pieces("aa. !? bb.", 10) == ["aa.", "bb."]
