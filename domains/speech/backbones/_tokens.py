"""How a backbone writes: the ids of a text, and the text of ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from common.errors import GraftError, unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_END, _START, _PLAIN, _TASK = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|transcribe|>"
TICK = 0.02
"""Seconds from one of Whisper's timestamps to the next."""


class TextTokens(Protocol):
    """How a backbone writes."""

    @property
    def size(self) -> int:
        """Number V of ids."""
        ...

    @property
    def pad(self) -> int:
        """The id behind the end of a text; for a CTC vocabulary its blank."""
        ...

    @property
    def eos(self) -> int | None:
        """The id that ends a text; None for a CTC vocabulary."""
        ...

    def start(self, language: str = "", *, timestamps: bool = False) -> tuple[int, ...]:
        """Return the ids that a decoder's input starts with; none for a CTC vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end. What cannot be written is left out."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; start, end, times, padding and blank write nothing."""
        ...

    def unwritable(self, text: str) -> set[str]:
        """Return the characters of a text that cannot be written."""
        ...


class WhisperTokens:
    """Whisper's byte pairs, with its ids of languages, tasks and times.

    A text is written with a space before it, as Whisper itself writes it.

    Args:
        tokenizer: The content of `tokenizer.json`.
        size: Number of ids that the network knows; times may have ids without a name in the tokenizer.
        multilingual: Whether the decoder is told the language.
        pad: The id behind the end of a text; None takes the one that ends it.

    Raises:
        GraftError: The tokenizer is not one of Whisper.
    """

    def __init__(self, tokenizer: Tokenizer, *, size: int, multilingual: bool, pad: int | None = None) -> None:
        self._tokenizer, self._size, self.multilingual = tokenizer, size, multilingual
        found = {name: tokenizer.token_to_id(name) for name in (_END, _START, _PLAIN, _TASK)}
        needed = (_END, _START, _PLAIN, *((_TASK,) if multilingual else ()))
        missing = [name for name in needed if found[name] is None]
        if missing:
            raise GraftError(
                f"The tokenizer lacks {', '.join(missing)}, so it is none of Whisper's. Take the folder's own "
                "tokenizer.json; one that is built from vocab.json and merges.txt has lost them."
            )
        self._special = found
        self._pad = found[_END] if pad is None else pad

    @property
    def size(self) -> int:
        """Number V of ids."""
        return self._size

    @property
    def pad(self) -> int:
        """The id behind the end of a text."""
        return self._pad

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        return self._special[_END]

    @property
    def no_timestamps(self) -> int:
        """The id that asks for a text without times; those of the times follow it."""
        return self._special[_PLAIN]

    def start(self, language: str = "", *, timestamps: bool = False) -> tuple[int, ...]:
        """Return the ids that the decoder's input starts with.

        Args:
            language: Language of the audio by its code (`es`); a model of English alone does not ask for it.
            timestamps: Whether times are to be written.

        Raises:
            GraftError: A model of many languages that is told none, or one that it does not know.
        """
        ids = [self._special[_START]]
        if self.multilingual:
            ids += [self._language(language), self._special[_TASK]]
        return (*ids, *(() if timestamps else (self.no_timestamps,)))

    def _language(self, language: str) -> int:
        if not language:
            raise GraftError("This Whisper knows many languages. State the data's language, such as 'es'.")
        found = self._tokenizer.token_to_id(f"<|{language}|>")
        if found is None or not self._special[_START] < found < self._special[_TASK]:
            first, last = self._special[_START] + 1, self._special[_TASK]
            names = [self._tokenizer.id_to_token(index) or "" for index in range(first, last)]
            raise unknown("language of Whisper", language, [name[2:-2] for name in names if len(name) in (6, 7)])
        return found

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return self._tokenizer.encode(f" {text.strip()}", add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; start, end, times and padding write nothing."""
        text = [index for index in ids if index < self.no_timestamps]
        return self._tokenizer.decode(text, skip_special_tokens=True).strip()

    def unwritable(self, text: str) -> set[str]:
        """Return the characters of a text that cannot be written: none, where the tokenizer falls back to bytes."""
        return {
            letter for letter in set(text) if not letter.isspace() and letter not in self.decode(self.encode(letter))
        }

    def segments(self, ids: Sequence[int]) -> list[tuple[float, float, str]]:
        """Cut ids with times into (start, end, text), in seconds of the audio that was encoded.

        A last stretch whose end was not written ends where it starts; text before the first time starts at 0.
        """
        found: list[tuple[float, float, str]] = []
        start, held = 0.0, []
        for index in ids:
            if index <= self.no_timestamps:
                held.append(index)
                continue
            time = (index - self.no_timestamps - 1) * TICK
            text = self.decode(held)
            if text:
                found.append((start, time, text))
            start, held = time, []
        text = self.decode(held)
        return [*found, (start, start, text)] if text else found


class CharacterTokens:
    """A CTC vocabulary of single characters.

    Args:
        ids: Character to id, where a space is what stands between words.
        blank: The id of CTC's blank.
        size: Number of ids, if there are more than the characters and the blank.
    """

    def __init__(self, ids: Mapping[str, int], *, blank: int = 0, size: int | None = None) -> None:
        self._ids, self._blank = dict(ids), blank
        self._letters = {index: letter for letter, index in self._ids.items()}
        self._size = max([blank, *self._ids.values()]) + 1 if size is None else size

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharacterTokens:
        """Build the vocabulary of all characters of some texts, in their order in Unicode behind the blank 0."""
        return cls.of_characters("".join(sorted(set().union(*texts))))

    @classmethod
    def of_characters(cls, characters: str) -> CharacterTokens:
        """Build the vocabulary of these characters, in this order behind the blank 0.

        Raises:
            GraftError: No character, or one twice.
        """
        if not characters or len(set(characters)) < len(characters):
            raise GraftError(f"A vocabulary of the characters {characters!r}: give at least one, and none twice.")
        return cls({letter: index for index, letter in enumerate(characters, start=1)})

    @property
    def characters(self) -> str:
        """The characters by their ids: what `of_characters` builds an equal vocabulary of, if the blank is 0."""
        return "".join(self._letters[index] for index in sorted(self._letters))

    @property
    def size(self) -> int:
        """Number V of ids."""
        return self._size

    @property
    def pad(self) -> int:
        """The blank."""
        return self._blank

    @property
    def eos(self) -> int | None:
        """None: the audio's end is the text's."""
        return None

    def start(self, language: str = "", *, timestamps: bool = False) -> tuple[int, ...]:
        """Return no ids."""
        return ()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; characters that cannot be written are left out, and case follows the vocabulary."""
        found = (self._id(letter) for letter in text)
        return [index for index in found if index is not None]

    def _id(self, letter: str) -> int | None:
        spellings = (letter, letter.upper(), letter.lower())
        return next((self._ids[spelling] for spelling in spellings if spelling in self._ids), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids that were collapsed already; the blank writes nothing."""
        return "".join(self._letters.get(index, "") for index in ids).strip()

    def collapse(self, ids: Sequence[int]) -> list[int]:
        """Take the best id of each feature: one of each run stays, and no blank."""
        return [index for index, _ in groupby(ids) if index != self._blank]

    def unwritable(self, text: str) -> set[str]:
        """Return the characters of a text that the vocabulary has not, in either case."""
        return {letter for letter in set(text) if self._id(letter) is None}
