"""Voices: networks that speak, with their roles: VITS, and SpeechT5 and FastSpeech2Conformer with a vocoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import GraftError, unknown
from domains.speech.backbones._weights import from_source
from domains.speech.voices._fastspeech2 import load_fastspeech2
from domains.speech.voices._huggingface import load_folder
from domains.speech.voices._mel_voice import ADVICE, MelVoice, say
from domains.speech.voices._speecht5 import load_speecht5
from domains.speech.voices._starters import STARTERS, build_starter
from domains.speech.voices._symbols import Letters, Phonemes, Symbols, pieces
from domains.speech.voices._vits import expand, log_durations
from domains.speech.voices._voice import Prior, Voice, frames_of, read, synthesize

__all__ = [
    "Letters",
    "MelVoice",
    "Phonemes",
    "Prior",
    "Symbols",
    "Voice",
    "build_mel_voice",
    "build_voice",
    "expand",
    "frames_of",
    "log_durations",
    "pieces",
    "read",
    "say",
    "synthesize",
]


_MEL_KINDS = {"speecht5": "SpeechT5ForTextToSpeech", "fastspeech2_conformer": "FastSpeech2ConformerModel"}


def build_voice(name: str, *, pretrained: bool = True, weights: str | None = None, posterior: bool = False) -> Voice:
    """Build a voice.

    Args:
        name: `piper-joe-medium`; or a local folder or hub name (`OWNER/NAME`) of a VITS of one speaker of transformers,
            such as `facebook/mms-tts-eng`.
        pretrained: Load weights; False gives random ones.
        weights: A local file with the weights of the named starter.
        posterior: Keep the posterior encoder, which training may need and no synthesis runs.

    Raises:
        GraftError: An unknown name, or weights that cannot be had or do not fit.
    """
    if weights is not None and not pretrained:
        raise GraftError(f"'weights' is {weights} and pretrained is false. Leave one of them out.")
    if name in STARTERS:
        return build_starter(name, pretrained=pretrained, weights=weights, posterior=posterior)
    if weights is not None:
        raise GraftError(
            f"'{name}' brings its own weights. Leave out 'weights', or name one of: {', '.join(STARTERS)}."
        )
    if Path(name).is_dir() or name.count("/") == 1:
        return load_folder(name, pretrained=pretrained, posterior=posterior)
    raise unknown("voice", name, (*STARTERS, "FOLDER", "OWNER/NAME"))


def build_mel_voice(name: str, vocoder: str, *, pretrained: bool = True) -> MelVoice:
    """Build a voice that speaks by way of a mel spectrogram and a vocoder.

    Args:
        name: A local folder or hub name (`OWNER/NAME`) of a `SpeechT5ForTextToSpeech` of transformers, such as
            `microsoft/speecht5_tts`, or of a `FastSpeech2ConformerModel`, such as `espnet/fastspeech2_conformer`.
        vocoder: The same of its vocoder, such as `microsoft/speecht5_hifigan` or
            `espnet/fastspeech2_conformer_hifigan`.
        pretrained: Load the network's weights; False gives random ones.

    Raises:
        GraftError: One of them cannot be had, is something else, or they do not fit each other.
    """
    from transformers import AutoConfig

    config: Any = from_source(name, AutoConfig, advice=ADVICE)
    kind = (getattr(config, "architectures", None) or [_MEL_KINDS.get(config.model_type, config.model_type)])[0]
    if kind == "SpeechT5ForTextToSpeech":
        return load_speecht5(name, vocoder, pretrained=pretrained)
    if kind == "FastSpeech2ConformerModel":
        return load_fastspeech2(name, vocoder, pretrained=pretrained)
    raise GraftError(f"'{name}' is a {kind}. Give a {' or a '.join(_MEL_KINDS.values())}.")
