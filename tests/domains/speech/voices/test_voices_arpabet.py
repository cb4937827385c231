"""ARPAbet from espeak-ng's IPA, against what the CMU dictionary has."""

from __future__ import annotations

import json

import pytest

from common.errors import GraftError
from domains.speech.voices import _arpabet
from domains.speech.voices._arpabet import Arpabet, arpabet, read_arpabet
from tests.domains.speech.voices.mel_nets import PHONEMES

TOY = Arpabet({symbol: place for place, symbol in enumerate(PHONEMES)})


def read(text, symbols=TOY):
    """The symbols of a text, without the end."""
    named = {place: symbol for symbol, place in symbols.ids.items()}
    ids = symbols.encode(symbols.spell(text))
    assert named[ids[-1]] == "<sos/eos>"
    return " ".join(named[place] for place in ids[:-1])


@pytest.mark.parametrize(
    ("word", "dictionary"),
    [
        ("water", "W AO1 T ER0"),
        ("button", "B AH1 T AH0 N"),
        ("city", "S IH1 T IY0"),
        ("little", "L IH1 T AH0 L"),
        ("hurry", "HH ER1 IY0"),
        ("fire", "F AY1 ER0"),
        ("idiot", "IH1 D IY0 AH0 T"),
        ("church", "CH ER1 CH"),
        ("judge", "JH AH1 JH"),
        ("measure", "M EH1 ZH ER0"),
        ("thing", "TH IH1 NG"),
        ("father", "F AA1 DH ER0"),
        ("house", "HH AW1 S"),
        ("boy", "B OY1"),
        ("music", "M Y UW1 Z IH0 K"),
        ("about", "AH0 B AW1 T"),
        ("good", "G UH1 D"),
        ("years", "Y IH1 R Z"),
        ("more", "M AO1 R"),
        ("where", "W EH1 R"),
        ("photograph", "F OW1 T AH0 G R AE2 F"),
        ("photography", "F AH0 T AA1 G R AH0 F IY0"),
        ("tomorrow", "T AH0 M AA1 R OW0"),
        ("question", "K W EH1 S CH AH0 N"),
        # Words that espeak-ng leaves without stress, as they are in a sentence.
        ("the", "DH AH0"),
        ("and", "AH0 N D"),
        ("to", "T UW1"),
        ("with", "W IH1 DH"),
        ("which", "W IH1 CH"),
        ("through", "TH R UW1"),
        ("over", "OW1 V ER0"),
        ("any", "EH1 N IY0"),
    ],
)
def test_common_words_are_written_as_in_the_dictionary(word, dictionary):
    assert read(word) == dictionary


def test_words_stay_themselves_in_a_sentence():
    found = read("Her uncle came over in a car, and we hurried through.")
    assert found == (
        "HH ER1 AH1 NG K AH0 L K EY1 M OW1 V ER0 IH0 N AH0 K AA1 R , AH0 N D W IY1 HH ER1 IY0 D TH R UW1 ."
    )


def test_an_r_stays_before_a_stressed_vowel():
    assert arpabet("ˌoʊvɚɹˈeɪt") == "OW2 V ER0 R EY1 T".split()  # noqa: RUF001  (phonemes)


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("Yes, no!", "Y EH1 S , N OW1 !"),
        ("One; two: three?", "W AH1 N , T UW1 , TH R IY1 ?"),
        ('(He) said "yes".', "HH IY1 S EH1 D Y EH1 S ."),
    ],
)
def test_marks_are_those_of_the_tokenizer(text, symbols):
    assert read(text) == symbols


def test_marks_and_spaces_are_what_the_vocabulary_has():
    some = {symbol: place for place, symbol in enumerate((*PHONEMES, " ")) if symbol != ","}
    assert read("Yes, no. Go", Arpabet(some)) == "Y EH1 S   N OW1 .   G OW1"


def test_what_has_no_counterpart_is_named(monkeypatch):
    monkeypatch.setattr(_arpabet, "phonemes", lambda text, language: "yˈeːs")  # noqa: RUF001
    with pytest.raises(GraftError, match=r"no phoneme 'e' \(U\+0065\), 'y' \(U\+0079\), 'ː' .* \(en-us\).*'yes'"):  # noqa: RUF001
        TOY.spell("yes")
    monkeypatch.undo()
    fewer = Arpabet({symbol: place for symbol, place in TOY.ids.items() if symbol != "OY1"})
    with pytest.raises(GraftError, match="no phoneme 'OY1', which espeak-ng"):
        fewer.spell("a boy")
    for text in ("", "?!"):
        with pytest.raises(GraftError, match="nothing to pronounce"):
            TOY.spell(text)


def test_a_vocabulary_is_read_or_refused(tmp_path):
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps(TOY.ids))
    assert read_arpabet(file) == TOY
    for content, named in (
        ('{"a": 0, "b": 1}', r"has no AH0, T, <sos/eos>\. Give a voice that reads ARPAbet"),
        ('["a"]', "is no table of symbols and ids"),
        ("{", "could not be read"),
    ):
        file.write_text(content)
        with pytest.raises(GraftError, match=named):
            read_arpabet(file)
