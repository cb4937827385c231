"""Whether generated speech is understood: the word error rate of a recogniser that no adaptation has touched."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from domains.speech._audio import RATE, resample
from domains.speech._text import normalize
from domains.speech._windows import is_silent, padded, pieces_of
from domains.speech.backbones import SpeechBackbone, build, encode, generate
from domains.speech.metrics import align

RECOGNISER = "whisper-tiny-en"
NORMALIZER = "english"


@functools.cache
def recogniser(name: str = RECOGNISER) -> SpeechBackbone:
    """Build a recogniser as it came, once.

    Args:
        name: `whisper-tiny-en`, or a Whisper by hub name or folder.
    """
    built = build(name)
    built.model.eval()
    return built


@torch.inference_mode()
def heard(audio: Tensor, rate: int, *, name: str = RECOGNISER, language: str = "") -> str:
    """Return what a recogniser hears in a clip of any length, at its whole context and greedily.

    In a shorter context than it was trained with an unadapted Whisper writes in loops.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        name: See `recogniser`.
        language: Language of the audio, for a recogniser of many.
    """
    built = recogniser(name)
    samples = resample(audio.detach().cpu().float(), rate, RATE).clamp(-1.0, 1.0)
    said = []
    for piece in pieces_of(samples, RATE, built.context or 30.0):
        part = samples[piece.start : piece.end]
        if is_silent(part) or built.tokens is None:
            continue
        features, _ = encode(built, built.model, *padded([part]), full_context=True)
        said += [built.tokens.decode(ids) for ids in generate(built, built.model, features, language=language)]
    return " ".join(" ".join(said).split())


def word_errors(texts: Sequence[str], hypotheses: Sequence[str], normalizer: str = NORMALIZER) -> list[tuple[int, int]]:
    """Return for each text how many words were heard wrongly, and how many it has, both normalised.

    Args:
        texts: What was to be said.
        hypotheses: What was heard.
        normalizer: See `domains.speech._text.normalize`.
    """
    found = [align(normalize(t, normalizer), normalize(h, normalizer)) for t, h in zip(texts, hypotheses, strict=True)]
    return [(one.errors, one.words) for one in found]
