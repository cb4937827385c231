"""ARPAbet with stress, as English voices trained on the CMU dictionary read it, made of espeak-ng's IPA."""

# ruff: noqa: RUF001, RUF002
# They would have phonemes written otherwise.
from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import GraftError
from domains.speech.voices._espeak import phonemes
from domains.speech.voices._symbols import no_phoneme, pronounced

LANGUAGE = "en-us"  # of espeak-ng
END = "<sos/eos>"

# All that espeak-ng writes for American English, and what it writes for a foreign name now and then.
_VOWELS = {
    "ɑː": "AA", "ɑ": "AA", "æ": "AE", "ʌ": "AH", "ə": "AH", "ɐ": "AH", "ɔː": "AO", "ɔ": "AO", "oː": "AO",
    "aʊ": "AW", "aɪ": "AY", "ɛ": "EH", "ɜː": "ER", "ɜ": "ER", "ɚ": "ER", "eɪ": "EY", "ɪ": "IH", "ᵻ": "IH",
    "iː": "IY", "i": "IY", "oʊ": "OW", "ɔɪ": "OY", "ʊ": "UH", "uː": "UW", "u": "UW",
}  # fmt: skip
_CONSONANTS = {
    "b": "B", "tʃ": "CH", "d": "D", "ð": "DH", "f": "F", "ɡ": "G", "g": "G", "h": "HH", "dʒ": "JH", "k": "K",
    "x": "K", "l": "L", "ɫ": "L", "m": "M", "n": "N", "ŋ": "NG", "p": "P", "ɹ": "R", "r": "R", "s": "S", "ʃ": "SH",
    "t": "T", "ɾ": "T", "ʔ": "T", "θ": "TH", "v": "V", "w": "W", "j": "Y", "z": "Z", "ʒ": "ZH",
}  # fmt: skip
_SYLLABIC = {"n\u0329": "N", "m\u0329": "M", "l\u0329": "L"}
_REDUCED = frozenset("əɐᵻɚi")  # bear no stress where a word is named alone
_STRESS = {"ˈ": 1, "ˌ": 2}
_WEAK = {"ænd": ("AH0", "N", "D"), "ɪn": ("IH0", "N")}  # the two that the dictionary has unstressed
_MARKS = {";": ",", ":": ","}  # as the tokenizer rewrites them
_ENDS = ",.:;!?"
_SOUNDS = sorted((*_VOWELS, *_CONSONANTS, *_SYLLABIC), key=len, reverse=True)
_READ = re.compile("|".join((*map(re.escape, _SOUNDS), *_STRESS)))


@dataclass(frozen=True)
class Arpabet:
    """The phonemes of a `FastSpeech2ConformerTokenizer` by its vocabulary, without `g2p_en` and what that downloads.

    espeak-ng's IPA is rewritten sound by sound. Where the CMU dictionary, which such voices were trained on, writes
    otherwise than espeak-ng speaks, the dictionary is followed: a word without a stressed vowel is given the stress
    that it has alone ("through" is TH R UW1); an /r/ behind ER is left out at a word's end and before an unstressed
    vowel ("hurry" is HH ER1 IY0); `ɪ` before a vowel is IY ("idiot"); flaps and glottal stops are T. Marks that the
    vocabulary has are kept, others are dropped, and so are the spaces between words where it has none.

    Attributes:
        ids: Symbol to id: `AH0`, `,`, `<sos/eos>` and so on.
    """

    ids: Mapping[str, int]

    @property
    def example(self) -> tuple[str, str]:
        """Two short texts of common sounds."""
        return "a", "to be"

    def spell(self, text: str) -> str:
        """Return the IPA of a text with the marks that are kept; see `Symbols`."""
        found = unicodedata.normalize("NFC", phonemes(text, LANGUAGE))
        for mark in _ENDS:
            read = _MARKS.get(mark, mark)
            found = found.replace(mark, read if read in self.ids else "")
        spelled = " ".join(found.split())
        odd = sorted(set(_READ.sub("", spelled)) - {" ", *_ENDS})
        odd += sorted({symbol for symbol in self._symbols(spelled) if symbol not in self.ids})
        if odd:
            raise no_phoneme(odd, LANGUAGE, text)
        return pronounced(text, spelled)

    def encode(self, spelled: str) -> list[int]:
        """Return the ids, the end behind them; see `Symbols`."""
        return [*(self.ids[symbol] for symbol in self._symbols(spelled)), self.ids[END]]

    def _symbols(self, spelled: str) -> list[str]:
        found: list[str] = []
        for word in spelled.split():
            if found and " " in self.ids:
                found.append(" ")
            sounds = word.rstrip(_ENDS)
            found += [*arpabet(sounds), *word[len(sounds) :]]
        return found


def arpabet(word: str) -> list[str]:
    """Return the ARPAbet of a word in espeak-ng's IPA of American English, stress digits on its vowels."""
    if word in _WEAK:
        return list(_WEAK[word])
    sounds = _READ.findall(word)
    found: list[tuple[str, int | None]] = []  # symbol and stress, None for consonants
    bearing: list[int] = []  # places of vowels that may bear the word's stress
    stress = 0
    for place, sound in enumerate(sounds):
        after = sounds[place + 1] if place + 1 < len(sounds) else ""
        if sound in _STRESS:
            stress = _STRESS[sound]
        elif sound in _VOWELS:
            if sound not in _REDUCED:
                bearing.append(len(found))
            found.append(("IY" if sound == "ɪ" and after in _VOWELS else _VOWELS[sound], stress))
            stress = 0
        elif sound in _SYLLABIC:
            found += [("AH", 0), (_SYLLABIC[sound], None)]
        elif not (sound == "ɹ" and found and found[-1][0] == "ER" and (not after or after in _VOWELS)):
            found.append((_CONSONANTS[sound], None))
    if not any(level == 1 for _, level in found):
        secondary = [place for place, (_, level) in enumerate(found) if level == 2]
        for place in (secondary or bearing)[:1]:
            found[place] = (found[place][0], 1)
    return [symbol if level is None else f"{symbol}{level}" for symbol, level in found]


def read_arpabet(file: Path) -> Arpabet:
    """Read the vocabulary of a `FastSpeech2ConformerTokenizer` (`vocab.json`).

    Raises:
        GraftError: It is no such vocabulary.
    """
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraftError(f"{file} could not be read ({error}). Fetch it again.") from error
    if not isinstance(ids, dict) or not all(isinstance(number, int) for number in ids.values()):
        raise GraftError(f"{file} is no table of symbols and ids. Fetch it again.")
    lacking = [symbol for symbol in ("AH0", "T", END) if symbol not in ids]
    if lacking:
        raise GraftError(f"{file} has no {', '.join(lacking)}. Give a voice that reads ARPAbet with stress.")
    return Arpabet(ids)
