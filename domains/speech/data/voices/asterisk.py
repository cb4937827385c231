"""The studio voice of the Asterisk telephone exchange: prompts labelled by the suite's own recogniser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from common.errors import GraftError
from common.splits import Split, joined, stable_hash
from domains.speech._text import normalize
from domains.speech.data._records import Record
from domains.speech.data.voices._prompts import PROMPT_PARTS, Prompt, prompts
from domains.speech.data.voices._records import VoiceSource
from domains.speech.data.voices.base import VoiceData

_ALIKE = 0.75  # share of the words of two texts that they have in common
_LEAST_WORDS = 4  # of a text that validates or tests


class AsteriskVoice(VoiceData):
    """English prompts of one professional female voice in studio quality, 16 kHz (G.722), F0 about 190 Hz.

    What the single words say (numbers, dates, letters, spelling alphabet: 107 clips) is known from their names. All
    other texts were heard by `whisper-tiny-en` at 30 s: they are PSEUDO-LABELS. A prompt is kept where the mean
    log-probability of its tokens is at least `min_confidence` and greedy and beam search wrote the same words; the
    rest is left out and counted. So the recordings kept are those that this recogniser understands, and its word error
    rate on them is 0 by construction: measure synthesised speech against that, and read it as agreement.

    Texts of at least four words are cut by phrase: those that share three quarters of their words, directly or over
    others, stand on one side. Shorter texts train. Test and validation are chosen by a hash.

    Args:
        min_confidence: Least mean log-probability of a pseudo-label's tokens, natural logarithm.
        words: Whether the single words train too.
        parts: How many of the sixteen parts of the package are read, 1 to 16: a first look labels few. A clip's
            side does not depend on it unless a phrase of another part ties phrases together.
        test_fraction: Share of the phrases of at least four words that test.
        val_fraction: Share of them that validates.
        **kwargs: See `VoiceData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        min_confidence: float = -0.35,
        words: bool = True,
        parts: int = PROMPT_PARTS,
        test_fraction: float = 0.35,
        val_fraction: float = 0.1,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1) or min_confidence >= 0:
            raise GraftError(
                f"{type(self).__name__}: val_fraction is {val_fraction} and test_fraction is {test_fraction} (both "
                f"above 0, their sum below 1), min_confidence is {min_confidence} (below 0). Mend the one out of range."
            )
        if not 1 <= parts <= PROMPT_PARTS:
            raise GraftError(f"{type(self).__name__}: parts is {parts}; give a whole number from 1 to {PROMPT_PARTS}.")
        self.min_confidence, self.words, self.parts = min_confidence, words, parts
        self.test_fraction, self.val_fraction = test_fraction, val_fraction

    def _read(self) -> VoiceSource:
        found, silent = prompts(parts=self.parts)
        left_out: Counter[str] = Counter({"silence": silent})
        kept = [prompt for prompt in found if self._trusted(prompt, left_out)]
        sides = phrase_sides([prompt.text for prompt in kept], {"test": self.test_fraction, "val": self.val_fraction})
        splits: dict[Split, list[Record]] = {"train": [], "val": [], "test": []}
        for prompt, side in zip(kept, sides, strict=True):
            splits[side].append(
                Record(
                    id=prompt.id,
                    path=prompt.path,
                    text=prompt.text,
                    speaker=SPEAKER,
                    seconds=prompt.seconds,
                    content=prompt.content,
                )
            )
        return VoiceSource(
            splits=splits,
            language="en",
            speaker=SPEAKER,
            pseudo={prompt.id: prompt.confidence for prompt in kept if prompt.pseudo},
            left_out=left_out,
        )

    def _trusted(self, prompt: Prompt, left_out: Counter[str]) -> bool:
        """Tell whether a prompt's text can be used; count why not."""
        why = ""
        if not prompt.pseudo:
            why = "" if self.words else "single words"
        elif not normalize(prompt.text, "lower"):
            why = "nothing was heard, or longer than the recogniser hears"
        elif not prompt.agreed:
            why = "greedy and beam search heard different words"
        elif prompt.confidence < self.min_confidence:
            why = f"recogniser less sure than {self.min_confidence:g}"
        left_out[why] += bool(why)
        return not why


SPEAKER = "Allison Smith"


def phrase_sides(texts: Sequence[str], fractions: Mapping[Split, float]) -> list[Split]:
    """Choose a split for each text, the same for texts that are alike.

    Texts of fewer than four words train, unless one like them is longer and chosen otherwise.

    Args:
        texts: What is said, as written.
        fractions: Share of the groups of texts of at least four words that each other split than `train` gets.
    """
    bags = [Counter(normalize(text, "english").split()) for text in texts]
    places = range(len(texts))
    ties: list[tuple[Hashable, Hashable]] = [(place, place) for place in places]
    ties += [(one, two) for one in places for two in range(one) if _alike(bags[one], bags[two])]
    group = joined(ties)
    names: dict[Hashable, str] = {}
    for place in places:  # a group is named by its first text, so that a set with more texts splits the others alike
        name = " ".join(sorted(bags[place].elements()))
        names[group[place]] = min(names.get(group[place], name), name)
    long = {group[place] for place in places if bags[place].total() >= _LEAST_WORDS}
    return [_side(names[group[place]], fractions) if group[place] in long else "train" for place in places]


def _alike(one: Counter[str], two: Counter[str]) -> bool:
    """Tell whether two bags of words share so many that one text gives the other away."""
    fewer, more = sorted((one.total(), two.total()))
    if fewer < _ALIKE * more:  # most pairs: the words that they share are no more than the shorter has
        return False
    return (one & two).total() >= _ALIKE * (one | two).total()


def _side(name: str, fractions: Mapping[Split, float]) -> Split:
    place = stable_hash(name, "phrase") / 2**64
    for side, share in fractions.items():
        if place < share:
            return side
        place -= share
    return "train"
