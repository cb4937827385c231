"""Small English sets for measuring alone: read sentences and single words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from common import artifacts
from common.artifacts import Member
from common.errors import GraftError, unknown
from domains.speech._audio import decode_audio
from domains.speech._text import Normalizer
from domains.speech.data._prepared import Take, prepared
from domains.speech.data._records import Contents
from domains.speech.data.base import SpeechData

LIBRIVOX = "pocketsphinx-testdata"
_LIBRIVOX = "usr/share/pocketsphinx/test/data/librivox/"
ASTERISK = "asterisk-sounds-en"
_ASTERISK = "usr/share/asterisk/sounds/en_US_f_Allison/"

Part = Literal["numbers", "dates", "letters", "phonetic"]

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_DAYS = "sunday monday tuesday wednesday thursday friday saturday"
_MONTHS = "january february march april may june july august september october november december"
_SPELLING = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey x-ray yankee zulu"
)


def _words() -> dict[Part, dict[str, str]]:
    """Name what each recording says whose file name tells it."""
    ones = [*_ONES.split(), "eighteen", "nineteen"]
    tens = {str(10 * place): word for place, word in enumerate(_TENS.split(), start=2)}
    large = {word: word for word in ("hundred", "thousand", "million", "billion", "minus")}
    numbers = {str(place): word for place, word in enumerate(ones)} | tens | large
    dates = {f"day-{place}": word for place, word in enumerate(_DAYS.split())}
    dates |= {f"mon-{place}": word for place, word in enumerate(_MONTHS.split())}
    dates |= {word: word for word in ("today", "tomorrow", "yesterday")}
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        "numbers": {f"digits/{name}": word for name, word in numbers.items()},
        "dates": {f"digits/{name}": word for name, word in dates.items()},
        "letters": {f"letters/{letter}": letter for letter in letters},
        "phonetic": {f"phonetic/{word[0]}_p": word for word in _SPELLING.split()},
    }


PARTS: Mapping[Part, Mapping[str, str]] = _words()


class LibriVoxClips(SpeechData):
    """Five sentences of an English audio book with checked transcripts, 71 words: for testing only.

    An end-to-end check of a recogniser, and the English side of a forgetting measurement; one word is 1.4 points.

    Args:
        **kwargs: See `SpeechData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _test_only = True

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)

    def prepare_data(self) -> None:
        """Fetch the archive and decode the clips, once."""
        self._read()

    def _read(self) -> Contents:
        found = prepared("librivox-clips-1", LIBRIVOX, _librivox)
        return Contents(
            kind="text", splits={"train": (), "val": (), "test": found.records}, language="en", left_out=found.left_out
        )


class AsteriskWords(SpeechData):
    """Single English words of telephone prompts, one recording each, in one studio voice: for testing only.

    16 kHz as G.722, 0.5 to 1.2 seconds. What is said is known from the file's name alone, so prompts of several words
    are left out.

    Args:
        parts: Which words: "numbers" (33), "dates" (22: days, months, today), "letters" (26), "phonetic" (26: alpha to
            zulu).
        normalizer: "english", because recognisers write numbers as digits; see `SpeechData`.
        **kwargs: See `SpeechData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _test_only = True

    def __init__(
        self,
        parts: Sequence[Part] = ("numbers", "dates"),
        normalizer: Normalizer = "english",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(normalizer=normalizer, **kwargs)
        for part in parts:
            if part not in PARTS:
                raise unknown("part of the prompts", part, PARTS)
        if not parts:
            raise GraftError(f"{type(self).__name__}: parts is empty; choose some of {', '.join(PARTS)}.")
        self.parts = tuple(sorted(set(parts)))

    def prepare_data(self) -> None:
        """Fetch the archive and decode the clips, once."""
        self._read()

    def _name(self) -> str:
        return f"AsteriskWords:{'+'.join(self.parts)}"

    def _read(self) -> Contents:
        found = prepared("asterisk-words-1", ASTERISK, _asterisk)
        wanted = {name for part in self.parts for name in PARTS[part]}
        test = [record for record in found.records if record.id in wanted]
        return Contents(
            kind="text", splits={"train": (), "val": (), "test": test}, language="en", left_out=found.left_out
        )


def _librivox(left_out: dict[str, int]) -> Iterator[Take]:
    members = {m.name.removeprefix(_LIBRIVOX): m.data for m in _members(LIBRIVOX, _LIBRIVOX)}
    listed = (members.get("transcription") or b"").decode()
    for text, name in re.findall(r"^<s> (.*) </s> \((.*)\)$", listed, re.MULTILINE):
        yield Take(name, decode_audio(members[f"{name}.wav"] or b"", f"{name}.wav"), text)


def _asterisk(left_out: dict[str, int]) -> Iterator[Take]:
    said = {name: word for part in PARTS.values() for name, word in part.items()}
    for member in _members(ASTERISK, _ASTERISK):
        name = member.name.removeprefix(_ASTERISK).removesuffix(".g722")
        if member.data is not None and name in said:
            yield Take(name, decode_audio(member.data, member.name), said[name])
        else:
            left_out["without a transcript"] = left_out.get("without a transcript", 0) + 1


def _members(row: str, root: str) -> Iterator[Member]:
    return artifacts.iter_members(artifacts.fetch(row), root)
