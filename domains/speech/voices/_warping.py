"""Durations of a recording's symbols by warping it onto the voice's own speech of the same text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from domains.speech.backbones._backbone import bare
from domains.speech.voices._alignment import warp, warped_durations
from domains.speech.voices._spectrum import log_mel, magnitudes
from domains.speech.voices._vits import log_durations
from domains.speech.voices._voice import Voice, frames_of, read, synthesize

_CEPSTRA = 13


def warp_recording(voice: Voice, model: nn.Module, ids: Tensor, audio: Tensor) -> Tensor:
    """Align a recording to its text.

    The voice says the text at its predicted durations without noise, and they follow the recording; see `follow`.

    Args:
        voice: The voice.
        model: Its network, as it came.
        ids: (L,).
        audio: The recording, (T,) at `voice.rate`.

    Returns:
        Frames of each symbol in the recording, int64 (L,), which sum up to the recording's.
    """
    with torch.no_grad():
        prior = read(model, ids[None], torch.tensor([len(ids)], device=ids.device))
        logs = log_durations(bare(model), prior.hidden, prior.mask, None)
        frames = frames_of(logs, prior.mask)[0].long()
        said = synthesize(voice, model, ids, durations=frames, noise=0.0)
    return follow(frames, _bands(voice, said), _bands(voice, audio))


def follow(durations: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Carry the durations of symbols over to another saying of the same text.

    Mel-cepstra of both, without the loudness and each with mean 0 and deviation 1 within the clip, are warped onto each
    other, and the durations go along.

    Args:
        durations: Frames of each symbol in `own`, int64 (L,).
        own: Log-mel bands (F, C), F the sum of the durations.
        other: The same of the other saying, (G, C).

    Returns:
        Frames of each symbol in `other`, int64 (L,), which sum up to G.
    """
    boundaries = warp(_cepstra(own), _cepstra(other))
    return torch.from_numpy(warped_durations(durations.cpu().numpy(), boundaries))


def _bands(voice: Voice, audio: Tensor) -> Tensor:
    """Return log-mel bands (F, C) of whole frames."""
    whole = audio[None, : len(audio) // voice.hop * voice.hop].detach().cpu().float()
    return log_mel(magnitudes(whole, 4 * voice.hop, voice.hop), voice.rate)[0].T


def _cepstra(bands: Tensor) -> np.ndarray:
    """Return standardised mel-cepstra (F, 13) without the loudness."""
    from scipy.fft import dct

    cepstra = dct(bands.detach().cpu().numpy().astype(np.float64), norm="ortho", axis=1)[:, 1 : _CEPSTRA + 1]
    return (cepstra - cepstra.mean(0)) / (cepstra.std(0) + 1e-6)
