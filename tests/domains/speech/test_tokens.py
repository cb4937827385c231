"""Texts to ids and back."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from common.errors import GraftError
from domains.speech.backbones import CharacterTokens, WhisperTokens
from tests.domains.speech.nets import byte_tokenizer


@pytest.fixture
def tokens():
    tokenizer = byte_tokenizer()
    return WhisperTokens(tokenizer, size=tokenizer.get_vocab_size() + 101, multilingual=False)


@pytest.mark.parametrize("text", ["a cab", "¿Qué?", "Привет, мир", "η γάτα", "中文"])
def test_every_script_comes_back_from_bytes(tokens, text):
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    assert tokens.decode([*tokens.start(), *ids, tokens.eos, tokens.no_timestamps + 5]) == text
    assert tokens.unwritable(text) == set()
    assert ids == tokens.encode(f"  {text} ")
    assert not {*tokens.start(), tokens.eos} & set(ids)


def test_tokens_survive_pickling(tokens):
    again = pickle.loads(pickle.dumps(tokens))
    assert again.encode("a cab") == tokens.encode("a cab")
    assert (again.start(), again.eos, again.size) == (tokens.start(), tokens.eos, tokens.size)


def test_times_cut_a_text_into_segments(tokens):
    first = tokens.no_timestamps + 1
    one, two = tokens.encode("one"), tokens.encode("two")
    assert tokens.segments([first, *one, first + 25, first + 30, *two, first + 50]) == [
        (0.0, 0.5, "one"),
        (pytest.approx(0.6), 1.0, "two"),
    ]
    assert tokens.segments([first + 10, *one]) == [(pytest.approx(0.2), pytest.approx(0.2), "one")]
    assert tokens.segments(one) == [(0.0, 0.0, "one")]
    assert tokens.segments([first, first + 5]) == []


def test_another_tokenizer_is_refused():
    words = Tokenizer(WordLevel({"a": 0}))
    with pytest.raises(GraftError, match=r"lacks <\|endoftext\|>.*none of Whisper's"):
        WhisperTokens(words, size=1, multilingual=False)


def test_a_vocabulary_of_characters_is_that_of_its_texts():
    tokens = CharacterTokens.of(["ab a", "ñ", ""])
    assert (tokens.characters, tokens.size, tokens.pad, tokens.eos) == (" abñ", 5, 0, None)
    assert tokens.encode("a ñ") == [2, 1, 4]
    assert tokens.decode([2, 1, 4, 0]) == "a ñ"
    assert tokens.unwritable("añx?") == {"x", "?"}
    assert tokens.encode("xA") == [2]
    assert tokens.collapse([0, 2, 2, 0, 2, 3, 3, 0]) == [2, 2, 3]
    assert CharacterTokens.of_characters(tokens.characters).encode("ab") == tokens.encode("ab")
    assert tokens.start("es") == ()


@pytest.mark.parametrize("characters", ["", "aba"])
def test_a_vocabulary_without_or_with_repeated_characters_is_refused(characters):
    with pytest.raises(GraftError, match="give at least one, and none twice"):
        CharacterTokens.of_characters(characters)


def test_no_texts_give_no_vocabulary():
    with pytest.raises(GraftError, match="give at least one"):
        CharacterTokens.of([])
