"""How near a generated voice is to a real one: spectra, pitch, duration, words, and who seems to speak."""

from __future__ import annotations

from domains.speech._pitch import median_pitch, pitch
from domains.speech.voice_metrics._acoustics import Acoustics, acoustics
from domains.speech.voice_metrics._cepstra import frame_distortion, mel_cepstra
from domains.speech.voice_metrics._dtw import warp
from domains.speech.voice_metrics._score import CHEAP, PARTS, Part, intervals, score, score_rows, summary
from domains.speech.voice_metrics._speaker import (
    SpeakerEncoder,
    speaker_encoder,
    speaker_levels,
    spectrum_distance,
)
from domains.speech.voice_metrics._words import NORMALIZER, heard, word_errors

__all__ = [
    "CHEAP",
    "NORMALIZER",
    "PARTS",
    "Acoustics",
    "Part",
    "SpeakerEncoder",
    "acoustics",
    "frame_distortion",
    "heard",
    "intervals",
    "median_pitch",
    "mel_cepstra",
    "pitch",
    "score",
    "score_rows",
    "speaker_encoder",
    "speaker_levels",
    "spectrum_distance",
    "summary",
    "warp",
    "word_errors",
]
