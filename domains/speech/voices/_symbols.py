"""How a voice reads text: as phonemes or as letters, each with its id."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import GraftError
from domains.speech.voices._espeak import phonemes

_SENTENCE, _CLAUSE = re.compile(r"(?<=[.!?])\s+"), re.compile(r"(?<=[,:;])\s+")
_SHOWN = 60  # characters of a text that an error cites


class Symbols(Protocol):
    """How a voice reads."""

    @property
    def example(self) -> tuple[str, str]:
        """Two short texts that the voice can say."""
        ...

    def spell(self, text: str) -> str:
        """Return the symbols of a text, one code point each.

        Raises:
            GraftError: A symbol that the voice has not, or none that is pronounced.
        """
        ...

    def encode(self, spelled: str) -> list[int]:
        """Return the ids of what `spell` returned, with those that separate, begin and end."""
        ...


@dataclass(frozen=True)
class Phonemes:
    """The IPA of espeak-ng by the map of a Piper voice.

    Ids: begin, pad, then each symbol followed by pad, and end.

    Attributes:
        ids: Code point to id, `^`, `_` and `$` among them for begin, pad and end.
        language: Voice of espeak-ng.
    """

    ids: Mapping[str, int]
    language: str

    @property
    def example(self) -> tuple[str, str]:
        """Two short texts: espeak-ng reads Latin letters in any language."""
        return "a", "to be"

    def spell(self, text: str) -> str:
        """Return the IPA of a text, decomposed (NFD); see `Symbols`."""
        spelled = unicodedata.normalize("NFD", phonemes(text, self.language))
        odd = sorted(set(spelled) - set(self.ids))
        if odd:
            raise no_phoneme(odd, self.language, text)
        return pronounced(text, spelled)

    def encode(self, spelled: str) -> list[int]:
        """Return the ids; see `Symbols`."""
        pad = self.ids["_"]
        inner = [number for symbol in spelled for number in (self.ids[symbol], pad)]
        return [self.ids["^"], pad, *inner, self.ids["$"]]


@dataclass(frozen=True)
class Letters:
    """The letters of a tokenizer of transformers (`VitsTokenizer`), as the voices of MMS read."""

    tokenizer: Any

    @property
    def example(self) -> tuple[str, str]:
        """Two short texts of the first letters of the alphabet."""
        known = sorted(letter for letter in self.tokenizer.get_vocab() if len(letter) == 1 and is_sound(letter))
        return known[0], "".join(known[:5])

    def spell(self, text: str) -> str:
        """Return the text as the tokenizer normalises it; see `Symbols`."""
        known = self.tokenizer.get_vocab()
        spelled = self.tokenizer.normalize_text(text) if self.tokenizer.normalize else text
        spelled = "".join(" " if letter.isspace() else letter for letter in spelled)
        odd = sorted({letter for letter in spelled if letter not in known and letter.isalnum()})
        if odd:
            raise GraftError(
                f"The voice has no letter {', '.join(map(repr, odd))}, and {cited(text)} has. Write numbers and signs "
                "out in words, in the script that the voice reads."
            )
        return pronounced(text, "".join(letter for letter in spelled if letter in known))

    def encode(self, spelled: str) -> list[int]:
        """Return the ids; see `Symbols`."""
        known = self.tokenizer.get_vocab()
        ids = [known[letter] for letter in spelled]
        return [0, *(number for each in ids for number in (each, 0))] if self.tokenizer.add_blank else ids


def pieces(spelled: str, most: int) -> list[str]:
    """Cut what is to be said at the ends of sentences, where too long then of clauses, then of words.

    Args:
        spelled: What `Symbols.spell` returned.
        most: Most symbols of a piece.

    Returns:
        Pieces in order; short sentences stay apart, so that each is said as one breath.
    """
    found = []
    for sentence in _SENTENCE.split(spelled):
        found += [sentence] if len(sentence) <= most else _joined(_CLAUSE.split(sentence), most)
    return [piece for piece in found if any(map(is_sound, piece))]


def _joined(clauses: list[str], most: int) -> list[str]:
    """Join clauses up to a length; a clause that is too long alone is cut between words, a word where it must be."""
    parts = []
    for clause in clauses:
        if len(clause) <= most:
            parts.append(clause)
            continue
        for word in clause.split(" "):
            parts += [word[at : at + most] for at in range(0, max(1, len(word)), most)]
    found = [""]
    for part in parts:
        longer = f"{found[-1]} {part}".strip()
        if len(longer) <= most:
            found[-1] = longer
        else:
            found.append(part)
    return found


@functools.cache
def is_sound(symbol: str) -> bool:
    """Whether a symbol is a letter, not a mark or a sign."""
    return unicodedata.category(symbol) in ("Ll", "Lu", "Lo", "Lt")  # modifiers (stress, length) are Lm and Sk


def pronounced(text: str, spelled: str) -> str:
    """Return what is spelled, or raise a `GraftError` that cites the text where nothing of it is said."""
    if not any(map(is_sound, spelled)):
        raise GraftError(f"There is nothing to pronounce in {cited(text)}. Give text with letters or numbers.")
    return spelled


def no_phoneme(odd: Sequence[str], language: str, text: str) -> GraftError:
    """Return the error that names phonemes which a voice has not, code points with their number."""
    named = ", ".join(f"'{one}' (U+{ord(one):04X})" if len(one) == 1 else f"'{one}'" for one in odd)
    return GraftError(
        f"The voice has no phoneme {named}, which espeak-ng ({language}) writes for {cited(text)}. "
        "Write the word otherwise, or take a voice of the text's language."
    )


def cited(text: str) -> str:
    """Return a text in quotes, short enough for an error."""
    short = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"'{short}'"
