"""The volunteers' voices of the tuxpaint stamps, with true transcripts."""

from __future__ import annotations

from typing import Any

from domains.speech.data.stamps import StampSpeech
from domains.speech.data.voices._records import VoiceSource
from domains.speech.data.voices.base import VoiceData


class StampVoice(VoiceData):
    """Short phrases of nouns, read by volunteers in be, bg, ca, da, el, es, fr, ro or ru; true transcripts.

    Nearly each language has one voice and one microphone; Russian and Belarusian have the steadiest. The Spanish
    recordings are clipped and refused unless `check` is `warn`. Kept at 16 kHz, so nothing lies above 8 kHz. Splits
    are those of `StampSpeech`: no transcript on two sides.

    Args:
        language: be, bg, ca, da, el, es, fr, ro or ru.
        fold: Which fifth is the test, 0 to 4.
        **kwargs: See `VoiceData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, language: str = "ru", fold: int = 0, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.stamps = StampSpeech(language=language, fold=fold)

    def _name(self) -> str:
        return f"StampVoice:{self.stamps.language}:{self.stamps.fold}"

    def _read(self) -> VoiceSource:
        found = self.stamps._read()
        language = self.stamps.language
        return VoiceSource(
            splits=found.splits, language=language, speaker=f"stamps-{language}", left_out=found.left_out
        )
