"""Characters as SpeechT5 reads them, by the vocabulary of a SentencePiece model that is read without its library."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import GraftError
from domains.speech.voices._symbols import cited, is_sound, pronounced

_SPACE = "\u2581"  # what SentencePiece writes for a space
_NORMAL, _CHARACTERS = 1, 4  # kinds of a piece and of a model
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of a model
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


@dataclass(frozen=True)
class Characters:
    """Single characters with a space in front of the line and an end behind it.

    Text is brought to Unicode's form NFKC, as SentencePiece's `nmt_nfkc` does, and numbers are written out in English
    words by transformers' own table. A capital that the vocabulary lacks becomes a small letter, and signs that it
    lacks are left out, where transformers would write `<unk>` for both.

    Attributes:
        ids: Character to id, `_SPACE` for the space.
        end: Id of the end.
    """

    ids: Mapping[str, int]
    end: int

    @property
    def example(self) -> tuple[str, str]:
        """Two short texts of the first letters of the alphabet."""
        known = sorted(letter for letter in self.ids if is_sound(letter) and letter.islower())
        return known[0], "".join(known[:5])

    def spell(self, text: str) -> str:
        """Return the characters that are read; see `Symbols`."""
        if any(letter.isdigit() for letter in text):
            text = _numbers()(text)
        spelled = " ".join(unicodedata.normalize("NFKC", text).split())
        spelled = "".join(letter if letter in self.ids else letter.lower() for letter in spelled)
        odd = sorted({letter for letter in spelled if letter not in self.ids and letter.isalnum()})
        if odd:
            raise GraftError(
                f"The voice has no letter {', '.join(map(repr, odd))}, and {cited(text)} has. Write it in the letters "
                "that the voice reads."
            )
        kept = "".join(letter for letter in spelled if letter in self.ids or letter == " ")
        return pronounced(text, " ".join(kept.split()))

    def encode(self, spelled: str) -> list[int]:
        """Return the ids; see `Symbols`."""
        return [*(self.ids[letter] for letter in f" {spelled}".replace(" ", _SPACE)), self.end]


def read_characters(file: Path) -> Characters:
    """Read a SentencePiece model of characters (`spm_char.model`).

    Raises:
        GraftError: It is no such model.
    """
    try:
        return _read(file.read_bytes())
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise GraftError(
            f"{file} is no SentencePiece model of single characters ({error}). Give a SpeechT5 with its own tokenizer."
        ) from error


def _read(data: bytes) -> Characters:
    ids: dict[str, int] = {}
    everything: dict[str, int] = {}
    kind = 0
    for field, value in _fields(data):
        if field == _PIECES and isinstance(value, bytes):
            piece = dict(_fields(value))
            text = bytes(piece[1]).decode()
            everything[text] = len(everything)
            if piece.get(3, _NORMAL) == _NORMAL and len(text) == 1:
                ids[text] = everything[text]
        elif field == _TRAINER and isinstance(value, bytes):
            kind = dict(_fields(value)).get(3, 0)
        elif field == _NORMALIZER and isinstance(value, bytes) and dict(_fields(value)).get(3, 1) != 1:
            raise ValueError("it puts no space in front")
    if kind != _CHARACTERS:
        raise ValueError("its pieces are no single characters")
    if _SPACE not in ids:
        raise ValueError("it has no space")
    return Characters(ids, everything["</s>"])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message of protocol buffers."""
    place = 0
    while place < len(data):
        tag, place = _number(data, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _number(data, place)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, place = _number(data, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if place + size > len(data):
            raise ValueError("it ends too early")
        yield tag >> 3, data[place : place + size]
        place += size


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of variable length and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


@functools.cache
def _numbers():  # noqa: ANN202  (a class of transformers)
    from transformers.models.speecht5.number_normalizer import EnglishNumberNormalizer

    return EnglishNumberNormalizer()
