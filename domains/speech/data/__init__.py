"""Speech sets: out of installed packages, the user's own, and published corpora on disk."""

from __future__ import annotations

from domains.speech.data._records import Record, SpeechBatch, SpeechFacts
from domains.speech.data.base import SpeechData
from domains.speech.data.layouts import FLEURS, CommonVoice, LibriSpeech
from domains.speech.data.own import AudioFolder, LabelledAudio, Manifest
from domains.speech.data.prompts import AsteriskWords, LibriVoxClips
from domains.speech.data.stamps import StampSpeech

__all__ = [
    "FLEURS",
    "AsteriskWords",
    "AudioFolder",
    "CommonVoice",
    "LabelledAudio",
    "LibriSpeech",
    "LibriVoxClips",
    "Manifest",
    "Record",
    "SpeechBatch",
    "SpeechData",
    "SpeechFacts",
    "StampSpeech",
]
