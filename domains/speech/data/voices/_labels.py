"""Transcripts out of the suite's own recogniser, with figures that tell how far each can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domains.speech._text import normalize
from domains.speech._windows import padded
from domains.speech.backbones import SpeechBackbone, build, decode, encode, generate

RECOGNISER = "whisper-tiny-en"
SECONDS = 30.0
"""Longest clip that is labelled: what the recogniser reads at a time."""

_BEAMS = 3
_SURE, _LOST = -0.12, -0.6  # confidences above and below which a second search would not change what is made of a text
_TOKENS = 12  # most that are spoken in a second, and a few more for a clip of any length


@dataclass(frozen=True, kw_only=True)
class PseudoLabel:
    """What a recogniser heard in a clip.

    Attributes:
        text: What greedy search wrote, with the recogniser's capitals and signs.
        confidence: Mean natural logarithm of the probability of its tokens, the end included; 0 is certain.
        agreed: Whether beam search wrote the same words. It is asked where the confidence is between -0.6 and -0.12;
            above it counts as agreed, below as not.
    """

    text: str
    confidence: float
    agreed: bool


Labeller = Callable[[Tensor], PseudoLabel]
"""Labels one clip, float32 (T,) at 16 kHz."""


def labeller(built: SpeechBackbone | None = None) -> Labeller:
    """Make a labeller that hears each clip at the recogniser's whole context.

    Args:
        built: A recogniser of kind `seq2seq` for English; None builds `whisper-tiny-en`.
    """
    recogniser = build(RECOGNISER) if built is None else built
    recogniser.model.eval()
    return lambda audio: _label(recogniser, audio)


@torch.inference_mode()
def _label(built: SpeechBackbone, audio: Tensor) -> PseudoLabel:
    features, _ = encode(built, built.model, *padded([audio]), full_context=True)
    most = round(_TOKENS * (1 + len(audio) / built.rate))
    ids = generate(built, built.model, features, max_tokens=most)[0]
    text, confidence = _text(built, ids), _confidence(built, features, ids)
    agreed = confidence > _SURE
    if _LOST <= confidence <= _SURE:
        other = _text(built, generate(built, built.model, features, beams=_BEAMS, max_tokens=most)[0])
        agreed = normalize(text, "english") == normalize(other, "english")
    return PseudoLabel(text=text, confidence=confidence, agreed=agreed)


def _text(built: SpeechBackbone, ids: Sequence[int]) -> str:
    return "" if built.tokens is None else built.tokens.decode(ids).strip()


def _confidence(built: SpeechBackbone, features: Tensor, ids: Sequence[int]) -> float:
    """Return the mean log-probability of a text's ids and its end, given the audio's features (1, F, width)."""
    if built.tokens is None or built.tokens.eos is None:
        return float("-inf")
    start = list(built.tokens.start())
    wanted = torch.tensor([*ids, built.tokens.eos])
    logits = decode(built, built.model, features, torch.tensor([[*start, *ids]]))[0, len(start) - 1 :]
    return float(logits.float().log_softmax(dim=-1).gather(1, wanted[:, None]).mean())
