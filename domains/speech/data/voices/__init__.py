"""Voice sets: recordings of one speaker with what is said, cleaned and checked."""

from __future__ import annotations

from domains.speech.data.voices._quality import Limits, Quality
from domains.speech.data.voices._records import VoiceBatch, VoiceFacts, VoiceRecord
from domains.speech.data.voices.asterisk import AsteriskVoice
from domains.speech.data.voices.base import VoiceData
from domains.speech.data.voices.manifest import VoiceManifest
from domains.speech.data.voices.stamps import StampVoice

__all__ = [
    "AsteriskVoice",
    "Limits",
    "Quality",
    "StampVoice",
    "VoiceBatch",
    "VoiceData",
    "VoiceFacts",
    "VoiceManifest",
    "VoiceRecord",
]
